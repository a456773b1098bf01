"""Drafting changes no token: every drafter, in one batch and alone, greedy and sampled, on trained models; and fake drafters.

The reference is plain decoding with the same seeds. In float64 every token id is equal; in float32 and bfloat16 answers may
differ at a tie that is closer than the rounding between batch shapes, which the test measures on the same answers.

The tests on trained models are cut into pieces of a batch of prompts, half a minute or more long. `-m slow` runs a sample of the
pieces. `-m slow --whole -s` runs all pieces and prints the numbers of docs/exactness.md, which takes hours. A single piece:
`-m slow --whole -k "float64 and bundled and greedy and piece7"`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pitlane import Draft, Limits, Plugin, PluginOptions, Result, SamplingParams, hookimpl
from pitlane import Sequence as Seq
from pitlane.engine.models import presets
from pitlane.engine.models.families.core import parse_config
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.kernels import linear
from pitlane.testing import assert_only_ties_differ, first_difference
from tests.integrity import assert_integrity

Settings = dict[str, dict[str, Any]]
BATCH = 8
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "0.7": {"temperature": 0.7}, "1.2": {"temperature": 1.2}}
ROUNDING = {"float32": 1e-3, "bfloat16": 1.0}  # in logits; a larger difference between batch shapes is a fault
each_mode = pytest.mark.parametrize(
    "mode", [pytest.param(mode, id=name, marks=[pytest.mark.slow] * (name == "0.7")) for name, mode in MODES.items()]
)
sampled_or_slow = pytest.mark.parametrize(  # greedy answers of every drafter: tests/contract, and in the slow tier here
    "mode", [pytest.param({}, id="greedy", marks=pytest.mark.slow), pytest.param({"temperature": 0.9}, id="sampled")]
)
each_model = pytest.mark.parametrize("model", ["stories260K", "babyllama-tok105", "bundled"])
NUM_PIECES, NUM_PIECES_ALONE, NUM_PIECES_ROUNDED = 25, 3, 7  # of a batch of prompts


def pieces(count: int, sample: list[tuple[int, str]]) -> pytest.MarkDecorator:
    """Parametrize by piece and mode: the pairs of `sample` in the slow tier, all pairs with `--whole`."""
    return pytest.mark.sizes("piece, mode", sample=sample, whole=list(product(range(count), MODES)), ids=piece_id)


def piece_id(value: int | str) -> str:
    return f"piece{value}" if isinstance(value, int) else value


class Bench(NamedTuple):
    """An engine, and a setting for every place in a batch; the first setting has no drafter."""

    engine: Any
    settings: list[Settings]


def all_drafters(draft_model: str, num_layers: int) -> list[Settings]:
    return [
        {},
        {"prompt_lookup": {"min_ngram": 1}},
        {"prompt_lookup": {"min_ngram": 1, "num_candidates": 4, "num_draft_tokens": 4}},
        {"speculative": {"model": draft_model}},
        {"speculative": {"model": draft_model, "branching": 2, "num_draft_tokens": 4}},
        {"self_speculation": {"num_layers": num_layers}},
        {"jacobi": {}},
        {"lookahead": {}},
    ]


def test_every_built_in_drafter_is_tested() -> None:
    registry = PluginRegistry.load()
    drafters = {name for name in registry.togglable() if registry.get(name).role == "drafter"}
    assert drafters == {name for settings in all_drafters("", 1) for name in settings}


@pytest.fixture
def make_bench(make_engine: Any, shared_data: Path, cut_model: Callable[[Path, int], Path]) -> Callable[..., Bench]:
    """A trained model with a draft model: another model with the same tokenizer, or the first layers of the target."""

    def make(model: str, **options: Any) -> Bench:
        import pitlane.storage.bundled

        models = shared_data / "models"
        bundled = Path(next(iter(pitlane.storage.bundled.__path__)))
        folder = bundled if model == "bundled" else models / model
        draft_model = str(cut_model(folder, 2))
        if model == "babyllama-tok105":
            draft_model = str(models / "babyllama-tok361-as-tok105")
        if model == "bundled" and (folder / "drafter").is_dir():
            draft_model = "bundled-drafter"
        engine = make_engine(str(folder), kv_memory=2**31, **options)
        return Bench(engine, all_drafters(draft_model, 0 if model == "bundled" else 2))

    return make


@pytest.fixture
def varied_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the governor: up to 5 draft tokens, at every eighth place up to 32, so windows and trees are cut anywhere."""

    def numbers(governor: Any, record: Any, seqs: Any, limits: list[int]) -> list[int]:
        places = [40503 * seq.num_tokens >> 4 for seq in seqs]
        return [min(limit, place % (6 if place & 7 else 33)) for place, limit in zip(places, limits, strict=True)]

    monkeypatch.setattr("pitlane.engine.pacing.governor.Governor._numbers", numbers)


