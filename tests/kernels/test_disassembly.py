"""The machine code of the tiles: loops over weights keep all sums in registers. Needs objdump and a build with AVX-512."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache

import pytest

from pitlane.kernels.extension import cpu

OBJDUMP = shutil.which("objdump")
TILE = re.compile(r"(bytes|nibbles)_(quantized|float)_\d+|wide_\d+_WIDE_\w+|(pairs|floats)_(streams_)?\d+|score_\d+")
AVX2_TILE = re.compile(r"(floats_(streams_)?|score_)\d+")
PRODUCT = re.compile(r"vpdpbusd|vdpbf16ps|vfmadd\d+ps|vpmaddwd")
STACK_MOVE = re.compile(r"^v.*\(%r[sb]p[,)]")
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)")

Code = list[tuple[int, str]]  # addresses and instructions


@cache
def tiles() -> dict[str, Code]:
    """The instructions of each tile by its symbol, with " avx2" behind the names of tiles for AVX2."""
    assert OBJDUMP is not None
    command = [OBJDUMP, "-d", "--no-show-raw-insn", cpu.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols: list[tuple[str, Code]] = []
    code: Code = []
    for line in text.splitlines():
        if symbol := re.match(r"[0-9a-f]+ <([\w.]+)>:", line):
            code = []
            symbols.append((symbol[1], code))
        elif instruction := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            code.append((int(instruction[1], 16), instruction[2].strip()))
    tiles: dict[str, Code] = {}
    for name, code in symbols:
        if TILE.fullmatch(name) and any("zmm" in text for _, text in code):
            tiles[name] = code
        elif AVX2_TILE.fullmatch(name):
            tiles[f"{name} avx2"] = code
    return tiles


def inner_loops(code: Code) -> Iterator[list[str]]:
    """The loops that contain no other loop."""
    jumps = [(int(jump[1], 16), at) for at, text in code if (jump := JUMP.match(text))]
    loops = [(begin, end) for begin, end in jumps if code[0][0] <= begin <= end]
    for begin, end in loops:
        if not any((begin, end) != other and begin <= other[0] and other[1] <= end for other in loops):
            yield [text for at, text in code if begin <= at <= end]


def loops_over_weights(code: Code) -> list[list[str]]:
    return [loop for loop in inner_loops(code) if any(PRODUCT.match(text) for text in loop)]


def moves(code: Code) -> list[str]:
    """The instructions of loops over weights that read or write the stack by vector registers."""
    return [text for loop in loops_over_weights(code) for text in loop if STACK_MOVE.match(text)]


@pytest.mark.skipif(cpu is None or OBJDUMP is None, reason="needs the kernels in C and objdump")
def test_loops_over_weights_keep_their_sums_in_registers() -> None:
    codes = tiles()
    if "pairs_12" not in codes:
        pytest.skip("this build has no AVX-512, or no symbols")
    # pairs and floats; bytes and nibbles; wide; scores of attention; AVX2: floats and scores
    assert len(codes) == 2 * (12 + 2) + 4 * 12 + 5 * 7 + 12 + (6 + 1 + 6), sorted(codes)
    assert all(loops_over_weights(code) for code in codes.values())
    assert {name: stack for name, code in codes.items() if (stack := moves(code))} == {}


def test_a_move_to_the_stack_is_seen() -> None:
    code = [
        (0, "vmovups %zmm1,0x40(%rsp)"),
        (1, "vpdpbusd %zmm1,%zmm2,%zmm3"),
        (2, "vmovups 0x8(%rsp),%zmm1"),
        (3, "jg 1 <x>"),
    ]
    assert moves(code) == ["vmovups 0x8(%rsp),%zmm1"]
    assert not moves([*code[:2], (3, "jg 1 <x>"), (4, code[0][1])])
