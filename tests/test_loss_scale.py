"""float16 weights: what losses are multiplied by, so that no gradient vanishes, never shows in what is measured."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from typer.testing import CliRunner

from fisher_mask_mergekit import fisher as fisher_module
from fisher_mask_mergekit import mask_gradients
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.errors import MeasurementError, RecipeError
from fisher_mask_mergekit.execution import Execution, check_options
from fisher_mask_mergekit.fisher import MaskFisher, mask_fisher
from fisher_mask_mergekit.mask_gradients import MaskGradients
from fisher_mask_mergekit.provenance import reproducing_command
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import read
from tests import tiny
from tests.test_fisher import _BadGradientLayer


def measure(model: nn.Module, size: int = 3, count: int = 7, **how: Any) -> MaskFisher:
    return mask_fisher(model, tiny.batches(tiny.samples(count), size), tiny.sites_of(model), tiny.TASK, **how)


def largest_gap(got: MaskFisher, wanted: MaskFisher) -> float:
    """Relative to the largest value of the same site."""
    assert got.fisher.keys() == wanted.fisher.keys()
    return max(
        float((got.fisher[key] - value).abs().max() / value.max()) for key, value in wanted.fisher.items()
    )


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scale of every forward and backward pass."""
    used: list[float] = []
    backward = MaskGradients.backward

    def noted(self: MaskGradients, *args: Any, **kwargs: Any) -> None:
        used.append(self.scale)
        backward(self, *args, **kwargs)

    monkeypatch.setattr(MaskGradients, "backward", noted)
    return used


@pytest.mark.parametrize(
    "how", [{}, {"labels": "exact"}, {"estimator": "batch"}, {"recompute": True}], ids=str
)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_no_scale_changes_a_digit_where_nothing_overflows_or_vanishes(
    architecture: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.classifier(architecture)  # float32, whose exponents leave room.
    wanted = measure(model, **how)
    for power in (1, 8, 15, 40):
        monkeypatch.setattr(fisher_module, "MaskGradients", partial(MaskGradients, scale=2.0**power))
        assert_close(measure(model, **how).fisher, wanted.fisher, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_float16_agrees_with_float32_of_the_same_weights(architecture: str) -> None:
    model = tiny.classifier(architecture).half()
    assert largest_gap(measure(model), measure(model.float())) < 0.02


def test_gradients_that_would_vanish_in_float16_do_not(
    monkeypatch: pytest.MonkeyPatch, scales: list[float]
) -> None:
    model = tiny.classifier("bert").half()
    with torch.no_grad():
        model.classifier.weight.mul_(2.0**-16)
    wanted = measure(tiny_float32(model))
    scales.clear()
    assert largest_gap(measure(model), wanted) < 0.02
    assert set(scales) == {2.0**15}
    monkeypatch.setattr(mask_gradients, "FIRST_SCALE", 1.0)
    assert largest_gap(measure(model), wanted) > 0.1


def tiny_float32(model: Any) -> nn.Module:
    other = tiny.classifier("bert")
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "how", [{}, {"labels": "exact"}, {"estimator": "batch"}, {"recompute": True}], ids=str
)
def test_a_batch_that_overflows_runs_again_and_every_sample_counts_once(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch, scales: list[float]
) -> None:
    model, seen = tiny.classifier("bert").half(), []
    monkeypatch.setattr(mask_gradients, "FIRST_SCALE", 2.0**24)
    got = measure(model, size=7, on_batch=lambda batch, *_: seen.append(batch.index), **how)
    passes = 3 if how.get("labels") == "exact" else 1
    fitting = scales[-1]
    assert scales == [
        2.0**power for power in range(24, int(fitting).bit_length() - 2, -1) for _ in range(passes)
    ]
    assert 1 < fitting < 2.0**24
    assert (got.samples, seen) == (7, [tuple(range(7))])
    monkeypatch.setattr(mask_gradients, "FIRST_SCALE", fitting)
    wanted = measure(model, size=7, **how)
    assert scales[-passes:] == [fitting] * passes
    assert len(scales) == passes * (26 - int(fitting).bit_length() + 1)
    assert_close(got.fisher, wanted.fisher, rtol=0, atol=0)
    assert (got.loss, got.accuracy) == (wanted.loss, wanted.accuracy)


def test_what_overflows_later_leaves_alone_what_was_summed_before(
    monkeypatch: pytest.MonkeyPatch, scales: list[float]
) -> None:
    model = tiny.classifier("bert").half()
    wanted = measure(model.float())
    scales.clear()
    monkeypatch.setattr(mask_gradients, "FIRST_SCALE", 2.0**14)
    limit = 2.0**12

    def overflow(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and scales:  # From the second batch on.
            output.register_hook(lambda gradient: gradient * (torch.inf if scales[-1] > limit else 1.0))

    model.half().bert.encoder.layer[0].intermediate.register_forward_hook(overflow)
    got = measure(model)
    assert scales == [2.0**power for power in (14, 14, 13, 12, 12)]
    assert got.samples == 7
    assert largest_gap(got, wanted) < 0.02


def test_what_is_not_finite_at_any_scale_is_the_error_that_it_was(scales: list[float]) -> None:
    model = tiny.classifier("bert").half()
    dense = model.bert.encoder.layer[1].output
    sites = tiny.sites_of(model)
    dense.dense = _BadGradientLayer(dense.dense)
    with pytest.raises(
        MeasurementError, match=r"layer\.1\.output\.dense, neuron 17, is not finite .* try another"
    ):
        mask_fisher(model, tiny.batches(tiny.samples(3), 3), sites, tiny.TASK)
    assert scales == [2.0**power for power in range(15, -1, -1)]


def test_a_loss_that_overflows_says_to_try_another_dtype() -> None:
    model = tiny.classifier("bert").half()
    with torch.no_grad():
        model.classifier.bias[0] = 6e4
        model.classifier.weight[0] = 6e4
    with pytest.raises(MeasurementError, match="the loss of sample 0 is nan; try another dtype"):
        measure(model)


def test_it_is_measured_and_told_by_name(tmp_path: Path) -> None:
    model, data = tiny.checkpoint(tmp_path / "model"), tiny.write_data(tmp_path / "data.jsonl")
    done = CliRunner().invoke(
        app,
        [
            "compute",
            str(model),
            "--data",
            str(data),
            "--dtype",
            "float16",
            "--out",
            str(tmp_path / "out.safetensors"),
        ],
    )
    assert done.exit_code == 0, done.output
    metadata = read(tmp_path / "out.safetensors").metadata
    assert metadata.settings.dtype == "float16"
    assert "--dtype float16" in reproducing_command(metadata)


def test_sums_that_are_added_before_an_overflow_shows_are_not_to_be_had() -> None:
    with pytest.raises(RecipeError, match="it takes no dtype float16: take bfloat16 or float32"):
        check_options(FisherSettings(kind="diagonal", dtype="float16"), Execution())
