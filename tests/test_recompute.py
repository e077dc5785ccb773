"""Layers that run again in the backward pass: the same numbers, and nothing kept between."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from fisher_mask_mergekit import job, measure_diagonal, measure_mask, prepass
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.execution import Execution
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.mask_gradients import MaskGradients
from fisher_mask_mergekit.passes import frozen
from fisher_mask_mergekit.recompute import layer_path
from fisher_mask_mergekit.settings import FisherSettings
from tests import tiny
from tests.families import FAMILIES, Family, build
from tests.test_architectures import TASK, batches, model_of

CHOSEN = ("bert", "albert", "gpt2", "llama", "t5-v1.1", "bart", "mixtral", "gpt-oss", "mamba")


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name in CHOSEN], ids=str)
def test_the_numbers_are_the_same(family: Family, placement: Any) -> None:
    sites = model_of(family)[1]
    if not sites:
        pytest.skip("no mask nodes")
    model = build(family).double()
    how: dict[str, Any] = {"mask_placement": placement, "labels": "exact"}
    wanted = mask_fisher(model, batches(family, (3, 2)), sites, TASK, **how)
    got = mask_fisher(model, batches(family, (3, 2)), sites, TASK, recompute=True, **how)
    assert got.one_by_one == wanted.one_by_one
    assert_close(got.fisher, wanted.fisher, rtol=1e-10, atol=0)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("recompute", [False, True])
def test_every_layer_but_the_last_runs_again_and_holds_nothing_between(recompute: bool) -> None:
    model = tiny.classifier("llama", num_hidden_layers=5)
    runs: list[int] = []

    for place, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, place=place: runs.append(place))
    (batch,) = tiny.batches(tiny.samples(4), 4)
    gradients = MaskGradients(model, tiny.sites_of(model), "post", "sample", recompute)
    with frozen(model), gradients.attached():
        assert model.config.use_cache != recompute
        likelihood = gradients.run(tiny.TASK, batch)
        assert runs == [0, 1, 2, 3, 4]
        assert [product is None for product in gradients.watched] == [recompute] * 8 + [False] * 2
        gradients.backward(likelihood.losses().sum(), None, again=False)
    assert runs == ([0, 1, 2, 3, 4, 3, 2, 1, 0] if recompute else [0, 1, 2, 3, 4])
    assert [product is None for product in gradients.watched] == [recompute] * 8 + [False] * 2
    assert model.config.use_cache


def test_the_layer_of_a_site() -> None:
    assert layer_path("bert.encoder.layer.11.attention.output.dense") == "bert.encoder.layer.11"
    assert layer_path("head.dense") == "head.dense"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "diagonal", "--recompute"], "keeps what every module is given; it takes no --recompute"),
        (["--estimator", "batch", "--batch-tokens", "9"], "it takes no --batch-tokens"),
    ],
)
def test_what_cannot_be_had_together_is_refused_before_anything_is_looked_into(
    tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny.checkpoint(tmp_path / "model"), tiny.write_data(tmp_path / "data.jsonl")
    given: dict[str, Any] = {options[0].removeprefix("--"): options[1]}
    settings = FisherSettings(data=str(data), **given)
    looked_into = job.prepare(str(model), settings)
    monkeypatch.setattr(job, "prepare", None)
    done = CliRunner().invoke(app, ["compute", str(model), "--data", str(data), *options])
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
    monkeypatch.setattr(measure_diagonal, "load", None)
    monkeypatch.setattr(measure_mask, "load", None)
    asked = Execution(recompute=True) if "--recompute" in options else Execution(batch_tokens=9)
    with pytest.raises(RecipeError, match=message):
        prepass.compute(looked_into, torch.device("cpu"), asked)
