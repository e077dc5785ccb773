"""The full diagonal Fisher information: one value per parameter."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.layer_gradients import (
    Call,
    Kind,
    embedding_rows,
    kind_of,
    own_parameters,
    per_sample,
)
from fisher_mask_mergekit.passes import Seen, frozen, run_samples
from fisher_mask_mergekit.settings import Labels
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task


@dataclass(frozen=True)
class DiagonalFisher:
    """What :func:`diagonal_fisher` measured.

    Attributes:
        fisher: Per parameter, by its name in the model, a tensor of its shape, non-negative, in nats squared;
            float32, or float64 if that is the parameter's.
        samples: N.
        loss: Mean over samples of their negative log-likelihood, in nats.
        accuracy: Mean over samples of the share of predictions whose most probable outcome is the data's.
        one_by_one: Whether samples ran one at a time, because not every parameter's gradient can be told apart
            in a batch.
    """

    fisher: dict[str, Tensor]
    samples: int
    loss: float
    accuracy: float
    one_by_one: bool


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    *,
    labels: Labels = "data",
    seed: int = 0,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> DiagonalFisher:
    r"""Diagonal Fisher information of a model's parameters.

    .. math:: F_i = \frac{1}{N} \sum_{n=1}^{N} \left( \partial \ell_n / \partial \theta_i \right)^2

    with :math:`\ell_n = -\log p(y_n \mid x_n)` in nats. The mean runs over samples, never over batches.

    One backward pass of a batch's summed loss brings every module the gradient of its output; with the
    module's input, that gives each sample's gradient of the module's own parameters, which is squared, added,
    and dropped before the next. So beside model and result, there is one parameter's gradient at a time.
    A parameter that several runs of modules share (tied embeddings, a layer that is run again) waits for the
    last of them: it is the sum of its gradients that is squared.

    Where that cannot be, all samples run one at a time, and autograd's own gradients are squared and dropped
    as they arrive: if a parameter enters the loss other than through the module that holds it, or a module's
    input or output does not hold the samples one after the other. Both are looked for, not assumed.

    Args:
        model: A model with the task's head. Put in evaluation mode, and left as it was found.
        batches: The samples. An iterator is enough; it is read once.
        task: What the loss is.
        labels: As in :func:`~fisher_mask_mergekit.fisher.mask_fisher`.
        seed: For ``sampled``.
        on_batch: Called after every batch.

    Returns:
        The Fisher information, zero for a parameter that no gradient reaches, and what else was seen.

    Raises:
        MeasurementError: If there is no sample; a loss or a gradient is not finite (names the parameter); or the
            first sample gives something else by itself than in its batch.

    Reference: Matena and Raffel 2022, arXiv 2111.09832, eq. (5).
    """
    gradients = DiagonalGradients(model, _floating(model))
    with frozen(model), gradients.attached():
        totals = run_samples(gradients, batches, task, labels=labels, seed=seed, on_batch=on_batch)
    fisher = {}
    for name, parameter in gradients.parameters.items():
        total = gradients.sums.pop(name, None)
        if total is None:
            total = torch.zeros_like(parameter, dtype=_wide(parameter))
        _check_finite(total, name)
        fisher[name] = total.div_(totals.samples)
    samples = totals.samples
    return DiagonalFisher(
        fisher, samples, totals.loss / samples, totals.correct / samples, gradients.one_by_one
    )


def _floating(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by its first name."""
    return {name: value for name, value in model.named_parameters() if value.is_floating_point()}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_finite(total: Tensor, name: str) -> None:
    if not bool(total.isfinite().all()):
        place = (~total.isfinite()).nonzero()[0].tolist()
        raise MeasurementError(
            f"the gradient of {name} at {place} is not finite ({total[tuple(place)].item()}); try another dtype, or "
            "look for infinities in the checkpoint"
        )


