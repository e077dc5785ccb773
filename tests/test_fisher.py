"""The pre-pass against its definition: explicit masks on the weights, one sample at a time, in float64."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.fisher import MaskFisher, mask_fisher
from fisher_mask_mergekit.sites import NodeKey, Site
from tests import naive, tiny

Sample = tuple[Tensor, int]


def naive_fisher(
    model: nn.Module, drawn: list[Sample], sites: Iterable[Site], **how: str
) -> dict[NodeKey, Tensor]:
    return naive.naive_fisher(model, tiny.TASK, tiny.batches(drawn, 1), sites, **how)


def assert_same(got: MaskFisher, wanted: dict[NodeKey, Tensor], rtol: float = 1e-10) -> None:
    assert got.fisher.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float(value.min()) >= 0
        assert float(value.max()) > 0
        # Relative to the vector's largest value: a node whose gradients cancel has no digits of its own.
        assert_close(
            got.fisher[key],
            value.double(),
            rtol=rtol,
            atol=rtol * float(value.max()),
        )


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_equals_the_definition(architecture: str, placement: Any) -> None:
    model = tiny.classifier(architecture).double()
    drawn = tiny.samples()
    sites = tiny.sites_of(model)
    assert [site.kind for site in sites].count("attention") == 2
    assert [site.kind for site in sites].count("ffn") == 2
    got = mask_fisher(model, tiny.batches(drawn, 3), sites, tiny.TASK, mask_placement=placement)
    assert_same(got, naive_fisher(model, drawn, sites, placement=placement))
    assert got.samples == len(drawn)
    logits = [model(ids[None]).logits[0].detach() for ids, _ in drawn]
    losses = [-torch.log_softmax(one, -1)[label] for one, (_, label) in zip(logits, drawn, strict=True)]
    assert got.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-9)
    right = [int(one.argmax()) == label for one, (_, label) in zip(logits, drawn, strict=True)]
    assert got.accuracy == pytest.approx(sum(right) / len(right))


def test_a_module_that_runs_several_times_counts_every_run() -> None:
    drawn = [(torch.cat([ids, ids])[:6], label) for ids, label in tiny.samples()]
    whole = tiny.classifier("bert").double()
    chunked = tiny.classifier("bert", chunk_size_feed_forward=1).double()
    sites = tiny.sites_of(whole)
    assert_same(
        mask_fisher(chunked, tiny.batches(drawn, 3), sites, tiny.TASK), naive_fisher(whole, drawn, sites)
    )


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_exact_labels_equal_the_expectation(architecture: str) -> None:
    model = tiny.classifier(architecture).double()
    drawn = tiny.samples()
    sites = tiny.sites_of(model)
    got = mask_fisher(model, tiny.batches(drawn, 3), sites, tiny.TASK, labels="exact")
    assert_same(got, naive_fisher(model, drawn, sites, labels="exact"))


def test_sampled_labels_are_the_models_and_no_batch_changes_them() -> None:
    model = tiny.classifier("bert").double()
    sites = tiny.sites_of(model)
    ids = tiny.samples(1)[0][0]
    same = [(ids, 0)] * 400
    sampled = mask_fisher(model, tiny.batches(same, 100), sites, tiny.TASK, labels="sampled")
    exact = mask_fisher(model, tiny.batches(same[:1], 1), sites, tiny.TASK, labels="exact")
    for key, value in exact.fisher.items():
        # One input drawn 400 times: the mean over draws nears the expectation, within Monte Carlo error.
        assert_close(sampled.fisher[key].sum(), value.sum(), rtol=0.25, atol=0)
    drawn = tiny.samples(9)
    one = mask_fisher(model, tiny.batches(drawn, 9), sites, tiny.TASK, labels="sampled", seed=3)
    backwards = list(reversed(range(9)))
    other = mask_fisher(
        model,
        tiny.batches([drawn[i] for i in backwards], 2, index=backwards),
        sites,
        tiny.TASK,
        labels="sampled",
        seed=3,
    )
    assert_same(other, one.fisher)
    third = mask_fisher(model, tiny.batches(drawn, 9), sites, tiny.TASK, labels="sampled", seed=4)
    assert any(not torch.equal(third.fisher[key], value) for key, value in one.fisher.items())


@pytest.mark.parametrize("architecture", ["bert", "mistral"])
def test_batch_size_order_padding_and_doubling_change_nothing(architecture: str) -> None:
    model = tiny.classifier(architecture).double()
    sites = tiny.sites_of(model)
    drawn = tiny.samples(8)
    wanted = mask_fisher(model, tiny.batches(drawn, 1), sites, tiny.TASK).fisher
    for variant in (
        tiny.batches(drawn, 8),
        tiny.batches(drawn[::-1], 3),
        tiny.batches(drawn, 4, extra_padding=9),
        tiny.batches(drawn + drawn, 5),
    ):
        assert_same(mask_fisher(model, variant, sites, tiny.TASK), wanted)


def test_batch_estimator_squares_the_gradient_of_each_batchs_mean_loss() -> None:
    model = tiny.classifier("bert").double()
    drawn = tiny.samples(8)
    sites = tiny.sites_of(model)
    wanted: dict[NodeKey, Any] = {}
    for start in (0, 4):
        each = [
            naive.naive_gradients(model.eval(), tiny.TASK, sample, sites)[0]
            for sample in tiny.batches(drawn[start : start + 4], 1)
        ]
        for key in each[0]:
            wanted[key] = wanted.get(key, 0) + torch.stack([one[key] for one in each]).mean(0) ** 2
    assert_same(mask_fisher(model, tiny.batches(drawn, 4), sites, tiny.TASK, estimator="batch"), wanted)


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("moment", ["forward", "backward", "sums"])
def test_batches_that_do_not_fit_into_memory_run_in_halves_and_every_sample_counts_once(
    moment: str, labels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.classifier("bert").double()
    sites, drawn = tiny.sites_of(model), tiny.samples(8)
    wanted = mask_fisher(model, tiny.batches(drawn, 1), sites, tiny.TASK, labels=labels)
    tried: list[int] = []

    def full(tensor: Tensor, passes: int) -> None:
        tried.append(len(tensor))
        # With exact labels, not before the second of a batch's three backward passes.
        if len(tensor) > 2 and tried[-passes:] == [len(tensor)] * passes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def watch(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if moment == "forward":
            full(output, 1)
        elif moment == "backward" and output.requires_grad:
            output.register_hook(lambda gradient: full(gradient, 2 if labels == "exact" else 1))

    model.bert.encoder.layer[0].intermediate.register_forward_hook(watch)
    double = Tensor.double

    def widened(tensor: Tensor) -> Tensor:  # Of the losses, when every backward pass is over.
        if moment == "sums" and tensor.ndim == 1:
            tried.append(len(tensor))
            if len(tensor) == 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return double(tensor)

    monkeypatch.setattr(Tensor, "double", widened)
    seen: list[int] = []
    got = mask_fisher(
        model, tiny.batches(drawn, 8), sites, tiny.TASK, labels=labels,
        on_batch=lambda batch, tally: seen.append(len(batch.index)),
    )  # fmt: skip
    assert {8, 4} <= set(tried)
    assert seen == [8]
    assert_same(got, wanted.fisher)
    assert (got.samples, got.loss) == (8, pytest.approx(wanted.loss))


def test_what_did_not_fit_once_is_not_tried_again() -> None:
    model = tiny.classifier("bert").double()
    sites, drawn = tiny.sites_of(model), [(torch.arange(5, 12), 0)] * 12
    tried: list[int] = []

    def full(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            )

    model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(full)
    got = mask_fisher(model, tiny.batches(drawn, 4), sites, tiny.TASK, estimator="batch")
    assert [size for size in tried if size > 1] == [4, 2, 2, 2, 2, 2, 2]
    model.bert.encoder.layer[0].intermediate._forward_pre_hooks.clear()
    assert_same(got, mask_fisher(model, tiny.batches(drawn, 4), sites, tiny.TASK, estimator="batch").fisher)


def test_no_memory_for_a_single_sample_and_other_errors_of_a_model_are_errors() -> None:
    model = tiny.classifier("bert")
    sites, drawn = tiny.sites_of(model), tiny.samples(4)

    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise error

    model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(fail)
    for error in (torch.OutOfMemoryError("no memory"), RuntimeError("shapes do not fit")):
        with pytest.raises(type(error), match=str(error)):
            mask_fisher(model, tiny.batches(drawn, 4), sites, tiny.TASK)


def test_float32_and_bfloat16_weights_agree_with_float64() -> None:
    drawn = tiny.samples()
    model = tiny.classifier("bert").double()
    sites = tiny.sites_of(model)
    wanted = mask_fisher(model, tiny.batches(drawn, 3), sites, tiny.TASK).fisher
    assert_same(mask_fisher(model.float(), tiny.batches(drawn, 3), sites, tiny.TASK), wanted, rtol=1e-4)
    assert_same(mask_fisher(model.bfloat16(), tiny.batches(drawn, 3), sites, tiny.TASK), wanted, rtol=0.3)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.classifier("bert").train()
    model.bert.embeddings.eval()
    model.classifier.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    mask_fisher(model, tiny.batches(tiny.samples(), 3), tiny.sites_of(model), tiny.TASK)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_dropout_is_off_while_measuring_even_in_train_mode() -> None:
    model = tiny.classifier("bert", hidden_dropout_prob=0.5).double()
    drawn = tiny.samples()
    sites = tiny.sites_of(model)
    assert_same(
        mask_fisher(model.train(), tiny.batches(drawn, 3), sites, tiny.TASK),
        naive_fisher(model, drawn, sites),
    )


class _Noise(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden)


def test_a_random_layer_is_caught() -> None:
    model = tiny.classifier("bert")
    model.bert.embeddings.LayerNorm = nn.Sequential(model.bert.embeddings.LayerNorm, _Noise())
    sites = tiny.sites_of(model)
    with pytest.raises(
        MeasurementError, match="apart in a batch and by itself: the model has a random layer"
    ):
        mask_fisher(model, tiny.batches(tiny.samples(), 3), sites, tiny.TASK)


class _Mixed(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(hidden)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden: -hidden.mean(0, keepdim=True),
    "largest": lambda hidden: hidden.amax(),
    "first": lambda hidden: hidden[:1],
    "last": lambda hidden: hidden[-1:],
    "one before": lambda hidden: torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]]),
    "one after": lambda hidden: torch.cat([hidden[1:], torch.zeros_like(hidden[:1])]),
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("mix", MIXES)
def test_a_layer_that_mixes_samples_is_caught(mix: str, size: int) -> None:
    model = tiny.classifier("bert")
    model.bert.embeddings.LayerNorm = nn.Sequential(model.bert.embeddings.LayerNorm, _Mixed(MIXES[mix]))
    sites = tiny.sites_of(model)
    with pytest.raises(MeasurementError, match="or mixes samples"):
        mask_fisher(model, tiny.batches(tiny.samples(), size), sites, tiny.TASK)


def test_no_sample_is_an_error() -> None:
    model = tiny.classifier("bert")
    with pytest.raises(MeasurementError, match="no sample"):
        mask_fisher(model, [], tiny.sites_of(model), tiny.TASK)


def test_a_loss_that_is_not_a_number_is_an_error() -> None:
    model = tiny.classifier("bert")
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(MeasurementError, match="the loss of sample 0 is nan"):
        mask_fisher(model, tiny.batches(tiny.samples(), 3), tiny.sites_of(model), tiny.TASK)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        bad = gradient.clone()
        bad[..., 17] = torch.inf
        return bad


class _BadGradientLayer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(_BadGradient.apply(hidden))


def test_a_gradient_that_is_not_finite_names_layer_and_node() -> None:
    model = tiny.classifier("bert")
    sites = tiny.sites_of(model)
    dense = model.bert.encoder.layer[1].output
    dense.dense = _BadGradientLayer(dense.dense)
    with pytest.raises(MeasurementError, match=r"encoder\.layer\.1\.output\.dense, neuron 17, is not finite"):
        mask_fisher(model, tiny.batches(tiny.samples(), 3), sites, tiny.TASK)


def test_key_value_masks_are_not_sums_of_head_fishers() -> None:
    model = tiny.classifier("llama").double()
    got = mask_fisher(model, tiny.batches(tiny.samples(), 3), tiny.sites_of(model), tiny.TASK).fisher
    for (output, node), value in got.items():
        if node == "kv_head_fisher":
            summed = got[output, "head_fisher"].unflatten(-1, (2, -1)).sum(-1)
            assert float((value / summed - 1).abs().max()) > 0.05


def test_a_site_that_the_module_around_it_does_not_run_is_named() -> None:
    """As where another implementation is put in a layer's place, which has its weights and not its modules."""
    model = tiny.classifier("bert")
    sites = tiny.sites_of(model)
    model.bert.encoder.layer[1].attention.output.forward = lambda hidden, given: given
    with pytest.raises(MeasurementError, match=r"no gradient reached bert\.encoder\.layer\.1\.attention"):
        mask_fisher(model, tiny.batches(tiny.samples(), 3), sites, tiny.TASK)


