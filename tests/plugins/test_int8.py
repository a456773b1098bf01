"""int8 and int4: their bounds, their bytes, tied heads, group sizes, toggles, and equal ids in any batch, chunk and draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pitlane import (
    BadOption,
    BuildContext,
    EmbeddingPart,
    LinearPart,
    Member,
    Part,
    Plugin,
    PluginRegistry,
    SamplingParams,
    Tensors,
    hookimpl,
)
from pitlane.engine.models.presets import preset
from pitlane.kernels import linear, quantized
from pitlane.plugins.int4 import Int4
from pitlane.plugins.int8 import Int8
from pitlane.storage import packed
from pitlane.storage.home import home
from tests.engine.models.harness import CPU
from tests.plugins.quality import Text

EIGHT, FOUR = {"int8": {}}, {"int4": {}}
each_plan = pytest.mark.parametrize("settings", [EIGHT, FOUR], ids=["int8", "int4"])
KERNELS = {"flash_attention": {}, "fused_ops": {}}
WEIGHTS_ONLY = {"activations": "bfloat16"}
here = pytest.mark.skipif(linear.unavailable() is not None, reason=str(linear.unavailable()))


def context(dtype: torch.dtype = torch.bfloat16) -> BuildContext:
    return BuildContext(preset("tiny"), dtype, CPU)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


@pytest.mark.parametrize(
    ("plugin", "options", "low", "bound", "perplexity"),
    [
        (Int8, {}, 0.02, 0.06, 1.01),
        (Int4, {}, 0.08, 0.20, 1.12),
        pytest.param(Int8, WEIGHTS_ONLY, 0.02, 0.06, 1.01, marks=pytest.mark.slow),
        pytest.param(Int4, WEIGHTS_ONLY, 0.08, 0.20, 1.12, marks=pytest.mark.slow),
        pytest.param(Int4, {"group_size": 64}, 0.08, 0.26, 1.18, marks=pytest.mark.slow),
        pytest.param(Int4, {"symmetric": True}, 0.08, 0.30, 1.40, marks=pytest.mark.slow),
    ],
)
def test_little_probability_moves(
    text: Text, plugin: type[Plugin], options: dict[str, Any], low: float, bound: float, perplexity: float
) -> None:
    """The bounds of the docstrings and of docs/exactness.md. The core's attention runs, so chunks give the same logits nearly."""
    built = plugin(plugin.parse_options(options))
    result = text.quality(text.logits(built, torch.bfloat16, 256))
    assert low < result.moved < bound
    assert result.perplexity < perplexity * result.exact_perplexity


@each_plan
def test_without_the_kernel_the_same_bound_holds(
    text: Text, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "cpu", None)
    quantized._warn.cache_clear()
    plugin = Int8() if settings is EIGHT else Int4()
    result = text.quality(text.logits(plugin, torch.bfloat16))
    assert result.moved < (0.06 if settings is EIGHT else 0.20)


