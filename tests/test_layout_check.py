"""The check of an untried architecture: it passes every family of the table, and stops what is laid out otherwise."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.layout_check import check_layout
from fisher_mask_mergekit.skeleton import sites_of
from fisher_mask_mergekit.table import find_sites
from tests import tiny
from tests.families import FAMILIES, Family, build
from tests.test_architectures import TASK, batches, model_of

LLAMA = next(family for family in FAMILIES if family.name == "llama")


def sample(family: Family) -> Any:
    return next(batches(family, (1,)))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_known_architecture_passes_and_is_left_as_it_was(family: Family) -> None:
    model, sites = model_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_layout(model, TASK, sample(family), sites)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_heads_that_are_differences_of_others_are_stopped() -> None:
    """DiffLlama's tensors are named like Llama's; without its mark, it would be taken for one."""
    family = next(family for family in FAMILIES if family.name == "diffllama")
    model = build(family)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "lambda" not in n}
    with pytest.raises(MeasurementError, match=r"layers\.0\.self_attn\..*_proj\.weight: rows taken to be"):
        check_layout(model, TASK, sample(family), find_sites(shapes, 4))


class Turned(torch.nn.Module):
    """A projection of columns in another order."""

    def __init__(self, inner: Any, by: int) -> None:
        super().__init__()
        self.inner, self.by = inner, by

    def forward(self, hidden: Any) -> Any:
        return self.inner(hidden.roll(self.by, -1))


@pytest.mark.parametrize(("kind", "by"), [("self_attn.o_proj", 12), ("mlp.down_proj", 1)])
def test_columns_in_another_order_are_stopped(kind: str, by: int) -> None:
    model = build(LLAMA)
    path = f"model.layers.0.{kind}"
    model.set_submodule(path, Turned(model.get_submodule(path), by))
    (site,) = (site for site in model_of(LLAMA)[1] if site.output == path)
    with pytest.raises(MeasurementError, match="in a way that is not known"):
        check_layout(model, TASK, sample(LLAMA), (site.model_copy(update={"output": f"{path}.inner"}),))


def test_value_rows_in_another_order_are_stopped() -> None:
    model = build(LLAMA)
    projection = model.get_submodule("model.layers.0.self_attn.v_proj")
    inner = projection.forward
    projection.forward = lambda hidden: inner(hidden).roll(4, -1)  # Half a head.
    with pytest.raises(MeasurementError, match=r"v_proj\.weight: rows taken to be kv head 0's"):
        check_layout(model, TASK, sample(LLAMA), model_of(LLAMA)[1])


def test_a_single_token_says_nothing_about_queries() -> None:
    model = tiny.classifier("bert")
    batch = tiny.batches([(torch.tensor([7]), 0)], 1)[0]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    check_layout(model.eval(), tiny.TASK, batch, sites_of(model, shapes))
