"""Means of rows and columns of the Fisher information against their definition: the full diagonal, made by autograd."""

import weakref
from collections import Counter
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from fisher_mask_mergekit import diagonal_gradients
from fisher_mask_mergekit import marginals as module
from fisher_mask_mergekit.diagonal import diagonal_fisher
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.factored import FactoredFisher, factored_fisher
from fisher_mask_mergekit.factors import Split
from fisher_mask_mergekit.layer_gradients import Call
from fisher_mask_mergekit.marginals import Marginals, Side, marginals, row_axes
from tests import tiny
from tests.families import build
from tests.naive import naive_diagonal
from tests.test_architectures import TASK, batches
from tests.test_diagonal import _Bare, assert_same, family_named

# Grouped queries, fused projections, matrices stored [in, out], experts, convolutions, tied weights, layers that run
# again, vision; measured in batches or one sample at a time.
CHOSEN = (
    "bert-sequence", "bert-chunked", "bert-masked-lm", "albert", "gpt2", "llama", "llama-tied", "phi3", "falcon-40b", "bloom",
    "mpnet", "mixtral", "qwen3-moe", "mamba", "whisper", "t5-v1.1",
)  # fmt: skip


def naive_factors(full: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Means over rows and over columns of the full diagonal."""
    found, axes = {}, row_axes(model)
    for name, value in full.items():
        split = Split.of(value.shape, axes[name])
        matrices = value.reshape(split.groups, split.rows, split.columns)
        found[name] = torch.cat((matrices.mean(2), matrices.mean(1)), 1)
    return found


def measure(model: nn.Module, size: int = 3, count: int = 7, **how: Any) -> FactoredFisher:
    return factored_fisher(model, tiny.batches(tiny.samples(count), size), tiny.TASK, **how)


def naive(model: nn.Module, count: int = 7, **how: Any) -> dict[str, Tensor]:
    full = naive_diagonal(model, tiny.TASK, tiny.batches(tiny.samples(count), 1), **how)
    return naive_factors(full, model)


@pytest.mark.parametrize("name", CHOSEN)
def test_equals_the_definition(name: str) -> None:
    family = family_named(name)
    model = build(family).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # The others have no float64 on a processor.
    got = factored_fisher(model, list(batches(family, (3, 2))), TASK)
    full = naive_diagonal(model, TASK, list(batches(family, (1,) * 5)))
    assert_same(got.fisher, naive_factors(full, model))
    assert got.one_by_one == (name in ("mpnet", "mixtral", "qwen3-moe", "mamba", "whisper", "t5-v1.1"))


@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_labels(architecture: str, labels: Any) -> None:
    model = tiny.classifier(architecture).double()
    got = measure(model, labels=labels, seed=3)
    assert_same(got.fisher, naive(model, labels=labels, seed=3))
    assert not got.one_by_one
    one_by_one = _Bare(model)
    assert_same(measure(one_by_one, labels=labels).fisher, naive(one_by_one, labels=labels))


@pytest.mark.parametrize(
    "architecture", [name for name in tiny.ARCHITECTURES if name not in ("bert", "llama")]
)
def test_rows_columns_biases_norms_and_embeddings(architecture: str) -> None:
    model = tiny.classifier(architecture).double()
    got = measure(model)
    assert_same(got.fisher, naive(model))
    full = naive_diagonal(model, tiny.TASK, tiny.batches(tiny.samples(), 1))
    vectors = {name: value for name, value in full.items() if value.ndim == 1}
    assert_same({name: got.fisher[name][0, : len(value)] for name, value in vectors.items()}, vectors)
    assert got.shapes == {name: tuple(value.shape) for name, value in full.items()}
    assert set(got.axes.values()) == {0}


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
    ):
        assert_same(factored_fisher(model, variant, tiny.TASK).fisher, wanted)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 7, 9), (3, 40, 60), (30, 40, 60), (5, 1, 8)])
def test_with_and_without_the_gradient_it_is_the_same(tokens: int, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(4, tokens, size).double() for size in (rows, columns))
    squares = (left.mT @ right).square()
    got = marginals(Side(left), Side(right))
    assert_close(got, (squares.sum(2), squares.sum(1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("without", [True, False])
def test_both_ways_give_the_definition_in_parts_of_a_batch(
    without: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.classifier("bert").double()
    monkeypatch.setattr(module, "_without", lambda tokens, rows, columns: without)
    monkeypatch.setattr(module, "_CHUNK", 700)
    assert_same(measure(model, 7, labels="exact").fisher, naive(model, labels="exact"))


class _Aside(nn.Module):
    """A layer that gives its input to another one too, whose output nobody sees."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.aside = inner, nn.Linear(32, 5).double()

    def forward(self, hidden: Tensor) -> Tensor:
        self.aside(hidden)
        return self.inner(hidden)


@pytest.mark.parametrize("labels", ["data", "exact"])
def test_a_layer_that_the_loss_does_not_see_keeps_none_waiting_that_is_given_the_same(labels: Any) -> None:
    model = tiny.classifier("bert").double()
    attention = model.bert.encoder.layer[1].attention.self
    attention.key = _Aside(attention.key)
    attention.value = Conv1D(32, 32).double()
    got = measure(model, labels=labels)
    assert not got.one_by_one
    assert_same(got.fisher, naive(model, labels=labels))
    assert float(got.fisher["bert.encoder.layer.1.attention.self.key.aside.weight"].sum()) == 0


class _Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_no_graph_outlives_its_batch() -> None:
    model = tiny.classifier("bert").double()
    saved: list[weakref.ref[_Saved]] = []
    alive: list[int] = []

    def pack(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor.detach())  # Else what an operation gave would hold the operation.
        saved.append(weakref.ref(kept))
        return kept

    def count(*_: Any) -> None:
        alive.append(sum(one() is not None for one in saved))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        factored_fisher(model, tiny.batches(tiny.samples(7), 3), tiny.TASK, labels="exact", on_batch=count)
    assert saved
    assert alive == [0] * 3


def test_a_layer_that_is_given_no_tokens_has_no_gradient() -> None:
    model = tiny.classifier("bert").double()
    attention = model.bert.encoder.layer[1].attention.self
    attention.key = _Empty(attention.key)
    assert_same(measure(model).fisher, naive(model))


class _Empty(nn.Module):
    """A layer that also runs two others on none of its tokens, with and without an axis of samples, and adds what they give."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.unhit, self.unrouted = inner, nn.Linear(32, 32).double(), nn.Linear(32, 32).double()

    def forward(self, hidden: Tensor) -> Tensor:
        found = torch.cat((self.inner(hidden), self.unhit(hidden[:, :0])), 1)
        return found + self.unrouted(hidden.flatten(0, 1)[:0]).sum(0)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many linear layers were added at once, and how often."""
    counted: Counter[int] = Counter()
    add = Marginals.add_matrices

    def counting(self: Marginals, products: Any, *rest: Any) -> None:
        counted[len(products)] += 1
        add(self, products, *rest)

    monkeypatch.setattr(Marginals, "add_matrices", counting)
    return counted


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_several_layers_are_given_is_looked_at_once(name: str, together: Counter[int]) -> None:
    measure(tiny.classifier(name), 7)
    # Of both layers: queries, keys and values; what is alone in what it is given; of llama gate and up.
    assert together == ({3: 2, 1: 2 * 3 + 2} if name == "bert" else {3: 2, 2: 2, 1: 2 * 2 + 1})


def test_no_more_than_a_few_layers_wait_for_each_other(
    together: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.classifier("bert").double()
    wanted = measure(model, 7).fisher
    together.clear()
    monkeypatch.setattr(diagonal_gradients, "_MOST_ALIKE", 2)
    assert_same(measure(model, 7).fisher, wanted)
    assert together == {2: 2, 1: 2 * 4 + 2}


def test_what_several_layers_are_given_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = Counter[str](), Call.given

    def counted(call: Call, rows: slice) -> Tensor:
        made[call.kind] += 1
        return given(call, rows)

    monkeypatch.setattr(Call, "given", counted)
    measure(tiny.classifier("bert"), 7)
    # Of both layers: attention's queries, keys and values, its output, both of the FFN; the pooler and the classifier.
    assert made == {"linear": 2 * 4 + 2}


def test_tokens_that_no_gradient_reaches_are_left_out_where_they_are_many() -> None:
    torch.manual_seed(0)
    gradient, given = Side(torch.randn(3, 20, 9)), Side(torch.randn(3, 20, 4))
    assert not module._is_sparse(gradient.values)
    assert module._reached(gradient, given) == (gradient, given)
    gradient.values[:, :2] = 0
    gradient.values[:, 18:] = 0  # Few.
    assert module._reached(gradient, given) == (gradient, given)
    gradient.values[:, 6:] = 0
    assert module._is_sparse(gradient.values)
    left, right = module._reached(gradient, given)
    for got, side in ((left, gradient), (right, given)):
        assert_close(got.values, side.values[:, 2:6], rtol=0, atol=0)
    gradient.values[1, 15, 8] = 1  # Nothing of it where one looks first.
    assert module._reached(gradient, given) == (gradient, given)
    gradient.values[:] = 0
    assert module._reached(gradient, given)[1].values.shape == (3, 0, 4)


def test_sums_that_cancel_are_never_negative() -> None:
    """Tokens that are alike, and whose gradients add up to nothing: all that is left is what was rounded."""
    torch.manual_seed(0)
    right = torch.randn(1, 1, 600).expand(1, 8, 600) * 1000
    left = torch.randn(1, 8, 600)
    left = left - left.mean(1, keepdim=True)
    for sums in marginals(Side(left), Side(right)):
        assert float(sums.min()) >= 0


@pytest.mark.parametrize("name", ["bert-sequence", "gemma", "llama"])
def test_float32_and_bfloat16_weights_agree_with_float64(name: str) -> None:
    family = family_named(name)
    model = build(family).double()
    wanted = naive_factors(naive_diagonal(model, TASK, batches(family, (1,) * 5)), model)
    for dtype, allowed in ((torch.float32, 1e-3), (torch.bfloat16, 0.4)):
        got = factored_fisher(build(family).to(dtype), list(batches(family, (3, 2))), TASK).fisher
        assert {value.dtype for value in got.values()} == {torch.float64}
        for part, value in wanted.items():
            if "key.bias" not in part:  # Nothing but what was rounded.
                assert float(got[part].sum()) == pytest.approx(float(value.sum()), rel=allowed), part


def test_what_was_summed_before_goes_on() -> None:
    model = tiny.classifier("bert").double()
    drawn = tiny.samples(7)
    kept: list[Any] = []
    first = tiny.batches(drawn[:4], 4)
    factored_fisher(model, first, tiny.TASK, on_batch=lambda batch, tally: kept.append(deepcopy(tally)))
    rest = tiny.batches(drawn[4:], 3)
    assert_same(factored_fisher(model, rest, tiny.TASK, tally=kept[0]).fisher, naive(model))


def test_it_says_what_the_full_diagonal_says() -> None:
    """Loss, accuracy, and the mean of every parameter; and what no gradient reaches has none."""
    model = tiny.classifier("bert").double()
    model.unused = nn.Linear(3, 2).double()
    got, full = measure(model), diagonal_fisher(model, tiny.batches(tiny.samples(), 3), tiny.TASK)
    assert (got.samples, got.loss, got.accuracy) == (full.samples, full.loss, full.accuracy)
    for name, value in full.fisher.items():
        rows = got.fisher[name][:, : len(value)]
        assert_close(rows.mean(), value.mean(), rtol=1e-10, atol=1e-30)
    assert_close(got.fisher["unused.weight"], torch.zeros(1, 5).double(), rtol=0, atol=0)


def test_how_parameters_fall_into_rows() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3))
    model.experts = nn.Parameter(torch.ones(5, 2, 3))
    model.positions = nn.Parameter(torch.ones(1, 7, 3))
    model.scale = nn.Parameter(torch.tensor(1.0))
    axes = row_axes(model)
    splits = {name: Split.of(value.shape, axes[name]) for name, value in model.named_parameters()}
    assert splits == {
        "0.weight": Split(1, 2, 3), "0.bias": Split(1, 2, 1), "1.weight": Split(1, 6, 12), "1.bias": Split(1, 6, 1),
        "2.weight": Split(1, 6, 36), "2.bias": Split(1, 6, 1), "experts": Split(5, 2, 3), "positions": Split(1, 7, 3),
        "scale": Split(1, 1, 1),
    }  # fmt: skip


