"""Per-sample gradients of masks that are not there: hooks on the modules that they would stand before."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.settings import MaskPlacement
from fisher_mask_mergekit.sites import Node, NodeKey, Site, sum_over_groups
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task


@dataclass
class MaskGradients:
    """Hooks that every backward pass fills ``found`` with: per-sample mask gradients ``[B, ...]``.

    Attributes:
        model: The model.
        sites: Its mask nodes.
        placement: Of the neuron masks.
        samples: B of the forward pass to come.
        found: What the last backward pass gave. A module that runs several times in a forward pass
            contributes the sum over its runs.
        inputs: If not None, gets what a forward pass gives each site.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    placement: MaskPlacement
    samples: int = 1
    found: dict[NodeKey, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] | None = None

    @contextmanager
    def attached(self) -> Iterator["MaskGradients"]:
        """Put the hooks on; take them off at the end."""
        with ExitStack() as stack:
            for site in self.sites:
                before = site.kind == "ffn" and self.placement == "pre"
                path = site.inputs[0] if before else site.output
                if site.experts:
                    weight = _parameter(self.model, path)
                    weight.requires_grad_(True)
                    stack.callback(weight.requires_grad_, False)
                    hook = partial(self._from_weight, site, site.model_axis(path))
                    stack.callback(weight.register_post_accumulate_grad_hook(hook).remove)
                else:
                    module = _submodule(self.model, path)
                    if before:
                        handle = module.register_forward_hook(partial(self._after_input, site))
                    else:
                        handle = module.register_forward_pre_hook(partial(self._before_output, site))
                    stack.callback(handle.remove)
            yield self

    def run(self, task: Task, batch: Batch) -> Likelihood:
        """A forward pass."""
        self.samples = len(batch.index)
        return task.likelihood(self.model, batch)

    def _before_output(self, site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._watch(site, args[0], None), *args[1:])

    def _after_input(self, site: Site, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._watch(site, output, getattr(module, "bias", None))

    def _watch(self, site: Site, tensor: Tensor, bias: Tensor | None) -> Tensor:
        if self.inputs is not None:
            self.inputs[site.output] = tensor.detach()
        if not torch.is_grad_enabled():
            return tensor
        if not tensor.requires_grad:  # The first site: autograd starts here, not at the embeddings.
            tensor = tensor.detach().requires_grad_()
        # The hook must hold another tensor object than the one it is registered on, else the two keep
        # each other alive.
        tensor.register_hook(partial(self._from_activation, site, tensor.detach(), bias))
        return tensor

    def _from_activation(self, site: Site, values: Tensor, bias: Tensor | None, gradient: Tensor) -> None:
        wide = torch.promote_types(values.dtype, torch.float32)
        masked = values.to(wide) if bias is None else values.to(wide) - bias.to(wide)
        product = masked * gradient.to(wide)
        per_sample = product.reshape(self.samples, -1, product.shape[-1]).sum(1)
        if site.kind == "attention":
            heads = per_sample.unflatten(-1, (site.heads, -1)).sum(-1)
            self._add(site, "head_fisher", heads)
            self._add(site, "kv_head_fisher", sum_over_groups(heads, site.kv_heads))
        else:
            # More columns than neurons: gate and up in one, before the activation.
            self._add(site, "neuron_fisher", site.activated(per_sample))

    @torch.no_grad()
    def _from_weight(self, site: Site, model_axis: int, weight: Tensor) -> None:
        """The gradient of neuron masks by that of the experts' weights, for a single sample."""
        assert weight.grad is not None
        wide = torch.promote_types(weight.dtype, torch.float32)
        product = weight.to(wide) * weight.grad.to(wide)
        weight.grad = None
        self._add(site, "neuron_fisher", site.activated(product.sum(model_axis))[None])

    def _add(self, site: Site, node: Node, value: Tensor) -> None:
        key = (site.output, node)
        self.found[key] = self.found[key] + value if key in self.found else value


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise MeasurementError(f"the checkpoint has {path}, the loaded model does not") from error


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    try:
        return model.get_parameter(path)
    except AttributeError as error:
        raise MeasurementError(f"the checkpoint has {path}, the loaded model does not") from error
