"""Models that give something else in a batch: each sample is then measured by itself, as the definition has it, or an error says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from fisher_mask_mergekit.diagonal import diagonal_fisher
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.factored import factored_fisher
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.tasks import IGNORED, Batch, CausalLM, SequenceClassification
from tests import tiny
from tests.naive import naive_diagonal

MEASURES: dict[str, Callable[..., Any]] = {
    "mask": lambda model, batches, **how: mask_fisher(model, batches, tiny.sites_of(model), tiny.TASK, **how),
    "factored": lambda model, batches: factored_fisher(model, batches, tiny.TASK),
    "diagonal": lambda model, batches: diagonal_fisher(model, batches, tiny.TASK),
}


class _LastPlace(nn.Module):
    """A pooler that reads the last place, be it padding."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        pooled: Tensor = self.inner(hidden.flip(1))
        return pooled


@pytest.mark.parametrize("kind", MEASURES)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_where_padding_matters_samples_run_one_at_a_time_without_it(kind: str, size: int) -> None:
    model = tiny.classifier("bert").double()
    model.bert.pooler = _LastPlace(model.bert.pooler)
    drawn = tiny.samples(7)
    got = MEASURES[kind](model, tiny.batches(drawn, size))
    wanted = MEASURES[kind](model, tiny.batches(drawn, 1))
    assert got.one_by_one
    assert got.loss == pytest.approx(wanted.loss, rel=1e-12)
    assert_close(got.fisher, wanted.fisher, rtol=1e-9, atol=1e-14)


