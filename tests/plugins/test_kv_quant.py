"""Quantized KV: its error, the blocks that a token reads in full precision, and answers that depend on no chunk, draft or hit."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from pitlane import BuildContext, Draft, KVGroup, KVState, PlainAttention, PlanConflict, Pool, SamplingParams
from pitlane.engine.kv import pool as pool_module
from pitlane.engine.kv.visibility import Visibility, num_sinks_of, visibility_of
from pitlane.engine.models.presets import PRESETS
from pitlane.engine.run.batch import BatchBuilder, Chunk
from pitlane.kernels import attention_quant as kernel
from pitlane.kernels import linear
from pitlane.plugins.attention_sinks import SinkWindow
from pitlane.plugins.flash_attention import Paged
from pitlane.plugins.kv_quant.arrange import arranged
from pitlane.plugins.kv_quant.formats import format_of, row_bytes
from pitlane.plugins.kv_quant.store import QuantizedKV
from pitlane.plugins.span_attention.attention import SpanAttention
from pitlane.ui.cli import main
from tests.plugins.document_prompts import chat, tokens

CPU = torch.device("cpu")
FORMATS = ["int8", "int4", "fp8"]
each_format = pytest.mark.parametrize("name", FORMATS)


# ---- formats


@pytest.mark.parametrize("dim", [8, 40, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_format
def test_a_value_is_off_by_at_most_half_a_scale(name: str, dtype: torch.dtype, dim: int) -> None:
    """fp8: by half a step of 4 significant bits. One channel has an offset of 50, one is tiny, and a token has zeros."""
    keys, values = torch.randn(2, 3, 2, 32, dim, dtype=torch.float64)
    keys[..., 1] += 50
    keys[..., 2] *= 1e-6
    values[:, :, 3] = 0
    keys, values = keys.to(dtype), values.to(dtype)
    rows = format_of(name, dim).encode(keys, values)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 2, 32, row_bytes(name, dim))
    for part, (x, decoded) in enumerate(
        zip((keys, values), format_of(name, dim).decode(rows, torch.float64), strict=True)
    ):
        x = x.double()
        if name == "fp8":
            bound = x.abs() * 2**-4 + 2**-10
        else:
            groups = x if part == 0 else x.unflatten(-1, (-1, 32 if dim % 32 == 0 else dim))
            axis = -2 if part == 0 else -1
            low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
            step = (high - low + low.abs() * 2**-7) / (255 if name == "int8" else 15) * (1 + 2**-7)
            bound = (step / 2 + 1e-6 * groups.abs().amax(axis, keepdim=True)).expand(groups.shape).reshape(x.shape)
        assert bool(((decoded - x).abs() <= bound).all())


def test_the_bytes_of_a_token_follow_a_formula() -> None:
    assert [row_bytes(name, 64) for name in FORMATS] == [64 + 8, 32 + 8, 64]
    assert [row_bytes(name, 128) for name in FORMATS] == [128 + 16, 64 + 16, 128]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_constant_blocks_are_exact(name: str) -> None:
    x = torch.full((1, 32, 32), -1.5)
    rows = format_of(name, 32)
    assert all(torch.equal(part, x) for part in rows.decode(rows.encode(x, x), x.dtype))


@pytest.mark.parametrize("dim", [32, 64, 96])
@each_format
def test_the_kernels_reference_reads_the_rows_of_the_store(name: str, dim: int) -> None:
    keys, values = torch.randn(2, 2, 3, 32, dim)
    rows = format_of(name, dim).encode(keys, values)
    expected = format_of(name, dim).decode(rows, torch.float32)
    decoded = kernel.decode_ref(rows.flatten(2, 3), dim, kernel.BITS[f"kv_quant_{name}"])
    for one, other in zip(decoded, expected, strict=True):
        torch.testing.assert_close(one, other.flatten(1, 2))


# ---- the blocks that a token reads


class Setting:
    """A sequence of `count` random tokens over a store of one layer."""

    def __init__(
        self, name: str, dtype: torch.dtype, count: int, dim: int = 64, trim: Visibility | None = None
    ) -> None:
        self.group, self.trim = KVGroup((0,), 1, dim), trim
        self.context = BuildContext(PRESETS["tiny"], dtype, CPU)  # 2 heads of 64, a KV head
        self.format = format_of(name, dim)
        self.store = QuantizedKV(self.group, 12, 32, self.context, self.format)
        self.pool = Pool([self.group], [12], 32, "", [visibility_of(self.group, trim)], 256, whole_blocks=True)
        generator = torch.Generator().manual_seed(0)
        self.q, self.sink_q = torch.randn(2, count, 2, dim, generator=generator, dtype=torch.float64).to(dtype)
        self.k, self.v = torch.randn(2, count, 1, dim, generator=generator, dtype=torch.float64).to(dtype)
        self.kv = KVState()

    def forward(self, attention: Any, count: int, draft: Draft | None = None) -> Tensor:
        """Compute `count` known tokens and a draft; tokens are taken in the order in which they are stored."""
        first = self.kv.num_computed_tokens
        total = count + (len(draft.token_ids) if draft else 0)
        assert self.pool.reserve(self.kv, first + total)
        batch = BatchBuilder(self.pool).build([Chunk(self.kv, [1] * count, draft, True)])
        batch = arranged(batch, [self.store])
        own = slice(first, first + total)
        self.store.write(0, batch.groups[0].slots, self.k[own], self.v[own])
        reads = attention.prepare(batch.seen_by(0), 0)
        second = () if batch.groups[0].sink_positions is None else (self.sink_q[own],)
        out: Tensor = attention(self.q[own], self.k[own], self.v[own], self.store, 0, reads, *second)
        return out

    def commit(self, count: int) -> None:
        before, self.kv.num_computed_tokens = self.kv.num_computed_tokens, self.kv.num_computed_tokens + count
        for index in range(before // 32, self.kv.num_computed_tokens // 32):
            self.store.seal(self.kv.block_tables[0][index])
        self.pool.drop(self.kv, self.kv.num_computed_tokens)

    def expected(self, path: list[int]) -> Tensor:
        """The output of the last token of a path of stored tokens; its place in the path is its position."""
        own = (len(path) - 1) // 32 * 32
        keys, values = self.k[path].transpose(0, 1), self.v[path].transpose(0, 1)
        blocks = [x[:, :own].unflatten(1, (-1, 32)) for x in (keys, values)]
        closed = self.format.decode(self.format.encode(*blocks), keys.dtype) if own else blocks
        keys, values = (
            torch.cat((a.flatten(1, 2), b[:, own:]), 1).double()[0] for a, b in zip(closed, (keys, values), strict=True)
        )
        position = len(path) - 1
        start = 0 if self.trim is None else int(self.trim.starts(np.array([position]))[0])
        num_sinks = min(start, 0 if self.trim is None else num_sinks_of(self.trim))
        q, sink_q = self.q[path[-1]].double(), self.sink_q[path[-1]].double()
        scores = torch.cat((sink_q @ keys[:num_sinks].T, q @ keys[start:].T), -1)
        return (scores * 64**-0.5).softmax(-1) @ torch.cat((values[:num_sinks], values[start:]))


def assert_near(out: Tensor, expected: list[Tensor]) -> None:
    bound = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-6}[out.dtype]
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=bound, atol=bound)


ATTENTIONS = [(PlainAttention, torch.float64), (SpanAttention, torch.float64), (Paged, torch.bfloat16)]
each_attention = pytest.mark.parametrize("attention, dtype", ATTENTIONS, ids=["plain", "span", "paged"])


@pytest.mark.cover(2)
@pytest.mark.parametrize("sizes", [[150], [33, 1, 30, 1, 60, 25], [31, 1, 1, 117]], ids=str)
@each_attention
@each_format
def test_own_block_in_full_precision_and_earlier_blocks_quantized(
    name: str, attention: Any, dtype: torch.dtype, sizes: list[int]
) -> None:
    """Whatever the chunks: also a token whose earlier blocks are written by the same forward."""
    if attention is Paged and kernel.unavailable(64) is not None:
        pytest.skip(str(kernel.unavailable(64)))
    setting = Setting(name, dtype, 150)
    built, outputs = attention(setting.context), []
    for size in sizes:
        outputs.append(setting.forward(built, size))
        setting.commit(size)
    assert_near(torch.cat(outputs), [setting.expected(list(range(end + 1))) for end in range(150)])
    assert setting.store.num_open == 1, "the last block alone is open"


@pytest.mark.cover(2)
@pytest.mark.parametrize("left_out", [1, 64])
@pytest.mark.parametrize("num_sinks", [4, 40])
@each_attention
@each_format
def test_sinks_are_read_in_the_format_of_the_store(
    name: str,
    attention: Any,
    dtype: torch.dtype,
    num_sinks: int,
    left_out: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a second query, over several strides; also where dropped blocks leave the table, and in a draft over two blocks."""
    if attention is Paged and kernel.unavailable(64) is not None:
        pytest.skip(str(kernel.unavailable(64)))
    monkeypatch.setattr(pool_module, "NUM_LEFT_OUT", left_out)
    setting = Setting(name, dtype, 300, trim=SinkWindow(num_sinks, 64, 32))
    built, outputs = attention(setting.context), []
    for size in (70, 1, 90, 31, 1, 67):
        outputs.append(setting.forward(built, size))
        setting.commit(size)
    outputs.append(setting.forward(built, 1, Draft([1] * 39)))
    assert_near(torch.cat(outputs), [setting.expected(list(range(end + 1))) for end in range(300)])
    assert setting.pool.num_free_blocks >= 5, "dropped blocks are given back"


