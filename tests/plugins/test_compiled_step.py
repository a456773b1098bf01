"""The compiled step has the bits of the Python forward with the kernels in C, or says why it does not run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pitlane import (
    BadOption,
    BuildContext,
    DecoderConfig,
    Draft,
    KVState,
    ModelSource,
    Planner,
    PluginRegistry,
    SamplingParams,
)
from pitlane.engine.kv.pool import Pool
from pitlane.engine.models.rope_config import RopeConfig
from pitlane.engine.models.weights import RandomWeights
from pitlane.engine.run.batch import BatchBuilder, Chunk
from pitlane.engine.run.built_model import BuiltModel
from pitlane.engine.run.runner import EarlyExit, Forward, Model
from pitlane.engine.variants import Variant, plan_weights
from pitlane.kernels import step
from pitlane.kernels.extension import cpu
from pitlane.kernels.linear import PRODUCTS, has_vectors
from pitlane.kernels.packing import Format
from pitlane.kernels.quantized import LEVELS, Quantized
from pitlane.plugins import compiled_step

pytestmark = pytest.mark.skipif(step.unavailable(64) is not None, reason=str(step.unavailable(64)))
EXACT: dict[str, dict[str, Any]] = {"packed_linear": {}, "flash_attention": {}, "fused_ops": {}}
COMPILED = EXACT | {"compiled_step": {}}
LLAMA = DecoderConfig(
    model_type="llama",
    hidden_size=192,
    intermediate_size=416,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=700,
    max_position=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
YARN = RopeConfig(10000.0, "yarn", {"factor": 4.0, "original_max_position_embeddings": 256.0})
CONFIGS = {
    "llama": LLAMA,
    "untied": replace(LLAMA, tie_word_embeddings=False, vocab_size=999, num_kv_heads=6),
    "wide heads": replace(LLAMA, head_dim=128, num_heads=4, num_kv_heads=1),
    "odd sizes": replace(LLAMA, hidden_size=150, intermediate_size=96, num_heads=3, num_kv_heads=1, vocab_size=33),
    "biases": replace(LLAMA, attention_bias=True, output_bias=True, mlp_bias=True),
    "norms of heads": replace(LLAMA, qk_norm=True, head_dim=64, rms_norm_eps=1e-6),
    "norms of heads of 96": replace(LLAMA, qk_norm=True, head_dim=96),
    "window": replace(LLAMA, windows=(40, 40, 40)),
    "windows and no rope": replace(
        LLAMA, windows=(40, None, 40), no_rope_layers=frozenset({1}), local_rope=RopeConfig(5000.0)
    ),
    "multiplier": replace(LLAMA, embedding_multiplier=13.85, query_pre_attn_scalar=50.0, norm_offset=1.0),
    "yarn": replace(LLAMA, rope=YARN),
}


class Weights(RandomWeights):
    """Random weights whose norms and biases matter."""

    def get(self, name: str) -> Tensor:
        tensor = super().get(name)
        if tensor.ndim > 1:
            return tensor
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return tensor + (0.3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def built(config: DecoderConfig, *plans: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[BuiltModel]:
    """The model under each plan; the plans build the same weights."""
    context = BuildContext(config, dtype, torch.device("cpu"))
    planner = Planner(PluginRegistry.load(), context)
    resolved = [planner.resolve(settings) for settings in plans]
    source = ModelSource("random", config, Weights(config))
    variant = Variant(resolved[0], plan_weights(resolved[0], context), source, context)
    return [variant.for_lane(plan, context) for plan in resolved]


@dataclass
class Run:
    """A model with stores, and the sequences that it computes. Equal calls on two runs give equal batches."""

    built: BuiltModel
    model: Model | None = None
    kvs: list[KVState] = field(default_factory=list)
    forward: Forward = field(init=False)

    def __post_init__(self) -> None:
        groups, count = self.built.model.kv_groups, 150
        self.stores = [plan.build(count, 16) for plan in self.built.stores]
        for store in self.stores:
            store.data.zero_()  # type: ignore[attr-defined]
        self.pool = Pool(groups, [count] * len(groups), 16, "", self.built.visibilities)
        self.builder = BatchBuilder(self.pool)
        self.forward = self.built.forward(self.stores, self.model)

    def step(self, *parts: tuple[int, int, Draft | None], logits: bool = True) -> Tensor:
        """Compute tokens: (sequence, number of known tokens, draft). Keeps the known tokens."""
        chunks = []
        for index, count, draft in parts:
            while index >= len(self.kvs):
                self.kvs.append(KVState())
            kv = self.kvs[index]
            assert self.pool.reserve(kv, kv.num_computed_tokens + count + (len(draft.token_ids) if draft else 0))
            tokens = [(7 * index + 13 * (kv.num_computed_tokens + i)) % 33 for i in range(count)]
            chunks.append(Chunk(kv, tokens, draft, logits))
        with torch.inference_mode():
            result = self.forward(self.builder.build(chunks)).logits
        for chunk in chunks:
            chunk.kv.num_computed_tokens += len(chunk.token_ids)
        return result

    @property
    def is_compiled(self) -> bool:
        return type(self.forward).__name__ == "Step"


def assert_same_bits(plain: Run, compiled: Run) -> None:
    """Prompts, decoding and verification of several sequences give equal logits and equal KV."""
    assert compiled.is_compiled and not plain.is_compiled
    chain, tree = Draft([5, 6, 7]), Draft([1, 2, 3, 4, 5], [-1, 0, -1, 2, 2])
    long_chain = Draft([i % 30 for i in range(40)])
    steps: list[tuple[tuple[int, int, Draft | None], ...]] = [
        ((0, 1, None),),
        ((0, 9, None),),
        ((1, 64, None),),
        ((2, 530, None),),  # in Python
        ((2, 1, None),),
        ((0, 1, None), (1, 1, None), (2, 1, None)),
        ((2, 1, chain),),
        ((1, 1, tree), (0, 1, None), (2, 1, tree)),
        ((0, 1, long_chain), (1, 1, chain), (2, 12, None)),
        ((2, 1, Draft([3])), (0, 1, None)),
    ]
    for number, parts in enumerate(steps):
        expected, result = plain.step(*parts), compiled.step(*parts)
        assert torch.equal(expected, result), f"step {number}: {(expected != result).sum()} of {result.numel()} differ"
        assert expected.isfinite().all() and result.dtype == torch.float32
    expected, result = plain.step((0, 3, None), logits=False), compiled.step((0, 3, None), logits=False)
    assert expected.shape == result.shape and len(result) == 0
    assert torch.equal(plain.step((0, 1, None)), compiled.step((0, 1, None)))
    for before, after in zip(plain.stores, compiled.stores, strict=True):
        assert torch.equal(before.data, after.data)  # type: ignore[attr-defined]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_kv_are_equal_to_the_bit(name: str) -> None:
    plain, compiled = built(CONFIGS[name], EXACT, COMPILED)
    run = Run(compiled)
    assert_same_bits(Run(plain), run)
    assert run.forward.counts == {"compiled": 11, "more than 64 tokens": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize("products", ["vectors", "float32"] if has_vectors() else ["float32"])
def test_a_step_uses_the_products_of_the_linears(products: str) -> None:
    linears = {"packed_linear": {"products": products}}
    plain, compiled = built(CONFIGS["biases"], EXACT | linears, COMPILED | linears)
    assert compiled.model.head.products == products  # type: ignore[attr-defined]
    assert_same_bits(Run(plain), Run(compiled))


SINKS = {"attention_sinks": {"num_sinks": 4, "window": 64, "stride": 32}}


@pytest.mark.parametrize("name", ["llama", "norms of heads", "windows and no rope"])
def test_dropped_tokens_and_sinks_give_the_same_bits(name: str) -> None:
    plain, compiled = built(CONFIGS[name], EXACT | SINKS, COMPILED | SINKS)
    run = Run(compiled)
    assert_same_bits(Run(plain), run)
    assert run.forward.counts == {"compiled": 11, "more than 64 tokens": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_quant": {"format": "int8"}},
        {"kv_quant": {"format": "int4"}, "prompt_lookup": {"min_ngram": 1}},
        {"kv_quant": {"format": "fp8"}} | SINKS,
    ],
    ids=["int8", "int4 with drafts", "fp8 with sinks"],
)
@pytest.mark.usefixtures("always_draft")
def test_quantized_kv_gives_the_same_bits(make_engine: Any, settings: dict[str, Any]) -> None:
    """The program reads quantized rows. It is made again when the store of open blocks grows: 26 sequences have an open block."""
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=EXACT | settings)
    prompts = [[(7 * i + j * j) % 200 for j in range(41)] for i in range(26)]
    sampling = SamplingParams(max_tokens=34, ignore_eos=True, logprobs=5)
    plain = [engine.submit(prompt, sampling) for prompt in prompts]
    expected = [stream.result() for stream in plain]
    plan = engine.plan(COMPILED | settings)
    streams = [engine.submit(prompt, sampling, plan=plan) for prompt in prompts]
    results = [stream.result() for stream in streams]
    assert [result.logprobs for result in results] == [result.logprobs for result in expected]
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    counts = results[-1].stats["notes"]["compiled_step"]
    assert counts["compiled"] > 10 and ("a sequence goes beyond a block of quantized KV" in counts) == (
        "prompt_lookup" in settings
    )
    assert all(result.stats["failed"] == {} for result in results)


@pytest.mark.parametrize("limit", [8, 100, 2**16])
def test_angles_of_a_text_without_end_are_computed_as_it_grows(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Tables of few positions, and sequences that are far apart: the same bits."""
    monkeypatch.setattr(compiled_step, "MOVING", 16)
    monkeypatch.setattr(compiled_step, "MAX_MOVING", limit)
    sinks: dict[str, Any] = {"attention_sinks": {"num_sinks": 4, "window": 64, "stride": 32}}
    plain, compiled = map(Run, built(CONFIGS["yarn"], EXACT | sinks, COMPILED | sinks))
    for run in (plain, compiled):
        run.step((0, 200, None))
        run.step((1, 90, None))
    for _ in range(40):
        for parts in (((0, 1, None), (1, 1, None)), ((1, 1, None),), ((0, 2, None),)):
            assert torch.equal(plain.step(*parts), compiled.step(*parts))


