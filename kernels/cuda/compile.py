"""Compiles the Triton kernels ahead of time for a GPU that is not there.

`python -m pitlane.kernels.cuda.compile [--quick] [CAPABILITY ...]`. --quick: every third configuration.

For each kernel and configuration: registers, spilled bytes and shared memory, as `ptxas` and Triton tell them. Needs no GPU.
CAPABILITY: 80, 90, 100. Prints a table and, as the last line, one JSON document. The exit status is 1 if a kernel spills
registers or needs more shared memory than the GPU has.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

QUICK = "--quick"
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # largest shared memory of a block


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers: of a thread. spilled: bytes of a thread that are stored and loaded again. shared: bytes of a block."""

    kernel: str
    configuration: str
    capability: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_BYTES[self.capability]


FORMATS = {8: "int8", 4: "int4", 0: "fp8"}  # of quantized KV, by bits
Configuration = tuple[
    str, Any, dict[str, str], dict[str, Any], int, int
]  # name, kernel, types, constants, warps, stages


def configurations(capability: int) -> Iterator[Configuration]:
    """Common configurations: no sinks, no bias; types of arguments and constants by their names."""
    yield from _of_ops()
    yield from _of_attention()
    yield from _of_kv()
    yield from _of_integers()
    yield from _of_fp8(capability)
    yield from _of_sampling()


def _of_ops() -> Iterator[Configuration]:
    from pitlane.kernels.cuda import activations, norms, rope

    types = {
        **dict.fromkeys(("x", "out", "weight", "sums", "y"), "*bf16"),
        **dict.fromkeys(("stride", "out_stride"), "i32"),
        "eps": "fp32",
    }
    for dim in (576, 2048, 4096):
        block = 1 << (dim - 1).bit_length()
        for add in (False, True):
            constants = {"ADD": add, "DIM": dim, "BLOCK": block}
            name = f"D {dim}{', add' if add else ''}"
            yield name, norms.rms_norm_kernel, types, constants, norms.num_warps(block), 3
    types = {
        **dict.fromkeys(("qk", "v", "cos", "sin", "keys", "values", "out"), "*bf16"),
        **dict.fromkeys(("qk_stride", "v_stride", "head_stride", "slot_stride"), "i32"),
        "slots": "*i64",
    }
    for dim, heads, kv_heads in ((64, 9, 3), (80, 32, 32), (128, 32, 8), (256, 8, 4)):
        width = 1 << (dim - 1).bit_length()
        constants = {
            "QUERIES": heads,
            "HEADS": heads + kv_heads,
            "DIM": dim,
            "WIDTH": width,
            "BLOCK": rope.HEADS,
        }
        yield f"D {dim}", rope.rope_store_kernel, types, constants, 4, 3
    types = {"gate_up": "*bf16", "y": "*bf16", "stride": "i32", "inner": "i32"}
    for gelu in (False, True):
        yield f"GELU {gelu}", activations.gated_kernel, types, {"GELU": gelu, "BLOCK": activations.BLOCK}, 4, 3


