"""Checks and times the Triton kernels on a GPU: `python -m pitlane.kernels.cuda.measure [--tiny]`, about five minutes.

First the ceilings of the device: a copy (bytes read and written per second) and a bfloat16 product. Then each kernel: the largest
error against a reference, the time (median of rounds in turn with the peer), its fraction of the ceiling, and its ratio to the peer
(torch's scaled_dot_product_attention, or a bfloat16 product of cuBLAS). Prints a table and, as the last line, one JSON document.
The exit status is 1 if an error is too large. --tiny: small shapes, also on a CPU under TRITON_INTERPRET=1, whose times mean
nothing; float16 then stands in for bfloat16, whose products the interpreter gets wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.kernels.cuda import activations, attention, linear, norms
from pitlane.kernels.ops import rms_norm_ref, silu_mul_ref
from pitlane.kernels.packing import Format
from pitlane.kernels.quantized import Quantized

BLOCK = 32  # slots of a block of KV
ROUNDS = 15
MAX_ERROR = 2e-2  # relative to the largest value of the reference


@dataclass(frozen=True, slots=True)
class Measured:
    """milliseconds of the kernel and its peer. fraction: of the ceiling of bytes or operations. error: relative, the largest."""

    kernel: str
    shape: str
    error: float
    ms: float
    fraction: float
    peer_ms: float | None

    @property
    def is_right(self) -> bool:
        return self.error <= MAX_ERROR


class Bench:
    """device: the GPU, or the CPU of the interpreter. bytes_per_second, operations_per_second: its ceilings, as measured."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny, self.rows = device, tiny, list[Measured]()
        size = 2**12 if tiny else 2**28
        source = torch.ones(size, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        self.bytes_per_second = 4 * size / self.times(lambda: target.copy_(source))[0]
        side = 64 if tiny else 8192
        a = torch.randn(side, side, device=device).bfloat16()
        self.operations_per_second = 2 * side**3 / self.times(lambda: a @ a)[0]

    def times(self, *calls: Callable[[], object]) -> list[float]:
        """Median seconds of every call, in turn."""
        rounds: list[list[float]] = [[] for _ in calls]
        for _ in range(1 if self.tiny else ROUNDS):
            for call, seconds in zip(calls, rounds, strict=True):
                call()
                self.wait()
                start = perf_counter()
                call()
                self.wait()
                seconds.append(perf_counter() - start)
        return [median(seconds) for seconds in rounds]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def add(
        self,
        kernel: str,
        shape: str,
        call: Callable[[], Tensor],
        reference: Tensor,
        num_bytes: float,
        operations: float,
        peer: Callable[[], object] | None = None,
    ) -> None:
        """Measure a kernel. Its ceiling is the longer of the times for its bytes and for its operations."""
        error = float((call().float() - reference.float()).abs().max() / reference.float().abs().max())
        seconds, *peers = self.times(call, *([peer] if peer else []))
        limit = max(num_bytes / self.bytes_per_second, operations / self.operations_per_second)
        peer_ms = peers[0] * 1e3 if peers else None
        self.rows.append(Measured(kernel, shape, error, seconds * 1e3, limit / seconds, peer_ms))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(torch.float16 if self.tiny else torch.bfloat16)

    def ops(self) -> None:
        rows, dim = (3, 96) if self.tiny else (4096, 4096)
        x, weight = self.random(rows, dim), self.random(dim)
        reference = rms_norm_ref(x, weight, 1e-5)
        self.add("rms_norm", f"{rows} x {dim}", lambda: norms.rms_norm(x, weight, 1e-5), reference, 4 * rows * dim, 0)
        self.add("silu_mul", f"{rows} x {dim}", lambda: activations.silu_mul(x), silu_mul_ref(x), 3 * rows * dim, 0)

    def linears(self) -> None:
        outputs, inputs = (96, 128) if self.tiny else (14336, 4096)
        weight = self.random(outputs, inputs)
        forms = {"int8": Format(8, False), "int8 W8A8": Format(8), "int4 g64": Format(4, False, 64)}
        for name, form in forms.items():
            packed = Quantized(outputs, inputs, form, [weight.cpu()], device=self.device)
            for rows in (1, 16) if self.tiny else (1, 16, 512):
                x = self.random(rows, inputs)
                self.add(
                    name,
                    f"{rows} x {inputs} x {outputs}",
                    lambda x=x, packed=packed: linear.linear(x, packed),  # type: ignore[misc]
                    packed.reference(x),
                    packed.packed.numel() + 2 * rows * (inputs + outputs),
                    2 * rows * inputs * outputs,
                    lambda x=x: F.linear(x, weight),  # type: ignore[misc]
                )

    def attention(self, name: str, seqs: list[tuple[int, int]], heads: tuple[int, int], dim: int) -> None:
        """seqs: (keys, queries) of each sequence; the queries are its last tokens."""
        num_heads, kv_heads = heads
        blocks = [-(-keys // BLOCK) for keys, _ in seqs]
        table = torch.full((len(seqs), max(blocks)), -1, dtype=torch.int32)
        order = torch.randperm(sum(blocks)).int()
        for row, (stop, count) in enumerate(zip(np.cumsum(blocks).tolist(), blocks, strict=True)):
            table[row, :count] = order[stop - count : stop]
        keys, values = (self.random(kv_heads, sum(blocks) * BLOCK, dim) for _ in range(2))
        q = self.random(sum(count for _, count in seqs), num_heads, dim)
        positions = np.concatenate([np.arange(total - count, total) for total, count in seqs])
        longest = max(count for _, count in seqs)
        tokens = max(1, attention.tile_rows(longest, dim) * kv_heads // num_heads)
        starts = np.cumsum([0, *(count for _, count in seqs)])
        tiles = [
            (row, at, min(at + tokens, int(starts[row + 1])))
            for row in range(len(seqs))
            for at in range(int(starts[row]), int(starts[row + 1]), tokens)
        ]
        ends = np.array([total for total, _ in seqs])
        num_pieces = max(1, -(-int(ends.max()) // attention.PIECE))
        none = np.zeros(len(positions), np.int64)
        arrays = np.array(tiles, np.int32), table.numpy(), none, positions + 1, none, ends, ends
        split = num_pieces > 1 and longest <= 16 and len(tiles) * kv_heads < attention.FEW_TILES
        moved = [torch.from_numpy(array).to(self.device) for array in arrays]
        reads = attention.Reads._make((*moved, BLOCK, tokens, num_pieces, 0, split))
        slots = (table[0, : blocks[0], None].long() * BLOCK + torch.arange(BLOCK)).flatten()[: seqs[0][0]]
        own_keys, own_values = (x[:, slots.to(self.device)][None] for x in (keys, values))
        first = q[: seqs[0][1]].transpose(0, 1)[None]
        causal = seqs[0][0] == seqs[0][1]

        def by_torch() -> Tensor:
            out = F.scaled_dot_product_attention(first, own_keys, own_values, is_causal=causal, enable_gqa=True)
            return out[0].transpose(0, 1)

        def by_triton() -> Tensor:
            return attention.attend(q, keys, values, reads, dim**-0.5)

        pairs = sum(count * total - (count * (count - 1)) // 2 for total, count in seqs)
        num_bytes = 4 * dim * kv_heads * sum(total for total, _ in seqs) + 4 * q.numel()
        operations = 4 * dim * num_heads * pairs
        reference = by_torch()
        error = float((by_triton()[: seqs[0][1]].float() - reference.float()).abs().max() / reference.abs().max())
        times = self.times(by_triton, *([by_torch] if len(seqs) == 1 else []))
        limit = max(num_bytes / self.bytes_per_second, operations / self.operations_per_second)
        peer_ms = times[1] * 1e3 if len(times) > 1 else None
        self.rows.append(Measured("attention", name, error, times[0] * 1e3, limit / times[0], peer_ms))

    def run(self) -> None:
        self.ops()
        self.linears()
        if self.tiny:
            self.attention("prompt of 40", [(40, 40)], (4, 2), 32)
            self.attention("2 x 40", [(40, 1)] * 2, (4, 2), 32)
            return
        self.attention("prompt of 16,384, D 128", [(16384, 16384)], (32, 8), 128)
        self.attention("decode 1 x 32,768, D 128", [(32768, 1)], (32, 8), 128)
        self.attention("decode 32 x 8,192, D 128", [(8192, 1)] * 32, (64, 8), 128)


def main() -> int:
    """Run the command line."""
    torch.manual_seed(0)
    tiny = "--tiny" in sys.argv[1:]
    if not torch.cuda.is_available() and not tiny:
        print(
            "measure needs a CUDA device; --tiny runs small shapes on a CPU, with TRITON_INTERPRET=1", file=sys.stderr
        )
        return 2
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), tiny)
    bench.run()
    for row in bench.rows:
        peer = "" if row.peer_ms is None else f"{row.peer_ms / row.ms:8.2f} times as fast as the peer"
        mark = "" if row.is_right else "  WRONG"
        print(f"{row.kernel:12} {row.shape:28} {row.ms:9.3f} ms {row.fraction:6.2f} of the ceiling {peer}{mark}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, interpreted"
    ceilings = {"bytes_per_second": bench.bytes_per_second, "operations_per_second": bench.operations_per_second}
    print(json.dumps({"device": name, **ceilings, "kernels": [asdict(row) for row in bench.rows]}))
    return 0 if all(row.is_right for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