def prompts_of(engine: Any, text: str, count: int) -> list[list[int]]:
    tokens = engine.tokenizer.encode(text, add_special_tokens=False)
    stride = (len(tokens) - 60) // count
    assert stride > 0, "the text is too short for so many prompts"
    return [tokens[i * stride : i * stride + 8 + i % 48] for i in range(count)]


def params_of(index: int, max_tokens: int, **sampling: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=1000 + index, ignore_eos=True, **sampling)


def answers(
    engine: Any,
    prompts: list[list[int]],
    settings: Callable[[int], Settings],
    size: int,
    max_tokens: int,
    **sampling: Any,
) -> list[Result]:
    """Answers to all prompts in batches of `size`, prompt i under `settings(i)`."""
    results: list[Result] = []
    for start in range(0, len(prompts), size):
        streams = [
            engine.submit(prompts[i], params_of(i % BATCH, max_tokens, **sampling), plan=engine.plan(settings(i)))
            for i in range(start, min(start + size, len(prompts)))
        ]
        results += [stream.result() for stream in streams]
    assert all(result.stats["failed"] == {} for result in results)
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.token_ids) == min(max_tokens, engine.loader.context - len(prompt))
    return results


def rotated(settings: list[Settings], shift: int) -> Callable[[int], Settings]:
    """Settings in turn: a batch holds all settings, and over all shifts a prompt meets all settings."""
    return lambda i: settings[(i + shift) % len(settings)]


def all_shifts(settings: list[Settings]) -> Callable[[int], Settings]:
    """For a batch of prompts that is repeated once per setting: every repetition shifts the settings by one."""
    return lambda i: settings[(i + i // BATCH) % len(settings)]


def assert_equal(results: list[Result], plain: list[Result], how: str) -> None:
    differing = [
        (i, first_difference(a.token_ids, b.token_ids), b.stats["plugins"])
        for i, (a, b) in enumerate(zip(plain, results, strict=True))
        if a.token_ids != b.token_ids
    ]
    assert not differing, (
        f"{how}: {len(differing)} of {len(results)} answers differ; (prompt, token, plugins): {differing[:5]}"
    )


def accepted_by_drafter(results: list[Result]) -> dict[str, int]:
    accepted: dict[str, int] = {}
    for result in results:
        for name in result.stats["plugins"]:
            accepted[name] = accepted.get(name, 0) + result.stats["accepted_tokens"]
    return accepted


# ---- on trained models


@pytest.mark.usefixtures("varied_draft")
@sampled_or_slow
def test_all_drafters_in_one_batch_give_plain_tokens(
    make_bench: Callable[..., Bench], shared_data: Path, mode: dict[str, Any]
) -> None:
    engine, settings = make_bench("stories260K")
    text = (shared_data / "text" / "tinystories_sample.txt").read_text()
    prompts = prompts_of(engine, text, BATCH)
    plain = answers(engine, prompts, lambda i: {}, BATCH, 96, **mode)
    results = answers(engine, prompts, rotated(settings, 0), BATCH, 96, **mode)
    assert_equal(results, plain, "in one batch")
    accepted = accepted_by_drafter(results)
    assert set(accepted) == {name for plugins in settings for name in plugins}
    assert all(count > 0 for count in accepted.values()), accepted
    alone = answers(engine, prompts[1:], rotated(settings, 1), 1, 48, **mode)
    references = [engine.generate(prompts[i + 1], params_of(i, 48, **mode)) for i in range(BATCH - 1)]
    assert_equal(alone, references, "alone")


@pytest.mark.usefixtures("varied_draft")
@sampled_or_slow
def test_all_drafters_on_a_random_gemma_give_plain_tokens(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any]
) -> None:
    """Layers with a window of 12 beside full layers; every prompt is longer. With a tied head, the text repeats one token."""
    shape = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512}
    shape |= {
        "sliding_window": 12,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": False,
    }
    models = {f"gemma-{layers}": parse_config({**shape, "num_hidden_layers": layers}) for layers in (4, 2)}
    monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, **models})
    engine, settings = make_engine("random:gemma-4"), all_drafters("random:gemma-2", 2)
    assert [group.window for group in engine.lane_of(engine.default_plan).pool.groups] == [12, None]
    generator = random.Random(7)
    words = [[generator.randrange(256) for _ in range(4)] for _ in range(6)]
    prompts = [[token for _ in range(9 + i) for token in generator.choice(words)] for i in range(BATCH)]
    plain = answers(engine, prompts, lambda i: {}, BATCH, 96, **mode)
    assert all(len(set(result.token_ids)) > 20 for result in plain), "the text does not settle into one token"
    results = answers(engine, prompts, rotated(settings, 0), BATCH, 96, **mode)
    assert_equal(results, plain, "in one batch")
    assert all(result.stats["draft_tokens"] > 0 for result in results[1:])
    accepted = accepted_by_drafter(results)
    assert accepted["speculative"] > 0 and accepted["self_speculation"] > 0, accepted