def _tokens_first(layer: Any) -> Any:
    def turned(hidden: Tensor) -> Tensor:
        hidden = hidden.transpose(0, 1)
        return layer.output(layer.intermediate(hidden), hidden).transpose(0, 1)

    return turned


def test_a_site_that_puts_tokens_first_is_measured_one_sample_at_a_time() -> None:
    model = tiny.classifier("bert").double().eval()
    sites = tiny.sites_of(model)
    for layer in model.bert.encoder.layer:
        layer.feed_forward_chunk = _tokens_first(layer)
    drawn = tiny.samples(4)
    got = mask_fisher(model, tiny.batches(drawn, 2), sites, tiny.TASK)
    assert got.one_by_one
    assert_same(got, naive_fisher(model, drawn, sites))


def _without_padding(layer: Any, masks: list[Tensor]) -> Any:
    def packed(hidden: Tensor) -> Tensor:
        real = masks[-1].bool()
        given, out = hidden[real], hidden.clone()
        out[real] = layer.output(layer.intermediate(given), given)
        return out

    return packed


def test_a_site_that_leaves_padding_out_is_measured_one_sample_at_a_time() -> None:
    """The first batch has no padding to leave out, and the samples lie one after the other in it."""
    model = tiny.classifier("bert").double().eval()
    sites = tiny.sites_of(model)
    masks: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for layer in model.bert.encoder.layer:
        layer.feed_forward_chunk = _without_padding(layer, masks)
    drawn = [(torch.arange(5, 5 + length), length % 3) for length in (12, 12, 9, 3, 8, 2)]
    got = mask_fisher(model, tiny.batches(drawn, 2), sites, tiny.TASK)
    assert got.one_by_one
    assert_same(got, naive_fisher(model, drawn, sites))
