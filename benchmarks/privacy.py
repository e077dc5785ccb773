"""What a sidecar tells of its samples, and what some of its samples tell of it.

    python benchmarks/privacy.py CHECKPOINT DATA [--samples 1,8,64,128] [--json FILE]

Every row is measured by itself, once. Sidecars are then means over rows drawn at random, as ``compute`` makes them, and who
has the checkpoint tries to tell the rows in them from others: by the bound that ``verify`` uses, by a correlation, and by
solving for all rows at once. And ``verify --recompute K`` is put to sidecars that were altered.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy.optimize import nnls
from scipy.stats import rankdata
from torch import Tensor

from fisher_mask_mergekit import measure_mask
from fisher_mask_mergekit.batches import Limit, padded_batches
from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.remeasure import refuted, rounding
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sites import NodeKey
from fisher_mask_mergekit.skeleton import sites_in

Vectors = dict[NodeKey, Tensor]
"""By site and kind of node, ``[rows, nodes]``, or ``[nodes]`` of a sidecar; float64."""

RESAMPLES = 1000
LOUDEST = 0.1
"""The share of rows that have the largest gradients, looked at by themselves."""

SLACK = rounding("float32")
CAUGHT_AFTER = (1 / 16, 1 / 4, 1 / 2, 15 / 16, 1)
"""K / N of the second table."""


def measure_rows(checkpoint: Path, settings: FisherSettings) -> Vectors:
    """Every row's own Fisher information, in the order drawn."""
    job = prepare(str(checkpoint), settings, force=True)
    assert job.inputs is not None
    model, _ = measure_mask.load(job, job.inputs)
    rows = [
        mask_fisher(model, [batch], sites_in(model), job.task).fisher
        for batch in padded_batches(
            job.inputs.encoded,
            job.inputs.tokenizer,
            limits=Limit(rows=1),
            by_length=False,
            device=torch.device("cpu"),
        )
    ]
    # Key-value heads that are the heads would count twice.
    keys = [key for site in job.sites for key in rows[0] if key[0] == site.output]
    wanted = [key for key in keys if key[1] != "kv_head_fisher"]
    return {key: torch.stack([row[key].flatten() for row in rows]) for key in wanted}


def sidecar_of(rows: Vectors, chosen: Any) -> Vectors:
    """The mean over some rows, as a sidecar keeps it."""
    return {key: vector[chosen].mean(0).float().double() for key, vector in rows.items()}


def together(vectors: Vectors) -> Tensor:
    """All nodes in one."""
    return torch.cat(list(vectors.values()), -1)


def is_refuted(stored: Vectors, again: Vectors, share: float) -> bool:
    """Whether ``verify`` says that the one cannot be, given the other."""
    return any(bool(refuted(stored[key], again[key], share, SLACK).any()) for key in stored)


def attack(rows: Vectors, count: int, reference: int, outside: int, trials: int) -> dict[str, Any]:
    """Sidecars of N rows, and how well their rows can be told from others.

    Args:
        rows: All rows.
        count: N.
        reference: How many other rows the attacker has to know what is usual.
        outside: How many rows that were not measured are to be told from the N.
        trials: How many sidecars.
    """
    everything = together(rows)
    found = []
    for trial in range(trials):
        order = numpy.random.default_rng(trial).permutation(len(everything))
        inside, usual = order[:count], order[count : count + reference]
        candidates = numpy.concatenate([inside, order[count + reference :][:outside]])
        sidecar = sidecar_of(rows, inside)
        stored, tried = together(sidecar), everything[candidates]
        known = everything[usual]
        scale = known.mean(0)
        loudness = (known / scale).mean(1).quantile(1 - LOUDEST)
        absent = [
            is_refuted(sidecar, {key: vector[row] for key, vector in rows.items()}, 1 / count)
            for row in candidates
        ]
        found.append(
            {
                "inside": numpy.arange(len(candidates)) < count,
                "loud": ((tried / scale).mean(1) > loudness).numpy(),
                "absent": numpy.array(absent),
                "bound": -(tried / stored).amax(1).numpy(),
                "correlation": _correlation(tried, stored, known),
                "all rows known": _weights(tried / scale / count, stored / scale),
            }
        )
    return {
        "samples": count,
        "auc": {name: _interval(found, _auc(name)) for name in ("bound", "correlation", "all rows known")},
        "auc_loudest": {name: _interval(found, _auc(name, "loud")) for name in ("bound", "correlation")},
        "proven_absent": _interval(found, _absent()),
        "proven_absent_loudest": _interval(found, _absent("loud")),
        "wrongly_proven_absent": int(sum((one["absent"] & one["inside"]).sum() for one in found)),
    }


def _correlation(tried: Tensor, stored: Tensor, known: Tensor) -> Any:
    """Cosine of each candidate and the sidecar, of what is unlike the known rows in them."""
    scale = known.std(0)
    basis = torch.linalg.qr((known / scale / (known / scale).norm(dim=1, keepdim=True)).T)[0]
    apart = [part - part @ basis @ basis.T for part in (tried / scale, (stored / scale)[None])]
    return torch.nn.functional.cosine_similarity(*apart).numpy()


def _weights(tried: Tensor, stored: Tensor) -> Any:
    """How much of each candidate is in the sidecar, solved for all of them at once; none less than nothing."""
    return nnls(tried.T.numpy(), stored.numpy(), maxiter=100 * len(tried))[0]


