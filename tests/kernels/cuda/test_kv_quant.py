"""Quantized KV in Triton: the rows have the bits of the plugin's formats, and attention reads them as the torch reference does."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane.kernels.attention_quant import FIRST_OPEN, decode_ref
from pitlane.kernels.cuda import attention, attention_reads
from pitlane.kernels.cuda.kv_quant import quantize_blocks, supports
from pitlane.plugins.kv_quant.formats import format_of

BITS = {"int8": 8, "int4": 4, "fp8": 0}
FORMATS = pytest.mark.parametrize("name", list(BITS))
BLOCK = 32


def values_of(*shape: int) -> Tensor:
    """One channel has an offset, one is tiny; a token has zeros, and a value is beyond the largest e4m3."""
    x = torch.randn(shape)
    x[..., 1] += 50
    x[..., 2] *= 1e-6
    x[..., 3, :] = 0
    x[..., 5, 4] = 1000
    return x


@FORMATS
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (128, torch.float16), (96, torch.float16)])
def test_the_rows_have_the_bits_of_the_format(name: str, dim: int, dtype: torch.dtype) -> None:
    """Blocks 2 and 0 of the open blocks go to blocks 5 and 1; no other row changes."""
    form = format_of(name, dim)
    full = values_of(2, 3, 3 * BLOCK, dim).to(dtype)
    rows = torch.randint(0, 256, (2, 3, 7 * BLOCK, form.num_bytes), dtype=torch.uint8)
    before, sources, targets = rows.clone(), torch.tensor([2, 0]), torch.tensor([5, 1])
    if not supports(BITS[name], dim):
        with pytest.raises(ValueError, match="heads of a multiple of 64, got 4, 96"):
            quantize_blocks(full, rows, sources, targets, BITS[name])
        return
    quantize_blocks(full, rows, sources, targets, BITS[name])
    expected = before.unflatten(2, (-1, BLOCK)).clone()
    keys, values = full.unflatten(2, (-1, BLOCK))[:, :, sources]
    expected[:, :, targets] = form.encode(keys, values)
    assert torch.equal(rows, expected.flatten(2, 3))


def test_wrong_shapes_are_refused() -> None:
    full, rows, none = torch.randn(2, 1, 32, 64), torch.zeros(2, 1, 32, 72, dtype=torch.uint8), torch.tensor([0])
    with pytest.raises(ValueError, match="shapes do not fit"):
        quantize_blocks(full, rows.int(), none, none, 8)
    with pytest.raises(ValueError, match="bits must be 8, 4 or 0"):
        quantize_blocks(full, rows, none, none, 4)
    with pytest.raises(ValueError, match="slots of a head must follow each other"):
        quantize_blocks(full, torch.zeros(2, 1, 32, 144, dtype=torch.uint8)[..., ::2], none, none, 8)


class Case:
    """Sequences with quantized blocks and an open block at the end, as kv_quant arranges them. seqs: (keys, queries)."""

    def __init__(
        self, name: str, seqs: list[tuple[int, int]], heads: tuple[int, int], dim: int, window: int = 10_000
    ) -> None:
        self.bits, self.heads, self.dim, self.dtype = BITS[name], heads, dim, torch.float32
        counts = [-(-keys // BLOCK) for keys, _ in seqs]
        self.full = torch.randn(2, heads[1], len(seqs) * BLOCK, dim)
        source = torch.randn(2, heads[1], sum(counts) * BLOCK, dim)
        self.rows = format_of(name, dim).encode(*source.unflatten(2, (-1, BLOCK))).flatten(2, 3)
        order, table = torch.randperm(sum(counts)).int(), torch.full((len(seqs), max(counts)), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = order[sum(counts[:row]) : sum(counts[: row + 1])]
            table[row, count - 1] = FIRST_OPEN // BLOCK + row
        self.positions = torch.cat([torch.arange(keys - queries, keys) for keys, queries in seqs])
        self.start = torch.tensor([0, *(queries for _, queries in seqs)]).cumsum(0)
        self.low = (self.positions + 1 - window).clamp(min=0)
        self.table, self.q = table, torch.randn(len(self.positions), heads[0], dim)

    def batch(self, num_sinks: int = 0) -> Any:
        group = SimpleNamespace(window_start=self.low, block_table=self.table, num_sinks=num_sinks)
        return SimpleNamespace(
            groups=(group,),
            positions=self.positions,
            parents=torch.full_like(self.positions, -1),
            query_start=self.start,
            block_size=BLOCK,
        )

    def run(self, sink_q: Tensor | None = None, num_sinks: int = 0) -> Tensor:
        reads = attention_reads.reads_of(self.batch(num_sinks), 0, self.heads, self.dim, torch.device("cpu"))
        return attention.attend(self.q, *self.full, reads, self.dim**-0.5, sink_q, self.rows, self.bits)

    def expected(self, sink_q: Tensor | None = None, num_sinks: int = 0) -> Tensor:
        """A softmax per query in float64, over the keys and values that `decode_ref` reads."""
        stores = torch.cat((torch.stack(decode_ref(self.rows, self.dim, self.bits)), self.full), 2).double()
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for row, (begin, end) in enumerate(pairwise(self.start.tolist())):
            for token in range(begin, end):
                seen = torch.arange(int(self.low[token]), int(self.positions[token]) + 1)
                sinks = torch.arange(min(num_sinks, int(self.low[token])))
                places = torch.cat((sinks, seen))
                slots = self.table[row][places // BLOCK].long() * BLOCK + places % BLOCK
                slots = torch.where(slots >= FIRST_OPEN, slots - FIRST_OPEN + self.rows.shape[2], slots)
                keys, values = stores[:, :, slots].repeat_interleave(self.heads[0] // self.heads[1], 1)
                queries = self.q[token].double()[:, None].repeat(1, len(places), 1)
                if sink_q is not None:
                    queries[:, : len(sinks)] = sink_q[token].double()[:, None]
                weights = ((queries * keys).sum(-1) * self.dim**-0.5).softmax(-1)
                out[token] = torch.einsum("hs,hsd->hd", weights, values)
        return out


SEQS = [(1, 1), (32, 32), (33, 1), (130, 2), (64, 20)]


@FORMATS
@pytest.mark.parametrize(("heads", "dim"), [((6, 2), 64), ((3, 3), 96)])
def test_attention_over_rows(name: str, heads: tuple[int, int], dim: int) -> None:
    case = Case(name, SEQS, heads, dim)
    torch.testing.assert_close(case.run().double(), case.expected(), rtol=3e-6, atol=3e-6)


@FORMATS
def test_windows_sinks_and_dropped_blocks(name: str) -> None:
    case = Case(name, [(40, 1), (200, 8)], (4, 2), 32, window=70)
    case.table[1, 1:3] = -1  # before the window of every query, behind the sinks
    sink_q = torch.randn_like(case.q)
    torch.testing.assert_close(case.run(sink_q, 4).double(), case.expected(sink_q, 4), rtol=3e-6, atol=3e-6)


@FORMATS
def test_both_modes_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reads, "PIECE", 64)
    case = Case(name, [(150, 1), (70, 2)], (4, 2), 64)
    results = []
    for few_tiles in (0, 256):
        monkeypatch.setattr(attention_reads, "FEW_TILES", few_tiles)
        results.append(case.run())
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), case.expected(), rtol=3e-6, atol=3e-6)


def test_rows_that_do_not_fit_are_refused() -> None:
    case = Case("int8", [(33, 1)], (2, 1), 32)
    case.bits = 4
    with pytest.raises(ValueError, match=r"rows must be uint8 \[2, 1, S, 20\], got torch.uint8 \[2, 1, 64, 36\]"):
        case.run()
    case.bits = 3
    with pytest.raises(ValueError, match="quantized KV needs bits 8, 4 or 0"):
        case.run()