@each_attention
def test_a_chain_of_draft_tokens_may_cross_blocks(attention: Any, dtype: torch.dtype) -> None:
    """It is rejected in the middle of a block that it completed; then other tokens complete the block."""
    if attention is Paged and kernel.unavailable(64) is not None:
        pytest.skip(str(kernel.unavailable(64)))
    setting = Setting("int4", dtype, 100)
    built = attention(setting.context)
    setting.forward(built, 20)
    setting.commit(20)
    setting.k[28:60] += 1
    setting.forward(built, 1, Draft([1] * 39))
    setting.commit(8)
    setting.k[28:60] -= 1
    out = setting.forward(built, 1, Draft([1] * 39))
    assert_near(out, [setting.expected(list(range(end + 1))) for end in range(28, 68)])


@each_attention
def test_a_draft_tree_reads_its_block_in_full_precision(attention: Any, dtype: torch.dtype) -> None:
    """The tree begins at token 60. Its slots reach into the next block, its positions do not."""
    if attention is Paged and kernel.unavailable(64) is not None:
        pytest.skip(str(kernel.unavailable(64)))
    setting = Setting("int8", dtype, 80)
    built = attention(setting.context)
    setting.forward(built, 60)
    setting.commit(60)
    out = setting.forward(built, 1, Draft([1] * 7, [-1, -1, 0, 1, 1, 2, 3]))
    known = list(range(61))
    paths = [[], [61], [62], [61, 63], [62, 64], [62, 65], [61, 63, 66], [62, 64, 67]]
    assert_near(out, [setting.expected(known + path) for path in paths])
    setting.store.copy([setting.pool.slots(setting.kv, 0, at, at + 1)[0] for at in (62, 64, 67)],
                       [setting.pool.slots(setting.kv, 0, at, at + 1)[0] for at in (61, 62, 63)])  # fmt: skip
    for x in (setting.k, setting.v):
        x[61:64] = x[[62, 64, 67]]
    setting.commit(4)
    out = setting.forward(built, 1)
    assert_near(out, [setting.expected(list(range(65)))])