def test_with_the_governor_too(make_bench: Callable[..., Bench], shared_data: Path) -> None:
    engine, settings = make_bench("stories260K")
    text = (shared_data / "text" / "tinystories_sample.txt").read_text()
    prompts = prompts_of(engine, text, BATCH)
    plain = answers(engine, prompts, lambda i: {}, BATCH, 160)
    assert_equal(answers(engine, prompts, rotated(settings, 0), BATCH, 160), plain, "governed")


def prompts_of_piece(engine: Any, shared_data: Path, piece: int) -> list[list[int]]:
    """One batch of the 200 prompts; all tests have the same pieces."""
    text = (shared_data / "text" / "pride_and_prejudice.txt").read_text()[:100_000]
    return prompts_of(engine, text, NUM_PIECES * BATCH)[piece::NUM_PIECES]


@pytest.mark.usefixtures("varied_draft")
@each_model
@pieces(NUM_PIECES, sample=[(0, "greedy"), (3, "0.7"), (4, "1.2")])
def test_all_tokens_are_plain_tokens_in_float64(
    make_bench: Callable[..., Bench], shared_data: Path, piece: int, mode: str, model: str
) -> None:
    """All pieces together: a drafter gives 200 answers of 256 tokens (up to the context), a batch holds every drafter.

    The first pieces run in batches of 8, the rest in batches of 64, where a prompt meets all eight settings.
    """
    engine, settings = make_bench(model)
    prompts = prompts_of_piece(engine, shared_data, piece)
    plain = answers(engine, prompts, lambda i: {}, BATCH, 256, **MODES[mode])
    size = BATCH if piece < NUM_PIECES_ALONE else BATCH * BATCH
    results = answers(engine, prompts * BATCH, all_shifts(settings), size, 256, **MODES[mode])
    assert_equal(results, plain * BATCH, f"{model} {mode}")
    accepted = accepted_by_drafter(results)
    assert all(count > 0 for count in accepted.values()), accepted
    print(f"\n{model} float64 {mode} piece {piece}: {BATCH * len(prompts)} answers plain; accepted {accepted}")