@dataclass
class DiagonalGradients:
    """Hooks that add the squares of every sample's gradients, parameter by parameter, while they go by.

    Attributes:
        model: The model.
        parameters: What is measured.
        one_by_one: Whether samples run one at a time.
        sums: Over all samples.
        samples: B of the forward pass.
        seen: If not None, gets what modules are given and give.
        uses: How often a parameter enters what its modules give, in a forward pass that only counts.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    one_by_one: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 1
    seen: Seen | None = None
    uses: Counter[str] | None = None
    _kinds: dict[nn.Module, Kind] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)
    _arrived: dict[str, list[tuple[Call, str, Tensor]]] = field(default_factory=dict)
    _rows: int = 1
    _weight: Tensor | None = None
    _hooks: ExitStack = field(default_factory=ExitStack)
    _shared: set[nn.Module] = field(default_factory=set)
    _counted: list[Call] = field(default_factory=list)
    _asking: bool = False

    def __post_init__(self) -> None:
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}

    @contextmanager
    def attached(self) -> Iterator["DiagonalGradients"]:
        """Put the hooks on; take them off at the end."""
        for path, module in self.model.named_modules():
            inside = [child for child in module.modules() if child is not module]
            if own_parameters(module) and not any(own_parameters(child) for child in inside):
                hook = partial(self._after, path)
                self._hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        try:
            yield self
        finally:
            self._hooks.close()

    def run(self, task: Task, batch: Batch, seen: Seen | None = None) -> Likelihood:
        """A forward pass."""
        self.samples = self._rows = len(batch.index)
        self.seen, self._calls = seen, Counter()
        return task.likelihood(self.model, batch)

    def fits(self, task: Task, sample: Batch) -> bool:
        """Whether the loss sees every parameter only in what the hooked modules give."""
        with ExitStack() as stack:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
                stack.callback(parameter.requires_grad_, False)
            self.uses = Counter()
            try:
                seen = self._uses(self.run(task, sample).losses().sum(), ())
                intact = all(call.is_intact() for call in self._counted)
                return intact and all(count <= self.uses[name] for name, count in seen.items())
            finally:
                self.uses = None
                self._counted.clear()

    def separate(self) -> None:
        """From now on samples run one at a time, and autograd gives the gradients."""
        self._hooks.close()
        self.one_by_one = True
        for name, parameter in self.parameters.items():
            self._hooks.callback(setattr, parameter, "grad", parameter.grad)
            self._hooks.callback(parameter.requires_grad_, False)
            parameter.grad = None
            parameter.requires_grad_(True)
            hook = partial(self._from_autograd, name)
            self._hooks.callback(parameter.register_post_accumulate_grad_hook(hook).remove)

    def backward(self, loss: Tensor, weight: Tensor | None, *, again: bool) -> None:
        """A backward pass."""
        self._weight = weight
        loss.backward(retain_graph=again)
        for name in list(self._arrived):  # Of runs that the loss does not see, nothing arrives.
            self._add(name)

    def end_batch(self, samples: int) -> None:
        """Nothing is kept for a whole batch."""

    def _after(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What a module gives goes on as it is, but that a gradient has to arrive."""
        if self._asking or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        names = [self._names[id(parameter)] for parameter in own_parameters(module).values()]
        if self.uses is not None:
            call = Call(module, "other", 1, args, kwargs)
            self._counted.append(call)
            self.uses += self._uses(output, call.tensors())
            return None
        call, output = self._call(module, args, kwargs, output)
        if self.seen is not None:
            run = f"{path}, run {self._calls[names[0]]}"
            tensors = enumerate((output, *call.tensors()))
            self.seen |= {f"{run}, tensor {place}": tensor.detach() for place, tensor in tensors}
        self._calls.update(names)
        if torch.is_grad_enabled():
            if not output.requires_grad:
                # The weights are frozen: here autograd starts. A leaf itself must not be changed in place.
                output = output.detach().requires_grad_().clone()
            output.register_hook(partial(self._arrive, call, self._calls))
        return output

    def _call(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> tuple[Call, Tensor]:
        """A module's run, and what it gives: a row per sample also where one stands for all."""
        if module not in self._kinds:
            with self._aside():
                self._kinds[module] = kind_of(module, args, kwargs, output)
        kind = self._kinds[module]
        if kind == "embedding" and args[0].ndim == 2:
            # Positions, the same for all samples. A table of distances is no such thing: [T, T].
            if args[0].shape[0] == 1 and (args[0].shape[1] > 1 or module in self._shared):
                self._shared.add(module)
                args = (args[0].expand(self._rows, -1),)
                output = output.expand(self._rows, -1, -1)
            else:
                self._rows = args[0].shape[0]  # Several per sample, where it is a choice among several.
        args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        kwargs = {
            key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()
        }
        return Call(module, kind, self.samples, args, kwargs), output

    @torch.no_grad()
    def _arrive(self, call: Call, calls: Counter[str], gradient: Tensor) -> None:
        """The gradient of what a module gave. What waits for no other run of a module is added at once."""
        if not call.is_intact() or any(t.shape[0] % call.samples for t in (gradient, *call.tensors())):
            raise MeasurementError(
                f"a {type(call.module).__name__} does not keep a batch's samples apart, but did in the first batch; "
                "take batch_size 1"
            )
        for own, parameter in own_parameters(call.module).items():
            name = self._names[id(parameter)]
            waiting = self._arrived.setdefault(name, [])
            waiting.append((call, own, gradient))
            if len(waiting) == calls[name]:
                self._add(name)

    @torch.no_grad()
    def _add(self, name: str) -> None:
        """Add the squares of what arrived for a parameter; several runs' gradients of a sample are summed first."""
        arrived = self._arrived.pop(name)
        total, (call, own, gradient) = self._sum(name), arrived[0]
        with self._aside():
            if len(arrived) == 1 and call.kind == "embedding":
                for sample, (rows, found) in enumerate(embedding_rows(call, gradient)):
                    total.index_add_(0, rows, found.square() * self._factor(sample))
                return
            several = [per_sample(*one) for one in arrived]
            if len(several) == 1 and isinstance(several[0], Tensor):
                squares = several[0].square()
                weight = 1 if self._weight is None else self._weight.reshape(-1, *[1] * total.ndim)
                total += (squares * weight).sum(0)
                return
            for sample, parts in enumerate(zip(*several, strict=True)):
                self._square(total, sum(parts[1:], start=parts[0]), sample)

    @torch.no_grad()
    def _from_autograd(self, name: str, parameter: Tensor) -> None:
        """A parameter's gradient for a single sample."""
        assert parameter.grad is not None
        total = self._sum(name)
        self._square(total, parameter.grad.to(total.dtype), 0)
        parameter.grad = None

    def _square(self, total: Tensor, gradient: Tensor, sample: int) -> None:
        other = gradient if self._weight is None else gradient * self._factor(sample)
        total.addcmul_(gradient, other)

    def _factor(self, sample: int) -> Tensor | float:
        return 1.0 if self._weight is None else self._weight[sample]

    def _sum(self, name: str) -> Tensor:
        if name not in self.sums:
            parameter = self.parameters[name]
            self.sums[name] = torch.zeros_like(parameter, dtype=_wide(parameter), requires_grad=False)
        return self.sums[name]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Modules may be run without being looked at."""
        self._asking = True
        try:
            yield
        finally:
            self._asking = False

    def _uses(self, output: Tensor, inputs: Iterable[Tensor]) -> Counter[str]:
        """How often each parameter enters the graph that leads from inputs to an output."""
        ends = {tensor.grad_fn for tensor in inputs}
        found: Counter[str] = Counter()
        pending = [output.grad_fn]
        done = set(ends)
        while pending:
            node = pending.pop()
            if node is None or node in done:
                continue
            done.add(node)
            for parent, _ in node.next_functions:
                leaf = self._names.get(id(getattr(parent, "variable", None)))
                if leaf is None:
                    pending.append(parent)
                else:
                    found[leaf] += 1
        return found
