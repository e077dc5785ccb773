"""RegMean beside the merges by Fisher information: every pair of a recipe's checkpoints.

    python benchmarks/regmean.py RECIPE --work FOLDER --parent FOLDER

RegMean (Jin et al. 2023, arXiv 2212.09849) merges the matrix of every linear map so that its outputs are closest, in the least
squares, to each model's own on its own inputs; all else is averaged. What it must know of a model is as large as the matrices'
squared widths. With ``--add regmean.json`` of another run, its pairs count too. Writes ``regmean.json`` and ``regmean.md`` into the work folder.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import summary
import torch
from compare import add_runs_option, arguments, bench, compare, with_runs, write
from torch import Tensor, nn
from ways import ALL, AVERAGE, COLUMNS, Way, by_tensor, from_parent

from fisher_mask_mergekit.batches import Limit, padded_batches
from fisher_mask_mergekit.checkpoint import read_tensors
from fisher_mask_mergekit.data import load_samples
from fisher_mask_mergekit.encoding import encode_samples
from fisher_mask_mergekit.evaluation.plan import Merge, Subject
from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.heads import is_head
from fisher_mask_mergekit.loading import class_of, load_model, load_tokenizer, longest
from fisher_mask_mergekit.tasks import Tokenization

OFF_DIAGONAL = 0.9
"""By which the authors multiply inner products of different inputs."""
REGMEAN = Way("regmean", "regmean", {"off_diagonal": OFF_DIAGONAL})
WAYS = (AVERAGE, REGMEAN, by_tensor(ALL), from_parent(COLUMNS, 1), from_parent(ALL, 1))


def inner_products(subject: Subject, device: torch.device) -> dict[str, Tensor]:
    r"""Of every linear map's inputs, the mean of :math:`x x^\top` over all tokens of the samples: ``[in, in]``, float64, by its weight's name."""
    request, task = subject.model.request, subject.task
    tokenizer = load_tokenizer(subject.checkpoint, task, trust_remote_code=False)
    kind = class_of(subject.checkpoint, subject.config, task, trust_remote_code=False)
    model = load_model(subject.checkpoint, kind, subject.config, tokenizer, torch.float32).to(device).eval()
    found: dict[str, Any] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        found[name] = found[name] + (rows.T @ rows).double()
        tokens[name] += len(rows)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(add, f"{name}.weight"))
    how = Tokenization(tokenizer, longest(model, tokenizer, request), request.seed)
    encoded = encode_samples(load_samples(request, task), task, how)
    with torch.inference_mode():
        # One by one: then nothing is padded.
        for batch in padded_batches(encoded, tokenizer, limits=Limit(rows=1), by_length=False, device=device):
            model(**batch.inputs)
    return {name: total.cpu() / tokens[name] for name, total in found.items()}


def regression_mean(products: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    r""":math:`W = (\sum_m W_m G_m) (\sum_m G_m)^{-1}`, G without a tenth of what is off its diagonal.

    Args:
        products: Means of :math:`x x^\top` over each model's inputs, ``[in, in]``, float64.
        weights: Each model's matrix, ``[out, in]``.
    """
    shrunk = [OFF_DIAGONAL * one + (1 - OFF_DIAGONAL) * one.diag().diag() for one in products]
    total = torch.stack([weight.double() @ one for weight, one in zip(weights, shrunk, strict=True)]).sum(0)
    return torch.linalg.solve(torch.stack(shrunk).sum(0), total.T).T.to(weights[0].dtype)


class RegMean:
    """Merges groups of models, and keeps what it found out about each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[str, dict[str, Tensor]] = {}

    def __call__(self, group: Sequence[Subject], first: Merge) -> Merge:
        """The average, with every linear map's matrix in place of the averaged one."""
        names = [
            name for name in self._products(group[0]) if name in first.encoder.shapes and not is_head(name)
        ]
        own = [dict(read_tensors(one.checkpoint, names)) for one in group]
        matrices = {
            name: regression_mean(
                [self._products(one)[name] for one in group], [tensors[name] for tensors in own]
            )
            for name in names
        }

        def read(wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
            return ((name, matrices.get(name, tensor)) for name, tensor in first.encoder.read(wanted))

        return replace(first, line=REGMEAN.name, encoder=replace(first.encoder, read=read))

    def key(self, group: Sequence[Subject]) -> list[str]:
        """The samples that inner products are made of."""
        return [
            load_samples(one.model.request, one.task).record.digest + one.model.request.model_dump_json()
            for one in group
        ]

    def _products(self, subject: Subject) -> dict[str, Tensor]:
        if subject.name not in self._known:
            self._known[subject.name] = inner_products(subject, self._device)
        return self._known[subject.name]


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The table, by title, of what was written to ``regmean.json``."""
    found = [one for run in record["runs"] for one in run["records"]]
    return {f"RegMean, {len(found)} pairs": aligned(summary.rows(summary.summaries(found)))}


def main() -> None:
    parser = arguments(__doc__)
    add_runs_option(parser)
    given = parser.parse_args()
    setting = bench(given)
    pairs = list(combinations(setting.subjects, 2))
    found = compare(setting, pairs, WAYS, {REGMEAN.name: RegMean(setting.device)})
    record = with_runs(given, {**setting.facts(), "records": found})
    write(given.work / "regmean", record, markdown)


if __name__ == "__main__":
    main()