def _auc(name: str, among: str | None = None) -> Callable[[list[Any]], float]:
    """The share of pairs, one row inside and one outside, in which the one inside has the higher score."""

    def score(found: list[Any]) -> float:
        chosen = [one[among] if among else numpy.ones_like(one["inside"]) for one in found]
        inside = numpy.concatenate([one["inside"][use] for one, use in zip(found, chosen, strict=True)])
        ranks = rankdata(numpy.concatenate([one[name][use] for one, use in zip(found, chosen, strict=True)]))
        ones, zeros = int(inside.sum()), int((~inside).sum())
        if not ones or not zeros:
            return math.nan
        return float((ranks[inside].sum() - ones * (ones + 1) / 2) / (ones * zeros))

    return score


def _absent(among: str | None = None) -> Callable[[list[Any]], float]:
    """The share of rows outside that are proven to be outside."""

    def score(found: list[Any]) -> float:
        kept = [one["absent"][~one["inside"] & (one[among] if among else True)] for one in found]
        outside = numpy.concatenate(kept)
        return float(outside.mean()) if len(outside) else math.nan

    return score


def _interval(found: list[Any], score: Callable[[list[Any]], float]) -> dict[str, float] | None:
    """A score, and its 95 % interval over resamples of the sidecars; None where it is not defined."""
    generator = numpy.random.default_rng(0)
    draws = [
        score([found[index] for index in generator.integers(len(found), size=len(found))])
        for _ in range(RESAMPLES)
    ]
    value = score(found)
    if math.isnan(value):
        return None
    low, high = numpy.nanpercentile(draws, [2.5, 97.5])
    return {"value": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def alterations(rows: Vectors, others: Any, stored: Vectors, seed: int) -> Iterator[tuple[str, Vectors]]:
    """Sidecars that do not say what was measured."""
    generator = numpy.random.default_rng(seed)
    heads = [key for key in stored if key[1] == "head_fisher"]
    key = heads[generator.integers(len(heads))]
    one, two = generator.choice(len(stored[key]), 2, replace=False).tolist()

    def altered(change: Mapping[int, Tensor]) -> Vectors:
        vector = stored[key].clone()
        for place, value in change.items():
            vector[place] = value
        return stored | {key: vector}

    yield "of other rows", sidecar_of(rows, others)
    yield "all numbers / 1.5", {key: vector / 1.5 for key, vector in stored.items()}
    yield "all numbers x 1.5", {key: vector * 1.5 for key, vector in stored.items()}
    yield "one head / 1.5", altered({one: stored[key][one] / 1.5})
    yield "one head x 1.5", altered({one: stored[key][one] * 1.5})
    yield "two heads swapped", altered({one: stored[key][two], two: stored[key][one]})
    yield "not altered", stored


def caught(rows: Vectors, count: int, trials: int) -> dict[str, dict[str, float]]:
    """By alteration, then by K, the share of altered sidecars that K of their N samples refute."""
    found: dict[str, dict[str, float]] = {}
    for trial in range(trials):
        order = numpy.random.default_rng(trial).permutation(len(together(rows)))
        stored = sidecar_of(rows, order[:count])
        for name, made in alterations(rows, order[count : 2 * count], stored, trial):
            for share in CAUGHT_AFTER:
                few = max(1, int(share * count))
                hit = is_refuted(made, sidecar_of(rows, order[:few]), few / count)
                line = found.setdefault(name, {})
                line[str(few)] = line.get(str(few), 0) + hit / trials
    return found


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title."""
    head = [
        "N",
        "bound",
        "correlation",
        "all rows known",
        "bound, loudest tenth",
        "proven absent",
        "proven absent, loudest tenth",
    ]
    lines = [head]
    for one in record["attacks"]:
        shown = (
            *one["auc"].values(), one["auc_loudest"]["bound"], one["proven_absent"], one["proven_absent_loudest"]
        )  # fmt: skip
        lines.append([str(one["samples"]), *map(_shown, shown)])
    numbers = list(next(iter(record["caught"].values())))
    altered = [["altered", *(f"K = {number}" for number in numbers)]]
    altered += [
        [name, *(f"{100 * share:.0f} %" for share in by.values())] for name, by in record["caught"].items()
    ]
    return {
        "Telling rows that were measured from rows that were not": aligned(lines),
        f"Sidecars of {numbers[-1]} samples that K of them refute": aligned(altered),
    }


def _shown(number: Mapping[str, float] | None) -> str:
    return "" if number is None else f"{number['value']:.2f} [{number['low']:.2f}, {number['high']:.2f}]"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--text", help="the text column, if not told by its name")
    parser.add_argument("--samples", default="1,8,64,128", help="N, several with commas between")
    parser.add_argument("--reference", type=int, default=200, help="other rows that the attacker has")
    parser.add_argument("--outside", type=int, default=128, help="rows to be told from those inside")
    parser.add_argument("--trials", type=int, default=20, help="sidecars of each N")
    parser.add_argument("--json", type=Path, default=Path("privacy.json"))
    given = parser.parse_args()
    counts = [int(part) for part in given.samples.split(",")]
    settings = FisherSettings(
        data=str(given.data), text=given.text, samples=max(counts) + given.reference + given.outside
    )
    rows = measure_rows(given.checkpoint, settings)
    record = {
        "checkpoint": given.checkpoint.name,
        "data": f"{given.data.parent.name}/{given.data.name}",
        "rows": len(together(rows)),
        "nodes": together(rows).shape[1],
        "reference": given.reference,
        "outside": given.outside,
        "trials": given.trials,
        "dtype": settings.dtype,
        "device": "cpu",
        "versions": {name: version(name) for name in ("fisher-mask-mergekit", "torch", "transformers")},
        "attacks": [attack(rows, count, given.reference, given.outside, given.trials) for count in counts],
        "caught": caught(rows, max(counts), given.trials),
    }
    given.json.write_text(json.dumps(record) + "\n")
    for title, table in markdown(record).items():
        print(f"{title}:\n\n{table}\n")


if __name__ == "__main__":
    main()
