"""The kernel in C, under the plugin's attention: rounded exactly, and equal to the bit in any draft, batch or chunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pitlane import Draft
from pitlane.kernels import attention as kernel
from pitlane.plugins.attention_sinks import SinkWindow
from pitlane.plugins.flash_attention import Paged
from tests.engine.run.attention_setting import MIXED, TREE, make_setting, share

pytestmark = pytest.mark.skipif(kernel.unavailable(64) is not None, reason=str(kernel.unavailable(64)))
BF16_STEP = 2.0**-8  # half the relative distance of neighbouring bfloat16 numbers


def assert_rounded(out: Tensor, expected: Tensor) -> None:
    """Assert that the output is the exact output rounded to bfloat16, up to the error of float32 sums of values about 1."""
    assert bool(((out.double() - expected).abs() <= BF16_STEP * expected.abs() + 1e-5).all())


@pytest.mark.cover(1)
@pytest.mark.parametrize("window", [None, 1, 2, 7, 33, 61, 1000])
@pytest.mark.parametrize(
    "heads, dim", [((4, 4), 32), ((6, 2), 64), ((5, 1), 96), ((40, 2), 128), ((4, 2), 160), ((3, 3), 256)]
)
def test_paged_a_mixed_batch(heads: tuple[int, int], dim: int, window: int | None) -> None:
    setting = make_setting(MIXED, heads=heads, dim=dim, window=window, dtype=torch.bfloat16, attention=Paged)
    assert_rounded(*setting.run())


@pytest.mark.parametrize("window", [None, 900])
def test_paged_contexts_of_many_pieces_beside_a_long_prompt(window: int | None) -> None:
    seqs = [(first, 1, None) for first in (0, 510, 511, 512, 513, 1023, 1024, 1700)]
    drafts = [(first, 1, TREE) for first in (500, 505, 510, 511, 1019, 1500)]
    setting = make_setting([*seqs, *drafts], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    assert_rounded(*setting.run())
    mixed = make_setting([(700, 200, None), *seqs], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    assert_rounded(*mixed.run())


@pytest.mark.cover(1)
@pytest.mark.parametrize("size", [71, 72, 80, 224])
@pytest.mark.parametrize("window", [None, 300])
def test_paged_a_wide_draft_tree(size: int, window: int | None) -> None:
    """Every node of a tree reads the context and its own path: the parts of a token lie in one kernel call."""
    half = size // 2
    tree = Draft([1] * size, [-1] * half + list(range(size - half)))
    seqs = [(699, 1, tree), (0, 1, tree), (40, 1, None)]
    setting = make_setting(seqs, dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    assert_rounded(*setting.run())


def test_paged_shared_blocks_are_one_task() -> None:
    seqs = [(1100, 1, None), (1090, 1, None), (1050, 1, TREE), (600, 1, None), (31, 1, None)]
    setting = make_setting(seqs, dim=64, dtype=torch.bfloat16, attention=Paged)
    share(setting, [(0, 1, 33), (0, 2, 32), (0, 3, 16)])
    parts = setting.prepare()[0]
    lengths = sorted(zip(parts.tasks[:, 1].tolist(), parts.tasks[:, 3].tolist(), strict=True))
    assert lengths[-2:] == [
        (512, 12),
        (512, 13),
    ]  # 2 tokens and a tree of 10 read both runs; a further token reads the first run
    assert len(parts.tasks) == 2 + 2 + 10 + 1 + 1
    assert_rounded(*setting.run())


@pytest.mark.cover(1)
@pytest.mark.parametrize("first", [3, 100, 505, 511, 512, 1020])
@pytest.mark.parametrize("window", [None, 40, 600])
def test_paged_a_draft_token_gets_the_bits_of_a_last_known_token(first: int, window: int | None) -> None:
    """Compare a draft chain with plain decoding and with a path of a tree, in other batches and other blocks."""
    size = 9
    chain = Draft([1] * size)
    reference = make_setting([(first, 1, chain)], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    chain_out, _ = reference.run()
    start = 0 if window is None else max(0, first - window + 1)
    slots = [0] * start + reference.lane.pool.slots(reference.seqs[0].kv, 0, start, first + 1 + size)

    def answer(seqs: list[tuple[int, int, Draft | None]], index: int, path: list[int], rows: list[int]) -> Tensor:
        """The output of nodes `path` of `seqs[index]`, given the same queries, keys and values; rows: indices of the queries."""
        other = make_setting(seqs, dim=64, window=window, dtype=torch.bfloat16, attention=Paged, seed=len(path))
        batch, seq = other.build_batch(), other.seqs[index]
        own, begin = seq.kv.num_computed_tokens, int(batch.query_start[index])
        low = 0 if window is None else max(0, own - window + 1)
        nodes = other.lane.pool.slots(seq.kv, 0, low, own + size + 1 if seq.draft else own + 1)
        nodes = [*nodes[: own - low], *(nodes[own - low + node] for node in path)]
        store = other.lane.stores[0]
        store.data[:, 1][:, :, nodes] = reference.lane.stores[0].data[:, 1][:, :, slots[low : low + len(nodes)]]
        q = other.random(batch.num_tokens, 4, 64)
        query_rows = [begin + node for node in path]
        q[query_rows] = reference.queries[rows]
        return other.attend(q, q[:, :2], q[:, :2], batch)[query_rows]

    for length in range(1 + size):  # plain decoding of the token at `first + length`
        batch: list[tuple[int, int, Draft | None]] = [(40, 1, None), (first + length, 1, None), (7, 1, TREE)]
        assert torch.equal(answer(batch, 1, [0], [length])[0], chain_out[length])
    tree = Draft([1] * size, [-1, -1, 0, 1, 2, 3, 4, 5, 6])  # two chains, node by node in turn
    path = [0, 1, 3, 5, 7, 9]  # the last known token, and the first chain
    assert torch.equal(answer([(first, 1, tree)], 0, path, list(range(len(path)))), chain_out[: len(path)])


@pytest.mark.cover(1)
@pytest.mark.parametrize("first, count", [(1000, 250), (0, 300), (490, 200), (37, 81)])
@pytest.mark.parametrize("window", [None, 40, 600])
def test_paged_a_token_of_a_long_prompt_gets_the_bits_of_a_decoded_one(
    first: int, count: int, window: int | None
) -> None:
    reference = make_setting([(first, count, None)], dim=64, window=window, dtype=torch.bfloat16, attention=Paged)
    prompt_out, _ = reference.run()
    for index in (0, 1, 71, 75, count // 2, count - 1):
        last = first + index
        other = make_setting(
            [(9, 1, TREE), (last, 1, None)], dim=64, window=window, dtype=torch.bfloat16, attention=Paged
        )
        batch, low = other.build_batch(), 0 if window is None else max(0, last - window + 1)
        slots, prompt_slots = (
            setting.lane.pool.slots(seq.kv, 0, low, last + 1)
            for setting, seq in ((other, other.seqs[1]), (reference, reference.seqs[0]))
        )
        store = other.lane.stores[0]
        store.data[:, 1][:, :, slots] = reference.lane.stores[0].data[:, 1][:, :, prompt_slots]
        q = other.random(batch.num_tokens, 4, 64)
        q[-1] = reference.queries[index]
        assert torch.equal(other.attend(q, q[:, :2], q[:, :2], batch)[-1], prompt_out[index])


def test_paged_large_scores_and_equal_ones() -> None:
    """No score overflows, and a key with a far lower score gets no weight."""
    q = torch.zeros(1, 2, 64).bfloat16()
    q[0, 0, 0], q[0, 1, 0] = 200.0, 0.0
    keys = torch.zeros(1, 600, 64).bfloat16()
    keys[0, :, 0] = torch.linspace(-200, 200, 600)
    values = torch.randn(1, 600, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    slots = torch.arange(600).int().numpy()
    out = torch.empty_like(q)
    num_slots, zero = np.array([600]), np.array([0])
    kernel.attend(q, keys, values, kernel.Parts.of([kernel.Seen(0, slots, zero, zero, num_slots)], 1), 1.0, out)
    assert torch.equal(out[0, 0], values[0, 599])
    assert_rounded(out[0, 1], values[0].double().mean(0))


@pytest.mark.parametrize("sinks", [SinkWindow(4, 64, 32), SinkWindow(40, 160, 96), SinkWindow(600, 640, 320)])
def test_paged_sinks(sinks: SinkWindow) -> None:
    """Second queries in a kernel call with single tokens, drafts, trees and long prompts."""
    seqs = [*MIXED, (150, 230, None), (222, 1, TREE), (1400, 1, None), (700, 100, None), (1300, 1, Draft([1] * 9))]
    setting = make_setting(seqs, heads=(6, 2), dim=64, dtype=torch.bfloat16, attention=Paged, sinks=sinks)
    assert setting.build_batch().groups[0].sink_positions is not None
    assert_rounded(*setting.run())
