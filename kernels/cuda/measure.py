"""Checks and times the Triton kernels on a GPU: `python -m pitlane.kernels.cuda.measure [--tiny] [--no-plugins]`.

First the ceilings of the device: a copy (bytes read and written per second) and a bfloat16 product. Then each kernel: the largest
error against a reference, the time (median of rounds in turn with its peers, on a cold cache), its fraction of the ceiling, and the
time of each peer: every back end of torch's scaled_dot_product_attention, cuBLAS in bfloat16, torch's fp8 product, or torch's own
operation. Then the plugins (measure_plugins.py): answers on the GPU beside answers on the CPU. Prints a table for
docs/benchmarks.md and, as the last line, one JSON document. The exit status is 1 if a kernel or a plugin is wrong. Planned for less
than 8 minutes, half of it compiling; not run on a GPU yet. --tiny: small shapes, also on a CPU under TRITON_INTERPRET=1, whose
times mean nothing; float16 then stands in for bfloat16, whose products the interpreter gets wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.kernels.attention_quant import decode_ref
from pitlane.kernels.cuda import (
    activations,
    attention,
    kv_quant,
    linear,
    linear_fp8,
    measure_plugins,
    norms,
    rope,
    sampling,
)
from pitlane.kernels.ops import rms_norm_ref, silu_mul_ref
from pitlane.kernels.packing import Format
from pitlane.kernels.quantized import Quantized

BLOCK = 32  # slots of a block of KV
ROUNDS = 15
MAX_ERROR = 2e-2  # relative to the largest value of the reference
COLD_BYTES = 2**28  # written before every timed call: more than the cache of a GPU
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Measured:
    """ms: of the kernel. fraction: of the ceiling of bytes or operations. error: relative, the largest. peers: their ms."""

    kernel: str
    shape: str
    error: float
    ms: float
    fraction: float
    peers: dict[str, float]

    @property
    def is_right(self) -> bool:
        return self.error <= MAX_ERROR


class Bench:
    """device: the GPU, or the CPU of the interpreter. bytes_per_second, operations_per_second: its ceilings, as measured."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny, self.rows = device, tiny, list[Measured]()
        self.cold = torch.empty(8 if tiny else COLD_BYTES, dtype=torch.uint8, device=device)
        size = 2**12 if tiny else 2**29
        source = torch.ones(size, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        self.bytes_per_second = 4 * size / self.times({"copy": lambda: target.copy_(source)})["copy"]
        side = 64 if tiny else 8192
        a = torch.randn(side, side, device=device).bfloat16()
        self.operations_per_second = 2 * side**3 / self.times({"product": lambda: a @ a})["product"]

    def times(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Median seconds of every call, in turn. A call that torch refuses on this device is left out."""
        rounds: dict[str, list[float]] = {}
        for name, call in calls.items():
            try:
                call()
                rounds[name] = []
            except (RuntimeError, NotImplementedError):
                if name == next(iter(calls)):
                    raise
        for _ in range(1 if self.tiny else ROUNDS):
            for name, seconds in rounds.items():
                self.cold.zero_()
                seconds.append(self.seconds(calls[name]))
        return {name: median(seconds) for name, seconds in rounds.items()}

    def seconds(self, call: Call) -> float:
        if self.device.type != "cuda":
            start = perf_counter()
            call()
            return perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def add(
        self,
        kernel: str,
        shape: str,
        call: Callable[[], Tensor],
        reference: Tensor,
        num_bytes: float,
        operations: float = 0,
        peers: Mapping[str, Call] | None = None,
    ) -> None:
        """Measure a kernel. Its ceiling is the longer of the times for its bytes and for its operations."""
        error = float((call().float() - reference.float()).abs().max() / reference.float().abs().max())
        times = self.times({"": call, **(peers or {})})
        seconds = times.pop("")
        limit = max(num_bytes / self.bytes_per_second, operations / self.operations_per_second)
        others = {name: value * 1e3 for name, value in times.items()}
        self.rows.append(Measured(kernel, shape, error, seconds * 1e3, limit / seconds, others))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(torch.float16 if self.tiny else torch.bfloat16)

    def ops(self) -> None:
        rows, dim = (3, 96) if self.tiny else (4096, 4096)
        x, out, weight = self.random(rows, dim), self.random(rows, dim), self.random(dim)
        shape, size = f"{rows} x {dim}", 2 * rows * dim
        self.add(
            "rms_norm", shape, lambda: norms.rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5), 2 * size,
            peers={"torch": lambda: F.rms_norm(x, (dim,), weight, 1e-5)},
        )  # fmt: skip
        self.add(
            "add_rms_norm", shape, lambda: norms.add_rms_norm(x, out, weight, 1e-5)[1],
            norms.add_rms_norm_ref(x, out, weight, 1e-5)[1], 4 * size,
            peers={"torch": lambda: F.rms_norm(x + out, (dim,), weight, 1e-5)},
        )  # fmt: skip
        self.add(
            "silu_mul", shape, lambda: activations.silu_mul(x), silu_mul_ref(x), 1.5 * size,
            peers={"torch": lambda: F.silu(x[:, : dim // 2]) * x[:, dim // 2 :]},
        )  # fmt: skip
        tokens, heads, kv_heads, dim = (3, 4, 2, 32) if self.tiny else (4096, 32, 8, 128)
        qkv = self.random(tokens, heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        cos, sin = self.random(tokens, 1, dim), self.random(tokens, 1, dim)
        data, slots = self.random(2, kv_heads, tokens + BLOCK, dim), torch.randperm(tokens, device=self.device)
        other = data.clone()
        reference = rope.rope_store_ref(qk, v, cos, sin, *other, slots)
        self.add(
            "rope_store", f"{tokens} x ({heads} + 2 x {kv_heads}) x {dim}",
            lambda: torch.cat((rope.rope_store(qk, v, cos, sin, *data, slots).flatten(), *(x[:, slots].flatten() for x in data))),
            torch.cat((reference.flatten(), *(x[:, slots].flatten() for x in other))), 4 * qkv.numel(),
        )  # fmt: skip
        seconds = self.times({"": lambda: rope.rope_store(qk, v, cos, sin, *data, slots),
                              "torch": lambda: rope.rope_store_ref(qk, v, cos, sin, *other, slots)})  # fmt: skip
        row = self.rows.pop()
        fraction = 4 * qkv.numel() / self.bytes_per_second / seconds[""]
        self.rows.append(
            Measured(row.kernel, row.shape, row.error, seconds[""] * 1e3, fraction, {"torch": seconds["torch"] * 1e3})
        )

    def linears(self) -> None:
        outputs, inputs = (96, 128) if self.tiny else (14336, 4096)
        weight = self.random(outputs, inputs)
        forms = {"int8": Format(8, False), "int8 W8A8": Format(8), "int4 g64": Format(4, False, 64)}
        packed = {
            name: Quantized(outputs, inputs, form, [weight.cpu()], device=self.device) for name, form in forms.items()
        }
        scales = weight.float().abs().amax(1) / 448
        small = (weight.float() / scales[:, None]).to(torch.float8_e4m3fn)
        blocks = torch.full((-(-outputs // 128), -(-inputs // 128)), 0.01, device=self.device)
        for rows in (1, 16) if self.tiny else (1, 16, 512, 4096):
            x = self.random(rows, inputs)
            shape, moved, work = (
                f"{rows} x {inputs} x {outputs}",
                2 * rows * (inputs + outputs),
                2 * rows * inputs * outputs,
            )
            cublas: dict[str, Call] = {"cuBLAS bf16": lambda x=x: F.linear(x, weight)}  # type: ignore[misc]
            for name, quantized in packed.items():
                self.add(
                    name, shape, lambda x=x, quantized=quantized: linear.linear(x, quantized),  # type: ignore[misc]
                    quantized.reference(x), quantized.packed.numel() + moved, work, cublas,
                )  # fmt: skip
            cases = (("fp8 W8A16", scales, False), ("fp8 W8A8", scales, True), ("fp8 W8A8 blocks", blocks, True))
            for name, factors, is_quantized in cases:
                peers = dict(cublas)
                if name == "fp8 W8A8":
                    numbers, row_scales = linear_fp8.quantize_ref(x, inputs)
                    peers["torch fp8"] = lambda numbers=numbers, row_scales=row_scales: torch._scaled_mm(  # type: ignore[misc]
                        numbers, small.t(), row_scales, scales[None], out_dtype=torch.bfloat16
                    )
                self.add(
                    name, shape,
                    lambda x=x, factors=factors, q=is_quantized: linear_fp8.linear(x, small, factors, quantized=q),  # type: ignore[misc]
                    linear_fp8.linear_ref(x, small, factors, quantized=is_quantized), small.numel() + moved, work, peers,
                )  # fmt: skip

    def attention(
        self, name: str, seqs: list[tuple[int, int]], heads: tuple[int, int], dim: int, bits: int = 16
    ) -> None:
        """seqs: (keys, queries) of each sequence; the queries are its last tokens. bits: of the KV, see `attention.attend`."""
        num_heads, kv_heads = heads
        counts = [-(-keys // BLOCK) for keys, _ in seqs]
        table, order, at = (
            torch.full((len(seqs), max(counts)), -1, dtype=torch.int32),
            torch.randperm(sum(counts)).int(),
            0,
        )
        for row, count in enumerate(counts):
            table[row, :count] = order[at : at + count]
            at += count
        stores = self.random(2, kv_heads, sum(counts) * BLOCK, dim)
        full, rows = stores, None
        if bits != 16:
            width = dim * bits // 8 + dim // 8 if bits else dim
            rows = torch.empty(*stores.shape[:3], width, dtype=torch.uint8, device=self.device)
            all_blocks = torch.arange(sum(counts), device=self.device)
            kv_quant.quantize_blocks(stores, rows, all_blocks, all_blocks, bits)
            full = stores[:, :, :BLOCK].contiguous()
            stores = torch.stack(decode_ref(rows, dim, bits)).to(stores.dtype)
        q = self.random(sum(queries for _, queries in seqs), num_heads, dim)
        reads = attention.reads_of(_batch(seqs, table), 0, heads, dim, self.device)
        (num_keys, num_queries), count = seqs[0], counts[0]
        slots = (table[0, :count, None].long() * BLOCK + torch.arange(BLOCK)).flatten()[:num_keys].to(self.device)
        keys, values = (x[:, slots][None] for x in stores)
        first = q[:num_queries].transpose(0, 1)[None]

        def by_torch() -> Tensor:
            return F.scaled_dot_product_attention(first, keys, values, is_causal=num_queries > 1, enable_gqa=True)

        def by_triton() -> Tensor:
            return attention.attend(q, *full, reads, dim**-0.5, rows=rows, bits=bits)

        pairs = sum(count * total - (count * (count - 1)) // 2 for total, count in seqs)
        row_bytes = 2 * dim if bits == 16 else rows.shape[3]  # type: ignore[union-attr]
        num_bytes = 2 * row_bytes * kv_heads * sum(total for total, _ in seqs) + 4 * q.numel()
        peers: dict[str, Call] = {"default": by_torch}
        if self.device.type == "cuda":
            peers = {backend: lambda backend=backend: _by_backend(backend, by_torch) for backend in BACKENDS}  # type: ignore[misc]
        if len(seqs) > 1:
            peers = {}
        reference = by_torch()[0].transpose(0, 1)
        error = float((by_triton()[:num_queries].float() - reference.float()).abs().max() / reference.abs().max())
        self.add("attention", name, by_triton, by_triton(), num_bytes, 4 * dim * num_heads * pairs, peers)
        row = self.rows.pop()
        self.rows.append(Measured(row.kernel, row.shape, error, row.ms, row.fraction, row.peers))

    def kv(self) -> None:
        kv_heads, blocks, dim = (2, 3, 32) if self.tiny else (8, 4096, 128)
        full, every = self.random(2, kv_heads, blocks * BLOCK, dim), torch.arange(blocks, device=self.device)
        for name, bits, width in (("int8", 8, dim + dim // 8), ("fp8", 0, dim)):
            rows = torch.empty(2, kv_heads, blocks * BLOCK, width, dtype=torch.uint8, device=self.device)
            kv_quant.quantize_blocks(full, rows, every, every, bits)
            expected = full if bits else full.to(torch.float8_e4m3fn)
            error = float((torch.stack(decode_ref(rows, dim, bits)) - expected.float()).abs().max() / full.abs().max())
            seconds = self.times(
                {"": lambda rows=rows, bits=bits: kv_quant.quantize_blocks(full, rows, every, every, bits)}
            )  # type: ignore[misc]
            limit = (2 * full.numel() + rows.numel()) / self.bytes_per_second
            shape = f"{kv_heads} x {blocks} blocks x {dim}"
            self.rows.append(Measured(f"quantize {name}", shape, error, seconds[""] * 1e3, limit / seconds[""], {}))

    def sampling(self) -> None:
        vocabulary = 300 if self.tiny else 128_256
        for rows in (2,) if self.tiny else (1, 64):
            logits = 4 * torch.randn(rows, vocabulary, device=self.device)
            for name, top_k, top_p in (("temperature", 0, 1.0), ("top-k, top-p", 50, 0.9), ("top-p", 0, 0.9)):
                keys = [(row + 1) * 0x9E3779B97F4A7C15 % 2**64 for row in range(rows)]
                wishes = sampling.Wishes(keys, [0.8] * rows, [top_k] * rows, [top_p] * rows, [0.0] * rows)
                expected = sampling.sample_ref(logits, wishes)
                call = lambda logits=logits, wishes=wishes: sampling.sample(logits, wishes)  # type: ignore[misc]  # noqa: E731
                error = float((call() != expected).float().mean())
                seconds = self.times(
                    {"": call, "torch": lambda logits=logits, wishes=wishes: sampling.sample_ref(logits, wishes)}
                )  # type: ignore[misc]
                limit = 4 * logits.numel() / self.bytes_per_second
                shape, peers = f"{rows} x {vocabulary}, {name}", {"torch": seconds["torch"] * 1e3}
                self.rows.append(Measured("sample", shape, error, seconds[""] * 1e3, limit / seconds[""], peers))

    def run(self) -> None:
        self.ops()
        self.kv()
        self.sampling()
        self.linears()
        if self.tiny:
            for bits in (16, 8, 0):
                self.attention(f"prompt of 64, {bits} bits", [(64, 64)], (4, 2), 32, bits)
                self.attention(f"2 x 64, {bits} bits", [(64, 1)] * 2, (4, 2), 32, bits)
            return
        for bits, name in ((16, ""), (8, ", int8 KV"), (0, ", fp8 KV")):
            self.attention(f"prompt of 16,384, D 128{name}", [(16384, 16384)], (32, 8), 128, bits)
            self.attention(f"decode 1 x 32,768, D 128{name}", [(32768, 1)], (32, 8), 128, bits)
            self.attention(f"decode 32 x 8,192, D 128{name}", [(8192, 1)] * 32, (64, 8), 128, bits)


def _batch(seqs: list[tuple[int, int]], table: Tensor) -> Any:
    """The fields of a `pitlane.Batch` that `reads_of` reads."""
    positions = torch.cat([torch.arange(keys - queries, keys) for keys, queries in seqs])
    starts = torch.tensor([0, *(queries for _, queries in seqs)]).cumsum(0)
    group = SimpleNamespace(window_start=torch.zeros_like(positions), block_table=table, num_sinks=0)
    parents = torch.full_like(positions, -1)
    return SimpleNamespace(groups=(group,), positions=positions, parents=parents, query_start=starts, block_size=BLOCK)


def _by_backend(name: str, call: Callable[[], Tensor]) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        return call()


def table_of(rows: list[Measured]) -> str:
    """A table for docs/benchmarks.md."""
    lines = ["| kernel | shape | ms | of the ceiling | times as fast as | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        peers = ", ".join(f"{name} {ms / row.ms:.2f}" for name, ms in row.peers.items())
        mark = "" if row.is_right else " WRONG"
        lines.append(
            f"| {row.kernel} | {row.shape} | {row.ms:.3f} | {row.fraction:.2f} | {peers} | {row.error:.1e}{mark} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line."""
    started = perf_counter()
    torch.manual_seed(0)
    tiny, device = "--tiny" in sys.argv[1:], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        print(
            "measure needs a CUDA device; --tiny runs small shapes on a CPU, with TRITON_INTERPRET=1", file=sys.stderr
        )
        return 2
    with torch.inference_mode():
        bench = Bench(device, tiny)
        bench.run()
    print(table_of(bench.rows))
    plugins = [] if "--no-plugins" in sys.argv[1:] else measure_plugins.run(device.type, tiny, bench.bytes_per_second)
    document = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "bytes_per_second": bench.bytes_per_second,
        "operations_per_second": bench.operations_per_second,
        "kernels": [asdict(row) for row in bench.rows],
        "plugins": [asdict(row) for row in plugins],
        "seconds": perf_counter() - started,
    }
    print(json.dumps(document))
    return 0 if all(row.is_right for row in (*bench.rows, *plugins)) else 1


if __name__ == "__main__":
    sys.exit(main())
