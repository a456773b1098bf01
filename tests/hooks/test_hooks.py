"""Every hook: a test named for it, and a heading in docs/hooks.md with its exact signature."""

from __future__ import annotations

import importlib.util
import inspect
import json
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pitlane import (
    CORE_FAMILIES,
    BadOption,
    Batch,
    BuildContext,
    Document,
    Draft,
    EmbeddingPart,
    Families,
    Forward,
    KVGroup,
    Lane,
    Limits,
    LinearPart,
    LinearPlan,
    ModelError,
    Output,
    Page,
    Part,
    PlainAttention,
    Plugin,
    PluginFailed,
    PluginOptions,
    Pool,
    PrefixMatch,
    Rows,
    RunnerContext,
    SamplingParams,
    Sequence,
    SlidingWindow,
    StepStats,
    Tensors,
    UnsupportedModel,
    Visibility,
    hookimpl,
)
from pitlane.engine.kv.visibility import checked
from pitlane.engine.models import presets
from pitlane.engine.models.layers import DenseLinear
from pitlane.engine.models.registry import resolve
from pitlane.engine.plan import hookspecs
from pitlane.engine.plan.registry import PluginRegistry
from tests.engine.kv.int8_kv import Int8KV

DOCS = Path(__file__).resolve().parents[2] / "docs" / "hooks.md"
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPT = [random.Random(0).randrange(256) for _ in range(70)]


def run(make_engine: Any, plugin: type[Plugin], **options: Any) -> Any:
    """Generate under a plan with a single plugin. Returns the result, the plugin instance and the engine."""
    registry = PluginRegistry.load()
    registry.add(plugin)
    engine = make_engine(registry=registry, plugins=[plugin.name], **options)
    result = engine.generate(PROMPT, PARAMS)
    engine.worker.call(lambda: None).result()  # wait for the end of the last step
    return result, engine.default_plan.plugins[0], engine


def test_hook_load_document() -> None:
    class Loader(Plugin):
        name, exactness, stage = "loader", "identical", -1

        @hookimpl
        def load_document(self, path: str, mime: str) -> Document | None:
            return Document("a", mime, (Page(0, "1", path),), "00") if mime == "text/x-test" else None

    registry = PluginRegistry.load()
    registry.add(Loader)
    assert registry.first("load_document", path="p", mime="text/x-test").pages[0].text == "p"
    assert registry.first("load_document", path="p", mime="image/png") is None


def twin_folder(folder: Path) -> Path:
    """The bundled model under an architecture that the core does not know."""
    import pitlane.storage.bundled

    shutil.copytree(
        next(iter(pitlane.storage.bundled.__path__)), folder, ignore=shutil.ignore_patterns("drafter", "*.py")
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["TwinForCausalLM"], "model_type": "twin"}))
    return folder


def twin_plugin() -> type[Plugin]:
    """The plugin that docs/hooks.md shows."""
    spec = importlib.util.spec_from_file_location("hook_examples", DOCS.parent / "hook_examples.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plugin: type[Plugin] = module.Twin
    return plugin


def test_hook_register_models(tmp_path: Path) -> None:
    registry = PluginRegistry.load()
    folder = str(twin_folder(tmp_path / "twin"))
    with pytest.raises(UnsupportedModel, match="'TwinForCausalLM' is not supported; known: LlamaForCausalLM, .*Gemma3"):
        resolve(folder, registry)
    registry.add(twin_plugin())
    source, bundled = resolve(folder, registry), resolve("bundled")
    assert source.config == bundled.config and source.weights.fingerprint() == bundled.weights.fingerprint()
    assert "twin" not in registry.togglable(), "it belongs to no plan"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "gemma3_text"])
def test_a_family_whose_name_is_taken_is_refused(name: str, tmp_path: Path) -> None:
    class Copies(Plugin):
        name, exactness = "copies", "identical"

        @hookimpl
        def register_models(self, registry: Families) -> None:
            registry.add(replace(CORE_FAMILIES[0], architecture="NewForCausalLM", model_type="new"))
            registry.add(replace(CORE_FAMILIES[0], architecture=taken[0], model_type=taken[1]))

    taken = (name, "other") if "For" in name else ("OtherForCausalLM", name)
    registry = PluginRegistry.load()
    with pytest.raises(ValueError, match=f"model family '{name}' is known already"):
        registry.add(Copies)
    assert "copies" not in registry.entries
    assert list(registry.families) == list(CORE_FAMILIES), "none of the plugin's families is added"