def _of_attention() -> Iterator[Configuration]:
    from pitlane.kernels.cuda import attention, attention_kernel
    from pitlane.kernels.cuda.attention_reads import tile_rows

    strides = ("q_stride", "sink_stride", "head_stride", "slot_stride", "row_stride", "table_stride", "num_pieces")
    types = {
        **dict.fromkeys(("q", "sink_q", "keys", "values", "out"), "*bf16"),
        "partial": "*fp32",
        **dict.fromkeys(("tiles", "table"), "*i32"),
        **dict.fromkeys(("lows", "highs", "masks", "drafts", "ends"), "*i64"),
        **dict.fromkeys(strides, "i32"),
        "scale": "fp32",
        "num_sinks": "i32",
    }
    shapes = [(64, 9, 3), (80, 32, 1), (96, 32, 1), (128, 32, 4), (128, 32, 8), (256, 4, 4)]  # D, H, G
    cases = [(*shape, 16) for shape in shapes] + [(dim, 32, 4, bits) for dim in (64, 128) for bits in (8, 4, 0)]
    for dim, heads, group, bits in cases:
        width = 0 if bits == 16 else dim * bits // 8 + dim // 8 if bits else dim
        rows_of = dict.fromkeys(("row_keys", "row_values"), "*bf16" if bits == 16 else "*u8")
        for longest, split in ((1, True), (512, False)):
            rows = tile_rows(longest, dim)
            constants = attention.constants(
                heads, group, 32, dim, rows // group, split, sinks=False, exact=False, bits=bits, width=width
            )
            form = "" if bits == 16 else f", KV {FORMATS[bits]}"
            name = f"D {dim}, G {group}, {rows} rows{', split' if split else ''}{form}"
            shape = attention.launch(constants["ROWS"])
            yield name, attention_kernel.attention_kernel, {**types, **rows_of}, constants, *shape.values()
    types = {"partial": "*fp32", "out": "*bf16", "num_pieces": "i32"}
    yield "D 128", attention_kernel.merge_kernel, types, {"DIM": 128, "WIDTH": 128}, 1, 3


def _of_kv() -> Iterator[Configuration]:
    from pitlane.kernels.cuda import kv_quant

    strides = dict.fromkeys(("full_part", "full_head", "row_part", "row_head"), "i32")
    types = {"full": "*bf16", "rows": "*u8", "sources": "*i64", "targets": "*i64", **strides}
    for dim in (64, 128):
        for bits, form in FORMATS.items():
            width = dim * bits // 8 + dim // 8 if bits else dim
            yield f"D {dim}, {form}", kv_quant.quantize_kernel, types, {"BITS": bits, "DIM": dim, "BYTES": width}, 4, 3


def _of_sampling() -> Iterator[Configuration]:
    from pitlane.kernels.cuda import sampling

    numbers = dict.fromkeys(("temperatures", "top_ps", "log_min_ps", "weights"), "*fp64")
    types = {**dict.fromkeys(("keys", "top_ks", "out"), "*i64"), **numbers, "stride": "i32", "V": "i32"}
    for top_k, top_p in ((False, False), (True, True)):
        for logits in ("*fp32", "*bf16"):
            constants = {"TOP_K": top_k, "TOP_P": top_p, "BLOCK": sampling.BLOCK}
            name = f"{'filters' if top_k else 'no filter'}, {logits[1:]}"
            yield name, sampling.sample_kernel, {"logits": logits, **types}, constants, 8, 3


def _of_integers() -> Iterator[Configuration]:
    from pitlane.kernels.cuda import linear

    types = {"x": "*bf16", "numbers": "*i8", "scales": "*fp32", "stride": "i32", "K": "i32"}
    yield "K 2048", linear.quantize_kernel, types, {"GROUPS": 32, "GROUP": 64}, 1, 3
    sizes = dict.fromkeys(("M", "N", "K", "x_stride", "panel_bytes"), "i32")
    for rows in (1, 32, 512):
        at = linear.launch(rows).values()
        for quantized in (True, False):
            flags = {"QUANTIZED": quantized, "HAS_BIAS": False, "EXACT": False}
            x, factors = ("*i8", "*fp32") if quantized else ("*bf16", "*bf16")
            types = {"x": x, "factors": factors, "packed": "*u8", "bias": "*fp32", "y": "*bf16", **sizes}
            constants = {**flags, **_tile(rows, 64), "GROUPS": 32, "BLOCK_K": 64}
            name = f"M {rows}, {'W8A8' if quantized else 'W8A16'}"
            yield name, linear.int8_kernel, {**types, "scales": "*fp32"}, constants, *at
            for group, symmetric in ((32, False), (64, True), (128, True)):
                name = f"M {rows}, {'W4A8' if quantized else 'W4A16'} g{group}{' symmetric' if symmetric else ''}"
                constants = {
                    **flags,
                    **_tile(rows, group),
                    "GROUPS": 2048 // group,
                    "GROUP": group,
                    "SYMMETRIC": symmetric,
                }
                yield name, linear.int4_kernel, {**types, "unit": "fp32"}, constants, *at


