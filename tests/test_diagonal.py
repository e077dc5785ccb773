"""The full diagonal Fisher information against its definition: one sample at a time, by autograd, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fisher_mask_mergekit import diagonal_gradients
from fisher_mask_mergekit.diagonal import DiagonalFisher, diagonal_fisher
from fisher_mask_mergekit.errors import MeasurementError
from tests import tiny
from tests.families import FAMILIES, Family, build
from tests.naive import naive_diagonal
from tests.test_architectures import FLOAT32, TASK, UNPADDED, batches

# In these, a parameter enters the loss otherwise than through the module that holds it, or a module is given
# what does not hold the samples one after the other: relative positions, experts' routers, state spaces. Or padding
# matters: Canine takes every fourth character's place.
ONE_BY_ONE = {
    "mpnet", "deberta-v1", "deberta-v2", "deberta-v3", "lfm2", "lfm2-adjusted", "mamba", "diffllama", "mamba2",
    "mixtral", "qwen3-moe", "qwen3-moe-dense-first", "glm4-moe", "granite-hybrid", "granite-hybrid-dense",
    "qwen2-moe", "qwen2-moe-dense-first", "olmoe", "phimoe", "qwen3-next", "deepseek-v2", "deepseek-v2-lite",
    "deepseek-v3", "deepseek-v3-dense-first", "deepseek-v3-moonlight", "jamba", "jamba-experts-everywhere",
    "gpt-oss", "t5-v1.0", "t5-v1.1", "whisper", "mt5", "t5-encoder", "bart", "gemma3-vl", "mistral3", "llama4",
    "qwen3-vl-moe", "canine",
}  # fmt: skip


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert got.keys() == wanted.keys()
    largest = max(float(value.max()) for value in wanted.values())
    assert largest > 0
    for name, value in wanted.items():
        # Relative to the tensor's largest value: an element whose gradients cancel has no digits of its own. Nor
        # has a key's bias, which moves all scores alike: its gradients are nothing but what was rounded.
        top = max(float(value.max()), 1e-12 * largest)
        assert_close(got[name].double(), value.double(), rtol=rtol, atol=rtol * top)


def measure(model: nn.Module, size: int = 3, count: int = 7, **how: Any) -> DiagonalFisher:
    return diagonal_fisher(model, tiny.batches(tiny.samples(count), size), tiny.TASK, **how)


def naive(model: nn.Module, count: int = 7, **how: Any) -> dict[str, Tensor]:
    return naive_diagonal(model, tiny.TASK, tiny.batches(tiny.samples(count), 1), **how)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_equals_the_definition(family: Family) -> None:
    model = build(family) if family.name in FLOAT32 else build(family).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # The others have no float64 on a processor.
    if family.name in UNPADDED:
        family = replace(family, inputs="text without mask")
    singles = list(batches(family, (1,) * 5))
    # Images in patches have no batch axis.
    together = singles if family.inputs == "text and patches" else list(batches(family, (3, 2)))
    got = diagonal_fisher(model, together, TASK)
    # Where the model itself computes in float32, rounding hangs on what is beside a sample.
    rtol = 1e-3 if family.name in FLOAT32 else 1e-6 if family.name == "afmoe" else 1e-10
    if got.one_by_one:  # Without padding, which moves what is rounded.
        singles = [single.trimmed() for single in singles]
    assert_same(got.fisher, naive_diagonal(model, TASK, singles), rtol)
    # That may look like mixing, in float64.
    assert got.one_by_one == (family.name in ONE_BY_ONE) or family.name == "afmoe"


@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_labels(architecture: str, labels: Any) -> None:
    model = tiny.classifier(architecture).double()
    got = measure(model, labels=labels, seed=3)
    assert_same(got.fisher, naive(model, labels=labels, seed=3))
    assert not got.one_by_one
    likelihoods = [tiny.TASK.likelihood(model, one) for one in tiny.batches(tiny.samples(), 1)]
    assert got.loss == pytest.approx(sum(float(one.losses().detach()) for one in likelihoods) / 7, rel=1e-9)
    assert (got.samples, got.accuracy) == (
        7,
        pytest.approx(sum(float(one.correct()) for one in likelihoods) / 7),
    )


def test_one_by_one_takes_the_same_labels() -> None:
    for labels in ("sampled", "exact"):
        model = _Bare(tiny.classifier("bert").double())
        got = measure(model, labels=labels)
        assert got.one_by_one
        assert_same(got.fisher, naive(model, labels=labels))


@pytest.mark.parametrize("architecture", ["bert", "mistral"])
def test_batch_size_order_padding_and_doubling_change_nothing(architecture: str) -> None:
    model = tiny.classifier(architecture).double()
    drawn = tiny.samples(8)
    wanted = naive(model, 8)
    for variant in (
        tiny.batches(drawn, 8),
        tiny.batches(drawn, 1),
        tiny.batches(drawn[::-1], 3),
        tiny.batches(drawn, 4, extra_padding=9),
        tiny.batches(drawn + drawn, 5),
        [*tiny.batches(drawn[:1], 1), *tiny.batches(drawn[1:], 7)],
    ):
        assert_same(diagonal_fisher(model, variant, tiny.TASK).fisher, wanted)


def test_a_batch_that_does_not_fit_into_memory_runs_in_halves_while_nothing_of_it_was_added() -> None:
    model = tiny.classifier("bert").double()

    def full(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("no memory")

    handle = model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(full)
    got = measure(model, size=7)
    handle.remove()
    assert_same(got.fisher, naive(model))

    def late(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if len(output) > 2 and output.requires_grad:
            output.register_hook(lambda gradient: full(module, (gradient,)))

    model.bert.encoder.layer[0].intermediate.register_forward_hook(late)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        measure(model, size=7)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def test_a_first_batch_of_one_sample_does_not_decide_for_larger_ones() -> None:
    model = build(family_named("mpnet")).double()
    got = diagonal_fisher(model, list(batches(family_named("mpnet"), (1, 4))), TASK)
    assert got.one_by_one
    assert_same(got.fisher, naive_diagonal(model, TASK, batches(family_named("mpnet"), (1,) * 5)))


def test_an_embedding_that_stands_for_padding_has_no_gradient_even_where_it_counts() -> None:
    model = tiny.classifier("bert").double()
    drawn = [
        (ids * (torch.arange(len(ids)) % 2), label) for ids, label in tiny.samples()
    ]  # Padding in between.
    got = diagonal_fisher(model, tiny.batches(drawn, 3), tiny.TASK).fisher
    assert_same(got, naive_diagonal(model, tiny.TASK, tiny.batches(drawn, 1)))
    assert float(got["bert.embeddings.word_embeddings.weight"][0].max()) == 0


class _Bare(nn.Module):
    """A classifier with a parameter that no module of its own holds."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=next(inner.parameters()).dtype))

    def forward(self, **inputs: Tensor) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits * self.gain
        return output


