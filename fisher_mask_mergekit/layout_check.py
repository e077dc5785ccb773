"""Do the rows that the table of sites gives to a node belong to it? Move them, and see what moves with them.

The table goes by names, and an architecture that nobody has tried may use the same names for something
else. Before such a model is measured, one node's rows are moved in the first layer of each kind: only that
node's columns of the output projection's input may move.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.sites import GovernedTensor, Node, Site, name_template, row_fisher
from fisher_mask_mergekit.tasks import Batch, Task

_OWN_SHARE = 0.9
"""Of the squared movement that must be in the node's own columns; a norm over all heads moves the others a little."""


@torch.no_grad()
def check_layout(model: nn.Module, task: Task, sample: Batch, sites: tuple[Site, ...]) -> None:
    """Check the first site of each kind, on one sample.

    Args:
        model: In evaluation mode; as it was afterwards.
        task: Runs the model.
        sample: A batch of one, better a long one: a single token attends to itself whatever its query is.
        sites: Where the mask nodes are taken to be. Experts that share a tensor are left out: their
            nodes show in no module's input.

    Raises:
        MeasurementError: If rows move columns that are not their node's (names the tensor).
    """
    first = {name_template(site.output): site for site in reversed(sites) if not site.experts}
    for site in first.values():
        before = _input_of(model, task, sample, site)
        if before is None or not bool(before.isfinite().all()):
            continue
        for tensor, node in _one_of_each(model, site):
            one_hot = {kind: torch.zeros(shape) for kind, shape in site.nodes().items()}
            one_hot[node][0] = 1
            rows = row_fisher(site, tensor, one_hot, torch.zeros(1))
            with _moved(model.get_parameter(tensor.name), rows):
                after = _input_of(model, task, sample, site)
            assert after is not None
            movement = (after - before).double().square().flatten(0, -2).sum(0)
            own = movement[: len(movement) // site.nodes()[node][0]].sum()
            if float(own) < _OWN_SHARE * float(movement.sum()):
                raise MeasurementError(
                    f"{tensor.name}: rows taken to be {node.removesuffix('_fisher').replace('_', ' ')} 0's also "
                    f"move other columns of what enters {site.output}: {type(model).__name__} "
                    "lays its heads or neurons out in a way that is not known, and cannot be measured"
                )


def _one_of_each(model: nn.Module, site: Site) -> Iterator[tuple[GovernedTensor, Node]]:
    """For each kind of node, a weight of the loaded model with rows of it."""
    parameters = dict(model.named_parameters())
    weights = [
        tensor
        for tensor in site.tensors
        if tensor.name in parameters and len(tensor.shape) > 1 and tensor.layout != "mean"
    ]
    kinds: dict[Node, str] = {"head_fisher": "q", "kv_head_fisher": "k", "neuron_fisher": "n"}
    for node in site.nodes():
        found = next((tensor for tensor in weights if kinds[node] in tensor.layout), None)
        if found is not None:
            yield found, node


class _Seen(Exception):  # noqa: N818  # Not an error: it ends a forward pass that has shown enough.
    pass


def _input_of(model: nn.Module, task: Task, sample: Batch, site: Site) -> Tensor | None:
    """What enters a site's output projection first; None if the sample does not run through it."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().clone())
        raise _Seen  # What comes after it does not matter.

    handle = model.get_submodule(site.output).register_forward_pre_hook(keep)
    try:
        task.likelihood(model, sample)
    except _Seen:
        return seen[0]
    finally:
        handle.remove()
    return None


@contextmanager
def _moved(weight: Tensor, rows: Tensor) -> Iterator[None]:
    """Some rows of a weight with noise a tenth of its size added."""
    original = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.add_((noise * rows * 0.1 * float(original.float().std())).to(weight.device, weight.dtype))
    try:
        yield
    finally:
        weight.copy_(original)