# ---- KV operations


@each_format
def test_saved_rows_are_loaded_as_they_were_and_an_open_block_is_saved_as_zeros(name: str) -> None:
    setting = Setting(name, torch.float32, 80)
    setting.forward(PlainAttention(setting.context), 80)
    slots = setting.pool.slots(setting.kv, 0, 0, 80)
    saved = setting.store.export(slots)
    assert saved.shape == (2, 1, 1, 80, setting.format.num_bytes) and saved.dtype == torch.uint8
    assert saved[:, :, :, :64].any() and not saved[:, :, :, 64:].any()
    target = list(range(8 * 32, 10 * 32))
    setting.store.load(target[:40], saved, 0)
    setting.store.load(target[40:], saved, 40)
    assert torch.equal(setting.store.export(target), saved[:, :, :, :64])
    setting.store.copy(target[:32], list(range(11 * 32, 12 * 32)))
    assert torch.equal(setting.store.export(list(range(11 * 32, 12 * 32))), saved[:, :, :, :32])
    with pytest.raises(AssertionError, match="copied as a whole"):
        setting.store.copy(target[:3], target[32:35])


def test_an_open_block_is_copied_in_full_precision() -> None:
    setting = Setting("int4", torch.float32, 40)
    setting.forward(PlainAttention(setting.context), 40)
    sources, targets = setting.pool.slots(setting.kv, 0, 32, 40), list(range(320, 328))
    setting.store.copy(sources, targets)
    first = setting.store.open(10, is_new=False) * 32
    keys, _ = setting.store.gather(0, torch.arange(first, first + 8), 1)
    assert torch.equal(keys[0], setting.k[32:40].transpose(0, 1))