def test_hook_load_model(make_engine: Any, tmp_path: Path, cut_model: Any) -> None:
    registry = PluginRegistry.load()
    folder = twin_folder(tmp_path / "twin")
    with pytest.raises(ModelError, match="no such folder: twin:"):
        make_engine(f"twin:{folder}", registry=registry)
    registry.add(twin_plugin())
    engine, few = (
        make_engine(f"twin:{folder}", registry=registry, plugins={}),
        SamplingParams(max_tokens=6, ignore_eos=True),
    )
    result, plain = engine.generate(PROMPT, few), make_engine("bundled").generate(PROMPT, few)
    assert (result.token_ids, result.stats["model"]) == (plain.token_ids, f"twin:{folder}")
    drafter = {"speculative": {"model": f"twin:{cut_model(folder, 2)}"}}
    assert engine.generate(PROMPT, few, plan=engine.plan(drafter)).token_ids == plain.token_ids
    with pytest.raises(ModelError, match=r"no config\.json in /nowhere"):
        make_engine("twin:/nowhere", registry=registry)
    with pytest.raises(ModelError, match="no folder and no Hugging Face id"):
        make_engine("other: name", registry=registry)


def test_names_that_load_model_sees(tmp_path: Path) -> None:
    sources: list[str] = []

    class Sees(Plugin):
        name, exactness = "sees", "identical"

        @hookimpl
        def load_model(self, name: str) -> Any:
            sources.append(name)
            if name == "text":
                return name
            raise RuntimeError("broken") if name == "broken" else ModelError("no; give yes")

    registry = PluginRegistry()
    registry.add(Sees)
    for own_name in ("bundled", "random:tiny"):
        resolve(own_name, registry)
    with pytest.raises(ModelError, match="no config"):
        resolve(str(tmp_path), registry)
    assert sources == []
    (tmp_path / "model.bin").touch()
    names = [str(tmp_path / "model.bin"), "./nowhere", "owner/name", "any:thing", "x" * 300]
    for name in names:
        with pytest.raises(ModelError, match="no; give yes"):
            resolve(name, registry)
    assert sources == names
    with pytest.raises(
        PluginFailed, match="sees.load_model: TypeError: returned str, must return a ModelSource or None"
    ):
        resolve("text", registry)
    with pytest.raises(PluginFailed, match="sees.load_model: RuntimeError: broken; uninstall sees, or choose another"):
        resolve("broken", registry)


def test_hook_build_linear(make_engine: Any) -> None:
    class Recorder(Plugin):
        name, role, exactness = "recorder", "linear", "identical"

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.part_names: list[list[str]] = []

        @hookimpl
        def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
            names = [member.name.rpartition(".")[2] for member in part.members]
            self.part_names.append(names)
            if names != ["v_proj"]:
                return None

            def build(tensors: list[Tensors]) -> Any:
                ((weight,),) = [list(member.values()) for member in tensors]
                assert weight.shape == (part.out_features, part.in_features)
                return DenseLinear(weight.to(context.dtype))

            return LinearPlan(1000, 1000, build)

    result, plugin, engine = run(make_engine, Recorder)
    assert plugin.part_names[1:5] == [["q_proj", "k_proj", "v_proj"], ["q_proj"], ["k_proj"], ["v_proj"]]
    core = engine.generate(PROMPT, PARAMS, plan=engine.plan({}))
    assert result.token_ids == core.token_ids
    values = 2 * 64 * 128 * 8  # of both layers, in float64
    assert result.stats["weight_bytes"] == core.stats["weight_bytes"] - values + 2 * 1000, "the plan's bytes count"


