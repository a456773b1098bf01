"""e4m3 numbers for Triton kernels: bytes to float16 and float32 to bytes, for GPUs without instructions for fp8."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def from_e4m3(byte):
    """The values of e4m3 bytes in float16: its bits fit, with an exponent that is 8 too low."""
    sign = (byte.to(tl.uint16) & 0x80) << 8
    size = (byte.to(tl.uint16) & 0x7F) << 7
    value = (sign | size).to(tl.float16, bitcast=True) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def to_e4m3(value):
    """The bytes of float32 values in [-448, 448], rounded to nearest, ties to even. NaN becomes 0x7F."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    power = tl.maximum(size >> 23, 121)  # below 2^-6, steps are 2^-9
    # adding 2^(e + 20) to a value with exponent e leaves 3 bits behind the point, rounded as the sum is
    step = ((power + 20) << 23).to(tl.float32, bitcast=True)
    rounded = (size.to(tl.float32, bitcast=True) + step) - step
    normal = (rounded.to(tl.int32, bitcast=True) - (120 << 23)) >> 20
    is_small = rounded < 0.015625  # below 2^-6 the byte is a number of steps
    byte = tl.where(is_small, tl.where(is_small, rounded * 512.0, 0.0).to(tl.int32), normal)
    byte = tl.where(size > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)
