"""Tensors are told by sixteen of their values, in the dtype at hand, without a look at every candidate."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fisher_mask_mergekit.errors import SidecarMismatchError
from fisher_mask_mergekit.recognition import Recognition, probe

LAYERS = 30
NAMES = [f"model.layers.{index}.mlp.weight" for index in range(LAYERS)]


def tensors() -> list[Tensor]:
    """Of two shapes; some equal, some equal after a cast only, zeros of both signs, and what is no number."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(6, 4 + index % 2, generator=generator) for index in range(LAYERS)]
    made[3], made[4] = made[5].clone(), made[6] * (1 + 2**-20)
    made[7], made[8] = torch.zeros(6, 5), -torch.zeros(6, 4)
    made[10] = torch.zeros(6, 4)
    made[11] = torch.full((6, 5), torch.nan)
    made[12] = torch.tensor(3.0)
    return made


def known() -> Recognition:
    return Recognition(
        {name: (tuple(one.shape), probe(one)) for name, one in zip(NAMES, tensors(), strict=True)}, "here"
    )


def one_by_one(name: str, tensor: Tensor, stored: Sequence[Tensor]) -> list[str]:
    """Every candidate compared: the tensor's own name if that fits, else all that fit."""
    fits = [
        other
        for other, value in zip(NAMES, stored, strict=True)
        if value.shape == tensor.shape and torch.equal(probe(value).to(tensor.dtype), probe(tensor))
    ]
    return [name] if name in fits else fits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("moved", [0, 1, 7, 100])
def test_it_finds_what_a_comparison_with_every_candidate_finds(dtype: torch.dtype, moved: int) -> None:
    recognition, stored = known(), tensors()
    several = 0
    for index, tensor in enumerate(stored):
        name = f"model.layers.{(index + moved) % LAYERS if moved < LAYERS else moved + index}.mlp.weight"
        wanted = one_by_one(name, tensor.to(dtype), stored)
        if len(wanted) == 1:
            assert recognition.which(name, tensor.to(dtype)) == wanted[0]
            continue
        several += len(wanted) > 1
        what = rf"fits several layers \({', '.join(wanted[:3])}\)" if wanted else "has other values"
        with pytest.raises(SidecarMismatchError, match=f"^here: tensor '{name}' {what}$"):
            recognition.which(name, tensor.to(dtype))
    assert bool(several) == bool(moved)


def test_names_that_no_layer_has_are_told_from_values_that_do_not_fit() -> None:
    assert known().which("model.layers.0.mlp.bias", torch.ones(6, 4)) is None
    with pytest.raises(SidecarMismatchError, match="has other values"):
        known().which(NAMES[0], torch.ones(6, 4))
    with pytest.raises(SidecarMismatchError, match="has other values"):
        known().which(NAMES[0], torch.ones(24))


def test_candidates_are_cast_once_per_dtype_not_once_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    recognition, stored = known(), tensors()
    cast = 0
    key = Recognition._key

    def counted(self: Recognition, name: str, dtype: torch.dtype) -> tuple[object, ...]:
        nonlocal cast
        cast += 1
        return key(self, name, dtype)

    monkeypatch.setattr(Recognition, "_key", counted)
    moved = range(13, LAYERS - 1)
    for dtype in (torch.float32, torch.bfloat16):
        for index in moved:
            assert recognition.which(NAMES[index + 1], stored[index].to(dtype)) == NAMES[index]
    assert cast == 2 * (len(moved) + LAYERS)