@pytest.mark.usefixtures("varied_draft")
@pytest.mark.skipif(bool(linear.unavailable()), reason=str(linear.unavailable()))
@pieces(NUM_PIECES, sample=[(0, "greedy"), (3, "0.7"), (4, "1.2")])
def test_all_tokens_are_plain_tokens_in_bfloat16_by_the_kernels_in_c(
    make_bench: Callable[..., Bench], shared_data: Path, piece: int, mode: str
) -> None:
    """The same 200 prompts on the bundled model; the kernels sum a row in the same order in any batch."""
    engine, settings = make_bench("bundled", dtype="bfloat16")
    kernels: Settings = {"packed_linear": {}, "flash_attention": {}, "fused_ops": {}}
    prompts = prompts_of_piece(engine, shared_data, piece)
    plain = answers(engine, prompts, lambda i: kernels, BATCH, 256, **MODES[mode])
    chosen = all_shifts([kernels | drafter for drafter in settings])
    size = BATCH if piece < NUM_PIECES_ALONE else BATCH * BATCH
    assert_equal(answers(engine, prompts * BATCH, chosen, size, 256, **MODES[mode]), plain * BATCH, f"{mode}")
    print(f"\nbundled bfloat16 kernels {mode} piece {piece}: {BATCH * len(prompts)} answers plain")


@each_model
@pieces(NUM_PIECES_ALONE, sample=[(0, "0.7")])
def test_alone_and_governed_all_tokens_are_plain_tokens_in_float64(
    make_bench: Callable[..., Bench], shared_data: Path, piece: int, mode: str, model: str
) -> None:
    """24 prompts one by one, under every drafter. The plain answers of a batch are compared too."""
    engine, settings = make_bench(model)
    prompts = prompts_of_piece(engine, shared_data, piece)
    plain = answers(engine, prompts, lambda i: {}, 1, 256, **MODES[mode])
    assert_equal(answers(engine, prompts, lambda i: {}, BATCH, 256, **MODES[mode]), plain, "plain, in a batch")
    for drafter in settings[1:]:
        results = answers(engine, prompts, rotated([drafter], 0), 1, 256, **MODES[mode])
        assert_equal(results, plain, f"{model} {mode}, {drafter} alone")
        count = sum(accepted_by_drafter(results).values())
        print(f"\n{model} float64 {mode} piece {piece} {drafter}: {len(results)} plain, {count} accepted")


def measured_rounding(references: list[Result], results: list[Result]) -> float:
    """The largest difference of a log-probability after equal tokens."""
    largest = 0.0
    for reference, result in zip(references, results, strict=True):
        assert reference.logprobs is not None and result.logprobs is not None
        stop = first_difference(reference.token_ids, result.token_ids)
        for expected, actual in zip(reference.logprobs[:stop], result.logprobs[:stop], strict=False):
            both = expected.keys() & actual.keys()
            largest = max([largest, *(abs(expected[token] - actual[token]) for token in both)])
    return largest


@pytest.mark.usefixtures("varied_draft")
@pytest.mark.parametrize("dtype", list(ROUNDING))
@each_model
@pieces(NUM_PIECES_ROUNDED, sample=[(0, "0.7"), (1, "greedy")])
def test_only_ties_below_the_measured_rounding_differ(
    make_bench: Callable[..., Bench], shared_data: Path, piece: int, mode: str, model: str, dtype: str
) -> None:
    """56 prompts under every drafter, the first 8 in batches of 8, the rest in batches of 64.

    Rounding may move both scores, so a tie is closer than twice the rounding.
    """
    engine, settings = make_bench(model, dtype=dtype)
    prompts = prompts_of_piece(engine, shared_data, piece)
    sampling = {**MODES[mode], "top_k": 20, "logprobs": 50} if MODES[mode] else {"logprobs": 50}
    plain = answers(engine, prompts, lambda i: {}, BATCH, 256, **sampling)
    size = BATCH if piece == 0 else BATCH * BATCH
    results = answers(engine, prompts * BATCH, all_shifts(settings), size, 256, **sampling)
    references = plain * BATCH
    rounding = measured_rounding(references, results)
    assert rounding < ROUNDING[dtype], f"batch shapes differ by {rounding:.3g} of a logit"
    num_differing = assert_only_ties_differ(references, results, SamplingParams(**sampling), 2 * rounding)
    tokens = [
        (len(a.token_ids), first_difference(a.token_ids, b.token_ids)) for a, b in zip(references, results, strict=True)
    ]
    before = sum(total if at is None else at for total, at in tokens)
    rate = 100 * before / sum(total for total, _ in tokens)
    print(
        f"\n{model} {dtype} {mode} piece {piece}: {len(results) - num_differing} of {len(results)} answers identical, "
        f"{rate:.2f} % of tokens before any tie; rounding {rounding:.2e}"
    )


