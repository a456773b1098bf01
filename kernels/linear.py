"""Linear: y [M, N] = x [M, K] w [N, K]^T + bias, in bfloat16 with float32 sums, by AVX2, AVX-512 or AMX on a CPU.

A weight is packed once, for kernels/cpu/linear_bf16.c: panels of 32 outputs; in a panel, one line per pair of inputs; in
a line, that pair's weights of the 32 outputs side by side. So a forward reads the weights in one stream, and all products
read the same layout: `vectors` (AVX-512 BF16's dot products of pairs), `amx` (its tiles), and `float32` (multiply-adds by
AVX-512 or AVX2 of numbers that a shift or a mask widens). The sums of `float32` have the order of `linear_in_order`; on
Intel's CPUs those of `vectors` too. Bytes moved: 2 N K for the weights, once per 192 rows (AMX: 512 rows); 2 M (K + N) for
inputs and outputs. Operations: 2 M N K. A row's result is bit-equal in any batch.
Source: GotoBLAS (Goto and van de Geijn 2008) for panels and tiles; Intel's VDPBF16PS and TDPBF16PS for the dot products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from pitlane.kernels.extension import cpu, without_vectors
from pitlane.kernels.pages import in_huge_pages

PANEL = 32  # outputs
AMX_INPUTS = 32  # per AMX instruction
PRODUCTS = ("vectors", "amx", "float32")  # as kernels/cpu/linear_bf16.h counts them
WORTH = 1.25  # `auto` takes float32 from this ratio of rates to vectors on: 1.7 on a Xeon, 0.5 on a Zen 4


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The reference in float32: x [M, K], weight [N, K], bias [N] -> y [M, N] in x's dtype."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear_in_order(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The sums of `float32` products, bit by bit: inputs in the order 1, 0, 3, 2, ..., a float32 rounding per addition."""
    y = x.new_zeros(len(x), len(weight), dtype=torch.float32)
    for k in range(x.shape[1]):
        y += x[:, k ^ 1, None].float() * weight[:, k ^ 1].float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def checked_inputs(x: Tensor, num_inputs: int, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The inputs [M, K] of a linear, contiguous; refuses another width or dtype."""
    if x.dtype not in dtypes or x.shape[1] != num_inputs:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"x must be {names} [M, {num_inputs}], got {x.dtype} {list(x.shape)}")
    return x.contiguous()


def pack(weight: Tensor) -> Tensor:
    """A bfloat16 weight [N, K], K even -> packed [ceil(N / 32), K / 2, 2, 16, 2], with zeros for outputs beyond N."""
    rows, inputs = weight.shape
    if weight.dtype != torch.bfloat16 or inputs % 2:
        raise ValueError(f"a packed weight is bfloat16 with even inputs, got {weight.dtype} [{rows}, {inputs}]")
    packed = in_huge_pages(weight.new_empty(-(-rows // PANEL), inputs // 2, PANEL, 2)).view(torch.int32).squeeze(-1)
    weight = weight.contiguous()
    pairs = (weight.clone() if weight.storage_offset() % 2 else weight).view(torch.int32)
    num_full = rows // PANEL
    packed[:num_full] = pairs[: num_full * PANEL].view(num_full, PANEL, inputs // 2).transpose(1, 2)
    if rows % PANEL:
        packed[num_full] = 0
        packed[num_full, :, : rows % PANEL] = pairs[num_full * PANEL :].T
    return packed.view(torch.bfloat16).view(*packed.shape[:2], 2, PANEL // 2, 2)


def packed_bytes(num_outputs: int, num_inputs: int) -> int:
    """Bytes of a packed weight [num_outputs, num_inputs]."""
    return 2 * -(-num_outputs // PANEL) * PANEL * num_inputs


class Packed:
    """A packed weight [N, K] and its bias [N], bfloat16. Calling it with x [M, K] returns y [M, N], a new tensor.

    products: a name of PRODUCTS. amx requires `has_amx()`, and becomes vectors unless K is a multiple of 32. vectors becomes
    float32 unless `has_vectors()`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, products: str = "vectors") -> None:
        if products not in PRODUCTS:
            raise ValueError(f"products must be {', '.join(PRODUCTS)}, got {products}")
        self.num_outputs, self.num_inputs = weight.shape
        if products == "amx" and self.num_inputs % AMX_INPUTS:
            products = "vectors"
        self.products = "float32" if products == "vectors" and not has_vectors() else products
        self.weight = pack(weight)
        if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != (self.num_outputs,)):
            raise ValueError(f"the bias must be bfloat16 [{self.num_outputs}], got {bias.dtype} {list(bias.shape)}")
        self.bias = None if bias is None else bias.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, torch.bfloat16)

    def wide(self, x: Tensor) -> Tensor:
        """As `__call__`, with y in float32: the sums are not rounded."""
        return self._product(x, torch.float32)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = checked_inputs(x, self.num_inputs, (torch.bfloat16,))
        rows, inputs = x.shape
        y = x.new_empty(rows, self.num_outputs, dtype=dtype)
        scratch = x.new_empty(rows, inputs, dtype=torch.float32 if self.products == "float32" else x.dtype)
        cpu.linear_bf16(
            x.data_ptr(),
            self.weight.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            rows,
            self.num_outputs,
            inputs,
            PRODUCTS.index(self.products),
            torch.get_num_threads(),
            dtype == torch.float32,
        )
        return y


@cache
def unavailable() -> str | None:
    """Why `Packed` cannot run on this machine; None if it can. Compares it with the reference, once per process."""
    if (reason := without_vectors()) is not None:
        return reason
    if not (_agrees(70, "vectors") and _agrees(70, "float32")):
        return "its result differs from the reference on this machine; please report it"
    return None


def has_vectors() -> bool:
    """Whether the CPU has AVX-512 BF16's dot products of pairs."""
    return cpu is not None and bool(cpu.has_products(PRODUCTS.index("vectors"), 2))


@cache
def has_amx() -> bool:
    """Whether the CPU has AMX, the operating system allows it, and it agrees with the reference. Checked once per process."""
    return unavailable() is None and cpu.has_products(PRODUCTS.index("amx"), AMX_INPUTS) and _agrees(96, "amx")


def fastest_products() -> str:
    """The products that are fastest on this CPU: amx if it has AMX, float32 if `float32_ratio` says so, else vectors."""
    if has_amx():
        return "amx"
    return "vectors" if has_vectors() and float32_ratio() < WORTH else "float32"


@cache
def float32_ratio() -> float:
    """The rate of float32 multiply-adds over that of AVX-512 BF16's dot products, on registers of one core.

    Needs `has_vectors()`. Measured once per process, in turn, about 5 ms in all. Takes the best of several runs: other
    processes only slow a run.
    """
    floats, pairs = 0.0, 0.0
    for _ in range(6):
        floats, pairs = max(floats, cpu.ceiling(0, 1, 2e-4)), max(pairs, cpu.ceiling(1, 1, 2e-4))
    return floats / pairs if pairs else 0.0


def _agrees(num_inputs: int, products: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 5, 27, 50):
        shapes = (rows, num_inputs), (75, num_inputs), (75,)
        x, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
        result, expected = Packed(weight, bias, products)(x).float(), linear_ref(x, weight, bias).float()
        if not torch.allclose(result, expected, rtol=2**-7, atol=1e-3):
            return False
    return True
