"""Do the rows that the table of sites gives to a node belong to it? Move them, and see what moves with them.

The table goes by names, and an architecture that nobody has tried may use the same names for something
else. Before such a model is measured, one node's rows are moved in the first layer of each kind: only that
node's columns of the output projection's input may move.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.sites import GovernedTensor, Layout, Node, Site, name_template, row_fisher
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
        for tensor, node, rows in _one_of_each(model, site):
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


_ROWS: Mapping[str, tuple[Node, tuple[Layout, ...]]] = {
    "queries": ("head_fisher", ("q", "q k v", "(q k v)")),
    "keys": ("kv_head_fisher", ("k", "q k v", "(q k v)", "(k v)")),
    "values": ("kv_head_fisher", ("v", "q k v", "(q k v)", "(k v)")),
    "neurons": ("neuron_fisher", ("n", "n n", "(n n)")),
}
"""What is moved: rows of a node, in a tensor of one of these layouts."""


def _one_of_each(model: nn.Module, site: Site) -> Iterator[tuple[GovernedTensor, Node, Tensor]]:
    """Of each kind of rows, a weight of the loaded model, their node, and 1 where the first such node's lie."""
    parameters = dict(model.named_parameters())
    weights = [tensor for tensor in site.tensors if tensor.name in parameters and len(tensor.shape) > 1]
    for what, (node, layouts) in _ROWS.items():
        found = next((tensor for tensor in weights if tensor.layout in layouts), None)
        if found is None:
            continue
        none = {kind: torch.zeros(shape) for kind, shape in site.nodes().items()}
        first = (torch.arange(site.nodes()[node][0]) == 0).float()
        if what == "values":
            yield found, node, row_fisher(site, found, none, first)
        else:
            yield found, node, row_fisher(site, found, none | {node: first}, torch.zeros(1))


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