def test_more_open_blocks_than_at_first() -> None:
    """Blocks without a reference lend their copies first; then the room doubles, and keeps what it holds."""
    setting = Setting("int8", torch.float32, 32)
    store = QuantizedKV(setting.group, 100, 32, setting.context, setting.format)
    counts = torch.zeros(100, dtype=torch.int32).numpy()
    numbers = [store.open(block, is_new=True) for block in range(24)]
    store.full[:] = 7.0
    counts[:20] = 1
    store.counts = counts
    store.open(30, is_new=True)
    assert store.num_open == 21 and store.full.shape[3] == 24 * 32
    counts[:] = 1
    for block in range(40, 50):
        store.open(block, is_new=True)
    assert store.full.shape[3] == 48 * 32 and bool((store.full[:, :, :, : 24 * 32] == 7).all())
    assert [store.open(block, is_new=False) for block in range(20)] == numbers[:20]
    with pytest.raises(AssertionError, match="no full-precision copy"):
        store.open(99, is_new=False)


# ---- answers


PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
LOOKUP: dict[str, Any] = {"prompt_lookup": {"min_ngram": 1}}
TREES: dict[str, Any] = {"prompt_lookup": {"min_ngram": 1, "num_candidates": 4}}


@pytest.mark.cover(1)
@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("drafter", [LOOKUP, TREES], ids=["chain", "tree"])
@each_format
def test_the_tokens_depend_on_no_chunk_draft_or_prefix_hit(
    make_engine: Any, name: str, drafter: dict[str, Any]
) -> None:
    """Nor on a restart: the second engine reads the saved blocks of the document. Its tokens behind them are computed again."""
    quant = {"kv_quant": {"format": name}}
    prompts = [chat((1, 150), question=seed) for seed in (1, 2)]
    expected = [make_engine(plugins=quant).generate(prompt, PARAMS).token_ids for prompt in prompts]
    for is_second in (False, True):
        engine = make_engine(plugins={**quant, **drafter, "prefix_cache": {}}, max_step_tokens=41)
        results = [engine.generate(prompt, PARAMS) for prompt in prompts]
        assert [result.token_ids for result in results] == expected
        assert [result.stats["cached_tokens"] for result in results] == [128 * is_second, 128]
        assert sum(result.stats["accepted_tokens"] for result in results) > 0
        engine.close()
    assert results[0].stats["notes"]["prefix_cache"]["disk_tokens"] == 128


def test_samples_of_one_prompt_and_a_batch_have_the_tokens_of_single_requests(make_engine: Any) -> None:
    """Samples share an open block, which is copied when they write into it. Little memory preempts sequences."""
    engine = make_engine(plugins=["kv_quant"], kv_memory=2**21, max_step_tokens=64)
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8, seed=3)
    alone = [engine.generate(tokens(seed, 45 + seed), params).token_ids for seed in range(6)]
    batch = engine.generate([tokens(seed, 45 + seed) for seed in range(6)], params)
    assert [result.token_ids for result in batch] == alone
    several = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8, seed=3, n=3)
    samples = engine.generate(tokens(0, 45), several).samples
    core = make_engine(plugins=["kv_quant"], max_step_tokens=7).generate(tokens(0, 45), several).samples
    assert samples[0].token_ids == alone[0] and [s.token_ids for s in samples] == [s.token_ids for s in core]


