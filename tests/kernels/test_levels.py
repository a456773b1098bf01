"""The level of the kernels: without vectors, and a CPU with AVX-512 that runs the kernels for AVX2 too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pitlane.kernels import attention, extension, fp8, linear, ops
from pitlane.kernels.attention import Parts, Seen
from pitlane.plugins.flash_attention import FlashAttention
from pitlane.plugins.fp8 import Fp8
from pitlane.plugins.fused_ops import FusedOps

with_both = pytest.mark.skipif(not linear.has_vectors(), reason="no AVX-512 BF16")


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


@pytest.fixture
def by_avx2(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Computes by the kernels for AVX2."""

    def compute(operation: Callable[[], Tensor]) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setenv("PITLANE_CPU_KERNELS", "avx2")
            assert not linear.has_vectors()
            return operation()

    return compute


@pytest.mark.skipif(extension.without_vectors() is not None, reason=str(extension.without_vectors()))
def test_plain_allows_no_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITLANE_CPU_KERNELS", "plain")
    cpu = extension.cpu
    assert cpu.vectors_level() == 0 and cpu.int_level() == 0
    assert extension.without_vectors() == "PITLANE_CPU_KERNELS = plain allows no vectors; unset it"
    has = (
        cpu.has_products(2, 64),
        cpu.has_ops_bf16(),
        cpu.has_attention_bf16(64),
        cpu.has_fp8_vectors(),
        cpu.has_step(64),
    )
    assert not any(has)
    for operation in (lambda: linear.Packed(made(8, 8))(made(1, 8)), lambda: ops.silu_mul(made(1, 8))):
        with pytest.raises(ValueError, match="this CPU cannot run it"):
            operation()


def test_kv_of_another_order_of_sums_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cpu:
        level = 1

        def vectors_level(self) -> int:
            return self.level

    monkeypatch.setattr(extension, "cpu", Cpu())
    keys = set()
    for plugin in (FlashAttention, FusedOps, Fp8):
        for Cpu.level in (1, 2):
            keys.add(plugin.key_of(plugin.Options()))
    assert len(keys) == 6


@with_both
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7, 12, 13, 200])
def test_float32_products_have_equal_bits(rows: int, by_avx2: Callable[[Callable[[], Tensor]], Tensor]) -> None:
    weight, x = linear.Packed(made(70, 524), made(70, seed=2), "float32"), made(rows, 524)
    assert torch.equal(by_avx2(lambda: weight(x)), weight(x))
    assert torch.equal(by_avx2(lambda: weight.wide(x)), weight.wide(x))


@with_both
@pytest.mark.parametrize("width", [8, 74, 96])
def test_operations_on_rows_agree(width: int, by_avx2: Callable[[Callable[[], Tensor]], Tensor]) -> None:
    x, weight = made(9, 2 * width), made(2 * width, seed=1)
    for operation in (lambda: ops.rms_norm(x, weight, 1e-5), lambda: ops.silu_mul(x)):
        torch.testing.assert_close(by_avx2(operation).float(), operation().float(), rtol=2**-7, atol=1e-6)


@with_both
@pytest.mark.parametrize("rows", [1, 3, 4, 40])
@pytest.mark.parametrize("granularity", fp8.GRANULARITIES)
def test_float8_weights_agree(granularity: str, rows: int, by_avx2: Callable[[Callable[[], Tensor]], Tensor]) -> None:
    weight = fp8.Fp8Linear([fp8.quantize(made(75, 300), granularity)], made(75, seed=2), fp8.VECTORS)
    x = made(rows, 300, seed=3)
    torch.testing.assert_close(by_avx2(lambda: weight(x)).float(), weight(x).float(), rtol=2**-7, atol=1e-2)


@with_both
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_attention_agrees_with_its_reference(dim: int, by_avx2: Callable[[Callable[[], Tensor]], Tensor]) -> None:
    q, keys, values = made(5, 6, dim), made(2, 700, dim, seed=1), made(2, 700, dim, seed=2)
    slots = torch.randperm(700, generator=torch.Generator().manual_seed(0)).numpy().astype(np.int32)
    counts = np.array((1, 31, 512, 600, 700))
    parts = Parts.of([Seen(0, slots, np.arange(5), np.zeros(5, np.int64), counts)], 5)

    def attended() -> Tensor:
        out = torch.empty_like(q)
        attention.attend(q, keys, values, parts, dim**-0.5, out)
        return out

    for out in (attended(), by_avx2(attended)):
        for token, count in enumerate(counts):
            expected = attention.attend_ref(q[token], keys, values, slots[:count], dim**-0.5)
            torch.testing.assert_close(out[token].float(), expected.float(), rtol=2**-6, atol=2e-3)