def test_a_linear_whose_sums_are_no_float32_is_refused_before_a_request(make_engine: Any) -> None:
    class Narrow(DenseLinear):
        def wide(self, x: torch.Tensor) -> torch.Tensor:
            return self(x)

    class Builder(Plugin):
        name, role, exactness = "builder", "linear", "rounding"

        @hookimpl
        def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan:
            return LinearPlan(8, 8, lambda tensors: Narrow(torch.cat([t["weight"].to(context.dtype) for t in tensors])))

    with pytest.raises(PluginFailed, match=r"builder.build_linear.*returns torch.bfloat16 .* not torch.float32"):
        run(make_engine, Builder, dtype="bfloat16")


def test_hook_build_embedding(make_engine: Any, tmp_path: Path) -> None:
    class Table:
        """The embedding and its head over one table."""

        def __init__(self, tensors: list[Tensors]) -> None:
            self.weight = tensors[0]["weight"].double()
            self.linear = lambda x: x @ self.weight.T

        def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
            return self.weight[token_ids]

    class Embedder(Plugin):
        name, exactness = "embedder", "identical"

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.parts: list[EmbeddingPart] = []

        @hookimpl
        def build_embedding(self, part: EmbeddingPart, context: BuildContext) -> LinearPlan:
            self.parts.append(part)
            return LinearPlan(1000, 1000, Table, has_head=part.is_tied)

    untied, plugin, engine = run(make_engine, Embedder)
    core = engine.generate(PROMPT, PARAMS, plan=engine.plan({}))
    assert plugin.parts[-1] == EmbeddingPart("model.embed_tokens", 512, 128)
    assert untied.token_ids == core.token_ids
    assert untied.stats["weight_bytes"] == core.stats["weight_bytes"] - 512 * 128 * 8 + 1000
    tied, plugin, engine = run(make_engine, Embedder, model="bundled")
    core = engine.generate(PROMPT, PARAMS, plan=engine.plan({}))
    part = plugin.parts[-1]
    assert part.is_tied and tied.token_ids == core.token_ids
    table = part.num_embeddings * part.dim * 8
    assert tied.stats["weight_bytes"] == core.stats["weight_bytes"] - table + 1000, "the head's bytes count once"
    model = engine.lane_of(engine.default_plan).built.model
    assert model.head is model.embedding.linear


def test_hook_transform_weights(make_engine: Any) -> None:
    class Scaler(Plugin):
        """Multiplies linears by a factor, and leaves all other parts."""

        name, exactness, factor, wrong = "scaler", "steering", 2.0, ""

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.names: list[str] = []

        @hookimpl
        def transform_weights(self, part: Part, tensors: Tensors, context: BuildContext) -> Any:
            self.names.append(part.name)
            assert {f"{part.name.removesuffix('.weight')}.{name}" for name in tensors} == set(part.shapes)
            if self.wrong:
                return {"shape": {"weight": torch.zeros(3)}, "name": {}}[self.wrong]
            return {"weight": tensors["weight"] * self.factor} if isinstance(part, LinearPart) else None

    class Unscaler(Scaler):
        name, factor, stage = "unscaler", 0.5, 1

    registry = PluginRegistry.load()
    registry.add(Scaler)
    registry.add(Unscaler)
    engine = make_engine(registry=registry)
    core = engine.generate(PROMPT, PARAMS)
    scaled = engine.plan({"scaler": {}})
    assert engine.generate(PROMPT, PARAMS, plan=scaled).token_ids != core.token_ids
    names = scaled.plugins[0].names
    assert len(names) == len(set(names)) == 2 * 9 + 3, "called once per tensor of the checkpoint"
    both = engine.plan({"scaler": {}, "unscaler": {}})
    assert engine.generate(PROMPT, PARAMS, plan=both).token_ids == core.token_ids, "each gets the result of the other"
    for wrong, words in (
        ("shape", r"made .*\(3,\).* names and shapes must stay"),
        ("name", r"made \{\} of .* must stay"),
    ):
        Scaler.wrong, Scaler.version = wrong, wrong
        with pytest.raises(PluginFailed, match=rf"scaler\.transform_weights: ValueError: {words}"):
            engine.lane_of(engine.plan({"scaler": {}}))