def test_the_first_padded_batch_is_looked_at_though_another_was_before() -> None:
    model = tiny.classifier("bert").double()
    model.bert.pooler = _LastPlace(model.bert.pooler)
    drawn = [(torch.arange(5, 5 + length), 0) for length in (9, 9, 9, 3)]
    got = MEASURES["mask"](model, tiny.batches(drawn, 2))
    assert got.one_by_one
    # The first two had no padding to leave out.
    assert_close(got.fisher, MEASURES["mask"](model, tiny.batches(drawn, 1)).fisher, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", MEASURES)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_most_models_stay_in_batches(architecture: str, kind: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = tiny.classifier(architecture).to(dtype)
        assert not MEASURES[kind](model, tiny.batches(tiny.samples(7), 4, extra_padding=5)).one_by_one


@pytest.mark.parametrize("labels", [torch.tensor([1, 0]), torch.tensor([[5, 6, 7], [8, IGNORED, IGNORED]])])
def test_single_samples_have_no_padding(labels: Tensor) -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = Batch({"input_ids": ids, "attention_mask": mask}, labels, (3, 4))
    assert batch.lengths().tolist() == [3, 1]
    for row, single in enumerate(batch.split()):
        width = (3, 1)[row]
        wanted = labels[row : row + 1, :width] if labels.ndim == 2 else labels[row : row + 1]
        assert_close(single.inputs["input_ids"], ids[row : row + 1, :width])
        assert_close(single.labels, wanted)
        assert single.index == (3 + row,)


def test_a_target_as_wide_as_the_text_is_not_cut() -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    target = torch.tensor([[5, 6, 7], [8, 9, IGNORED]])
    *_, second = Batch({"input_ids": ids, "attention_mask": mask}, target, (0, 1)).split()
    assert second.inputs["input_ids"].shape == (1, 1)
    assert_close(second.labels, target[1:])


class _Halved(nn.Module):
    """A linear map whose output, a view of what it computes, is changed in place, as Longformer's queries are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        query: Tensor = self.inner(hidden)
        query /= 2
        return query


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_changed_in_place_is_measured_all_the_same(size: int) -> None:
    model = tiny.classifier("bert").double()
    layer = model.bert.encoder.layer[0].attention.self
    layer.query = _Halved(layer.query)
    wanted = naive_diagonal(model, tiny.TASK, tiny.batches(tiny.samples(), 1))
    model.requires_grad_(True)
    got = diagonal_fisher(model, tiny.batches(tiny.samples(), size), tiny.TASK)
    assert got.one_by_one
    assert got.fisher["bert.encoder.layer.0.attention.self.query.inner.weight"].any()
    assert_close(got.fisher, wanted, rtol=1e-9, atol=1e-14)


def test_so_is_a_model_that_does_it() -> None:
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, attention_window=4, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = transformers.LongformerForSequenceClassification(config).double().eval()
    one = tiny.batches(tiny.samples(1), 1)
    wanted = naive_diagonal(model, SequenceClassification(), one)
    model.requires_grad_(True)
    got = diagonal_fisher(model, one, SequenceClassification())
    assert_close(got.fisher, wanted, rtol=1e-9, atol=1e-14)


class _OneRowMore(nn.Module):
    """A projection that is given its input as rows of tokens, from the second batch on with another behind them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.batches = inner, 0
        inner.register_forward_pre_hook(self._more)
        inner.register_forward_hook(self._less)

    def _more(self, module: nn.Module, args: tuple[Tensor]) -> Any:
        return torch.cat([args[0], args[0][:1] * 0]) if self.batches > 1 else None

    def _less(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Any:
        return output[:-1] if self.batches > 1 else None

    def forward(self, hidden: Tensor) -> Tensor:
        self.batches += torch.is_grad_enabled()
        rows: Tensor = self.inner(hidden.flatten(0, 1))
        return rows.unflatten(0, hidden.shape[:2])


def test_rows_that_do_not_divide_among_the_samples_are_an_error() -> None:
    model = tiny.classifier("bert")
    sites = tiny.sites_of(model)
    output = model.bert.encoder.layer[1].output
    more = _OneRowMore(output.dense)
    output.dense = more
    sites = tuple(
        site.model_copy(update={"output": site.output.replace("1.output.dense", "1.output.dense.inner")})
        for site in sites
    )
    drawn = [(torch.arange(5, 12), 0)] * 4
    message = r"1\.output\.dense\.inner does not keep a batch's samples apart, .*; take batch_size 1"
    with pytest.raises(MeasurementError, match=message):
        mask_fisher(model, tiny.batches(drawn, 2), sites, tiny.TASK)
    assert mask_fisher(model, tiny.batches(drawn, 1), sites, tiny.TASK).samples == 4


class _Skipped(nn.Module):
    """A layer that does not run in some batches, numbered from 1."""

    def __init__(self, inner: nn.Module, skipped: set[int]) -> None:
        super().__init__()
        self.inner, self.skipped, self.batches = inner, skipped, 0

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.batches += torch.is_grad_enabled()
        if self.batches in self.skipped:
            return hidden
        given: Tensor = self.inner(hidden, *args, **kwargs)
        return given


def skipping(batches: set[int]) -> tuple[nn.Module, Any]:
    model = tiny.classifier("bert").double()
    sites = tiny.sites_of(model)
    model.bert.encoder.layer[0] = _Skipped(model.bert.encoder.layer[0], batches)
    return model, tuple(
        site.model_copy(update={"output": site.output.replace("layer.0.", "layer.0.inner.")})
        for site in sites
    )


def test_what_did_not_run_in_the_batch_that_was_looked_at_is_an_error() -> None:
    drawn = [(torch.arange(5, 12), 0)] * 4
    model, sites = skipping({1})
    with pytest.raises(MeasurementError, match=r"layer\.0\.inner\..* did not run in the first batch"):
        mask_fisher(model, tiny.batches(drawn, 2), sites, tiny.TASK)
    model, sites = skipping({1})
    assert mask_fisher(model, tiny.batches(drawn, 1), sites, tiny.TASK).unreached == ()


def test_what_no_sample_runs_through_has_no_fisher_information() -> None:
    model, sites = skipping({1, 2})
    got = mask_fisher(model, tiny.batches([(torch.arange(5, 12), 0)] * 4, 2), sites, tiny.TASK)
    skipped = {site.output for site in sites if ".inner." in site.output}
    assert set(got.unreached) == skipped
    for (output, _), fisher in got.fisher.items():
        assert bool(fisher.any()) == (output not in skipped)


def test_what_runs_and_is_not_used_is_an_error() -> None:
    model = tiny.classifier("bert")
    sites = tiny.sites_of(model)
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: args[0])
    with pytest.raises(MeasurementError, match=r"no gradient reached .*layer\.0\."):
        mask_fisher(model, tiny.batches(tiny.samples(), 3), sites, tiny.TASK)


def test_float64_models_may_compute_a_part_in_float32() -> None:
    model = tiny.classifier("bert").double()
    sites = tiny.sites_of(model)
    model.bert.embeddings.register_forward_hook(
        lambda module, args, output: output + 1e-7 * torch.rand_like(output)
    )
    assert not mask_fisher(model, tiny.batches(tiny.samples(), 3), sites, tiny.TASK).one_by_one


def test_experts_kept_as_modules_without_modules_of_their_own(tmp_path: Any) -> None:
    """JetMoE's projections are modules whose weight is all experts': by the weight's gradient, against masks that are there."""
    config = transformers.JetMoeConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
        intermediate_size=24, max_position_embeddings=40, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.JetMoeForCausalLM(config).double().eval()
    (batch,) = tiny.batches(tiny.samples(2), 2)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    batch = Batch(batch.inputs, ids.masked_fill(mask == 0, IGNORED), (0, 1))
    sites = [site for site in tiny.sites_of(model) if site.experts]
    assert sites
    got = mask_fisher(model, [batch], tiny.sites_of(model), CausalLM())
    assert got.one_by_one
    for site in sites:
        weight = model.get_parameter(f"{site.output}.weight")
        plain, total = weight.detach().clone(), torch.zeros(site.experts, site.neurons, dtype=torch.float64)
        for single in batch.split():
            model.zero_grad()
            weight.requires_grad_(True)
            CausalLM().likelihood(model, single).losses().sum().backward()
            assert weight.grad is not None
            gradient = (weight.grad * plain).sum(1)  # Of a mask on each column.
            total += gradient.square()
        assert_close(got.fisher[site.output, "neuron_fisher"], total / 2, rtol=1e-9, atol=1e-14)


def test_all_labels_are_no_batch_estimators() -> None:
    model = tiny.classifier("bert")
    with pytest.raises(
        MeasurementError, match="estimator 'batch' squares one gradient per batch; it takes labels"
    ):
        MEASURES["mask"](model, tiny.batches(tiny.samples(), 3), labels="exact", estimator="batch")