INTEGERS: dict[str, dict[str, Any]] = {
    "int8": {"int8": {}},
    "int8, bfloat16 inputs": {"int8": {"activations": "bfloat16"}},
    "int8, bfloat16 head": {"int8": {"head": "bfloat16"}},
    "int4": {"int4": {}},
    "int4, bfloat16 head": {"int4": {"head": "bfloat16"}},
    "int4 by 64, symmetric": {"int4": {"group_size": 64, "symmetric": True}},
    "int4 by 128, bfloat16 inputs": {"int4": {"group_size": 128, "activations": "bfloat16"}},
    "int4, symmetric, bfloat16 inputs": {"int4": {"symmetric": True, "activations": "bfloat16"}},
}
SIZES = {
    32: LLAMA,
    64: replace(LLAMA, hidden_size=320, intermediate_size=448, head_dim=64, num_heads=3, num_kv_heads=1),
}
SIZES[128] = replace(LLAMA, hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2, head_dim=64)


def with_integers(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {plugin: options for plugin, options in settings.items() if plugin != "packed_linear"} | INTEGERS[name]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", INTEGERS)
def test_linears_of_int8_and_int4_give_their_own_bits(name: str) -> None:
    size = next(iter(INTEGERS[name].values())).get("group_size", 32)
    config = replace(SIZES[size], attention_bias=True, mlp_bias=True, qk_norm=size != 64)
    plain, compiled = built(config, with_integers(EXACT, name), with_integers(COMPILED, name))
    torch.set_num_threads(2)
    assert_same_bits(Run(plain), Run(compiled))


@pytest.mark.parametrize("level", LEVELS[1:])  # a step needs AVX2
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_step_uses_the_level_of_the_linears(name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    best = int(cpu.int_level())
    monkeypatch.setenv("PITLANE_CPU_KERNELS", level)
    config = replace(LLAMA, num_layers=1)
    plain, compiled = built(config, with_integers(EXACT, name), with_integers(COMPILED, name))
    assert compiled.model.head.level == min(best, LEVELS.index(level))  # type: ignore[attr-defined]
    assert_same_bits(Run(plain), Run(compiled))


def test_linears_of_several_kinds_share_a_program() -> None:
    """A model whose linears are of bfloat16, of 8 bits and of 4 bits."""
    plain, compiled = built(LLAMA, EXACT, COMPILED)
    generator, level = torch.Generator().manual_seed(3), cpu.int_level()
    for index, layer in enumerate(plain.model.layers):  # type: ignore[attr-defined]
        for name in ("qkv", "output", "gate_up", "down")[index:]:
            linear = getattr(layer, name)
            weight = torch.randn(linear.num_outputs, linear.num_inputs, generator=generator) / 14
            form = [Format(4, index > 1, 32, name == "down"), Format(8, index > 0)][(index + len(name)) % 2]
            setattr(layer, name, Quantized(*weight.shape, form, [weight], level=level))
    compiled.model.layers = plain.model.layers  # type: ignore[attr-defined]
    assert_same_bits(Run(plain), Run(compiled))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("number", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(number: int) -> None:
    plain, compiled = built(CONFIGS["norms of heads"], EXACT, COMPILED)
    torch.set_num_threads(number)
    assert_same_bits(Run(plain), Run(compiled))


@pytest.mark.usefixtures("threads")
def test_two_engines_at_once_get_their_own_results() -> None:
    plain, compiled = built(LLAMA, EXACT, COMPILED)

    def equal(_: int) -> bool:
        torch.set_num_threads(2)
        assert_same_bits(Run(plain), Run(compiled))
        return True

    with ThreadPoolExecutor(3) as callers:
        assert all(callers.map(equal, range(6)))


def test_the_first_layers_alone_have_the_same_bits() -> None:
    plain, compiled = built(LLAMA, EXACT, COMPILED)
    assert_same_bits(*(Run(part, EarlyExit(part.model, 2)) for part in (plain, compiled)))


def test_a_step_of_a_program_that_is_gone_is_over() -> None:
    (compiled,) = built(LLAMA, COMPILED)
    for _ in range(20):
        run = Run(compiled)
        run.step((0, 8, None))
        del run


REFUSED: dict[str, tuple[DecoderConfig, dict[str, Any], str]] = {
    "linear": (LLAMA, {**COMPILED, "packed_linear": None}, "linears that no kernel in C computes"),
    "head": (
        replace(LLAMA, hidden_size=75),
        {**COMPILED, "packed_linear": None, "int8": {"head": "bfloat16"}},
        "a head that no kernel in C computes",
    ),
    "attention": (LLAMA, {**COMPILED, "flash_attention": None}, "attention other than flash_attention"),
    "ops": (LLAMA, {**COMPILED, "fused_ops": None}, "operations other than those of fused_ops"),
    "gelu": (replace(LLAMA, activation="gelu_tanh"), COMPILED, "operations other than those of fused_ops"),
    "norms": (replace(LLAMA, output_norms=True), COMPILED, "norms behind attention or MLP"),
    "size": (replace(LLAMA, intermediate_size=100), COMPILED, "an intermediate size that is no multiple of 32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_program_serves_runs_in_python_and_says_why(name: str) -> None:
    config, settings, reason = REFUSED[name]
    settings = {plugin: options for plugin, options in settings.items() if options is not None}
    (model,) = built(config, settings)
    run = Run(model)
    run.step((0, 3, None))
    (hook,) = model.runner_hooks
    assert not run.is_compiled
    assert list(hook.plugin.refused.values()) == [reason]  # type: ignore[attr-defined]


def test_another_dtype_has_no_compiled_step() -> None:
    with pytest.raises(BadOption, match="compiled_step is unavailable: it is for bfloat16 on a CPU"):
        built(LLAMA, {"compiled_step": {}}, dtype=torch.float32)


def test_the_default_plan_of_bfloat16_runs_it(make_engine: Any) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=None)
    result = engine.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    assert result.stats["notes"]["compiled_step"]["compiled"] >= 4


@pytest.mark.parametrize("settings", [COMPILED, {"compiled_step": {}}], ids=["served", "refused"])
def test_the_stats_say_how_the_steps_ran(make_engine: Any, settings: dict[str, Any]) -> None:
    engine = make_engine("random:tiny", dtype="bfloat16", plugins=settings)
    result = engine.generate(list(range(100)), SamplingParams(max_tokens=8, ignore_eos=True))
    notes = result.stats["notes"]["compiled_step"]
    if settings is COMPILED:
        assert notes["compiled"] >= 7 and notes["more than 64 tokens"] >= 1
    else:
        assert notes == {"refused": "linears that no kernel in C computes"}


DRAFTERS: list[dict[str, dict[str, Any]]] = [
    {},
    {"prompt_lookup": {"min_ngram": 1, "num_candidates": 4, "num_draft_tokens": 4}},
    {"speculative": {"branching": 2, "num_draft_tokens": 4}},
    {"self_speculation": {}},
    {"jacobi": {}},
    {"lookahead": {}},
]


@pytest.mark.cover(1)
@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("linears", [None, "int8", "int4"], ids=["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("mode", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_no_drafter_and_no_batch_changes_a_token(make_engine: Any, mode: dict[str, Any], linears: str | None) -> None:
    exact, with_step = (with_integers(plan, linears) if linears else plan for plan in (EXACT, COMPILED))
    engine = make_engine("bundled", dtype="bfloat16", plugins=exact)
    generator = random.Random(0)
    passages = [[generator.randrange(3, 500) for _ in range(6 + 5 * i)] for i in range(len(DRAFTERS))]
    prompts = [passage * (1 + i % 2) for i, passage in enumerate(passages)]
    params = [SamplingParams(max_tokens=32, seed=i, ignore_eos=True, **mode) for i in range(len(prompts))]
    plain = [engine.generate(prompt, params[i]) for i, prompt in enumerate(prompts)]
    plans = [engine.plan(with_step | drafter) for drafter in DRAFTERS]
    streams = [engine.submit(prompt, params[i], plan=plans[i]) for i, prompt in enumerate(prompts)]
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    assert sum(result.stats["accepted_tokens"] for result in results) > 0
    assert all(result.stats["failed"] == {} for result in results)
    assert all(result.stats["notes"]["compiled_step"]["compiled"] > 0 for result in results)


def test_wrong_programs_and_steps_are_refused() -> None:
    (model,) = built(LLAMA, COMPILED)
    program = Run(model).forward.program  # type: ignore[attr-defined]
    x, one, parts = torch.zeros(1, 192), torch.zeros(1, dtype=torch.int64), ()
    with pytest.raises(ValueError, match=r"x must be float32 \[1 to 64, 192\]"):
        program.run(x.bfloat16(), one, one, [one], parts, [], [None])
    with pytest.raises(ValueError, match="needs slots and parts of 1 groups"):
        program.run(x, one, one, [one], parts, [], [None])
    shape = step.Shape(192, 6, 2, 32, 1, 1)
    for op, words in (
        (step.Op(step.LINEAR, outs=32, ins=32), "an address of 0"),
        (step.Op(step.LINEAR, source=0, w=1, outs=32, ins=32), "reads a later one"),
        (step.Op(9), "its kind is unknown"),
        (step.Op(step.LINEAR, weights=7, w=1, outs=32, ins=32), "unknown weights"),
        (step.Op(step.LINEAR, weights=step.INT, w=1, outs=32, ins=32, bits=8, input_group=64), "unknown weights"),
        (step.Op(step.LINEAR, weights=step.INT, w=1, outs=32, ins=32, bits=4, input_group=64), "unknown weights"),
        (
            step.Op(step.LINEAR, weights=step.INT, w=1, scales=1, outs=32, ins=32, bits=8, input_group=64, level=9),
            "unknown",
        ),
        (step.Op(step.LINEAR, output=9, w=1, outs=32, ins=32), "unknown output"),
        (step.Op(step.LINEAR, step.NORM, w=1, norm=1, outs=32, ins=32), "no sums, or another number"),
        (step.Op(step.LINEAR, step.NORM, step.SUM, w=1, norm=1, outs=32, ins=192), "no sums, or another number"),
        (step.Op(step.LINEAR, w=1, outs=32, ins=32), "no activations"),
        (step.Op(step.ATTENTION), "no KV"),
    ):
        op.products = PRODUCTS.index("float32")
        with pytest.raises(ValueError, match=words):
            step.Program(shape, [op], 1e-5, 1.0, None)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        step.Program(shape._replace(kv_heads=4), [step.Op(step.ATTENTION)], 1e-5, 1.0, None)
    assert cpu.step_recomputed() >= 0