def test_hook_build_op(make_engine: Any) -> None:
    class Normer(Plugin):
        name, exactness = "normer", "identical"

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.kinds: list[str] = []
            self.shapes: list[tuple[int, ...]] = []

        @hookimpl
        def build_op(self, kind: str, context: BuildContext) -> Any:
            self.kinds.append(kind)
            assert context.config.head_dim == 64
            return self.norm if kind == "rms_norm" else None

        def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            self.shapes.append((*x.shape, *weight.shape))
            return torch.nn.functional.rms_norm(x, tuple(weight.shape), weight, eps)

    result, plugin, engine = run(make_engine, Normer)
    assert plugin.kinds == ["rms_norm", "silu_mul", "add_rms_norm", "rope_store", "sample"]
    assert (len(PROMPT), 128, 128) in plugin.shapes and (1, 128, 128) in plugin.shapes
    assert result.token_ids == engine.generate(PROMPT, PARAMS, plan=engine.plan({})).token_ids
    assert len(engine.lanes.all) == 2


def test_hook_build_attention(make_engine: Any) -> None:
    class Attender(Plugin):
        name, role, exactness = "attender", "attention", "identical"

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.num_prepared, self.num_calls = 0, 0

        @hookimpl
        def build_attention(self, context: BuildContext) -> Any:
            outer = self

            class Counting(PlainAttention):
                def prepare(self, *arguments: Any) -> Any:
                    outer.num_prepared += 1
                    return super().prepare(*arguments)

                def __call__(self, *arguments: Any) -> torch.Tensor:
                    outer.num_calls += 1
                    return super().__call__(*arguments)

            return Counting(context)

    result, plugin, engine = run(make_engine, Attender)
    steps = result.stats["steps"]
    assert plugin.num_prepared >= steps and plugin.num_calls >= 2 * steps  # the model has two layers
    assert result.token_ids == engine.generate(PROMPT, PARAMS, plan=engine.plan({})).token_ids


def test_hook_build_kv_store(make_engine: Any) -> None:
    """int8 KV takes 17 of 32 parts of bfloat16 KV, so the same memory holds nearly twice as many tokens."""
    result, _, engine = run(make_engine, Int8KV, dtype="bfloat16", kv_memory=2**22)
    plain = engine.plan({})
    lane, plain_lane = engine.lane_of(engine.default_plan), engine.lane_of(plain)
    assert lane is not plain_lane and lane.pool.fingerprint != plain_lane.pool.fingerprint
    assert result.stats["exactness"] == "approximate"
    ratio = result.stats["kv_bytes"] / engine.generate(PROMPT, PARAMS, plan=plain).stats["kv_bytes"]
    assert ratio == (64 + 4) / (64 * 2) and lane.pool.num_blocks == int(plain_lane.pool.num_blocks / ratio)
    assert [store.format for store in lane.stores] == ["int8"]


class Streaming(Plugin):
    """Every position sees the last tokens only, whatever the model's attention shows."""

    name, role, exactness = "streaming", "eviction", "approximate"

    class Options(PluginOptions):
        window: int = 48

    @hookimpl
    def trim_cache(self, group: KVGroup, context: BuildContext) -> Visibility | None:
        return SlidingWindow(self.options.window)


@pytest.fixture
def windowed_tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """`random:tiny` with the windows of `Streaming` in its config."""
    shape = replace(presets.PRESETS["tiny"], windows=(48, 48))
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "tiny-windowed": shape})
    return "random:tiny-windowed"


