"""Checks and times the Triton kernels on a GPU: `python -m pitlane.kernels.cuda.measure [--tiny] [--no-plugins] [--tune [FILE]]`.

First the ceilings of the device: a copy (bytes read and written per second) and a bfloat16 product. Then each kernel: the largest
error against a reference, the time (median of rounds in turn with its peers, on a cold cache), its fraction of the ceiling, and the
time of each peer: every back end of torch's scaled_dot_product_attention, cuBLAS in bfloat16, torch's fp8 product, or torch's own
operation. Then the plugins (measure_plugins.py): answers on the GPU beside answers on the CPU. Prints a table for
docs/benchmarks.md and, as the last line, one JSON document. The exit status is 1 if a kernel or a plugin is wrong. Planned for less
than 8 minutes, half of it compiling; not run on a GPU yet. --tiny: small shapes, also on a CPU under TRITON_INTERPRET=1, whose
times mean nothing; float16 then stands in for bfloat16, whose products the interpreter gets wrong. --tune: time the candidates of
tuning.py instead, and write the table of this GPU to FILE; without FILE, to the folder `tables` of the package.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from pitlane.kernels.attention_quant import decode_ref
from pitlane.kernels.cuda import (
    activations,
    kv_quant,
    linear,
    linear_fp8,
    measure_attention,
    measure_plugins,
    measure_tune,
    norms,
    rope,
    sampling,
)
from pitlane.kernels.cuda.measure_attention import BLOCK
from pitlane.kernels.cuda.measure_timer import Call, Measured, Timer, error_of
from pitlane.kernels.ops import rms_norm_ref, silu_mul_ref
from pitlane.kernels.packing import Format
from pitlane.kernels.quantized import Quantized


class Bench(Timer):
    """The measures of every kernel."""

    def ops(self) -> None:
        rows, dim = (3, 96) if self.tiny else (4096, 4096)
        x, out, weight = self.random(rows, dim), self.random(rows, dim), self.random(dim)
        num_bytes = 2 * rows * dim

        def normed() -> Tensor:
            return norms.rms_norm(x, weight, 1e-5)

        def summed() -> tuple[Tensor, Tensor]:
            return norms.add_rms_norm(x, out, weight, 1e-5)

        def active() -> Tensor:
            return activations.silu_mul(x)

        error = error_of(normed(), rms_norm_ref(x, weight, 1e-5))
        peers: dict[str, Call] = {"torch": lambda: F.rms_norm(x, (dim,), weight, 1e-5)}
        self.add("rms_norm", f"{rows} x {dim}", error, normed, 2 * num_bytes, peers=peers)
        error = max(map(error_of, summed(), norms.add_rms_norm_ref(x, out, weight, 1e-5)))
        peers = {"torch": lambda: F.rms_norm(x + out, (dim,), weight, 1e-5)}
        self.add("add_rms_norm", f"{rows} x {dim}", error, summed, 4 * num_bytes, peers=peers)
        peers = {"torch": lambda: F.silu(x[:, : dim // 2]) * x[:, dim // 2 :]}
        error = error_of(active(), silu_mul_ref(x))
        self.add("silu_mul", f"{rows} x {dim}", error, active, 1.5 * num_bytes, peers=peers)

    def rope(self) -> None:
        tokens, heads, kv_heads, dim = (3, 4, 2, 32) if self.tiny else (4096, 32, 8, 128)
        qkv, angles = self.random(tokens, heads + 2 * kv_heads, dim), self.random(2, tokens, 1, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        stores = [torch.zeros_like(self.random(2, kv_heads, tokens, dim)) for _ in range(2)]
        slots = torch.randperm(tokens, device=self.device)
        cos, sin = angles

        def by_triton() -> Tensor:
            return rope.rope_store(qk, v, cos, sin, stores[0][0], stores[0][1], slots)

        def by_torch() -> Tensor:
            return rope.rope_store_ref(qk, v, cos, sin, stores[1][0], stores[1][1], slots)

        error = max(error_of(by_triton(), by_torch()), error_of(stores[0], stores[1]))
        shape = f"{tokens} x ({heads} + 2 x {kv_heads}) x {dim}"
        self.add("rope_store", shape, error, by_triton, 4 * qkv.numel(), peers={"torch": by_torch})

    def linears(self) -> None:
        outputs, inputs = (96, 128) if self.tiny else (14336, 4096)
        weight = self.random(outputs, inputs)
        forms = {"int8": Format(8, False), "int8 W8A8": Format(8), "int4 g64": Format(4, False, 64)}
        packed = {
            name: Quantized(outputs, inputs, form, [weight.cpu()], device=self.device) for name, form in forms.items()
        }
        scales = weight.float().abs().amax(1) / linear_fp8.LARGEST
        small = (weight.float() / scales[:, None]).to(torch.float8_e4m3fn)
        blocks = torch.full((-(-outputs // 128), -(-inputs // 128)), 0.01, device=self.device)
        cases = {"fp8 W8A16": (scales, False), "fp8 W8A8": (scales, True), "fp8 W8A8 blocks": (blocks, True)}
        for rows in (1, 16) if self.tiny else (1, 16, 512, 4096):
            x, shape = self.random(rows, inputs), f"{rows} x {inputs} x {outputs}"
            moved, work = 2 * rows * (inputs + outputs), 2 * rows * inputs * outputs
            numbers, factors = linear_fp8.quantize_ref(x, inputs)
            by_cublas = partial(F.linear, x, weight)
            by_torch = partial(
                torch._scaled_mm, numbers, small.t(), factors, scales[None], out_dtype=torch.bfloat16
            )  # products alone: without the rounding of x
            for name, form in packed.items():
                call = partial(linear.linear, x, form)
                error = error_of(call(), form.reference(x))
                self.add(name, shape, error, call, form.packed.numel() + moved, work, {"cuBLAS bf16": by_cublas})
            for name, (unit, quantized) in cases.items():
                call = partial(linear_fp8.linear, x, small, unit, quantized=quantized)
                error = error_of(call(), linear_fp8.linear_ref(x, small, unit, quantized=quantized))
                peers = {"cuBLAS bf16": by_cublas, **({"torch fp8": by_torch} if name == "fp8 W8A8" else {})}
                self.add(name, shape, error, call, small.numel() + moved, work, peers)

    def attention(
        self, name: str, seqs: list[tuple[int, int]], heads: tuple[int, int], dim: int, bits: int = 16
    ) -> None:
        measure_attention.measure(self, name, seqs, heads, dim, bits)

    def kv(self) -> None:
        kv_heads, blocks, dim = (2, 3, 32) if self.tiny else (8, 4096, 128)
        full, every = self.random(2, kv_heads, blocks * BLOCK, dim), torch.arange(blocks, device=self.device)
        for name, bits, width in (("int8", 8, dim + dim // 8), ("fp8", 0, dim)):
            rows = torch.empty(2, kv_heads, blocks * BLOCK, width, dtype=torch.uint8, device=self.device)
            call = partial(kv_quant.quantize_blocks, full, rows, every, every, bits)
            call()
            expected = full if bits else full.to(torch.float8_e4m3fn)
            error = error_of(torch.stack(decode_ref(rows, dim, bits)), expected)
            shape = f"{kv_heads} x {blocks} blocks x {dim}"
            self.add(f"quantize {name}", shape, error, call, 2 * full.numel() + rows.numel())

    def sampling(self) -> None:
        vocabulary = 300 if self.tiny else 128_256
        for rows in (2,) if self.tiny else (1, 64):
            logits = 4 * torch.randn(rows, vocabulary, device=self.device)
            for name, top_k, top_p in (("temperature", 0, 1.0), ("top-k, top-p", 50, 0.9), ("top-p", 0, 0.9)):
                keys = [(row + 1) * 0x9E3779B97F4A7C15 % 2**64 for row in range(rows)]
                lists = keys, [0.8] * rows, [top_k] * rows, [top_p] * rows, [0.0] * rows
                call, peer = (partial(sample, logits, *lists) for sample in (sampling.sample, sampling.sample_ref))
                error = float((call() != peer()).float().mean())
                self.add(
                    "sample", f"{rows} x {vocabulary}, {name}", error, call, 4 * logits.numel(), peers={"torch": peer}
                )

    def run(self) -> None:
        self.ops()
        self.rope()
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
        if measure_tune.FLAG in sys.argv[1:]:
            return measure_tune.main(bench, sys.argv[sys.argv.index(measure_tune.FLAG) + 1 :])
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
    is_right = all(row.is_right for row in bench.rows) and all(row.is_right for row in plugins)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
