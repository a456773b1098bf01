"""Attention in Triton over chunks, trees, windows and sinks, against a softmax per query in float64."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from pitlane import Draft
from pitlane.kernels.cuda import attention_reads
from pitlane.plugins.attention_sinks import SinkWindow
from pitlane.plugins.flash_attention import PagedOnCuda
from tests.engine.run.attention_setting import MIXED, TREE, Setting, assert_near, make_setting

HEADS = [(4, 4), (6, 2), (5, 1), (9, 3)]


def near(setting: Setting) -> None:
    out, expected = setting.run()
    assert_near(out, expected)


def make(seqs, **options) -> Setting:  # type: ignore[no-untyped-def]
    return make_setting(seqs, attention=PagedOnCuda, dtype=torch.float32, **options)


@pytest.mark.parametrize(
    ("heads", "window"),
    [
        ((9, 3), None),
        ((5, 1), 33),
        *(
            pytest.param(heads, window, marks=pytest.mark.slow)
            for heads, window in product(HEADS, (None, 33))
            if (heads, window) not in (((9, 3), None), ((5, 1), 33))
        ),
    ],
)
def test_a_mixed_batch(heads: tuple[int, int], window: int | None) -> None:
    near(make(MIXED, heads=heads, window=window))


@pytest.mark.parametrize("dim", [8, 80, 128, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (64, 96, 256))])
def test_sizes_of_heads(dim: int) -> None:
    near(make([(70, 1, None), (0, 37, None), (31, 1, TREE)], heads=(4, 2), dim=dim))


@pytest.mark.parametrize("sinks", [SinkWindow(4, 64, 32), SinkWindow(40, 32, 32)])
def test_sinks(sinks: SinkWindow) -> None:
    setting = make([*MIXED, (150, 130, None), (222, 1, TREE)], heads=(6, 2), sinks=sinks)
    assert setting.build_batch().groups[0].sink_positions is not None
    near(setting)


@pytest.mark.parametrize("size", [1, 31, 32, *(pytest.param(size, marks=pytest.mark.slow) for size in (13, 127))])
def test_chunks_at_the_edges_of_blocks(size: int) -> None:
    for first in (0, 31, 64):
        near(make([(first, size, None)], window=19 if first % 2 else None, seed=first))


@pytest.mark.parametrize("sizes", [(64, 1, 7), pytest.param((2, 17, 63, 64, 64), marks=pytest.mark.slow)])
def test_random_trees(sizes: tuple[int, ...]) -> None:
    generator = random.Random(1)
    for seed, size in enumerate(sizes):
        draft = Draft([1] * size, [generator.randrange(-1, index) if index else -1 for index in range(size)])
        near(make([(generator.randint(0, 90), 1, draft)], window=(None, 3, 40)[seed % 3], seed=seed))


@pytest.mark.parametrize("few_tiles", [0, 256])
def test_several_pieces(few_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few tiles every piece has a program; with many, a program walks the pieces."""
    monkeypatch.setattr(attention_reads, "PIECE", 128)
    monkeypatch.setattr(attention_reads, "FEW_TILES", few_tiles)
    setting = make([(500, 1, None), (300, 40, None), (511, 1, TREE), (0, 1, None)], heads=(4, 2), window=None)
    near(setting)
    near(make([(500, 1, None), (300, 16, None)], heads=(4, 2), window=150))
    near(make([(300, 100, None)], heads=(4, 2), window=150))
    near(make([(500, 1, None), (300, 20, TREE)], heads=(4, 2), sinks=SinkWindow(4, 160, 96)))


def test_both_modes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reads, "PIECE", 128)
    results = []
    sinks = SinkWindow(4, 160, 96)
    for few_tiles in (0, 256):
        monkeypatch.setattr(attention_reads, "FEW_TILES", few_tiles)
        results.append([make([(700, 1, None), (300, 5, None)], heads=(4, 2), sinks=s).run()[0] for s in (None, sinks)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_draft_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="a draft has 65 tokens; the kernel takes up to 64"):
        make([(3, 1, Draft([1] * 65))]).run()
