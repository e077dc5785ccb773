"""Options that several commands have, and mean alike."""

from typing import Annotated, Any, Literal

import typer

Device = Annotated[str | None, typer.Option(help="Where to run. [default: cuda, else xpu, mps, cpu]")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint. No recipe can.")
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Metric, or several with commas between, the first normalised. [default: the task's own]"
    ),
]
Pooler = Annotated[
    Literal["own", "average"], typer.Option(help="Each task's own pooler, or the mean of all.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per batch.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option(help="Dtype of the weights. [default: the recipe's, else float32]"),
]


def scoring_overrides(metric: str | None, dtype: str | None) -> dict[str, Any]:
    """What beats the recipe's settings where models are scored."""
    names = None if metric is None else tuple(name.strip() for name in metric.split(","))
    return {key: value for key, value in (("metric", names), ("dtype", dtype)) if value is not None}
