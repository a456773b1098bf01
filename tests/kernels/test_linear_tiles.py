"""The C linear on AMX's tiles: on tiles emulated in C from Intel's manual, and on the CPU's own if it has AMX."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from pitlane import BadOption, BuildContext, LinearPart, Member
from pitlane.engine.models.presets import preset
from pitlane.kernels import linear
from pitlane.plugins.packed_linear import PackedLinear

CPU = Path(__file__).parents[2] / "kernels" / "cpu"
SOURCES = [path for path in CPU.glob("*.c") if not path.name.startswith("module")]
COMPILER = shutil.which("cc") or shutil.which("gcc")
Multiply: TypeAlias = Callable[..., Tensor]

here = pytest.mark.skipif(linear.unavailable() is not None, reason=str(linear.unavailable()))
with_vectors = pytest.mark.skipif(not linear.has_vectors(), reason="no AVX-512 BF16")
with_amx = pytest.mark.skipif(not linear.has_amx(), reason="no AMX")


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Multiply:
    """The kernel compiled with emulated tiles: (x, packed weight, number of outputs, bias, threads) -> y."""
    if COMPILER is None or not CPU.is_dir():
        pytest.skip("no compiler, or no sources")
    library = tmp_path_factory.mktemp("tiles") / "linear.so"
    tiles = f'-DEMULATED_TILES="{Path(__file__).with_name("emulated_tiles.h")}"'
    flags = ["-std=c11", "-O2", "-ffp-contract=off", "-mfma", "-shared", "-fPIC", tiles]
    subprocess.run([COMPILER, *flags, *map(str, SOURCES), "-o", str(library), "-lm"], check=True)
    run = ctypes.CDLL(str(library)).linear_bf16
    run.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3 + [ctypes.c_int] * 3

    def multiply(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None, threads: int = 1) -> Tensor:
        # the kernel must not write to the extra row
        y = torch.full((len(x) + 1, outputs), torch.nan, dtype=torch.bfloat16)
        addresses = [x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), 0]
        run(*addresses, len(x), outputs, x.shape[1], 1, threads, 0)
        assert y[-1].isnan().all()
        return y[:-1]

    return multiply


@with_vectors
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outputs, inputs", [(1, 32), (32, 64), (31, 96), (200, 544), (70, 1056)])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 48, 50, 511, 513, 600])
def test_is_within_a_rounding_of_the_exact_value(
    rows: int, outputs: int, inputs: int, threads: int, emulated: Multiply
) -> None:
    x, weight, bias = made(rows, inputs), made(outputs, inputs, seed=1), made(outputs, seed=2)
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T  # the error of a float32 sum grows with the size of its terms
    result = emulated(x, linear.pack(weight), outputs, bias, threads)
    assert bool(((result.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6 * size).all())


@with_vectors
def test_a_row_is_the_same_in_any_batch(emulated: Multiply) -> None:
    weight, x = linear.pack(made(160, 1536)), made(560, 1536)
    whole = emulated(x, weight, 160, None)
    for first, last in [(0, 1), (7, 8), (0, 2), (5, 17), (3, 19), (0, 33), (100, 293), (20, 533), (559, 560)]:
        assert torch.equal(emulated(x[first:last].contiguous(), weight, 160, None), whole[first:last])


@with_amx
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 100, 600])
def test_the_cpu_does_as_the_emulation(rows: int, emulated: Multiply) -> None:
    x, weight = made(rows, 1056), made(200, 1056, seed=1)
    packed = linear.Packed(weight, products="amx")
    assert torch.equal(packed(x), emulated(x, packed.weight, 200, None))


@here
@pytest.mark.parametrize("has_vectors", [True, False])
def test_products_that_a_linear_cannot_have_are_replaced(has_vectors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_vectors", lambda: has_vectors)
    products = [linear.Packed(made(8, inputs), products="amx").products for inputs in (48, 64)]
    assert products == ["vectors" if has_vectors else "float32", "amx"]
    assert linear.Packed(made(8, 64), products="vectors").products == products[0]


@here
@pytest.mark.parametrize("products, missing", [("amx", "AMX"), ("vectors", "AVX-512 BF16")])
def test_products_are_refused_with_a_reason_where_there_are_none(
    products: str, missing: str, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, f"has_{products}", lambda: False)
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=[])
    plan = engine.plan({"packed_linear": {"products": products}})
    with pytest.raises(BadOption, match=rf"packed_linear.products = {products}: .* has no {missing}.*use auto"):
        engine.generate(["a"], plan=plan)
    assert engine.generate(["a"], plan=engine.plan({"packed_linear": {}}))[0].token_ids


@here
@pytest.mark.parametrize("has_amx", [True, False])
@pytest.mark.parametrize("products", ["auto", "amx", "vectors", "float32"])
def test_products_choose_the_way(products: str, has_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_amx", lambda: has_amx)
    monkeypatch.setattr(linear, "has_vectors", lambda: True)
    monkeypatch.setattr(linear, "float32_ratio", lambda: 1.7)
    if products == "amx" and not has_amx:
        return
    expected = {"auto": "amx" if has_amx else "float32"}.get(products, products)
    plugin = PackedLinear(PackedLinear.parse_options({"products": products}))
    part, context = LinearPart((Member("q", 8),), 64), BuildContext(preset("tiny"), torch.bfloat16, torch.device("cpu"))
    plan = plugin.build_linear(part, context)
    assert plan is not None
    built = plan.build([{"weight": made(8, 64)}])
    assert isinstance(built, linear.Packed) and built.products == expected
    assert plan.num_bytes == plan.peak_bytes == built.weight.nbytes


@here
def test_kv_is_kept_apart_for_each_kind_of_products(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=[])
    keys = set()
    for products in ("auto", "vectors", "float32"):
        for fastest in ("amx", "vectors", "float32"):
            monkeypatch.setattr(linear, "fastest_products", lambda fastest=fastest: fastest)
            keys.add(engine.plan({"packed_linear": {"products": products}}).kv_key)
    assert len(keys) == 5, "auto has a key for each choice; the other options do not depend on the choice"