def _tile(rows: int, size: int) -> dict[str, int]:
    from pitlane.kernels.cuda.linear import tiles_of

    return dict(zip(("BLOCK_M", "BLOCK_N"), tiles_of(rows, size), strict=True))


def _of_fp8(capability: int) -> Iterator[Configuration]:
    from pitlane.kernels.cuda import linear_fp8

    types = {"x": "*bf16", "numbers": "*u8", "scales": "*fp32", "stride": "i32", "K": "i32"}
    for groups, size in ((1, 4096), (32, 128)):
        constants = {"GROUPS": groups, "SIZE": size, "BLOCK": size}
        yield f"groups of {size}", linear_fp8.quantize_kernel, types, constants, max(1, size // 256), 3
    sizes = ("M", "N", "K", "x_stride", "weight_stride", "scale_stride", "num_factors")
    for rows in (1, 32, 512):
        block_m, block_n = linear_fp8.tiles_of(rows)
        for blocks in (False, True):
            for quantized in (False, True):
                types = {
                    "x": "*u8" if quantized else "*bf16",
                    "weight": "*u8",
                    **dict.fromkeys(("factors", "scales", "bias"), "*fp32"),
                    "y": "*bf16",
                    **dict.fromkeys(sizes, "i32"),
                }
                constants = {
                    "BLOCKS": blocks,
                    "QUANTIZED": quantized,
                    "NATIVE": quantized and capability >= 89,
                    "HAS_BIAS": False,
                    "EXACT": False,
                    "BLOCK_M": block_m,
                    "BLOCK_N": block_n,
                    "BLOCK_K": linear_fp8.BLOCK_K,
                }
                name = f"M {rows}, {'W8A8' if quantized else 'W8A16'}{', blocks' if blocks else ''}"
                yield name, linear_fp8.fp8_kernel, types, constants, *linear_fp8.launch(rows).values()


def compile_for(capability: int, half: str = "bf16", step: int = 1) -> Iterator[Compiled]:
    """Compile every `step`-th configuration for a GPU of this capability (90: Hopper). half: the type of 16 bits, bf16 or fp16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, kernel, types, constants, num_warps, num_stages in islice(configurations(capability), 0, None, step):
        types = {parameter: kind.replace("bf16", half) for parameter, kind in types.items()}
        signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, parameter in enumerate(kernel.arg_names)
            if str(types.get(parameter)).startswith("*")
        }
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        registers, spilled = _ptxas(compiled.asm["ptx"], capability)
        kind = Path(inspect.getfile(kernel.fn)).stem
        yield Compiled(f"{kind}.{kernel.__name__}", name, capability, registers, spilled, compiled.metadata.shared)


def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes of the kernel of a PTX text."""
    from triton.backends.nvidia.compiler import get_ptxas

    (target,) = re.findall(r"(?m)^\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", str(file), "-o", str(file) + ".cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", log)]
    return max(registers), sum(spills)


def main() -> int:
    """Run the command line."""
    wanted = [argument for argument in sys.argv[1:] if argument != QUICK]
    step = 3 if QUICK in sys.argv[1:] else 1
    rows = [row for capability in map(int, wanted or ("80", "90", "100")) for row in compile_for(capability, step=step)]
    for row in rows:
        mark = "" if row.fits else "  DOES NOT FIT"
        place = f"sm_{row.capability} {row.kernel:30} {row.configuration:32}"
        print(f"{place} {row.registers:4} registers {row.spilled:4} spilled {row.shared:7} shared{mark}")
    print(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