@pytest.mark.cover(1)
@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 4}])
@pytest.mark.parametrize("plugins", [["prompt_lookup"], ["prefix_cache", "jacobi"]])
def test_hook_trim_cache(make_engine: Any, windowed_tiny: str, sampling: dict[str, Any], plugins: list[str]) -> None:
    """Through chunks, drafts and the prefix cache, the answers are those of a model that has the window in its config."""
    registry = PluginRegistry.load()
    registry.add(Streaming)
    params = SamplingParams(max_tokens=60, ignore_eos=True, **sampling)
    prompts = [PROMPT, [*PROMPT, *PROMPT], [*PROMPT, *PROMPT[:9]]]
    plain, windowed = make_engine(), make_engine(windowed_tiny)
    expected = [windowed.generate(prompt, params).token_ids for prompt in prompts]
    assert expected != [plain.generate(prompt, params).token_ids for prompt in prompts], (
        "the window changes the answers"
    )
    engine = make_engine(registry=registry, plugins=["streaming", *plugins], max_step_tokens=23)
    results = [engine.generate(prompt, params) for prompt in prompts]
    assert [result.token_ids for result in results] == expected
    assert any(result.stats["accepted_tokens"] for result in results)
    assert any(result.stats["cached_tokens"] for result in results) == ("prefix_cache" in plugins)
    lane, plain_lane = engine.lane_of(engine.default_plan), engine.lane_of(engine.plan({}))
    assert lane is not plain_lane and lane.pool.fingerprint != plain_lane.pool.fingerprint


def test_blocks_that_a_plugin_hides_are_given_back(make_engine: Any) -> None:
    class Counter(Streaming):
        """Counts the blocks of the lane's only sequence in every step."""

        name = "counter"
        counts: ClassVar[list[int]] = []

        class Options(PluginOptions):
            window: int = 20

        @hookimpl
        def lane_opened(self, lane: Lane) -> None:
            self.lane = lane

        @hookimpl
        def step_finished(self, stats: StepStats) -> None:
            self.counts.append(self.lane.pool.num_blocks - self.lane.pool.num_free_blocks)

    run(make_engine, Counter, max_step_tokens=32)
    assert len(PROMPT) + PARAMS.max_tokens > 3 * 32 and max(Counter.counts[5:]) == 2, "not all four blocks"


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 1, 0], r"must lie in \[0, position\] and never decrease"),
        ([0, 2, 2], r"must lie in \[0, position\]"),
        ([0, 0, 0], "max_tokens is 2, and a position sees 3 tokens"),
        ([0], r"starts must be int64 \(3,\)"),
        ([0.0, 0.0, 1.0], "got float64"),
    ],
)
def test_a_visibility_that_breaks_the_contract_is_refused(starts: list[Any], message: str) -> None:
    class Wrong:
        max_tokens = 2

        def starts(self, positions: Any) -> Any:
            return np.array(starts)

    with pytest.raises((TypeError, ValueError), match=message):
        checked(Wrong(), 3)


