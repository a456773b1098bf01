"""Every kernel's own check fails when a bug is planted in the kernel: a wrong scale, a mask that is off by one, a wrong boundary.

A bug is a replacement in the source of a kernel's module. The changed source becomes a module that stands in for the original; then
a fresh copy of the kernel's test module runs one of its tests, which must fail.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from pitlane.kernels.packing import Format
from pitlane.plugins.attention_sinks import SinkWindow

PACKAGE = "pitlane.kernels.cuda"
ROW = {"shape": (3, 74), "dtype": torch.float32}
RESULT = "test_linear.test_the_result_is_that_of_the_reference"
SINKS = SinkWindow(4, 64, 32)
ROPE = {"heads": (9, 3), "dim": 64, "dtype": torch.float32}


class Bug(NamedTuple):
    """module: of the kernel. old, new: texts. test: module and function of the check, arguments: of the function."""

    module: str
    old: str
    new: str
    test: str
    arguments: dict[str, Any]


BUGS = [
    Bug("norms", "/ DIM + eps", "/ BLOCK + eps", "test_ops.test_rms_norm", ROW),
    Bug("norms", "inside = columns < DIM", "inside = columns < DIM - 1", "test_ops.test_rms_norm", ROW),
    Bug("norms", "value += tl.load(out", "value += 1.01 * tl.load(out", "test_ops.test_add_rms_norm", ROW),
    Bug("norms", "row * out_stride", "row * stride", "test_ops.test_add_rms_norm", ROW),
    Bug("rope", "(columns + DIM // 2) % DIM", "(columns + DIM // 2 + 1) % DIM", "test_ops.test_rope_store", ROPE),
    Bug("rope", "(head >= QUERIES)[:, None]", "(head > QUERIES)[:, None]", "test_ops.test_rope_store", ROPE),
    Bug("rope", "head < 2 * HEADS - QUERIES", "head < 2 * HEADS - QUERIES - 1", "test_ops.test_rope_store", ROPE),
    Bug("activations", "1.0 + tl.exp(-gate)", "1.01 + tl.exp(-gate)", "test_ops.test_gated_activations", ROW),
    Bug("activations", "0.044715", "0.044", "test_ops.test_gated_activations", ROW),
    Bug("activations", "columns < inner", "columns < inner - 1", "test_ops.test_gated_activations", ROW),
    *(
        Bug("attention_kernel", old, new, "test_attention.test_chunks_at_the_edges_of_blocks", {"size": 31})
        for old, new in (
            ('"tf32") * scale', '"tf32") * scale * 1.01'),
            ("place[None, :] < high[:, None]", "place[None, :] <= high[:, None]"),
            ("place[None, :] >= low[:, None]", "place[None, :] > low[:, None]"),
            ("place % SIZE\n        held", "(place + 1) % SIZE\n        held"),
            ("* q_stride + head[:, None] * DIM", "* q_stride + kv_head * GROUP * DIM"),
        )
    ),
    Bug(
        "attention_kernel",
        "place[None, :] >= draft)",
        "place[None, :] > draft)",
        "test_attention.test_random_trees",
        {"sizes": (64, 1, 7)},
    ),
    Bug("attention_kernel", "part_total * new", "part_total", "test_attention.test_several_pieces", {"few_tiles": 0}),
    Bug(
        "attention_kernel",
        "range(num_pieces)",
        "range(num_pieces - 1)",
        "test_attention.test_several_pieces",
        {"few_tiles": 256},
    ),
    Bug(
        "attention_kernel",
        "tl.minimum(low, num_sinks)",
        "tl.minimum(low, num_sinks - 1)",
        "test_attention.test_sinks",
        {"sinks": SINKS},
    ),
    *(
        Bug(
            "attention_kernel",
            old,
            new,
            "test_kv_quant.test_attention_over_rows",
            {"name": name, "heads": (4, 2), "dim": 64},
        )
        for name, old, new in (
            ("int8", "(columns // 32 * 2)", "(columns // 64 * 2)"),
            ("int8", "columns % (DIM // 32) * 2", "0"),
            ("int4", "columns // (DIM // 2) * 4", "0 * columns"),
            ("fp8", "from_e4m3(tl.load", "-from_e4m3(tl.load"),
        )
    ),
    *(
        Bug(
            "kv_quant",
            old,
            new,
            "test_kv_quant.test_the_rows_have_the_bits_of_the_format",
            {"name": name, "dim": 64, "dtype": dtype},
        )
        for name, dtype, old, new in (
            ("int8", torch.float32, "bits + 0xFFFF, bits)", "bits, bits)"),
            ("int8", torch.float32, "rest > 0.5, low + 1.0", "rest > 0.6, low + 1.0"),
            ("int4", torch.float32, "group + GROUPS, part", "group, part"),
            ("fp8", torch.float32, "tl.maximum(x, -448.0), 448.0", "tl.maximum(x, -448.0), 400.0"),
        )
    ),
    Bug("linear", "byte.to(tl.int16) - 128", "byte.to(tl.int16) - 127", RESULT, {"form": Format(8, False)}),
    Bug("linear", "number -= 8", "number -= 7", RESULT, {"form": Format(4, False, 32, True)}),
    Bug("linear", "group % 2 * 32) // 2", "0 * group) // 2", RESULT, {"form": Format(4, False, 32, False)}),
    Bug(
        "linear",
        "rest < 0.5, low, low + is_odd",
        "rest < 0.5, low, low",
        "test_linear.test_inputs_are_rounded_to_nearest_even",
        {},
    ),
    Bug("e4m3", "* 256.0", "* 255.0", "test_linear_fp8.test_all_bytes_are_decoded", {}),
    Bug(
        "e4m3",
        "size >> 23, 121",
        "size >> 23, 120",
        "test_linear_fp8.test_values_are_rounded_as_torch_rounds",
        {},
    ),
    *(
        Bug(
            "linear_fp8",
            old,
            new,
            "test_linear_fp8.test_the_result_is_that_of_the_reference",
            {"shared": shared, "quantized": True},
        )
        for shared, old, new in (
            (128, "128 * scale_stride + start // 128", "128 * scale_stride"),
            (1, "outs * scale_stride + start // 128", "outs * scale_stride"),
            (128, "num_factors + start // 128", "num_factors"),
            (0, "tl.load(scales + outs, outs < N", "tl.load(scales + outs, outs < N - 1"),
            (0, "(ins < K)[:, None]", "(ins < K - 1)[:, None]"),
        )
    ),
    *(
        Bug(
            "linear_fp8_tiles",
            old,
            new,
            "test_linear_fp8.test_tiles_by_descriptors_give_the_result_of_the_reference",
            {"shared": shared, "quantized": True},
        )
        for shared, old, new in (
            (128, "out // 128 * scale_stride + start", "start"),
            (1, "outs * scale_stride + start // 128", "outs * scale_stride"),
            (0, "tile % width // size", "tile // size"),
            (0, "tl.minimum(tiles_m - first, GROUP)", "GROUP"),
            (0, "total *= tl.load(factors + rows, rows < M", "total *= tl.load(factors + rows, rows < M - 1"),
        )
    ),
    *(
        Bug("attention_prefill", old, new, "test_attention_prefill.test_the_sums_are_those_of_the_reference", arguments)
        for arguments in ({"heads": (2, 1), "dim": 64},)
        for old, new in (
            ("place[None, :] < high[:, None]", "place[None, :] <= high[:, None]"),
            (
                "block * BLOCK_N, 0]).reshape(BLOCK_N, DIM)\n        more_value",
                "0, 0]).reshape(BLOCK_N, DIM)\n        more_value",
            ),
            ("num_tiles - 1 - index // KV_HEADS", "num_tiles - 2 - index // KV_HEADS"),
            ("// (2 * BLOCK_N) * (2 * BLOCK_N)", "// BLOCK_N * (2 * BLOCK_N)"),
            ("range(0, highest, PIECE)", "range(0, highest - PIECE, PIECE)"),
        )
    ),
    *(
        Bug("sampling", old, new, f"test_sampling.{test}", {})
        for old, new, test in (
            ("above < k,", "above < k - 1,", "test_filters_cut_where_the_host_cuts"),
            ("bits >> 27", "bits >> 28", "test_filters_cut_where_the_host_cuts"),
            ("limit = p * total", "limit = p * total * 0.5", "test_filters_cut_where_the_host_cuts"),
            (", 0) <= ties", ", 0) < ties", "test_equal_logits_at_a_cut_survive_in_the_order_of_their_ids"),
            ("(value + 0.0)", "value", "test_equal_logits_at_a_cut_survive_in_the_order_of_their_ids"),
        )
    ),
]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def users_of(module: str) -> set[str]:
    """The modules of the package that import a module, directly or not."""
    folder = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    sources = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    users, size = {module}, 0
    while size != len(users):
        size = len(users)
        pattern = re.compile(rf"(?m)^ *from {PACKAGE}(\.| import [\w, ]*\b)({'|'.join(users)})\b")
        users |= {name for name, source in sources.items() if pattern.search(source)}
    return users - {module}


def plant(bug: Bug, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the changed module stand in for the original, and have its users imported again."""
    name, package = f"{PACKAGE}.{bug.module}", importlib.import_module(PACKAGE)
    original = importlib.import_module(name)
    source = Path(str(original.__file__)).read_text(encoding="utf-8")
    assert bug.old in source and bug.old != bug.new
    path = folder / f"{bug.module}.py"
    path.write_text(source.replace(bug.old, bug.new), encoding="utf-8")
    changed = load(name, path)
    monkeypatch.setitem(sys.modules, name, changed)
    monkeypatch.setattr(package, bug.module, changed)
    for user in users_of(bug.module):
        importlib.import_module(f"{PACKAGE}.{user}")
        monkeypatch.delattr(package, user)
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{user}")


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.module}: {bug.new}".replace("\n", " "))
def test_a_planted_bug_is_caught(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(bug, tmp_path, monkeypatch)
    module, function = bug.test.split(".")
    tests = load(f"planted_{module}", Path(__file__).with_name(f"{module}.py"))
    check = getattr(tests, function)
    names = check.__code__.co_varnames[: check.__code__.co_argcount]
    arguments = {name: value for name, value in bug.arguments.items() if name in names}
    if "monkeypatch" in names:
        arguments["monkeypatch"] = monkeypatch
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        check(**arguments)


def test_every_kernel_module_has_a_bug() -> None:
    folder = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    kernels = {path.stem for path in folder.glob("*.py") if "@triton.jit" in path.read_text(encoding="utf-8")}
    assert kernels == {bug.module for bug in BUGS}
