"""Activations times gradients: from what autograd keeps, or kept where nothing else will do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu
from torch.testing import assert_close
from transformers.activations import ACT2FN

from fisher_mask_mergekit.activations import product_of, sums_over_tokens

Activate = Callable[[Tensor], Tensor]
REMADE: dict[str, Activate] = {
    "gelu": gelu,
    "gelu_tanh": lambda given: gelu(given, approximate="tanh"),
    "gelu_new": ACT2FN["gelu_new"],
    "quick_gelu": ACT2FN["quick_gelu"],
    "silu": silu,
    "gated": lambda given: silu(given) * given.exp(),
}
KEPT: dict[str, Activate] = {
    "relu": relu,
    "tanh": torch.tanh,
    "by a number": lambda given: given * 3.0,
    "by a vector": lambda given: given * torch.linspace(-1, 1, 5).requires_grad_(),
    "reshaped": lambda given: gelu(given).reshape(given.shape),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*REMADE, *KEPT])
def test_the_product_is_that_of_the_activation_which_is_not_kept_if_autograd_keeps_enough(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = torch.randn(6, 4, 5, dtype=dtype, requires_grad=True)
    activation = (REMADE | KEPT)[name](given * 2)
    values, gradient = activation.detach().clone(), torch.randn(6, 4, 5, dtype=dtype)
    product = product_of(activation)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = (values.to(wide) * gradient.to(wide)).reshape(3, 8, 5).sum(1)
    assert_close(sums_over_tokens(product, gradient, 3), wanted)
    # With the activation gone, what was kept of it is gone.
    activation.detach().zero_()
    wanted = wanted if name in REMADE else torch.zeros_like(wanted)
    assert_close(sums_over_tokens(product, gradient, 3), wanted)


def test_a_bias_is_taken_off() -> None:
    layer = nn.Linear(4, 5)
    output = layer(torch.randn(2, 3, 4))
    gradient = torch.randn(2, 3, 5)
    wanted = ((output - layer.bias) * gradient).sum(1).detach()
    assert_close(sums_over_tokens(product_of(output, layer.bias.detach()), gradient, 2), wanted)


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_pieces_add_up(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fisher_mask_mergekit.activations._CHUNK", 50)
    values, gradient = torch.randn(samples * 2, 4, 5), torch.randn(samples * 2, 4, 5)
    wanted = (values * gradient).reshape(samples, -1, 5).sum(1)
    assert_close(sums_over_tokens(product_of(values), gradient, samples), wanted)


def test_no_tokens_sum_to_zero() -> None:
    nothing = torch.randn(3, 0, 5)
    assert_close(sums_over_tokens(product_of(nothing), nothing, 3), torch.zeros(3, 5))
