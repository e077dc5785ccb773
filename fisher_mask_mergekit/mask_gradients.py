"""Per-sample gradients of masks that are not there: hooks on the modules that they would stand before."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.activations import Product, product_of, sums_over_tokens
from fisher_mask_mergekit.apart import Seen
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.expert_gradients import Routing, can_run, run_experts, sums_over_routed
from fisher_mask_mergekit.recompute import LayerRun, layer_path, recomputed, replaced
from fisher_mask_mergekit.settings import Estimator, MaskPlacement
from fisher_mask_mergekit.sites import Node, NodeKey, Site, sum_over_groups
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task

FIRST_SCALE = 2.0**15
"""What a float16 model's loss is multiplied by at first: a logit's gradient is 1 at most, and 65504 is the largest number."""


@dataclass
class MaskGradients:
    """Hooks that take per-sample mask gradients ``[B, ...]`` out of every backward pass, and their sums.

    Attributes:
        model: The model.
        sites: Its mask nodes.
        placement: Of the neuron masks.
        estimator: What is summed: squares, or squares of a batch's mean.
        recompute: Whether layers run again in the backward pass instead of keeping their activations.
        tally: What was summed so far. Samples run one at a time if experts' weights are all there is to see.
        samples: B of the last forward pass; hooks keep the one they were made in.
        found: What the last backward pass gave. A module that runs several times in a forward pass
            contributes the sum over its runs.
        pending: Sums over the samples that run; of squares, or of gradients for the batch estimator.
        means: The batch's gradients so far, for the batch estimator.
        seen: If not None, gets what a forward pass gives each site.
        ran: The outputs of the sites that were run, or the module around which was; those of experts' weights aside.
        checked: Those that were while something was looked at.
        watched: The sites' activations in a forward pass, in the order that they ran; None for what is still to
            be computed again.
        fleeting: The places among them of what is computed again, for one backward pass.
        run_of: The layer's run that is on, if its activations are not kept.
        scale: What losses are multiplied by on their way back, so that float16 gradients do not vanish, and gradients
            are divided by before they are squared. A power of two, which changes no digit. It is halved when a batch's
            gradients overflow and never grows: to try whether it may would cost a batch's run each time.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    placement: MaskPlacement
    estimator: Estimator
    recompute: bool = False
    tally: Tally[NodeKey] = field(default_factory=Tally)
    samples: int = 1
    found: dict[NodeKey, Tensor] = field(default_factory=dict)
    pending: dict[NodeKey, Tensor] = field(default_factory=dict)
    means: dict[NodeKey, Tensor] = field(default_factory=dict)
    seen: Seen | None = None
    ran: set[str] = field(default_factory=set)
    checked: set[str] = field(default_factory=set)
    watched: list[Product | None] = field(default_factory=list)
    fleeting: set[int] = field(default_factory=set)
    run_of: LayerRun | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if any(parameter.dtype == torch.float16 for parameter in self.model.parameters()):
            self.scale = FIRST_SCALE
        self.tally.one_by_one |= any(site.experts and not can_run(self._experts(site)) for site in self.sites)

    @contextmanager
    def attached(self) -> Iterator["MaskGradients"]:
        """Put the hooks on; take them off at the end."""
        with ExitStack() as stack:
            for site in self.sites:
                before = site.kind == "ffn" and self.placement == "pre"
                path = site.inputs[0] if before else site.output
                experts = self._experts(site) if site.experts else None
                if experts is not None and can_run(experts):
                    watch: dict[str, Any] = {"before" if before else "after": partial(self._routed, site)}
                    stack.enter_context(replaced(experts, partial(run_experts, experts, **watch)))
                elif site.experts:
                    weight = _weight(self.model, path)
                    weight.requires_grad_(True)
                    stack.callback(weight.requires_grad_, False)
                    hook = partial(self._from_weight, site, site.model_axis(path))
                    stack.callback(weight.register_post_accumulate_grad_hook(hook).remove)
                else:
                    module, around = _found(self.model, path), _found(self.model, path.rpartition(".")[0])
                    entered = around.register_forward_pre_hook(partial(self._around, site))
                    stack.callback(entered.remove)
                    if before:
                        handle = module.register_forward_hook(partial(self._after_input, site))
                    else:
                        handle = module.register_forward_pre_hook(partial(self._before_output, site))
                    stack.callback(handle.remove)
            if self.recompute:
                # A stack's last layer would run again at once: keeping one costs no memory beyond what that takes.
                *paths, _ = dict.fromkeys(layer_path(site.output) for site in self.sites)
                layers = [_found(self.model, path) for path in paths]
                stack.enter_context(recomputed(self.model, layers, self._layer_runs))
            yield self

    def _layer_runs(self) -> tuple[LayerRun, LayerRun]:
        places: list[int] = []
        return LayerRun(self._enter, places, again=False), LayerRun(self._enter, places, again=True)

    def _enter(self, run: LayerRun | None) -> None:
        self.run_of = run

    def _experts(self, site: Site) -> nn.Module:
        return _found(self.model, site.output.rpartition(".")[0])

    def run(self, task: Task, batch: Batch, seen: Seen | None = None) -> Likelihood:
        """A forward pass."""
        self.samples, self.seen = len(batch.index), seen
        if torch.is_grad_enabled():
            self.pending.clear()
            self.watched.clear()
            self.fleeting.clear()
        return task.likelihood(self.model, batch)

    @torch.no_grad()
    def alone(self, task: Task, sample: Batch, seen: Seen) -> tuple[Likelihood, bool]:
        """A forward pass of one sample; what a site's input is says all."""
        return self.run(task, sample, seen), True

    def separate(self) -> None:
        """From now on samples run one at a time."""
        self.tally.one_by_one = True

    def backward(self, loss: Tensor, weight: Tensor | None, *, again: bool) -> None:
        """Add up the squares of one backward pass; for the batch estimator, its gradients."""
        self.found.clear()
        (loss * self.scale).backward(retain_graph=again)
        for key, gradient in self.found.items():
            unscaled = _wide(gradient) / self.scale
            total = unscaled.sum(0) if self.estimator == "batch" else _squared(unscaled, weight)
            self.pending[key] = self.pending.get(key, 0) + total

    def overflowed(self) -> bool:
        """Whether something pending is not finite, as is all that a number that overflowed leads to."""
        return self.scale > 1 and not all(bool(total.isfinite().all()) for total in self.pending.values())

    def shrink_loss(self) -> None:
        """Halve the scale."""
        self.scale /= 2

    def keep(self) -> None:
        """Add what is pending to the sums; to the means for the batch estimator."""
        totals = self.means if self.estimator == "batch" else self.tally.sums
        added = {key: totals.get(key, 0) + total for key, total in self.pending.items()}
        totals.update(added)  # All of them, or none where memory lacks.
        self.watched.clear()

    def can_forget(self) -> bool:
        """What is pending, always."""
        return True

    def end_batch(self, samples: int) -> None:
        """Add the squared mean of the batch, if that is what the estimator squares."""
        sums = self.tally.sums
        for key, total in self.means.items():
            sums[key] = sums.get(key, 0) + (total / samples).square()
        self.means.clear()

    def _around(self, site: Site, module: nn.Module, args: Any) -> None:
        self.ran.add(site.output)

    def _before_output(self, site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._watch(site, args[0], None), *args[1:])

    def _after_input(self, site: Site, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._watch(site, output, getattr(module, "bias", None))

    def _watch(self, site: Site, tensor: Tensor, bias: Tensor | None) -> Tensor:
        self._look(site, tensor)
        return self._hooked(tensor, bias, partial(self._from_activation, site, self.samples))

    def _look(self, site: Site, tensor: Tensor) -> None:
        """A tensor whose rows must be the samples', one after the other.

        Raises:
            MeasurementError: If they are not, or were never looked at, where they were before.
        """
        self.ran.add(site.output)
        if self.seen is not None:
            self.seen.add(site.output, tensor)
            self.checked.add(site.output)
        elif len(tensor) % self.samples or (
            self.samples > 1 and self.checked and site.output not in self.checked
        ):
            raise MeasurementError(
                f"{site.output} does not keep a batch's samples apart, or did not run in the first batch, which tells "
                "whether it does; take batch_size 1"
            )

    def _hooked(self, tensor: Tensor, bias: Tensor | None, hook: Callable[[int, Tensor], None]) -> Tensor:
        """What a hook that is told the tensor's place among the watched ones is put on."""
        if not torch.is_grad_enabled():
            return tensor
        if not tensor.requires_grad:  # The first site: autograd starts here, not at the embeddings.
            tensor = tensor.detach().requires_grad_()
        if self.run_of is not None and self.run_of.again:  # The hook is on what the first run gave.
            self.watched[next(self.run_of.places)] = product_of(tensor, bias)
            return tensor
        # What is watched may hold the graph that holds the hook: the hook itself must not hold it.
        tensor.register_hook(partial(hook, len(self.watched)))
        if self.run_of is not None:
            self.run_of.noted.append(len(self.watched))
            self.fleeting.add(len(self.watched))
        self.watched.append(None if self.run_of is not None else product_of(tensor, bias))
        return tensor

    def _product(self, place: int) -> Product:
        """Of a watched activation."""
        product = self.watched[place]
        assert product is not None
        if place in self.fleeting:
            self.watched[place] = None
        return product

    def _from_activation(self, site: Site, samples: int, place: int, gradient: Tensor) -> None:
        per_sample = sums_over_tokens(self._product(place), gradient, samples)
        if site.kind == "attention":
            heads = per_sample.unflatten(-1, (site.heads, -1)).sum(-1)
            self._add(site, "head_fisher", heads)
            self._add(site, "kv_head_fisher", sum_over_groups(heads, site.kv_heads))
        else:
            # More columns than neurons: gate and up in one, before the activation.
            self._add(site, "neuron_fisher", site.activated(per_sample))

    def _routed(self, site: Site, tensor: Tensor, routing: Routing, tokens: Tensor) -> Tensor:
        """Experts' tokens must be the samples', one after the other."""
        self._look(site, tokens)
        shape = self.samples, site.experts, len(tokens) // self.samples
        return self._hooked(tensor, None, partial(self._from_routed, site, routing, shape))

    def _from_routed(
        self, site: Site, routing: Routing, shape: tuple[int, int, int], place: int, gradient: Tensor
    ) -> None:
        per_sample = sums_over_routed(self._product(place), gradient, routing, shape)
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


def _wide(gradient: Tensor) -> Tensor:
    return gradient.to(torch.float32 if gradient.device.type == "mps" else torch.float64)


def _squared(gradient: Tensor, weight: Tensor | None) -> Tensor:
    """One batch's contribution to the sum, ``[B, ...] -> [...]``."""
    squares = gradient.square()
    if weight is not None:
        # A model's layers may lie on several devices.
        squares *= weight.to(squares.device).reshape(-1, *[1] * (squares.ndim - 1))
    return squares.sum(0)


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    """A parameter, or the weight of a module."""
    parent, _, own = path.rpartition(".")
    found = getattr(_found(model, parent), own, None)
    return found if isinstance(found, nn.Parameter) else _weight(model, f"{path}.weight")


def _found(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise MeasurementError(f"the checkpoint has {path}, the loaded model does not") from error
