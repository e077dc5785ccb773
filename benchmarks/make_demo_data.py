"""Make the data files bundled with the demo from the full banking77 and clinc150.

    python benchmarks/make_demo_data.py SOURCE [--out FOLDER]

SOURCE holds ``banking77/`` and ``clinc150/``, each with ``train.jsonl``, ``validation.jsonl`` (fields
``sentence1`` and ``label``, an index) and ``labels.json`` (the labels' names).

The selection, everything drawn with seed 0, nothing chosen by hand or by any model's result:

1. of the labels that have enough rows in both files, as many as wanted;
2. of each label, the wanted number of rows from either file, without duplicates; a text that stands in both
   files is left out of train;
3. rows shuffled, texts unchanged, fields renamed to ``text`` and ``label``, and the label written as a name.

Sources and licences are in NOTICE.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy

DATA = Path(__file__).parent.parent / "fisher_mask_mergekit" / "demo" / "data"
SEED = 0


@dataclass(frozen=True)
class Wanted:
    """How much of a data set: labels, and rows per label for training and held out."""

    name: str
    labels: int
    train: int
    held_out: int


SETS = (Wanted("banking77", 20, 80, 24), Wanted("clinc150", 30, 80, 20))


def by_label(file: Path, names: list[str]) -> dict[str, list[str]]:
    """Label name to its texts, each once, in the file's order."""
    texts: dict[str, dict[str, None]] = {name: {} for name in names}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts[names[row["label"]]][row["sentence1"]] = None
    return {name: list(found) for name, found in texts.items()}


def select(source: Path, wanted: Wanted, out: Path) -> None:
    """Write the two files of one data set."""
    folder = source / wanted.name
    names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    held_out = by_label(folder / "validation.jsonl", names)
    known = {text for texts in held_out.values() for text in texts}
    train = {
        name: [text for text in texts if text not in known]
        for name, texts in by_label(folder / "train.jsonl", names).items()
    }
    generator = numpy.random.default_rng(SEED)
    enough = [
        name for name in names if len(train[name]) >= wanted.train and len(held_out[name]) >= wanted.held_out
    ]
    chosen = sorted(generator.choice(enough, wanted.labels, replace=False).tolist())
    for part, pool, count in (("train", train, wanted.train), ("held_out", held_out, wanted.held_out)):
        rows = [
            {"text": text, "label": name}
            for name in chosen
            for text in generator.choice(pool[name], count, replace=False).tolist()
        ]
        shuffled = [rows[index] for index in generator.permutation(len(rows))]
        file = out / f"{wanted.name}_{part}.jsonl"
        file.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shuffled), encoding="utf-8"
        )
        print(f"{file.name}: {len(rows)} rows, {len(chosen)} labels, {file.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="Folder with banking77/ and clinc150/.")
    parser.add_argument("--out", type=Path, default=DATA, help="Where to write.")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for wanted in SETS:
        select(given.source, wanted, given.out)


if __name__ == "__main__":
    main()
