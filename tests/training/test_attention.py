"""Attention in blocks against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pitlane.training.attention import BLOCK, block_attention


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_outputs_and_gradients_equal_causal_sdpa(length: int, heads: tuple[int, int]) -> None:
    shapes = [(2, heads[0], length, 16), (2, heads[1], length, 16), (2, heads[1], length, 16)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    upstream = torch.randn(2, length, heads[0], 16)
    blocks = block_attention(torch.nn.Identity(), *inputs, None, scaling=0.3)[0]
    reference_output = scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert (blocks - reference_output).abs().max() < 1e-5
    for gradient, reference in zip(
        torch.autograd.grad(blocks, inputs, upstream),
        torch.autograd.grad(reference_output, inputs, upstream),
        strict=True,
    ):
        assert (gradient - reference).abs().max() < 1e-5


def test_without_a_scale_it_is_that_of_the_width() -> None:
    query = torch.randn(1, 2, 9, 16)
    blocks = block_attention(torch.nn.Identity(), query, query, query, None)[0]
    assert torch.allclose(
        blocks, scaled_dot_product_attention(query, query, query, is_causal=True).transpose(1, 2), atol=1e-5
    )


def test_the_future_weighs_nothing() -> None:
    query, key, value = (torch.randn(1, 2, BLOCK + 9, 16) for _ in range(3))
    before = block_attention(torch.nn.Identity(), query, key, value, None)[0]
    key[:, :, BLOCK + 3 :] += 5.0
    value[:, :, BLOCK + 3 :] += 5.0
    after = block_attention(torch.nn.Identity(), query, key, value, None)[0]
    assert torch.equal(before[:, : BLOCK + 3], after[:, : BLOCK + 3])
    assert not torch.equal(before[:, BLOCK + 3 :], after[:, BLOCK + 3 :])
