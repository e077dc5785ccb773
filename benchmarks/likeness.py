"""How alike the Fisher information that rows and columns make of a parameter is to its own, kind of tensor by kind.

    python benchmarks/likeness.py RECIPE [--samples N] [--device D] [--json OUT]

Measures every model of a recipe both ways on its data, and the diagonal of K-FAC beside them: of a matrix, mean over
samples of the sum over tokens of the squared gradient of an output, times mean over samples and tokens of the squared
input. Prints, over layers and models, the correlation of square roots with those of the full diagonal.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fisher_mask_mergekit import measure_diagonal
from fisher_mask_mergekit.batches import Limit, padded_batches
from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.execution import pick_device
from fisher_mask_mergekit.factored import FactoredFisher
from fisher_mask_mergekit.factors import factors_of
from fisher_mask_mergekit.job import Job, prepare
from fisher_mask_mergekit.measuring import measure
from fisher_mask_mergekit.passes import frozen
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sites import name_template


@dataclass
class Likeness:
    """Correlations with the full diagonal of the same tensor in all layers of all models.

    Attributes:
        tensor: Its name, without numbers.
        elements: How many it has.
        rows_and_columns: Correlations of what rows and columns make of it.
        kfac: Of K-FAC's diagonal; none where it is no linear module's matrix.
    """

    tensor: str
    elements: int
    rows_and_columns: list[float] = field(default_factory=list)
    kfac: list[float] = field(default_factory=list)


@contextmanager
def squares_of(model: nn.Module, sums: dict[str, list[Tensor]]) -> Iterator[None]:
    """Adds, for every linear module's matrix, what a sample has of both factors of K-FAC's diagonal."""

    def add(name: str, place: int, value: Tensor) -> None:
        total = sums.setdefault(name, [torch.zeros((), device=value.device)] * 2)
        total[place] = total[place] + value

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_().clone()
            add(name, 1, args[0].detach().flatten(0, -2).double().square().mean(0))
            output.register_hook(
                lambda gradient: add(name, 0, gradient.flatten(0, -2).double().square().sum(0))
            )
            return output

        return hook

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                stack.callback(module.register_forward_hook(watch(f"{path}.weight")).remove)
        yield


def kfac(job: Job, device: torch.device) -> dict[str, Tensor]:
    """K-FAC's diagonal of every linear module's matrix, from one sample at a time, without padding."""
    assert job.inputs is not None
    model, _ = measure_diagonal.load(job, job.inputs)
    model.to(device)
    sums: dict[str, list[Tensor]] = {}
    singles = padded_batches(
        job.inputs.encoded,
        job.inputs.tokenizer,
        limits=iter(lambda: Limit(rows=1), None),
        by_length=False,
        device=device,
    )
    count = 0
    with frozen(model), squares_of(model, sums):
        for batch in singles:
            job.task.likelihood(model, batch).losses().sum().backward()
            count += 1
    found = {}
    for name, (outputs, inputs) in sums.items():
        if outputs.ndim:  # Else no gradient reached it.
            product = torch.outer(outputs, inputs) / count**2
            is_transposed = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
            found[name] = product.T if is_transposed else product
    return found


def rank_one(found: FactoredFisher, name: str) -> Tensor:
    """What rows and columns make of a parameter."""
    rows, columns = factors_of(found.fisher[name], found.split(name))
    return (rows[:, :, None] * columns[:, None, :]).reshape(found.shapes[name])


def correlation(one: Tensor, other: Tensor) -> float | None:
    """Of square roots; None where one of them does not vary."""
    roots = torch.stack([value.double().flatten().cpu().sqrt() for value in (one, other)])
    if roots.shape[1] < 2 or not bool((roots.std(1) > 0).all()):
        return None
    return float(torch.corrcoef(roots)[0, 1])


def compare(name: str, settings: FisherSettings, device: torch.device, found: dict[str, Likeness]) -> None:
    """Add a model's correlations."""
    factored, full = (measured(prepared(name, settings, kind), device) for kind in ("factored", "diagonal"))
    reference = kfac(prepared(name, settings, "diagonal"), device)
    for parameter, value in full.fisher.items():
        template = name_template(parameter)
        line = found.setdefault(template, Likeness(template, value.numel()))
        if value.ndim > 1 and (like := correlation(value, rank_one(factored, parameter))) is not None:
            line.rows_and_columns.append(like)
        if parameter in reference and (like := correlation(value, reference[parameter])) is not None:
            line.kfac.append(like)


def prepared(name: str, settings: FisherSettings, kind: str) -> Job:
    """What is to be measured of a model."""
    wanted = FisherSettings.model_validate(settings.model_dump() | {"kind": kind})
    return prepare(name, wanted, out=Path("none"), force=True, writes=False)


def measured(job: Job, device: torch.device) -> Any:
    """A model's Fisher information."""
    assert job.inputs is not None
    return measure(job, job.inputs, device).fisher


def table(found: list[Likeness]) -> str:
    """As Markdown."""

    def shown(values: list[float]) -> list[str]:
        return [f"{statistics.median(values):.3f}", f"{min(values):.3f}"] if values else ["", ""]

    head = ["tensor", "elements", "rows and columns, median", "least", "K-FAC, median", "least"]
    lines = [
        [one.tensor, f"{one.elements:,}", *shown(one.rows_and_columns), *shown(one.kfac)]
        for one in found
        if one.rows_and_columns
    ]
    return aligned([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where to write every correlation")
    options = parser.parse_args()
    logging.disable_progress_bar()
    device = pick_device(None if options.device == "auto" else options.device)
    recipe = read_recipe(options.recipe, {"samples": options.samples} if options.samples else None)
    found: dict[str, Likeness] = {}
    for model in recipe.models:
        if model.settings is not None:
            compare(model.name, model.settings, device, found)
    every = [value for one in found.values() for value in one.rows_and_columns]
    print(table(list(found.values())))
    print(f"\nmedian over all matrices: {statistics.median(every):.3f}, least {min(every):.3f}")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found.values()], indent=2) + "\n")


if __name__ == "__main__":
    main()