class _Twice(nn.Module):
    """A classifier that uses a weight behind its module's back, once more than the module does."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **inputs: Tensor) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits + output.logits @ self.inner.classifier.weight[:, :3]
        return output


class _InPlace(nn.Module):
    """A layer whose input is changed after it has run, which only the gradient of its weight would see."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        given = hidden.clone()
        output = self.inner(given)
        with torch.no_grad():
            given.mul_(2)
        return output


@pytest.mark.parametrize("wrapped", [_Bare, _Twice])
def test_a_parameter_used_otherwise_is_noticed(wrapped: Callable[[Any], nn.Module]) -> None:
    model = wrapped(tiny.classifier("bert").double())
    for size in (3, 1):
        got = measure(model, size)
        assert got.one_by_one
        assert_same(got.fisher, naive(model))


def test_an_input_changed_in_place_is_noticed() -> None:
    model = tiny.classifier("bert").double()
    model.dropout = _InPlace(nn.Linear(32, 32).double())
    # Autograd refuses to give the gradient that would be wrong.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        measure(model)


def test_several_runs_of_a_module_and_tied_weights_add_up_before_they_are_squared() -> None:
    # ALBERT's layers are one, and a chunked FFN runs once for every token.
    for name in ("albert", "bert-chunked", "llama-tied", "gpt2", "bert-masked-lm"):
        family = family_named(name)
        model = build(family).double()
        got = diagonal_fisher(model, list(batches(family, (3, 2))), TASK)
        assert not got.one_by_one
        assert_same(got.fisher, naive_diagonal(model, TASK, batches(family, (1,) * 5)))


