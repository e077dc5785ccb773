"""What is measured as lines of a table: ratios of neighbours in time, beside what they should be."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 2**20
GOAL = 57
"""How many times as long one-sample-at-a-time full Fisher should take on an H200, for BERT-base at 128 samples."""


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: What is measured, for programs.
        title: The same, for people.
        values: Of every repeat, in ``unit``; the median counts.
        detail: How it was measured.
        unit: ``x`` for a ratio, ``ms`` or ``s``; empty for a bare number.
        target: The most it should be, if there is such a target; the least, if ``at_least``.
        at_least: Whether more is better.
    """

    name: str
    title: str
    values: Sequence[float]
    detail: str
    unit: str = "x"
    target: float | None = None
    at_least: bool = False

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def aim(self) -> str:
        """The target; empty if there is none."""
        return "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty if there is none."""
        if self.target is None:
            return ""
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return "met" if met else "falls short"

    @property
    def shown(self) -> str:
        """The value, its range and its unit."""
        ends = f" [{_short(min(self.values))}, {_short(max(self.values))}]" if len(self.values) > 1 else ""
        return f"{_short(self.value)}{ends}{' ' * (self.unit not in ('', 'x'))}{self.unit.strip('x')}"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        own = {name: value for name, value in vars(self).items() if name != "values"}
        return own | {"value": self.value, "values": list(self.values), "verdict": self.verdict}


def from_record(record: Mapping[str, Any]) -> Row:
    """What :meth:`Row.record` gave."""
    return Row(**{name: value for name, value in record.items() if name not in ("value", "verdict")})