def test_hook_build_runner(make_engine: Any) -> None:
    class Bucketed(Plugin):
        """Pads every batch to a multiple of 16 tokens, as captured graphs would."""

        name, exactness = "bucketed", "identical"
        sizes: ClassVar[set[int]] = set()

        @hookimpl
        def build_runner(self, forward: Forward, context: RunnerContext) -> Forward:
            null_blocks = [store.null_block for store in context.stores]

            def padded(batch: Batch) -> Output:
                num_rows = len(batch.logit_rows)
                if batch.num_tokens:
                    size = -(-batch.num_tokens // 16) * 16
                    batch = batch.padded(size, -(-num_rows // 8) * 8, null_blocks)
                    self.sizes.add(batch.num_tokens)
                output = forward(batch)
                return output._replace(logits=output.logits[:num_rows])

            return padded

    result, plugin, engine = run(make_engine, Bucketed)
    assert plugin.sizes >= {16, 80}
    assert result.token_ids == engine.generate(PROMPT, PARAMS, plan=engine.plan({})).token_ids
    assert len(engine.lanes.all) == 2


def test_hook_lane_opened(make_engine: Any) -> None:
    class Opener(Plugin):
        name, exactness = "opener", "identical"

        class Options(PluginOptions):
            number: int = 0

        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.opened: list[Lane] = []
            self.threads: set[str] = set()

        @hookimpl
        def lane_opened(self, lane: Lane) -> None:
            self.opened.append(lane)
            self.threads.add(threading.current_thread().name)
            if self.options.number == 13:
                raise BadOption("number must not be 13; take 14")
            if self.options.number == 666:
                raise RuntimeError("broken")

    registry = PluginRegistry.load()
    registry.add(Opener)
    engine = make_engine(registry=registry, plugins=["opener"])
    (plugin,) = engine.default_plan.plugins
    lane = engine.lane_of(engine.default_plan)
    engine.generate(PROMPT, PARAMS)
    assert plugin.opened == [lane], "called once"
    second_plan = engine.plan({"opener": {}, "prefix_cache": {}})
    engine.generate(PROMPT, PARAMS, plan=second_plan)
    assert plugin.opened == [lane, lane], "called once more for another plan"
    assert plugin.threads == {threading.current_thread().name, "pitlane-load"}, "never on the engine's thread"
    for _ in range(2):  # a failed call is repeated
        with pytest.raises(BadOption, match="number must not be 13"):
            engine.generate(PROMPT, PARAMS, plan=engine.plan({"opener": {"number": 13}}))
    broken = engine.plan({"opener": {"number": 666}})
    with pytest.raises(PluginFailed, match="opener.lane_opened: RuntimeError: broken; take opener out of the plan"):
        engine.lane_of(broken)
    result = engine.generate(PROMPT, PARAMS, plan=broken)  # the request goes on without the plugin
    assert result.token_ids == engine.generate(PROMPT, PARAMS, plan=engine.plan({})).token_ids
    assert "opener.lane_opened: RuntimeError: broken" in result.stats["failed"]["opener"]


def test_hook_match_prefix(make_engine: Any) -> None:
    class Matcher(Plugin):
        name, exactness = "matcher", "identical"

        @hookimpl
        def match_prefix(self, seq: Sequence, lane: Lane) -> PrefixMatch | None:
            seq.state[self.name] = lane.pool.num_free_blocks
            return None

    result, _, _ = run(make_engine, Matcher)
    assert result.stats["cached_tokens"] == 0 and "matcher" in result.stats["plugin_ms"]


class Hoarder(Plugin):
    """Locks every sealed block until the pool needs blocks."""

    name, exactness = "hoarder", "identical"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.locked: list[tuple[int, ...]] = []
        self.sealed: list[int] = []
        self.num_calls = 0
        self.pool: Pool | None = None

    @hookimpl
    def block_sealed(self, seq: Sequence, index: int, lane: Lane) -> None:
        self.pool = lane.pool
        assert seq.kv.num_computed_tokens >= (index + 1) * lane.pool.block_size
        self.sealed.append(index)
        self.locked.append(seq.kv.column(index))
        lane.pool.lock(self.locked[-1])

    @hookimpl
    def reclaim_blocks(self, lane: Lane, num_blocks: int) -> None:
        self.num_calls += 1
        while self.locked:
            lane.pool.unlock(self.locked.pop())


def test_hook_block_sealed(make_engine: Any) -> None:
    _, plugin, engine = run(make_engine, Hoarder)
    assert plugin.sealed == [0, 1, 2]  # 70 + 40 - 1 computed tokens fill three blocks of 32
    assert plugin.pool.num_free_blocks == plugin.pool.num_blocks - 3


def test_hook_reclaim_blocks(make_engine: Any) -> None:
    per_token = make_engine().loader.needs.kv_per_token
    _, plugin, engine = run(make_engine, Hoarder, kv_memory=4 * 32 * per_token * 5)
    engine.generate(PROMPT, PARAMS)
    assert plugin.num_calls > 0


def test_hook_propose(make_engine: Any) -> None:
    class Greedy(Plugin):
        name, role, exactness = "greedy_drafter", "drafter", "identical"

        @hookimpl
        def propose(self, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
            assert all(seq.is_decoding for seq in seqs)
            return [Draft([1] * limit) for limit in limits.num_draft_tokens]

    result, _, engine = run(make_engine, Greedy)
    assert result.token_ids == engine.generate(PROMPT, PARAMS, plan=engine.plan({})).token_ids
    assert result.stats["draft_tokens"] > 0


def test_hook_adjust_logits(make_engine: Any) -> None:
    class Bans(Plugin):
        name, exactness = "bans", "steering"

        @hookimpl
        def adjust_logits(self, rows: Rows) -> torch.Tensor:
            logits = rows.logits.clone()
            logits[:, ::2] = float("-inf")
            return logits

    result, _, _ = run(make_engine, Bans)
    assert all(token % 2 for token in result.token_ids)
    assert result.stats["exactness"] == "steering"


class Watcher(Plugin):
    """Knows the answer and drafts a tree with one right branch. Records the target's tokens."""

    name, role, exactness = "watcher", "drafter", "identical"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.answer: list[int] = []
        self.verified: list[tuple[int, Draft, list[int], list[int]]] = []

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
        result: list[Draft | None] = []
        for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True):
            first, second = [*self.answer[seq.num_completion_tokens :], 0, 0][:2]
            drafts = seq.num_completion_tokens % 2 and limit >= 4
            result.append(Draft([first ^ 1, first, second, second ^ 1], [-1, -1, 1, 0]) if drafts else None)
        return result

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        assert seq.draft is draft
        self.verified.append((seq.num_completion_tokens, draft, targets, accepted))


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 4}])
def test_hook_after_verify(make_engine: Any, sampling: dict[str, Any]) -> None:
    registry = PluginRegistry.load()
    registry.add(Watcher)
    engine = make_engine(registry=registry)
    plan, params = engine.plan({"watcher": {}}), SamplingParams(max_tokens=40, ignore_eos=True, **sampling)
    plain = engine.generate(PROMPT, params).token_ids
    (plugin,) = plan.plugins
    plugin.answer = plain
    result = engine.generate(PROMPT, params, plan=plan)
    assert result.token_ids == plain and result.stats["failed"] == {}
    assert 5 < len(plugin.verified) < result.stats["steps"], "called for drafts, not for every step"
    for count, draft, targets, accepted in plugin.verified:
        assert len(targets) == 1 + len(draft.token_ids), "targets of rejected draft tokens too"
        assert targets[0] == plain[count], "called before the step is committed"
        assert accepted == [1, 2]
        assert targets[2] == plain[count + 1] and targets[3] == plain[count + 2]
        behind = [*PROMPT, *plain[:count], draft.token_ids[0]]
        if not sampling:
            assert targets[1] == engine.generate(behind, SamplingParams(max_tokens=1, ignore_eos=True)).token_ids[0]


