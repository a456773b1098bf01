"""Attention over chunks, trees and windows, of the core and of span_attention, against a softmax per query in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pitlane import Draft, PlainAttention
from pitlane.plugins.attention_sinks import SinkWindow
from pitlane.plugins.span_attention.attention import SpanAttention
from tests.engine.run.attention_setting import MIXED, TREE, assert_near, make_setting, torch_attention

ATTENTIONS = pytest.mark.parametrize("attention", [PlainAttention, SpanAttention])


@ATTENTIONS
@pytest.mark.cover(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 32, 33, 61, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_a_mixed_batch(attention: Any, heads: tuple[int, int], window: int | None, dtype: torch.dtype) -> None:
    setting = make_setting(MIXED, attention=attention, heads=heads, window=window, dtype=dtype)
    assert_near(*setting.run())


@ATTENTIONS
@pytest.mark.parametrize("sinks", [SinkWindow(4, 64, 32), SinkWindow(40, 32, 32), SinkWindow(1, 160, 96)])
def test_a_mixed_batch_with_sinks(attention: Any, sinks: SinkWindow) -> None:
    setting = make_setting([*MIXED, (150, 130, None), (222, 1, TREE)], attention=attention, heads=(6, 2), sinks=sinks)
    assert setting.build_batch().groups[0].sink_positions is not None
    assert_near(*setting.run())


@ATTENTIONS
@pytest.mark.parametrize("size", [1, 2, 13, 31, 32, 127])
@pytest.mark.parametrize("window", [None, 19])
def test_chunks_of_any_size(attention: Any, size: int, window: int | None) -> None:
    for first in range(0, 150, max(size, 29)):
        assert_near(*make_setting(attention=attention, seqs=[(first, size, None)], window=window, seed=first).run())


@ATTENTIONS
@pytest.mark.parametrize("window", [None, 3, 8, 40])
def test_random_trees(attention: Any, window: int | None) -> None:
    generator = random.Random(1)
    for seed in range(25):
        size = generator.randint(1, 17)
        draft = Draft([1] * size, [generator.randrange(-1, index) if index else -1 for index in range(size)])
        assert_near(
            *make_setting(
                attention=attention, seqs=[(generator.randint(0, 90), 1, draft)], window=window, seed=seed
            ).run()
        )


@pytest.mark.cover(1)
@ATTENTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_chunk_much_longer_than_the_window(attention: Any, dtype: torch.dtype) -> None:
    """Some rows see no token of a whole tile, in the span before them and among the queries."""
    setting = make_setting(attention=attention, seqs=[(1200, 1300, None)], heads=(2, 1), dim=8, window=700, dtype=dtype)
    assert_near(*setting.run())
    setting = make_setting(attention=attention, seqs=[(40, 1100, None)], heads=(2, 1), dim=8, window=5, dtype=dtype)
    assert_near(*setting.run())


@ATTENTIONS
@pytest.mark.parametrize(
    "first, count, draft", [(500, 1, None), (300, 100, None), (500, 1, Draft([1] * 7)), (500, 1, TREE)]
)
def test_the_error_in_bfloat16_is_at_most_twice_that_of_torch(
    attention: Any, first: int, count: int, draft: Draft | None
) -> None:
    errors, torch_errors = [], []
    for seed in range(4):
        setting = make_setting(
            attention=attention, seqs=[(first, count, draft)], heads=(8, 2), dim=64, dtype=torch.bfloat16, seed=seed
        )
        out, expected = setting.run()
        errors.append((out.double() - expected).abs())
        torch_errors.append((torch_attention(setting) - expected).abs())
    ratio = torch.cat(errors).pow(2).mean().sqrt() / torch.cat(torch_errors).pow(2).mean().sqrt()
    assert torch.cat(errors).max() <= 2 * torch.cat(torch_errors).max()
    assert ratio <= 2, f"root mean square of the error: {ratio:.2f} times torch's"