def _short(value: float) -> str:
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    digits = next((count for limit, count in ((10, 3), (100, 2), (1000, 1)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f}"


def _median(values: Sequence[float]) -> str:
    return _short(statistics.median(values))


def ratios_of(tops: Sequence[float], bottoms: Sequence[float]) -> list[float]:
    """Ratios of runs that were neighbours in time."""
    return [top / bottom for top, bottom in zip(tops, bottoms, strict=False)]


def pre_pass_rows(timed: Mapping[str, Any]) -> list[Row]:
    """The pre-pass, of either kind, against the least that one backward pass takes; and against one gradient per batch."""
    rows = []
    for name, title, way, other, target in (
        ("pre_pass_over_lower_bound", "pre-pass / lower bound, time", "pre_pass", "lower_bound", 1.05),
        ("unchecked_over_lower_bound", "the same, its check for randomness excepted", "unchecked", "lower_bound", 1.05),
        ("recompute_over_lower_bound", "--recompute / lower bound, time", "recompute", "lower_bound", 1.5),
        ("factored_over_pre_pass", "kind factored / pre-pass, time", "factored", "pre_pass", 1.15),
        ("factored_over_lower_bound", "kind factored / lower bound, time", "factored", "lower_bound", 1.2),
        ("by_token_over_pre_pass", "kind factored, estimator token / pre-pass, time", "by_token", "pre_pass", 1.15),
        ("by_token_over_lower_bound", "kind factored, estimator token / lower bound, time", "by_token", "lower_bound", 1.2),
        ("pre_pass_over_batch_gradients", "pre-pass / estimator batch, time", "pre_pass", "batch_gradients", 1.0),
    ):  # fmt: skip
        top, bottom = timed["seconds"][way], timed["seconds"][other]
        processor = ratios_of(top["processor"], bottom["processor"])
        seconds = " and ".join(_median(one["wall"]) for one in (top, bottom))
        detail = f"{seconds} s; by processor time {_median(processor)}; {len(timed['batches'])} batch(es)"
        rows.append(Row(name, title, ratios_of(top["wall"], bottom["wall"]), detail, target=target))
    return rows


def full_fisher_rows(timed: Mapping[str, Any], shape: str) -> list[Row]:
    """How many times as long other ways take as the pre-pass."""
    rows = []
    for name, title in (
        ("exact_full_fisher", "full Fisher, exact expectation, one sample at a time / pre-pass, time"),
        ("full_fisher", "full Fisher, data's labels, one sample at a time / pre-pass, time"),
        ("exact_diagonal", "full Fisher, exact expectation, in batches / pre-pass, time"),
        ("diagonal", "full Fisher, data's labels, in batches / pre-pass, time"),
        ("explicit_masks", "explicit masks, one sample at a time / pre-pass, time"),
    ):
        way, pre_pass = timed["seconds"][name], timed["seconds"]["pre_pass"]
        times = [
            ratios_of([used / way["share"] for used in way[clock]], pre_pass[clock])
            for clock in ("wall", "processor")
        ]
        scaled = "" if way["share"] == 1 else f", scaled from {100 * way['share']:.0f} % of the tokens"
        labels = f"; {timed['labels']} labels" if name.startswith("exact") else ""
        detail = f"{_median(way['wall'])} s{scaled}{labels}; by processor time {_median(times[1])}"
        is_goal = name == "exact_full_fisher" and shape == "base" and timed["device"] != "cpu"
        target = GOAL if is_goal else None
        rows.append(Row(f"{name}_over_pre_pass", title, times[0], detail, target=target, at_least=is_goal))
    gap = Row(
        "disagreement_with_explicit_masks",
        "explicit masks and pre-pass, largest difference of the values",
        [timed["disagreement"]],
        f"relative to the largest value of the site; {timed['dtype']} weights",
        unit="",
        target=1e-3,
    )
    return [*rows, gap]


def memory_rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Peak memory of the pre-pass, of kind factored and of the full diagonal, against that of the lower bound."""
    of = "device memory" if runs["pre_pass"][0]["of"] == "device" else "resident set"
    rows = []
    for way, name, title, without, target in (
        ("pre_pass", "memory", "pre-pass / lower bound, peak memory", 0, 1.05),
        ("pre_pass", "memory_beyond_model", "the same, beyond what the loaded model takes", 1, None),
        ("recompute", "memory_beyond_model", "--recompute / lower bound, beyond the model", 1, None),
        ("factored", "memory", "kind factored / lower bound, peak memory", 0, 1.05),
        ("factored", "memory_beyond_model", "kind factored / lower bound, beyond the model", 1, None),
        ("diagonal", "memory", "full Fisher in batches / lower bound, peak memory", 0, None),
    ):
        # At least a byte: on an idle high-water mark nothing is added.
        used = [
            [max(1, run["peak"] - without * run["before"]) for run in runs[one]]
            for one in (way, "lower_bound")
        ]
        medians = " and ".join(f"{statistics.median(values) / MIB:,.0f}" for values in used)
        detail = f"{medians} MiB, {of}"
        rows.append(Row(f"{way}_{name}_over_lower_bound", title, ratios_of(*used), detail, target=target))
    return rows


def merge_rows(
    runs: Mapping[str, Mapping[str, Sequence[float]]], count: int, size: int, largest: int, factored: int
) -> list[Row]:
    """``mergekit-yaml`` with this package's methods against stock mergekit's ``linear``.

    Args:
        runs: As ``processes.merge_runs`` gives them.
        count: Models.
        size: Bytes of each.
        largest: Bytes of its largest tensor.
        factored: Bytes of its sidecar of rows and columns.
    """
    limit = 1.05 if size >= 1e9 else None  # What starting takes weighs more in a small one.
    rows = []
    for method in (one for one in runs if one != "linear"):
        target = None if method == "fisher_diagonal" else limit
        shown = method.replace("nodes_all", "nodes: all")
        for name, title, aim, unit, scale in (
            ("seconds", f"{shown} / linear, time", target, "s", 1),
            ("seconds_once_imported", f"{shown} / linear, time once everything is imported", None, "s", 1),
            ("peak", f"{shown} / linear, peak memory", target, "MiB", MIB),
        ):
            used = [runs[one][name] for one in (method, "linear")]
            medians = " and ".join(_short(statistics.median(values) / scale) for values in used)
            detail = f"{medians} {unit}"
            if name == "seconds":
                processor = ratios_of(*(runs[one]["processor"] for one in (method, "linear")))
                detail += f"; by processor time {_median(processor)}"
            rows.append(
                Row(f"merge_{method}_{name}_over_linear", title, ratios_of(*used), detail, target=aim)
            )
    if "fisher_diagonal" in runs:
        beyond = [
            (top - bottom) / (count * largest)
            for top, bottom in zip(runs["fisher_diagonal"]["peak"], runs["linear"]["peak"], strict=True)
        ]
        title = "the same, beyond linear's, in largest tensors of each input"
        detail = f"the largest has {largest / MIB:,.0f} MiB; what is mapped from files is counted"
        rows.append(Row("merge_fisher_diagonal_peak_beyond", title, beyond, detail, target=1.0))
    if "nodes_all" in runs:
        title, detail = "sidecar of kind factored / checkpoint, size", f"{factored:,} and {size:,} bytes"
        rows.append(Row("factored_sidecar_over_checkpoint", title, [factored / size], detail, target=0.01))
    return rows


def start_rows(
    imports: Mapping[str, Sequence[Sequence[float]]], command: Mapping[str, Sequence[float]]
) -> list[Row]:
    """What the plug-in adds to ``import torch``, and what the command takes to say how it is used."""
    on, off = [run[0] for run in imports["on"]], [run[0] for run in imports["off"]]
    search, own = [run[1] for run in imports["off"]], [run[2] for run in imports["off"]]
    longer = [one - other for one, other in zip(on, off, strict=True)]
    return [
        Row(
            "import_torch_milliseconds",
            "import torch, longer than with TORCH_DEVICE_BACKEND_AUTOLOAD=0, run by run",
            longer,
            f"medians of {len(on)}: {_median(on)} and {_median(off)} ms, fastest {_short(min(on))} and {_short(min(off))}",
            unit="ms",
        ),
        Row(
            "import_torch_search_milliseconds",
            "of that, torch's search for plug-ins, which it makes without any too",
            search,
            "timed by itself",
            unit="ms",
        ),
        Row(
            "import_torch_plug_in_milliseconds",
            "of that, the plug-in: loading and calling its entry point",
            own,
            "timed by itself",
            unit="ms",
            target=1.0,
        ),
        Row(
            "help_seconds",
            "mergekit-fisher --help",
            command["seconds"],
            f"processor time {_median(command['processor'])} s",
            unit="s",
            target=0.3,
        ),
    ]
