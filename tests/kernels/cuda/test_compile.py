"""Every Triton kernel compiles for a GPU that is not there, spills no register, and fits into shared memory."""

from __future__ import annotations

import pytest

from pitlane.kernels.cuda.compile import Compiled, compile_for


def misfits(rows: list[Compiled]) -> list[Compiled]:
    assert len(rows) > 80
    return [row for row in rows if not row.fits]


@pytest.mark.slow
@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit(capability: int, half: str) -> None:
    assert misfits(list(compile_for(capability, half))) == []


def test_spills_and_large_blocks_are_named() -> None:
    assert not Compiled("k", "", 90, 255, 4, 0).fits and not Compiled("k", "", 80, 32, 0, 200_000).fits
    assert Compiled("k", "", 90, 255, 0, 200_000).fits