def test_no_sample_and_a_gradient_that_is_not_finite_are_errors() -> None:
    model = tiny.classifier("bert")
    with pytest.raises(MeasurementError, match="no sample"):
        factored_fisher(model, [], tiny.TASK)
    with torch.no_grad():
        model.classifier.weight.mul_(1e30)
    with pytest.raises(MeasurementError, match=r"the gradient of bert\.\S+ at \[.*\] is not finite"):
        measure(model)


def naive_tokens(model: nn.Module, labels: str, count: int = 7) -> dict[str, Tensor]:
    """Of every linear module's matrix, the mean over samples of the sum over tokens of the squares of each token's gradient."""
    probability = torch.ones(())
    sums: dict[str, Tensor] = {}
    given: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        given[module] = args[0].detach()

    def add(path: str, module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        squares = (outputs[0][..., None] * given[module][..., None, :]).square()
        squares = squares.mT if isinstance(module, Conv1D) else squares
        sums[path] = sums.get(path, torch.zeros(())) + probability * squares.flatten(0, -3).sum(0)

    for path, part in model.named_modules():
        if isinstance(part, nn.Linear | Conv1D):
            part.register_forward_hook(keep)
            part.register_full_backward_hook(partial(add, path))
    for batch in tiny.batches(tiny.samples(count), 1):
        likelihood = tiny.TASK.likelihood(model, batch)
        terms = likelihood.expectation() if labels == "exact" else [(None, torch.ones(1))]
        for outcomes, weight in terms:
            probability = weight[0]
            likelihood.losses(outcomes).sum().backward(retain_graph=True)
    return {f"{path}.weight": total / count for path, total in sums.items()}


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_by_token_a_matrixs_squares_are_each_tokens(
    architecture: str, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.classifier(architecture).double()
    wanted = naive(model, labels=labels) | naive_factors(naive_tokens(deepcopy(model), labels), model)
    assert_same(measure(model, by_token=True, labels=labels).fisher, wanted)
    monkeypatch.setattr(module, "_CHUNK", 700)
    assert_same(measure(model, by_token=True, size=7, labels=labels).fisher, wanted)


@pytest.mark.parametrize("labels", ["data", "exact"])
def test_by_token_it_makes_no_difference_which_way_round_a_matrix_is(labels: str) -> None:
    model = tiny.classifier("bert").double()
    torch.manual_seed(0)
    model.bert.encoder.layer[1].attention.self.key = Conv1D(32, 32).double()
    model.bert.encoder.layer[1].output.dense = Conv1D(32, 48).double()
    wanted = naive(model, labels=labels) | naive_factors(naive_tokens(deepcopy(model), labels), model)
    assert_same(measure(model, by_token=True, labels=labels).fisher, wanted)


def test_by_token_a_layer_that_is_given_no_tokens_has_no_gradient() -> None:
    model = tiny.classifier("bert").double()
    model.bert.encoder.layer[1].attention.self.key = _Empty(model.bert.encoder.layer[1].attention.self.key)
    got = measure(model, by_token=True, labels="exact")
    assert not got.one_by_one
    for name in ("unhit", "unrouted"):
        assert float(got.fisher[f"bert.encoder.layer.1.attention.self.key.{name}.weight"].sum()) == 0


class _FirstOnly(nn.Module):
    """A layer that runs another one on its first token alone, which then has no axis but its features'."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.first = inner, nn.Linear(32, 48).double()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) + self.first(hidden.reshape(-1, 32)[0])[:32]


@pytest.mark.parametrize("by_token", [True, False])
def test_a_layer_that_is_given_a_single_vector(by_token: bool) -> None:
    model = tiny.classifier("bert").double()
    model.bert.encoder.layer[1].attention.self.key = _FirstOnly(
        model.bert.encoder.layer[1].attention.self.key
    )
    got = measure(model, by_token=by_token, labels="exact", size=1).fisher
    name = "bert.encoder.layer.1.attention.self.key.first.weight"
    assert_same({name: got[name]}, {name: naive(model, labels="exact")[name]})


def test_by_token_where_several_runs_share_a_matrix_or_samples_run_one_at_a_time() -> None:
    model = build(family_named("albert")).double()
    samples = list(batches(family_named("albert"), (3, 2)))
    shared = factored_fisher(model, samples, TASK, by_token=True).fisher
    plain = factored_fisher(model, samples, TASK).fisher
    ends = ("query.weight", "dense.bias", "word_embeddings.weight")
    assert_same(
        {n: v for n, v in shared.items() if n.endswith(ends)},
        {n: v for n, v in plain.items() if n.endswith(ends)},
    )
    with pytest.raises(MeasurementError, match="a token's cannot either; take estimator sample"):
        measure(_Bare(tiny.classifier("bert")), by_token=True)