# ---- on fakes


class Fake(Plugin):
    """Knows the answers. kind: drafts right tokens, wrong tokens, or invalid drafts."""

    name, role, exactness = "fake", "drafter", "identical"

    class Options(PluginOptions):
        kind: str = "never"

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.answers: dict[tuple[int, ...], list[int]] = {}

    @hookimpl
    def propose(self, seqs: Sequence[Seq], limits: Limits) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True):
            answer = self.answers[tuple(seq.token_ids[: seq.request.num_prompt_tokens])]
            truth = answer[seq.num_completion_tokens :][:limit]
            drafts.append(getattr(self, f"_{self.options.kind}")(truth, limit) if truth else None)
        return drafts

    def _never(self, truth: list[int], limit: int) -> Draft:
        return Draft([token ^ 1 for token in truth])

    def _always(self, truth: list[int], limit: int) -> Draft:
        return Draft(truth)

    def _sometimes(self, truth: list[int], limit: int) -> Draft:
        generator = random.Random(str(truth))
        return Draft([token ^ (generator.random() < 0.3) for token in truth])

    def _wrong_parents(self, truth: list[int], limit: int) -> Draft:
        """A node that is its own parent, later parents, parents below -1, and too few parents."""
        generator = random.Random(str(truth))
        parents = [index - 1 if generator.random() < 0.8 else generator.randint(-3, 40) for index in range(len(truth))]
        return Draft(truth, parents[: generator.randint(0, 40)])

    def _out_of_range(self, truth: list[int], limit: int) -> Draft:
        generator = random.Random(str(truth))
        return Draft([token if generator.random() < 0.8 else generator.choice([-1, 512, 10**12]) for token in truth])

    def _too_many(self, truth: list[int], limit: int) -> Draft:
        return Draft([*truth, *[7] * 5000])

    def _too_many_siblings(self, truth: list[int], limit: int) -> Draft:
        return Draft([*truth, *range(512)], [*range(-1, len(truth) - 1), *[-1] * 512])

    def _equal_siblings(self, truth: list[int], limit: int) -> Draft:
        """Every token twice; the next tokens hang on the second node."""
        tokens = [token for token in truth[: max(1, limit // 2)] for _ in range(2)][:limit]
        return Draft(tokens, [2 * (index // 2) - 1 for index in range(len(tokens))])


ACCEPTED = {  # share of the answer that is accepted draft tokens: (min, max)
    "never": (0.0, 0.0),
    "always": (0.9, 1.0),
    "sometimes": (0.3, 0.9),
    "wrong_parents": (0.2, 0.95),
    "out_of_range": (0.3, 0.95),
    "too_many": (0.9, 1.0),
    "too_many_siblings": (0.9, 1.0),
    "equal_siblings": (0.85, 1.0),
}


@pytest.mark.usefixtures("always_draft")
@each_mode
def test_no_fake_drafter_changes_a_token(make_engine: Any, mode: dict[str, Any]) -> None:
    """Eight kinds in one batch; no request fails."""
    registry = PluginRegistry()
    registry.add(Fake)
    engine = make_engine(registry=registry)
    generator = random.Random(5)
    prompts = [[generator.randrange(256) for _ in range(20 + 5 * i)] for i in range(len(ACCEPTED))]
    plain = answers(engine, prompts, lambda i: {}, BATCH, 256, **mode)
    kinds = [{"fake": {"kind": kind}} for kind in ACCEPTED]
    plans = [engine.plan(settings) for settings in kinds]  # a plugin lives as long as a plan with it
    for plan in plans:
        known = plan.plugins[0].answers
        known |= {tuple(prompt): result.token_ids for prompt, result in zip(prompts, plain, strict=True)}
    results = answers(engine, prompts, lambda i: kinds[i], BATCH, 256, **mode)
    assert_equal(results, plain, "fake drafters")
    for (kind, (low, high)), result in zip(ACCEPTED.items(), results, strict=True):
        assert low <= result.stats["accepted_tokens"] / 256 <= high, kind
    lane = engine.lane_of(engine.default_plan)
    assert_integrity(lane.pool, [])
    assert lane.pool.num_free_blocks == lane.pool.num_blocks