@each_plan
def test_weights_take_the_bytes_that_are_planned_and_toggle_per_request(
    make_engine: Any, settings: dict[str, Any]
) -> None:
    engine = make_engine("bundled", dtype="bfloat16")
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    core, small, again = (engine.generate("a b c", params, plan=engine.plan(plan)) for plan in ({}, settings, {}))
    low, high = (0.5, 0.52) if settings is EIGHT else (0.33, 0.36)
    assert low < small.stats["weight_bytes"] / core.stats["weight_bytes"] < high
    assert small.stats["exactness"] == "approximate" and small.stats["failed"] == {}
    assert again.token_ids == core.token_ids
    model = engine.lane_of(engine.plan(settings)).built.model
    linears = [x for layer in model.layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    assert {x.form.bits for x in linears} == {8 if settings is EIGHT else 4} and model.head.form.bits == 8


@each_plan
@pytest.mark.parametrize("head", ["int8", "bfloat16"])
def test_the_plan_follows_the_shape_alone(settings: dict[str, Any], head: str) -> None:
    plugin = (Int8 if settings is EIGHT else Int4).parse_options({"head": head})
    built = (Int8 if settings is EIGHT else Int4)(plugin)
    part = LinearPart((Member("q", 64), Member("k", 24)), 96, bias=True)
    plan = built.build_linear(part, context())
    assert plan is not None
    tensors = [{"weight": torch.randn(n, 96).bfloat16(), "bias": torch.randn(n).bfloat16()} for n in (64, 24)]
    made = plan.build(tensors)
    parts = [made.packed, made.bias, *([] if made.scales is None else [made.scales])]
    assert plan.num_bytes == sum(tensor.nbytes for tensor in parts) < plan.peak_bytes
    x = torch.randn(3, 96).bfloat16()
    exact = torch.cat([x.float() @ t["weight"].float().T + t["bias"].float() for t in tensors], 1)
    assert float((made(x) - exact).norm() / exact.norm()) < (0.02 if settings is EIGHT else 0.12)
    lm_head = LinearPart((Member("lm_head", 64),), 96)
    head_plan = built.build_linear(lm_head, context())
    if head == "bfloat16" and linear.unavailable() is not None:
        assert head_plan is None
    else:
        assert head_plan is not None
        weight = torch.randn(64, 96).bfloat16()
        made = head_plan.build([{"weight": weight}])
        assert type(made) is (linear.Packed if head == "bfloat16" else quantized.Quantized)
        exact = x.float() @ weight.float().T
        assert float((made(x) - exact).norm() / exact.norm()) < (0.004 if head == "bfloat16" else 0.02)
    embedding = built.build_embedding(EmbeddingPart("e", 300, 48, is_tied=True), context())
    assert (embedding is None) == (head == "bfloat16")


@each_plan
def test_a_second_load_packs_nothing_and_gives_the_same_ids(
    make_engine: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    monkeypatch.setattr(packed, "SMALLEST_BYTES", 1)

    def ids() -> list[int]:
        return list(make_engine("bundled", dtype="bfloat16", plugins=settings).generate("a b c", params).token_ids)

    first = ids()
    folders = packed.packed_folders()
    assert {folder.recipe for folder in folders} == (
        {"8 bits"} if settings is EIGHT else {"4 bits, groups of 32", "8 bits"}
    )
    with monkeypatch.context() as patch:
        patch.setattr(quantized.Quantized, "_pack", None)
        assert ids() == first
    changed = next(iter((home() / "cache" / "packed" / folders[0].name).glob("*proj*")))
    changed.write_bytes(changed.read_bytes()[:-1])
    assert ids() == first and "is damaged" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(quantized.Quantized, "_pack", None)
        assert ids() == first


class Shifted(Plugin):
    """Moves the rows of a weight, so that another plan has other weights. Exactness: steering."""

    name, exactness = "shifted", "steering"

    @hookimpl
    def transform_weights(self, part: Part, tensors: Tensors, context: BuildContext) -> Tensors:
        return {name: tensor.roll(1, 0) for name, tensor in tensors.items()}


def test_changed_weights_take_no_copy(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan with `transform_weights` has other weights than the checkpoint."""
    monkeypatch.setattr(packed, "SMALLEST_BYTES", 1)
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    registry = PluginRegistry.load()
    registry.add(Shifted)

    def ids(*names: str) -> list[int]:
        plugins = {name: dict[str, Any]() for name in ("int8", *names)}
        engine = make_engine("random:tiny", dtype="bfloat16", plugins=plugins, registry=registry)
        return list(engine.generate([1, 2, 3], params).token_ids)

    shifted = ids("shifted")
    assert packed.packed_folders() == []
    assert ids() != shifted
    assert packed.packed_folders() and ids("shifted") == shifted


def test_a_tied_head_shares_the_table() -> None:
    weight = torch.randn(300, 48)
    plan = Int8().build_embedding(EmbeddingPart("e", 300, 48, is_tied=True), context(torch.float32))
    assert plan is not None and plan.has_head
    built = plan.build([{"weight": weight}])
    assert plan.num_bytes == 304 * 48 + 300 * 4
    ids = torch.tensor([299, 0, 7])
    torch.testing.assert_close(built(ids), weight[ids], atol=float(weight.abs().max()) / 250, rtol=0)
    x = torch.randn(2, 48)
    exact = x @ built(torch.arange(300)).T
    assert float((built.linear(x) - exact).norm() / exact.norm()) < 0.01


def test_a_group_size_that_does_not_divide_is_refused(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pitlane.engine.models import presets
    from pitlane.engine.models.families.core import parse_config

    shape = {
        "model_type": "llama",
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes = {"fits32": (64, 96), "fits": (64, 192), "fits-not": (64, 100)}
    models = {
        name: parse_config({**shape, "hidden_size": hidden, "intermediate_size": inner})
        for name, (hidden, inner) in sizes.items()
    }
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, **models})
    for name, size, words in (
        ("fits32", 64, r"got 64 and 96 \(model.layers.0.mlp.down_proj\); try 32;"),
        ("fits", 128, r"got 128 and 64 .*; try 32 or 64;"),
        ("fits-not", 32, "no group size fits this model; use int8"),
    ):
        engine = make_engine(f"random:{name}", dtype="float32", plugins=[])
        with pytest.raises(BadOption, match=words):
            engine.plan({"int4": {"group_size": size}})
    engine = make_engine("random:fits-not", dtype="float32", plugins=[])
    for name, words in (("gptq", "no group size fits this model; use int8"), ("few_bits", "0 makes a row a group")):
        with pytest.raises(BadOption, match=rf"{name}.group_size must divide .* got 32 and 100 .*; {words}"):
            engine.plan({name: {"group_size": 32}})


# ---- the same ids

PLANS = {
    "int8": EIGHT,
    "int4": FOUR,
    "int8 weights only": {"int8": WEIGHTS_ONLY},
    "int4 weights only": {"int4": WEIGHTS_ONLY | {"group_size": 64, "symmetric": True}},
    "int8, bfloat16 head": {"int8": {"head": "bfloat16"}},
}


@here
@pytest.mark.sizes(
    "count, name",
    sample=[(10, name) for name in PLANS],
    whole=[(50, name) for name in PLANS],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_texts_give_the_same_ids_drafted_batched_chunked_preempted_and_from_the_cache(
    make_engine: Any, count: int, name: str
) -> None:
    plan = PLANS[name] | KERNELS | {"compiled_step": {}}
    text = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
    prompts = [text[:400] + text[200 * i : 200 * i + 60 + 8 * i] for i in range(count)]
    params = [SamplingParams(max_tokens=32, ignore_eos=True, temperature=0.7 * (i % 2), seed=i) for i in range(count)]
    engine = make_engine("bundled", dtype="bfloat16", plugins=plan)
    alone = [engine.generate(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    expected = [result.token_ids for result in alone]
    assert len({tuple(ids) for ids in expected}) > count // 2

    def ids_of(engine: Any, extra: dict[str, Any]) -> tuple[list[list[int]], dict[str, int]]:
        results = engine.generate(prompts, params, plan=engine.plan(plan | extra))
        names = ("accepted_tokens", "cached_tokens", "preemptions")
        return [result.token_ids for result in results], {
            name: sum(result.stats[name] for result in results) for name in names
        }

    assert ids_of(engine, {})[0] == expected
    for drafter, options in {"prompt_lookup": {"min_ngram": 1}, "lookahead": {}}.items():
        ids, sums = ids_of(engine, {drafter: options})
        assert ids == expected and sums["accepted_tokens"] > 0, drafter
    cache = {"prefix_cache": {}, "prompt_lookup": {}}
    for minimum in (0, 32 * count):
        ids, sums = ids_of(engine, cache)
        assert ids == expected and sums["cached_tokens"] >= minimum
    memory = 6 * (max(result.stats["prompt_tokens"] for result in alone) + 64) * engine.loader.needs.kv_per_token
    tight = make_engine("bundled", dtype="bfloat16", plugins=plan, max_step_tokens=16, kv_memory=memory)
    for extra in ({}, {"prompt_lookup": {}}):
        ids, sums = ids_of(tight, extra)
        assert ids == expected and sums["preemptions"] > 0


@here
@pytest.mark.parametrize(
    "settings",
    [
        EIGHT,
        FOUR,
        pytest.param({"int8": WEIGHTS_ONLY}, marks=pytest.mark.slow),
        pytest.param({"int4": WEIGHTS_ONLY | {"group_size": 64, "symmetric": True}}, marks=pytest.mark.slow),
    ],
    ids=["int8", "int4", "int8 weights only", "int4 weights only"],
)
def test_batches_chunks_preemption_and_drafts_give_the_same_ids(make_engine: Any, settings: dict[str, Any]) -> None:
    plan = settings | KERNELS
    prompts = [[(7 * i + 3 * j) % 250 for j in range(20 + 9 * i)] for i in range(5)]
    params = [SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.7 * (i % 2), seed=i) for i in range(5)]
    engine = make_engine("bundled", dtype="bfloat16", plugins=plan)
    per_block = 32 * engine.loader.needs.kv_per_token
    alone = [engine.generate(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    assert alone[0].stats["batch_invariant"] is True
    expected = [result.token_ids for result in alone]
    drafter = engine.plan(plan | {"prompt_lookup": {"min_ngram": 1}})
    drafted = engine.generate(prompts, params, plan=drafter)
    assert [result.token_ids for result in drafted] == expected
    tight = make_engine("bundled", dtype="bfloat16", plugins=plan, max_step_tokens=16, kv_memory=4 * 5 * per_block)
    chunked = tight.generate(prompts, params)
    assert sum(result.stats["preemptions"] for result in chunked) > 0
    assert [result.token_ids for result in chunked] == expected
