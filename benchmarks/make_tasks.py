"""More tasks out of text at hand: two data sets whose labels follow from that text.

    python benchmarks/make_tasks.py DATA OUT

``DATA`` has folders ``banking77`` and ``mnli_subset``, as ``fine_tune.py`` reads them; ``OUT`` gets two more. ``same_intent``:
whether two queries of BANKING77 ask for the same, half of the pairs do. ``word_order``: whether two neighbouring words of
a MultiNLI hypothesis were exchanged, half of them have been; one of the probes of arXiv 1805.01070. Training rows come
from training rows, validation rows from validation rows; the same every time.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SIZES = {"train": 8000, "validation": 1000}
"""Rows to make."""


def same_intent(rows: Sequence[Row], count: int, draw: random.Random) -> Iterator[Row]:
    """Pairs of queries."""
    by_label: dict[int, list[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["sentence1"])
    labels = sorted(label for label, texts in by_label.items() if len(texts) > 1)
    for number in range(count):
        if number % 2:
            first, second = draw.sample(by_label[draw.choice(labels)], 2)
        else:
            first, second = (draw.choice(by_label[label]) for label in draw.sample(labels, 2))
        yield {"sentence1": first, "sentence2": second, "label": number % 2}


def word_order(rows: Sequence[Row], count: int, draw: random.Random) -> Iterator[Row]:
    """Sentences of five words and more."""
    texts = sorted({row["sentence2"] for row in rows if len(row["sentence2"].split()) >= 5})
    for number, text in enumerate(draw.sample(texts, count)):
        words = text.split()
        if number % 2:
            pairs = enumerate(pairwise(words))
            unlike = [place for place, (one, other) in pairs if one.lower() != other.lower()]
            place = draw.choice(unlike[:-1] or unlike)  # A full stop would show the last.
            words[place : place + 2] = reversed(words[place : place + 2])
        yield {"sentence1": " ".join(words), "label": number % 2}


TASKS = {
    "same_intent": ("banking77", same_intent, ["different", "same"]),
    "word_order": ("mnli_subset", word_order, ["intact", "exchanged"]),
}
"""By name: the text's folder, how rows are made of it, and what the labels are called."""


def read(file: Path) -> list[Row]:
    """All rows."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    for name, (source, make, labels) in TASKS.items():
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "labels.json").write_text(json.dumps(labels))
        for split, count in SIZES.items():
            made = make(read(options.data / source / f"{split}.jsonl"), count, random.Random(split))
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in made))


if __name__ == "__main__":
    main()
