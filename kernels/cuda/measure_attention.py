"""Paged KV in random blocks and queries, for the measures of attention (measure.py, measure_tune.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.kernels.attention_quant import decode_ref
from pitlane.kernels.cuda import attention, attention_reads, kv_quant
from pitlane.kernels.cuda.measure_timer import Call, Timer, error_of
from pitlane.kernels.cuda.tuning import Form

BLOCK = 32  # slots of a block of KV
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


class Paged:
    """seqs: (keys, queries) of each sequence; the queries are its last tokens. bits: of the KV, see `attention.attend`.

    q: [T, H, D]. row_bytes: bytes of a key in the store.
    """

    def __init__(
        self, timer: Timer, seqs: list[tuple[int, int]], heads: tuple[int, int], dim: int, bits: int = 16
    ) -> None:
        self.seqs, self.heads, self.dim, self.bits, self.device = seqs, heads, dim, bits, timer.device
        counts = [-(-keys // BLOCK) for keys, _ in seqs]
        self.table = torch.full((len(seqs), max(counts)), -1, dtype=torch.int32)
        order, at = torch.randperm(sum(counts)).int(), 0
        for row, count in enumerate(counts):
            self.table[row, :count] = order[at : at + count]
            at += count
        stores = timer.random(2, heads[1], sum(counts) * BLOCK, dim)
        self.full, self.row_bytes = stores, 2 * dim
        self.rows: Tensor | None = None
        if bits != 16:
            self.row_bytes = dim * bits // 8 + dim // 8 if bits else dim
            self.rows = torch.empty(*stores.shape[:3], self.row_bytes, dtype=torch.uint8, device=self.device)
            all_blocks = torch.arange(sum(counts), device=self.device)
            kv_quant.quantize_blocks(stores, self.rows, all_blocks, all_blocks, bits)
            self.full = stores[:, :, :BLOCK].contiguous()
            stores = torch.stack(decode_ref(self.rows, dim, bits)).to(stores.dtype)
        self.q = timer.random(sum(queries for _, queries in seqs), heads[0], dim)
        slots = (self.table[0, : counts[0], None].long() * BLOCK + torch.arange(BLOCK)).flatten()[: seqs[0][0]]
        self.first_keys, self.first_values = (x[:, slots.to(self.device)][None] for x in stores)

    def by_torch(self) -> Tensor:
        """The output of the first sequence, [1, H, T, D]."""
        count = self.seqs[0][1]
        first = self.q[:count].transpose(0, 1)[None]
        return F.scaled_dot_product_attention(
            first, self.first_keys, self.first_values, is_causal=count > 1, enable_gqa=True
        )

    def by_triton(self, form: Form | None = None) -> Callable[[], Tensor]:
        """A call of the kernel, whose reads are planned already. form: of the kernel with pointers, for tuning."""
        reads = attention_reads.reads_of(self._batch(), 0, self.heads, self.dim, self.device, form)
        keys, values = self.full
        return partial(attention.attend, self.q, keys, values, reads, self.dim**-0.5, rows=self.rows, bits=self.bits)

    def error(self, out: object) -> float:
        """The largest error of the first sequence."""
        assert isinstance(out, Tensor)
        return error_of(out[: self.seqs[0][1]], self.by_torch()[0].transpose(0, 1))

    def _batch(self) -> Any:
        """The fields of a `pitlane.Batch` that `reads_of` reads."""
        positions = torch.cat([torch.arange(keys - queries, keys) for keys, queries in self.seqs])
        starts = torch.tensor([0, *(queries for _, queries in self.seqs)]).cumsum(0)
        group = SimpleNamespace(window_start=torch.zeros_like(positions), block_table=self.table, num_sinks=0)
        parents = torch.full_like(positions, -1)
        return SimpleNamespace(
            groups=(group,), positions=positions, parents=parents, query_start=starts, block_size=BLOCK
        )


def measure(
    timer: Timer, name: str, seqs: list[tuple[int, int]], heads: tuple[int, int], dim: int, bits: int = 16
) -> None:
    """Add a row for attention over `seqs`. The peers of a single sequence are the back ends of torch."""
    case = Paged(timer, seqs, heads, dim, bits)
    pairs = sum(count * total - (count * (count - 1)) // 2 for total, count in seqs)
    num_bytes = 2 * case.row_bytes * heads[1] * sum(total for total, _ in seqs) + 4 * case.q.numel()
    peers: dict[str, Call] = {"default": case.by_torch} if timer.device.type == "cpu" else {}
    if timer.device.type == "cuda" and len(seqs) == 1:
        peers = {backend: partial(_by_backend, backend, case.by_torch) for backend in BACKENDS}
    call = case.by_triton()
    timer.add("attention", name, case.error(call()), call, num_bytes, 4 * dim * heads[0] * pairs, peers)


def _by_backend(name: str, call: Callable[[], Tensor]) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        return call()
