"""Every sample's gradients, summed as they are wanted while a backward pass goes by: hooks on all modules with parameters."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from fisher_mask_mergekit.apart import Seen
from fisher_mask_mergekit.blocks import wide_dtype
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.layer_gradients import (
    Call,
    Kind,
    Product,
    embedding_rows,
    kind_of,
    own_parameters,
    per_sample,
)
from fisher_mask_mergekit.summed import Summed
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task

_MOST_ALIKE = 4
"""Modules of the same input that wait for each other, and keep the gradients of what they gave meanwhile."""


@dataclass
class _Alike:
    """Linear modules that were given the same in a forward pass.

    Attributes:
        count: How many.
        arrived: Those that the gradient of their output has arrived for, in a backward pass.
    """

    count: int = 0
    arrived: list[Product] = field(default_factory=list)


@dataclass
class DiagonalGradients:
    """Hooks that add up every sample's gradients, parameter by parameter, while they go by.

    Attributes:
        model: The model.
        parameters: What is measured.
        summed: What is added of a gradient.
        tally: What was summed so far.
        samples: B of the forward pass.
        seen: If not None, gets what modules are given and give.
        uses: How often a parameter enters what its modules give, in a forward pass that only counts.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    summed: Summed
    tally: Tally[str] = field(default_factory=Tally)
    samples: int = 1
    seen: Seen | None = None
    uses: Counter[str] | None = None
    _kinds: dict[nn.Module, Kind] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)
    _arrived: dict[str, list[tuple[Call, str, Tensor]]] = field(default_factory=dict)
    _alike: dict[tuple[Node, int], _Alike] = field(default_factory=dict)
    _rows: int | None = None
    _weight: Tensor | None = None
    _hooks: ExitStack = field(default_factory=ExitStack)
    _shared: set[nn.Module] = field(default_factory=set)
    _counted: list[tuple[Call, Tensor, int]] = field(default_factory=list)
    _asking: bool = False
    _added: bool = False

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
            if self.tally.one_by_one:
                self.separate()
            yield self
        finally:
            self._hooks.close()
            self._forget()

    def run(self, task: Task, batch: Batch, seen: Seen | None = None) -> Likelihood:
        """A forward pass."""
        self.samples, self._rows, self._added = len(batch.index), None, False
        if torch.is_grad_enabled() and self.uses is None:  # Else it is only looked at, beside a pass.
            self._forget()
        self.seen, self._calls = seen, Counter()
        return task.likelihood(self.model, batch)

    def alone(self, task: Task, sample: Batch, seen: Seen) -> tuple[Likelihood, bool]:
        """A forward pass of one sample, and whether the loss sees every parameter only in what the hooked modules give."""
        if self.tally.one_by_one:
            with torch.no_grad():
                return self.run(task, sample, seen), True
        with ExitStack() as stack:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
                stack.callback(parameter.requires_grad_, False)
            self.uses = Counter()
            try:
                likelihood = self.run(task, sample, seen)
                entered = self._uses(likelihood.losses().sum(), ())
                intact = all(
                    # A hook on a view is lost when that is changed in place: what a linear map with a bias gives is one.
                    call.is_intact() and not (output._is_view() and output._version != version)
                    for call, output, version in self._counted
                )
                return likelihood, intact and all(count <= self.uses[name] for name, count in entered.items())
            finally:
                self.uses = None
                self._counted.clear()

    def separate(self) -> None:
        """From now on samples run one at a time, and autograd gives the gradients."""
        self._hooks.close()
        self.tally.one_by_one = True
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

    def overflowed(self) -> bool:
        """What a backward pass gave is in the sums: no loss is scaled."""
        return False

    def shrink_loss(self) -> None:
        """Never asked for."""

    def keep(self) -> None:
        """Everything was added as it came; the graph may go."""
        self._forget()

    def can_forget(self) -> bool:
        """What a backward pass gave is in the sums: a copy of them would double the memory."""
        return not self._added

    def end_batch(self, samples: int) -> None:
        """Nothing is kept for a whole batch."""

    def _after(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What a module gives goes on as it is, but that a gradient has to arrive."""
        if self._asking or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        names = [self._names[id(parameter)] for parameter in own_parameters(module).values()]
        if self.uses is not None:
            call = Call(module, "other", 1, args, kwargs)
            self._counted.append((call, output, output._version))
            self.uses += self._uses(output, call.tensors())
        call, output = self._call(module, args, kwargs, output)
        if self.seen is not None:
            run = f"{path}, run {self._calls[names[0]]}"
            for place, tensor in enumerate((output, *call.tensors())):
                self.seen.add(f"{run}, tensor {place}", tensor)
        self._calls.update(names)
        if torch.is_grad_enabled() and self.uses is None:
            if not output.requires_grad:
                # The weights are frozen: here autograd starts. A leaf itself must not be changed in place.
                output = output.detach().requires_grad_().clone()
            call = call.lean(args[0] if args else None)
            self._note(call)
            output.register_hook(partial(self._arrive, call, self._calls))
        return output

    def _call(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> tuple[Call, Tensor]:
        """A module's run, and what it gives: a row per sample also where one stands for all."""
        if module not in self._kinds:
            with self._aside():
                self._kinds[module] = kind_of(module, args, kwargs, output)
        kind = self._kinds[module]
        if kind == "embedding" and args[0].ndim == 2:
            ids = args[0]
            # Positions, the same for all samples. A table of distances is no such thing: [T, T].
            if len(ids) == 1 and (ids.shape[1] > 1 or module in self._shared):
                self._shared.add(module)
                rows = self._rows or self.samples
                args, output = (ids.expand(rows, -1),), output.expand(rows, -1, -1)
            # What is read first is tokens; several rows per sample, where it is a choice among several.
            self._rows = self._rows or len(args[0])
        args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        kwargs = {
            key: value.detach() if isinstance(value, Tensor) else value for key, value in kwargs.items()
        }
        return Call(module, kind, self.samples, args, kwargs), output

    def _note(self, call: Call) -> None:
        """A linear module's run: of several with the same input, that is looked at only once."""
        if call.source is None:
            return
        if call.source not in self._alike:
            alike = self._alike[call.source] = _Alike()
            # If the loss does not see all of them, this is the last moment that the input can be made.
            call.source[0].register_prehook(lambda _: self._add_alike(alike))
        self._alike[call.source].count += 1

    def _forget(self) -> None:
        """What is of a graph."""
        self._arrived.clear()
        for alike in self._alike.values():
            alike.arrived.clear()  # They hold what holds the hook.
        self._alike.clear()

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
            is_last = len(waiting) + 1 == calls[name]
            waiting.append((call if is_last else call.kept(), own, gradient))
            if is_last:
                self._add(name)

    @torch.no_grad()
    def _add(self, name: str) -> None:
        """Add what arrived for a parameter; several runs' gradients of a sample are summed first."""
        arrived = self._arrived.pop(name)
        total, (call, own, gradient) = self._sum(name), arrived[0]
        # A model's layers may lie on several devices.
        weight = None if self._weight is None else self._weight.to(total.device)
        with self._aside():
            if len(arrived) == 1 and call.kind == "embedding":
                self.summed.add_rows(name, total, *embedding_rows(call, gradient), weight)
                return
            if len(arrived) == 1 and call.kind in ("linear", "transposed") and own == "weight":
                self._add_product(Product(name, call, gradient))
                return
            several = [per_sample(*one) for one in arrived]
            if len(several) == 1 and isinstance(several[0], Tensor):
                self.summed.add(name, total, several[0], weight)
                return
            for sample, parts in enumerate(zip(*several, strict=True)):
                factor = None if weight is None else weight[sample]
                self.summed.add_one(name, total, sum(parts[1:], start=parts[0]), factor)

    def _add_product(self, product: Product) -> None:
        """Add a linear module's, once what was given the same has arrived too; no more than a few wait."""
        source = product.call.source
        alike = _Alike(1) if source is None else self._alike[source]
        alike.arrived.append(product)
        if len(alike.arrived) == min(alike.count, _MOST_ALIKE):
            self._add_alike(alike)

    @torch.no_grad()
    def _add_alike(self, alike: _Alike) -> None:
        """Add what has arrived."""
        products, alike.arrived = alike.arrived, []
        if products:
            totals = [self._sum(product.name) for product in products]
            weight = None if self._weight is None else self._weight.to(totals[0].device)
            self.summed.add_matrices(products, totals, weight)

    @torch.no_grad()
    def _from_autograd(self, name: str, parameter: Tensor) -> None:
        """A parameter's gradient for a single sample."""
        assert parameter.grad is not None
        gradient = parameter.grad.to(wide_dtype(parameter))
        factor = None if self._weight is None else self._weight[0].to(gradient.device)
        self.summed.add_one(name, self._sum(name), gradient, factor)
        parameter.grad = None

    def _sum(self, name: str) -> Tensor:
        """What to add to."""
        self._added = True
        sums = self.tally.sums
        if name not in sums:
            sums[name] = self.summed.zeros(name, self.parameters[name])
        return sums[name]

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