class Observer(Plugin):
    name, exactness = "observer", "identical"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.steps: list[StepStats] = []
        self.finished: list[list[int]] = []

    @hookimpl
    def step_finished(self, stats: StepStats) -> None:
        self.steps.append(stats)

    @hookimpl
    def sequence_finished(self, seq: Sequence) -> None:
        self.finished.append(seq.token_ids[seq.request.num_prompt_tokens :])


def test_hook_step_finished(make_engine: Any) -> None:
    result, plugin, _ = run(make_engine, Observer)
    assert len(plugin.steps) == result.stats["steps"] == 40
    assert plugin.steps[0].num_tokens == 70 and plugin.steps[1].num_tokens == 1
    assert all(0 < step.forward_seconds <= step.seconds for step in plugin.steps)


def test_hook_sequence_finished(make_engine: Any) -> None:
    result, plugin, _ = run(make_engine, Observer)
    assert plugin.finished == [result.token_ids]


@pytest.mark.parametrize("hook", hookspecs.SPECS)
def test_every_hook_is_tested_and_documented(hook: str) -> None:
    assert f"test_hook_{hook}" in globals(), f"write test_hook_{hook}"
    arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert f"### `{hook}({arguments})`" in DOCS.read_text(), f"docs/hooks.md lacks a heading for {hook}({arguments})"


def test_the_docs_say_how_the_results_of_every_hook_combine() -> None:
    specs = {name for name, value in vars(hookspecs).items() if hasattr(value, "pitlane_spec")}
    assert specs == set(hookspecs.SPECS)
    paragraphs = DOCS.read_text().split("### ")[1:]
    assert len(paragraphs) == len(specs)
    for paragraph in paragraphs:
        combine = hookspecs.SPECS[paragraph[1:].split("(")[0]].combine
        assert f"*{combine.title()}" in paragraph, f"{paragraph.splitlines()[0]} lacks *{combine.title()}.*"
