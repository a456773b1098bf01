"""Attention with tensor descriptors, and the batches that it serves. Triton's interpreter knows descriptors."""

from __future__ import annotations

import pytest
import torch

from pitlane import Draft
from pitlane.kernels.cuda import attention_prefill, attention_reads
from pitlane.plugins.attention_sinks import SinkWindow
from pitlane.plugins.flash_attention import PagedOnCuda
from tests.engine.run.attention_setting import Setting, assert_near, make_setting

SEQS = [(61, 129, None), (200, 1, None), (0, 1, None), (31, 33, None)]


def make(seqs, **options) -> Setting:  # type: ignore[no-untyped-def]
    return make_setting(seqs, attention=PagedOnCuda, dtype=torch.float32, **options)


@pytest.fixture(autouse=True)
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of sm_90. Programs are few: so each takes several tiles. Pieces are short: so a sequence has several."""
    monkeypatch.setattr(attention_reads, "has_descriptors", lambda device: True)
    monkeypatch.setattr(attention_reads, "PIECE", 128)


@pytest.mark.parametrize(("heads", "dim"), [((3, 1), 64), ((2, 2), 128)])
def test_the_sums_are_those_of_the_reference(heads: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_prefill, "serves", lambda *_, **__: True)  # in float32 too, to compare closely
    setting = make(SEQS, heads=heads, dim=dim)
    assert setting.prepare().long_tiles is not None
    assert_near(*setting.run())


def test_inputs_of_16_bits_run_by_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    attend = attention_prefill.attend
    monkeypatch.setattr(attention_prefill, "attend", lambda *args: calls.append(1) or attend(*args))
    out, expected = make_setting(
        [(2, 128, None)], attention=PagedOnCuda, dtype=torch.float16, heads=(2, 1), dim=64
    ).run()
    torch.testing.assert_close(out.double(), expected, rtol=2**-9, atol=2**-9)
    assert calls == [1]


@pytest.mark.parametrize(
    ("seqs", "options"),
    [
        ([(300, 127, None)], {}),  # a short query
        ([(0, 130, None)], {"window": 40}),
        ([(0, 130, None)], {"sinks": SinkWindow(4, 64, 32)}),
        ([(0, 130, None), (9, 1, Draft([1, 2]))], {}),
        ([(0, 130, None)], {"dim": 80}),
    ],
)
def test_other_batches_keep_the_kernel_with_pointers(seqs, options) -> None:  # type: ignore[no-untyped-def]
    assert make(seqs, heads=(4, 2), **{"dim": 64, **options}).prepare().long_tiles is None


def test_a_store_that_no_descriptor_can_describe_keeps_the_kernel_with_pointers() -> None:
    setting = make_setting([(0, 130, None)], attention=PagedOnCuda, dtype=torch.float16, heads=(4, 2), dim=64)
    reads, q = setting.prepare(), torch.randn(130, 4, 64).half()
    data = torch.randn(2 * 160 * 64 + 8).half()
    keys, shifted = (data[skip : skip + 2 * 160 * 64].view(2, 160, 64) for skip in (0, 1))
    assert attention_prefill.serves(q, keys, keys, reads, is_dense=True)
    assert not attention_prefill.serves(q, keys, shifted, reads, is_dense=True)
    assert not attention_prefill.serves(q, keys, keys, reads, is_dense=False)
    assert not attention_prefill.serves(q.float(), keys.float(), keys.float(), reads, is_dense=True)