def test_saved_kv_of_another_format_is_not_read(make_engine: Any) -> None:
    prompt = chat((1, 150))
    for name in (*FORMATS, None):
        plugins: dict[str, Any] = {"prefix_cache": {}} | ({"kv_quant": {"format": name}} if name else {})
        engine = make_engine(plugins=plugins)
        assert engine.generate(prompt, PARAMS).stats["cached_tokens"] == 0
        engine.close()


def test_prefix_cache_saves_rows_as_they_are(make_engine: Any) -> None:
    """Its option `int8` changes nothing, also where two documents end in one block."""
    plugins: dict[str, Any] = {"kv_quant": {"format": "int4"}, "prefix_cache": {"int8": True, "min_tokens": 1}}
    prompt = chat((1, 70), (2, 10), (3, 80))
    expected = make_engine(plugins={"kv_quant": {"format": "int4"}}).generate(prompt, PARAMS).token_ids
    for cached in (0, 160):
        engine = make_engine(plugins=plugins)
        result = engine.generate(prompt, PARAMS)
        assert (result.token_ids, result.stats["cached_tokens"]) == (expected, cached)
        engine.close()


def test_a_model_with_a_window(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from pitlane.engine.models import presets

    shape = replace(presets.PRESETS["tiny"], windows=(None, 48))
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, "tiny-mixed": shape})
    prompt = chat((1, 200))
    expected = make_engine("random:tiny-mixed", plugins=["kv_quant"]).generate(prompt, PARAMS).token_ids
    for cached in (0, 192):
        engine = make_engine(
            "random:tiny-mixed", plugins=["kv_quant", "span_attention", "prefix_cache"], max_step_tokens=23
        )
        result = engine.generate(prompt, PARAMS)
        assert (result.token_ids, result.stats["cached_tokens"]) == (expected, cached)
        engine.close()


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("name", ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int4", "fp8"))])
def test_in_bfloat16_the_kernels_give_equal_tokens_in_any_chunk_draft_or_batch(make_engine: Any, name: str) -> None:
    """To the bit, with linears and attention in C: also after a load of saved blocks."""
    if kernel.unavailable(64) or linear.unavailable():
        pytest.skip(str(kernel.unavailable(64) or linear.unavailable()))
    built: dict[str, Any] = {"packed_linear": {}, "flash_attention": {}, "fused_ops": {}}
    exact = built | {"kv_quant": {"format": name}}
    prompts = [chat((1, 100), question=2), chat((1, 100), question=3), chat((4, 40))]
    alone = make_engine("bundled", dtype="bfloat16", plugins=exact, kv_memory=2**28)
    assert alone.lane_of(alone.default_plan).built.is_batch_invariant
    expected = [alone.generate(prompt, PARAMS).token_ids for prompt in prompts]
    for step in (29, 512):
        engine = make_engine("bundled", dtype="bfloat16", plugins=exact, kv_memory=2**28, max_step_tokens=step)
        plans = [engine.plan(exact | drafter | {"prefix_cache": {}}) for drafter in (TREES, LOOKUP, {"jacobi": {}})]
        pairs = zip(prompts, plans, strict=True)
        streams = [engine.submit(prompt, PARAMS, plan=plan) for prompt, plan in pairs]
        assert [stream.result().token_ids for stream in streams] == expected
        engine.close()


# ---- memory


def test_the_forecast_and_the_engine_count_the_bytes_of_the_format(make_engine: Any) -> None:
    def forecast(plugins: str) -> dict[str, Any]:
        arguments = ["memory", "random:tiny", "--dtype", "bfloat16", "--plugins", plugins, "--json"]
        needs: dict[str, Any] = json.loads(CliRunner().invoke(main, arguments).stdout)
        return needs

    dense, quant = forecast(""), forecast("kv_quant")
    assert (dense["kv_bytes_per_token"], quant["kv_bytes_per_token"]) == (2 * 2 * 128, 2 * 2 * 72)
    assert quant["kv_plugins"] == ["kv_quant"] and quant["fixed_kv_bytes"] == 24 * 32 * 512
    assert quant["kv_bytes"] == 4096 * 288 + 24 * 32 * 512
    engine = make_engine(dtype="bfloat16", kv_memory=2**25)
    lanes = [engine.lane_of(engine.plan(settings)) for settings in ({}, {"kv_quant": {}})]
    counts = [lane.pool.num_blocks for lane in lanes]
    assert counts == [2**23 // (512 * 32), (2**23 - 24 * 32 * 512) // (288 * 32)]
    assert lanes[1].stores[0].num_bytes <= 2**23 + 288 * 32
    stats = engine.generate(tokens(0, 40), SamplingParams(max_tokens=1), plan=engine.plan({"kv_quant": {}})).stats
    assert (stats["kv_bytes_per_token"], stats["kv_bytes"]) == (288, 2 * 32 * 288)
    assert stats["exactness"] == "approximate"


def test_an_attention_that_reads_dense_tensors_is_refused(make_engine: Any) -> None:
    from pitlane.engine.plan.registry import PluginRegistry
    from tests.engine.kv.test_store import DenseOnly

    registry = PluginRegistry.load()
    registry.add(DenseOnly)
    engine = make_engine(registry=registry)
    with pytest.raises(
        PlanConflict, match="dense_only reads KV as dense or paged, and kv_quant stores it as kv_quant_int8"
    ):
        engine.lane_of(engine.plan({"kv_quant": {}, "dense_only": {}}))


# ---- quality


def quality() -> Any:
    """docs/kv_quality.py as a module."""
    path = Path(__file__).resolve().parents[2] / "docs" / "kv_quality.py"
    spec = importlib.util.spec_from_file_location("kv_quality", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOUNDS = {"int8": 0.003, "int4": 0.05, "fp8": 0.05}  # of the docstring: share of probability that moves


def test_little_probability_moves(make_engine: Any) -> None:
    """The bounds of the plugin's docstring and of docs/exactness.md."""
    script = quality()
    engine = make_engine("bundled", dtype="float32", kv_memory=2**29)
    ids = script.tokens_of(engine, script.sample_text(), 1000)
    assert len(ids) == 655
    rows = {row["format"]: row for row in script.measure(engine, ids, {})}
    assert all(bound / 5 < rows[name]["moved"] < bound for name, bound in BOUNDS.items()), rows
    assert all(row["perplexity"] < 1.05 * rows["dense"]["perplexity"] for row in rows.values())


# ---- the long proof


@pytest.mark.slow
@pytest.mark.usefixtures("always_draft", "cut_tiny")
@pytest.mark.parametrize("mode", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
@each_format
def test_no_drafter_batch_chunk_or_preemption_changes_a_token(
    make_engine: Any, name: str, mode: dict[str, Any]
) -> None:
    """20 prompts under every drafter, in one batch, with little memory, in float64: 200 equal tokens each."""
    drafters: list[dict[str, Any]] = [
        {},
        LOOKUP,
        TREES,
        {"speculative": {"model": "random:tiny-cut"}},
        {"speculative": {"model": "random:tiny-cut", "branching": 2, "num_draft_tokens": 4}},
        {"self_speculation": {"num_layers": 1}},
        {"jacobi": {}},
        {"lookahead": {}},
    ]
    quant: dict[str, Any] = {"kv_quant": {"format": name}}
    generator = random.Random(5)
    prompts = [tokens(seed, generator.randrange(5, 150)) * (1 + seed % 2) for seed in range(20)]
    params = [SamplingParams(max_tokens=200, ignore_eos=True, seed=seed, **mode) for seed in range(20)]
    alone = make_engine(plugins=quant)
    expected = [alone.generate(prompt, one).token_ids for prompt, one in zip(prompts, params, strict=True)]
    for options in ({"max_step_tokens": 37}, {"kv_memory": 2**23}):
        engine = make_engine(plugins=quant, **options)
        for shift in range(3):
            plans = [
                engine.plan({**quant, **drafters[(i + 3 * shift) % len(drafters)], "prefix_cache": {}})
                for i in range(20)
            ]
            streams = [engine.submit(p, one, plan=plan) for p, one, plan in zip(prompts, params, plans, strict=True)]
            results = [stream.result() for stream in streams]
            assert [result.token_ids for result in results] == expected
            assert all(result.stats["failed"] == {} for result in results)
            assert sum(result.stats["accepted_tokens"] for result in results) > 0
