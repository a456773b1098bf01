"""KV stores: the dense store, and a store of another format through chunks, drafts, the prefix cache and a restart."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pitlane import (
    BuildContext,
    KVGroup,
    PlainAttention,
    PlanConflict,
    Plugin,
    PluginFailed,
    SamplingParams,
    Segment,
    hookimpl,
)
from pitlane.engine.kv.store import DenseKV, KVStore, KVStorePlan
from pitlane.engine.kv.visibility import FullAttention, Visibility
from pitlane.engine.models.presets import PRESETS
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.text.tokenizer import Prompt
from tests.engine.kv.int8_kv import Int8KV, Int8Store, relative_errors

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
GROUP = KVGroup((0, 1), 3, 8)
CPU = torch.device("cpu")
TOKENS = [random.Random(1).randrange(256) for _ in range(150)]


@pytest.fixture
def registry() -> PluginRegistry:
    registry = PluginRegistry.load()
    for plugin in (Int8KV, DenseOnly):
        registry.add(plugin)
    return registry


class DenseOnly(Plugin):
    """An attention that reads the tensors of a dense store."""

    name, role, exactness = "dense_only", "attention", "identical"

    @hookimpl
    def build_attention(self, context: BuildContext) -> PlainAttention:
        attention = PlainAttention(context)
        attention.formats = ("dense", "paged")  # type: ignore[assignment]
        return attention


@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_a_store_gives_back_what_was_written(kind: str) -> None:
    context = BuildContext(PRESETS["tiny"], torch.float64, CPU)
    store: KVStore = DenseKV(GROUP, 4, 4, torch.float64, CPU) if kind == "dense" else Int8Store(GROUP, 4, 4, context)
    bound = 0.0 if kind == "dense" else 0.5 / 127 * 1.001
    x = torch.randn(2, 2, 6, 3, 8, dtype=torch.float64)  # [K and V, L, T, Hkv, D]
    slots = [9, 10, 11, 2, 3, 15]
    for layer in range(2):
        store.write(layer, torch.tensor(slots), *x[:, layer])
    assert store.null_block == 4 and store.num_bytes == (5 * 4) * 2 * 2 * 3 * (64 if kind == "dense" else 12)
    exported = store.export(slots)
    assert exported.shape == (2, 2, 3, 6, 8) and exported.dtype == torch.float64
    assert max(relative_errors(exported, x.transpose(2, 3))) <= bound
    for layer in range(2):
        view, gathered = store.view(layer, 9, 12), store.gather(layer, torch.tensor([9, 10, 2, 3]), 2)
        for part in range(2):
            assert torch.equal(view[part], exported[part, layer, :, :3])
            assert torch.equal(gathered[part][0], exported[part, layer, :, :2])
            assert torch.equal(gathered[part][1], exported[part, layer, :, 3:5])
    store.copy([9, 2], [0, 1])
    assert torch.equal(store.export([0, 1]), exported[:, :, :, [0, 3]])
    store.load([16, 17, 18], exported, 2)
    assert torch.equal(store.export([16, 17, 18]), exported[:, :, :, 2:5]), "also a saved prefix of int8 KV is exact"
    assert store.export([]).shape[3] == 0
    store.load([], exported)


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_tokens_of_int8_kv_depend_on_no_chunk_draft_or_prefix_hit(
    make_engine: Any, registry: PluginRegistry, temperature: float
) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=temperature, seed=7)
    prompts = [Prompt([*TOKENS, seed], (Segment(0, 150, "00", "a.pdf"),), "") for seed in (1, 2)]
    expected = [
        make_engine(registry=registry, plugins=["int8_kv"]).generate(prompt, params).token_ids for prompt in prompts
    ]
    for _ in range(2):  # the second engine reads the saved document
        options = {"plugins": ["int8_kv", "prompt_lookup", "prefix_cache"], "max_step_tokens": 41}
        engine = make_engine(registry=registry, **options)
        results = [engine.generate(prompt, params) for prompt in prompts]
        assert [result.token_ids for result in results] == expected
        assert results[1].stats["cached_tokens"] == 150
        engine.close()
    assert results[0].stats["notes"]["prefix_cache"]["disk_tokens"] == 150


def test_the_stored_keys_are_near_the_exact_keys(make_engine: Any, registry: PluginRegistry) -> None:
    exported = []
    for plugins in ([], ["int8_kv"]):
        engine = make_engine(registry=registry, plugins=plugins)
        engine.generate(TOKENS, SamplingParams(max_tokens=1))
        store = engine.lane_of(engine.default_plan).stores[0]
        exported.append(store.export(list(range(150)))[:, 0])
    assert 0.1 / 127 < max(relative_errors(exported[1], exported[0])) <= 0.5 / 127 * 1.001


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_an_attention_that_cannot_read_the_store_is_refused(
    make_engine: Any, registry: PluginRegistry, dtype: str
) -> None:
    """Before KV memory is taken, with both names and the way out. Other plans of the engine go on."""
    engine = make_engine(registry=registry, dtype=dtype)
    expected = engine.generate(TOKENS, PARAMS).token_ids
    with pytest.raises(
        PlanConflict,
        match="^dense_only reads KV as dense or paged, and int8_kv stores it as int8; "
        "take dense_only or int8_kv out of the plan$",
    ):
        engine.generate(TOKENS, PARAMS, plan=engine.plan({"int8_kv": {}, "dense_only": {}}))
    if dtype == "bfloat16" and registry.get("flash_attention").unavailable(engine.loader.build_context) is None:
        with pytest.raises(
            PlanConflict, match="flash_attention reads KV as dense or .*, and int8_kv stores it as int8"
        ):
            engine.generate(TOKENS, PARAMS, plan=engine.plan({"int8_kv": {}, "flash_attention": {}}))
    assert engine.generate(TOKENS, PARAMS).token_ids == expected
    assert engine.generate(TOKENS, PARAMS, plan=engine.plan({"dense_only": {}})).token_ids == expected


@pytest.mark.parametrize(
    ("name", "served"),
    [("attention_sinks", "attention sinks, which"), ("key_norm_eviction", "evictions; take int8_kv")],
)
def test_a_store_that_does_not_serve_dropped_blocks_is_refused(
    make_engine: Any, registry: PluginRegistry, name: str, served: str
) -> None:
    engine = make_engine(registry=registry)
    with pytest.raises(PlanConflict, match=f"the KV store of int8_kv does not say that it serves {served}"):
        engine.lane_of(engine.plan({"int8_kv": {}, name: {}}))


def test_a_store_of_another_type_is_refused(make_engine: Any, registry: PluginRegistry) -> None:
    class Wrong(Plugin):
        name, role, exactness = "wrong", "kv_store", "approximate"

        @hookimpl
        def build_kv_store(self, group: KVGroup, context: BuildContext) -> Any:
            return Int8Store

    registry.add(Wrong)
    with pytest.raises(PluginFailed, match="wrong.build_kv_store: TypeError: returned type, not a KVStorePlan"):
        make_engine(registry=registry, plugins=["wrong"])


class Breaks(Plugin):
    """A dense store, or a visibility, that fails from the call after `num_calls` on. At 0, the store is not even built."""

    name, role, exactness = "breaks", "kv_store", "rounding"
    num_calls = 10**9

    @classmethod
    def count(cls) -> None:
        cls.num_calls -= 1
        if cls.num_calls < 0:
            raise RuntimeError("broken")

    @hookimpl
    def build_kv_store(self, group: KVGroup, context: BuildContext) -> KVStorePlan:
        def build(num_blocks: int, block_size: int) -> KVStore:
            self.count()
            return BrokenStore(group, num_blocks, block_size, context.dtype, context.device)

        return KVStorePlan("dense", group.bytes_per_token(context.dtype), build)


class BrokenStore(DenseKV):
    def write(self, *args: Any) -> None:
        Breaks.count()
        super().write(*args)


class Trims(Plugin):
    name, role, exactness = "trims", "eviction", "rounding"

    @hookimpl
    def trim_cache(self, group: KVGroup, context: BuildContext) -> Visibility:
        return BrokenVisibility()


class BrokenVisibility(FullAttention):
    def starts(self, positions: Any) -> Any:
        Breaks.count()
        return super().starts(positions)


@pytest.mark.parametrize("plugin", [Breaks, Trims])
def test_requests_go_on_without_a_store_or_a_visibility_that_fails(
    make_engine: Any, registry: PluginRegistry, monkeypatch: pytest.MonkeyPatch, plugin: type[Plugin]
) -> None:
    registry.add(plugin)
    engine = make_engine(registry=registry)
    expected = engine.generate(TOKENS, PARAMS).token_ids
    plan = engine.plan({plugin.name: {}})
    engine.lane_of(plan)
    monkeypatch.setattr(Breaks, "num_calls", 20)
    results = engine.generate([TOKENS, TOKENS], PARAMS, plan=plan)
    assert [result.token_ids for result in results] == [expected, expected]
    assert [result.stats["failed"] for result in results] == [
        {plugin.name: f"{plugin.name}.forward: RuntimeError: broken"}
    ] * 2


def test_a_store_that_cannot_be_built_names_its_plugin(
    make_engine: Any, registry: PluginRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add(Breaks)
    monkeypatch.setattr(Breaks, "num_calls", 0)
    with pytest.raises(PluginFailed, match="breaks.build_kv_store: RuntimeError: broken; take breaks out of the plan"):
        make_engine(registry=registry, plugins=["breaks"])
