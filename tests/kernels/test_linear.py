"""The C linear equals its reference for any shape and number of rows, is bit-equal in any batch, and works as a plugin."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane import BadOption, BuildContext, PlanConflict, Plugin, SamplingParams, hookimpl
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.kernels import attention, extension, linear, ops, step
from pitlane.testing import assert_only_ties_differ

here = pytest.mark.skipif(linear.unavailable() is not None, reason=str(linear.unavailable()))
BF16_STEP = 2.0**-8  # largest relative error of rounding to bfloat16
OF_SIZE = {"vectors": 1e-6, "float32": 2e-7}  # error of a float32 sum, as a share of the sum of the sizes of its terms
by_both_products = pytest.mark.parametrize("products", OF_SIZE)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


@here
@pytest.mark.usefixtures("threads")
@by_both_products
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", [(1, 2), (32, 64), (31, 70), (33, 256), (200, 514), (1000, 1026)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11, 12, 13, 24, 25, 100, 192, 193, 400])
def test_is_within_a_rounding_of_the_exact_value(
    rows: int, outputs: int, inputs: int, bias: bool, products: str
) -> None:
    x, weight = made(rows, inputs), made(outputs, inputs, seed=1)
    offset = made(outputs, seed=2) if bias else None
    exact = x.double() @ weight.double().T
    if offset is not None:
        exact += offset.double()
    size = x.double().abs() @ weight.double().abs().T
    result = linear.Packed(weight, offset, products)(x)
    assert result.shape == (rows, outputs) and result.dtype == torch.bfloat16
    assert bool(((result.double() - exact).abs() <= BF16_STEP * exact.abs() + OF_SIZE[products] * size).all())
    wide = linear.Packed(weight, offset, products).wide(x)
    assert wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), result)
    assert bool(((wide.double() - exact).abs() <= 1e-6 * size).all())


@here
@pytest.mark.usefixtures("threads")
@by_both_products
def test_a_row_is_the_same_in_any_batch(products: str) -> None:
    weight, x = linear.Packed(made(320, 1500), products=products), made(300, 1500)
    whole = weight(x)
    parts = [(7, 8), (5, 17), (3, 16), (100, 293), (299, 300), (0, 192), *((0, rows) for rows in range(1, 65))]
    for first, last in parts:
        assert torch.equal(weight(x[first:last]), whole[first:last])
        assert torch.equal(weight.wide(x[first:last]).bfloat16(), whole[first:last])


@here
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 3, 12, 13, 40])
def test_float32_products_round_once_per_input_in_a_fixed_order(rows: int) -> None:
    x, weight, bias = made(rows, 524), made(70, 524, seed=1), made(70, seed=2)
    assert torch.equal(linear.Packed(weight, bias, "float32")(x), linear.linear_in_order(x, weight, bias))
    x, weight = torch.cat([x, -x], 1), torch.cat([weight, weight], 1)  # the exact sums are 0: roundings remain
    result = linear.Packed(weight, products="float32")(x)
    assert torch.equal(result, linear.linear_in_order(x, weight))
    assert not torch.equal(result, linear.linear_in_order(x.flip(1), weight.flip(1))), (
        "another order has other roundings"
    )


@here
def test_auto_takes_float32_only_where_it_is_much_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_amx", lambda: False)
    monkeypatch.setattr(linear, "has_vectors", lambda: False)
    assert linear.fastest_products() == "float32"
    monkeypatch.setattr(linear, "has_vectors", lambda: True)
    for ratio, expected in ((1.7, "float32"), (1.2, "vectors"), (0.5, "vectors")):
        monkeypatch.setattr(linear, "float32_ratio", lambda ratio=ratio: ratio)
        assert linear.fastest_products() == expected
    monkeypatch.setattr(linear, "has_amx", lambda: True)
    assert linear.fastest_products() == "amx"


@pytest.mark.skipif(not linear.has_vectors(), reason="no AVX-512 BF16")
def test_the_rates_of_products_are_of_the_instructions_alone() -> None:
    assert 0.25 < linear.float32_ratio() < 4, "a multiply-add of floats has half the products of a dot product of pairs"


@here
def test_takes_rows_that_are_strided_and_no_rows() -> None:
    weight, x = linear.Packed(made(64, 32)), made(10, 96)
    assert torch.equal(weight(x[:, 32:64]), weight(x[:, 32:64].clone()))
    assert weight(x[:0, :32]).shape == (0, 64)


@here
def test_serves_threads_at_once() -> None:
    weight, x = linear.Packed(made(512, 512)), [made(9, 512, seed=i) for i in range(4)]
    expected, equal = [weight(rows) for rows in x], [True] * 4

    def run(i: int) -> None:
        equal[i] = all(torch.equal(weight(x[i]), expected[i]) for _ in range(200))

    running = [Thread(target=run, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(equal)


@here
def test_packs_every_weight_once() -> None:
    weight = made(45, 6)
    packed = linear.pack(weight)  # [2 panels, 3 pairs, 2, 16, 2]
    flat = packed.permute(0, 2, 3, 1, 4).reshape(64, 6)
    assert torch.equal(flat[:45], weight) and not flat[45:].any()


# ---- the plugin


@here
def test_answers_part_from_the_core_only_at_ties(make_engine: Any) -> None:
    engine = make_engine("bundled", dtype="bfloat16", plugins=[])
    prompts = ["Question: how much does it weigh?", "The machine has", "Page 1"]
    params = [SamplingParams(max_tokens=40, logprobs=50, ignore_eos=True)] * len(prompts)
    plain = engine.generate(prompts, params)
    packed = engine.generate(prompts, params, plan=engine.plan({"packed_linear": {}}))
    assert list(packed[0].stats["plugins"]) == ["packed_linear"] and packed[0].stats["exactness"] == "rounding"
    # Both plans round to bfloat16, at different places: logits of about 10 differ by a few steps of 2^-8.
    assert_only_ties_differ(plain, packed, params[0], rounding=0.5)


@here
def test_every_linear_of_a_model_is_packed(make_engine: Any) -> None:
    engine = make_engine("bundled", dtype="bfloat16", plugins=["packed_linear"])
    model = engine.lane_of(engine.default_plan).runner.forward.model
    linears = [model.head, *(x for layer in model.layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down))]
    assert all(isinstance(layer, linear.Packed) for layer in linears)


def test_is_on_by_default_where_it_serves_and_refused_with_a_reason_where_not(make_engine: Any) -> None:
    engine = make_engine("random:tiny", dtype="float32", plugins=None)
    assert engine.default_plan.names == ["prefix_cache", "span_attention"]
    with pytest.raises(BadOption, match="packed_linear is unavailable: .* the model runs in float32 on cpu"):
        engine.plan({"packed_linear": {}})
    if linear.unavailable() is None:
        names = make_engine("random:tiny", dtype="bfloat16", plugins=None).default_plan.names
        assert names == ["compiled_step", "flash_attention", "fused_ops", "packed_linear", "prefix_cache"]


def test_without_a_compiler_it_is_left_out_and_says_why(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cpu", None)
    for module in (linear, attention, ops, step):
        monkeypatch.setattr(module, "cpu", None)
        monkeypatch.setattr(module, "unavailable", module.unavailable.__wrapped__)
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=None)
    assert engine.default_plan.names == ["prefix_cache", "span_attention"]
    for name in ("packed_linear", "flash_attention", "fused_ops", "compiled_step"):
        with pytest.raises(BadOption, match=f"{name} is unavailable: the package was built without a C compiler"):
            engine.plan({name: {}})


def test_another_holder_of_its_role_replaces_it_and_both_are_refused(make_engine: Any) -> None:
    class Other(Plugin):
        name, role, exactness = "other", "linear", "approximate"

        @hookimpl
        def build_linear(self, part: Any, context: Any) -> None:
            return None

    registry = PluginRegistry.load()
    registry.add(Other)
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=[], registry=registry)
    if linear.unavailable() is None:
        with pytest.raises(PlanConflict, match="linear is held by packed_linear"):
            engine.plan({"packed_linear": {}, "other": {}})


def test_says_nothing_of_other_models_than_the_one_it_is_asked_for() -> None:
    context = BuildContext(None, torch.bfloat16, torch.device("cuda"))  # type: ignore[arg-type]
    reason = PluginRegistry.load().get("packed_linear").unavailable(context)
    assert reason is not None and "cuda" in reason