class _Odd(nn.Module):
    """Takes a weight's softmax: a weight and a bias like a norm's, that are nothing like it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32).double())
        self.bias = nn.Parameter(torch.zeros(32).double())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.softmax(self.weight, -1) + self.bias.square()


@pytest.mark.parametrize("how", ["method", "hook", "subclass"])
def test_a_layer_norm_that_gives_something_else_is_measured_as_it_is(how: str) -> None:
    model = tiny.classifier("bert").double()
    norm = model.bert.encoder.layer[0].output.LayerNorm
    plain = type(norm).forward
    if how == "method":
        norm.forward = lambda hidden: plain(norm, hidden) * norm.weight
    elif how == "hook":
        norm.register_forward_hook(lambda module, args, output: output * 3)
    else:
        norm.__class__ = type(
            "Tripled", (nn.LayerNorm,), {"forward": lambda self, hidden: plain(self, hidden * 3)}
        )
    assert_same(measure(model).fisher, naive(model))


def test_a_module_that_only_looks_like_a_norm_is_left_to_autograd() -> None:
    model = tiny.classifier("bert").double()
    model.bert.embeddings.LayerNorm = nn.Sequential(model.bert.embeddings.LayerNorm, _Odd())
    got = measure(model)
    assert not got.one_by_one
    assert_same(got.fisher, naive(model))


@pytest.mark.parametrize("name", ["bert-sequence", "gemma", "llama"])
def test_float32_and_bfloat16_weights_agree_with_float64(name: str) -> None:
    family = family_named(name)
    wanted = naive_diagonal(build(family).double(), TASK, batches(family, (1,) * 5))
    for dtype, allowed in ((torch.float32, 1e-3), (torch.bfloat16, 0.4)):
        got = diagonal_fisher(build(family).to(dtype), list(batches(family, (3, 2))), TASK).fisher
        assert {value.dtype for value in got.values()} == {torch.float32}
        for part, value in wanted.items():
            if "key.bias" not in part:  # Nothing but what was rounded.
                assert float(got[part].sum()) == pytest.approx(float(value.sum()), rel=allowed), part


@pytest.mark.parametrize("wrapped", [lambda model: model, _Bare])
def test_the_model_is_left_as_it_was(wrapped: Callable[[Any], nn.Module]) -> None:
    inner = tiny.classifier("bert").train()
    inner.bert.embeddings.eval()
    inner.classifier.weight.requires_grad_(False)
    inner.classifier.bias.grad = torch.ones(3)
    model = wrapped(inner)
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got = measure(model)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert_close(inner.classifier.bias.grad, torch.ones(3), rtol=0, atol=0)
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (
        float(got.fisher[next(name for name in got.fisher if name.endswith("classifier.weight"))].max()) > 0
    )


def test_a_parameter_that_no_gradient_reaches_has_none() -> None:
    model = tiny.classifier("bert").double()
    model.unused = nn.Linear(3, 2).double()
    fisher = measure(model).fisher
    assert_close(fisher["unused.weight"], torch.zeros(2, 3).double(), rtol=0, atol=0)
    # Padding's embedding has no gradient either.
    assert_close(
        fisher["bert.embeddings.word_embeddings.weight"][0], torch.zeros(32).double(), rtol=0, atol=0
    )


def test_memory_is_that_of_one_parameter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives is added at once: never more than one module's gradients wait, but for tied ones."""
    model, most = tiny.classifier("bert"), 0
    add = diagonal_gradients.DiagonalGradients._add

    def counted(self: Any, name: str) -> None:
        nonlocal most
        most = max(most, sum(len(calls) for calls in self._arrived.values()))
        add(self, name)

    monkeypatch.setattr(diagonal_gradients.DiagonalGradients, "_add", counted)
    measure(model)
    assert most == 1


class _Noise(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden)


def test_a_random_layer_is_caught() -> None:
    model = tiny.classifier("bert")
    model.bert.embeddings.LayerNorm = nn.Sequential(model.bert.embeddings.LayerNorm, _Noise())
    with pytest.raises(MeasurementError, match="the model has a random layer"):
        measure(model)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(MeasurementError, match="no sample"):
        diagonal_fisher(tiny.classifier("bert"), [], tiny.TASK)


def test_a_gradient_that_is_not_finite_names_the_parameter() -> None:
    model = tiny.classifier("bert")
    with torch.no_grad():
        model.classifier.weight.mul_(1e30)
    with pytest.raises(MeasurementError, match=r"the gradient of bert\.\S+ at \[.*\] is not finite"):
        measure(model)
