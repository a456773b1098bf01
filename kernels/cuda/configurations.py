"""Common configurations of every Triton kernel, for compile.py: no sinks, no bias; sizes of heads 64, 80, 96, 128 and 256.

A configuration is a name, the kernel, the types of its arguments and its constants by their names, its warps and its stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    if capability >= 90:
        yield from _of_descriptors(capability)
    yield from _of_sampling()


def _of_ops() -> Iterator[Configuration]:
    from pitlane.kernels.cuda import activations, norms, rope

    types = {
        **dict.fromkeys(("x", "sums"), "*fp32"),  # the residual stream
        **dict.fromkeys(("out", "weight", "y"), "*bf16"),
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
    from pitlane.kernels.cuda import attention, attention_kernel, tuning

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
            form_of = tuning.plain(f"attention D {dim}", longest)
            rows = form_of.block_m
            constants = attention.constants(
                heads, group, 32, dim, rows // group, split, sinks=False, exact=False, bits=bits, width=width
            )
            form = "" if bits == 16 else f", KV {FORMATS[bits]}"
            name = f"D {dim}, G {group}, {rows} rows{', split' if split else ''}{form}"
            launch = form_of.launch.values()
            yield name, attention_kernel.attention_kernel, {**types, **rows_of}, constants, *launch
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
    from pitlane.kernels.cuda import linear, tuning

    types = {"x": "*bf16", "numbers": "*i8", "scales": "*fp32", "stride": "i32", "K": "i32"}
    yield "K 2048", linear.quantize_kernel, types, {"GROUPS": 32, "GROUP": 64}, 1, 3
    sizes = dict.fromkeys(("M", "N", "K", "x_stride", "panel_bytes"), "i32")
    for rows in (1, 32, 512):
        for quantized in (True, False):
            flags = {"QUANTIZED": quantized, "HAS_BIAS": False, "EXACT": False}
            x, factors = ("*i8", "*fp32") if quantized else ("*bf16", "*bf16")
            types = {"x": x, "factors": factors, "packed": "*u8", "bias": "*fp32", "y": "*bf16", **sizes}
            form = tuning.plain("int8", rows)
            constants = {**flags, **form.blocks, "GROUPS": 32}
            name = f"M {rows}, {'W8A8' if quantized else 'W8A16'}"
            yield name, linear.int8_kernel, {**types, "scales": "*fp32"}, constants, *form.launch.values()
            for group, symmetric in ((32, False), (64, True), (128, True)):
                name = f"M {rows}, {'W4A8' if quantized else 'W4A16'} g{group}{' symmetric' if symmetric else ''}"
                form = tuning.plain(f"int4 g{group}", rows)
                sizes_of = {"BLOCK_M": form.block_m, "BLOCK_N": form.block_n, "GROUPS": 2048 // group, "GROUP": group}
                constants = {**flags, **sizes_of, "SYMMETRIC": symmetric}
                yield name, linear.int4_kernel, {**types, "unit": "fp32"}, constants, *form.launch.values()


def _of_fp8(capability: int) -> Iterator[Configuration]:
    from pitlane.kernels.cuda import linear_fp8, tuning

    types = {"x": "*bf16", "numbers": "*u8", "scales": "*fp32", "stride": "i32", "K": "i32"}
    for groups, size in ((1, 4096), (32, 128)):
        constants = {"GROUPS": groups, "SIZE": size, "BLOCK": size}
        yield f"groups of {size}", linear_fp8.quantize_kernel, types, constants, max(1, size // 256), 3
    sizes = dict.fromkeys(("M", "N", "K", "x_stride", "weight_stride", "scale_stride", "num_factors"), "i32")
    others = {"y": "*bf16", **dict.fromkeys(("factors", "scales", "bias"), "*fp32"), **sizes}
    for rows in (1, 32, 512):
        for shared in (0, 1, 128):
            for quantized in (False, True):
                form = tuning.plain("fp8", rows)
                types = {"x": "*u8" if quantized else "*bf16", "weight": "*u8", **others}
                constants = {**_flags(shared, quantized, quantized and capability >= 89), **form.blocks}
                name = f"M {rows}, {_linear_name(shared, quantized)}"
                yield name, linear_fp8.fp8_kernel, types, constants, *form.launch.values()


def _flags(shared: int, quantized: bool, native: bool) -> dict[str, Any]:
    return {"SHARED": shared, "QUANTIZED": quantized, "NATIVE": native, "HAS_BIAS": False, "EXACT": False}


def _linear_name(shared: int, quantized: bool) -> str:
    return f"{'W8A8' if quantized else 'W8A16'}{', blocks' if shared == 128 else ', groups' if shared else ''}"


def _of_descriptors(capability: int) -> Iterator[Configuration]:
    """The kernels with tensor descriptors, which need sm_90."""
    from pitlane.kernels.cuda import attention_prefill, linear_fp8_tiles, tuning
    from pitlane.kernels.cuda.attention_reads import LONG_ROWS

    sizes = dict.fromkeys(("M", "N", "K", "scale_stride", "num_factors"), "i32")
    for quantized in (True, False):
        form = tuning.default(f"fp8 {'W8A8' if quantized else 'W8A16'}", 512, divmod(capability, 10))
        m, n, k = form.blocks.values()
        x, weight = ("fp8e4nv", "fp8e4nv") if quantized else ("bf16", "u8")
        tiles = {
            "x": f"tensordesc<{x}[{m},{k}]>",
            "weight": f"tensordesc<{weight}[{n},{k}]>",
            "y": f"tensordesc<bf16[{m},{n}]>",
        }
        types = {**tiles, **dict.fromkeys(("factors", "scales", "bias"), "*fp32"), **sizes}
        for shared in (0, 1, 128):
            constants = {**_flags(shared, quantized, quantized), **form.blocks}
            constants |= {"GROUP": linear_fp8_tiles.GROUP, "SPECIALISED": form.specialised}
            yield (
                _linear_name(shared, quantized),
                linear_fp8_tiles.tiles_kernel,
                types,
                constants,
                *form.launch.values(),
            )
    numbers = dict.fromkeys(("num_tiles", "q_stride", "table_stride"), "i32")
    arrays = {
        "q": "*bf16",
        "out": "*bf16",
        "tiles": "*i32",
        "table": "*i32",
        "highs": "*i64",
        "scale": "fp32",
        **numbers,
    }
    for dim, heads, kv_heads in ((128, 32, 8), (64, 9, 3)):
        tokens = LONG_ROWS[dim] * kv_heads // heads
        constants = attention_prefill.constants(heads, kv_heads, dim, tokens, exact=False)
        types = {**arrays, **dict.fromkeys(("keys", "values"), f"tensordesc<bf16[1,{constants['BLOCK_N']},{dim}]>")}
        launch = attention_prefill.launch().values()
        yield f"D {dim}, G {heads // kv_heads}", attention_prefill.prefill_kernel, types, constants, *launch
