"""The example package pitlane-json-schema: every answer is valid, and every drafter gives the ids of plain constrained decoding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import pytest

from pitlane import BadOption, Engine, PitlaneError, PluginRegistry, SamplingParams
from tests.examples.schemas import LEVELS, schema

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
from pitlane_json_schema import JsonSchema, Vocabulary, grammar_of  # noqa: E402

PROMPT = 'A record: {"name": "Ada", "age": 36, "tags": [1, 2]}. Another record: '
DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"min_ngram": 1},
    "prompt_lookup, a tree": {"min_ngram": 1, "num_candidates": 4},
    "speculative": {},
    "self_speculation": {},
    "jacobi": {},
    "lookahead": {},
}
TINY = {"speculative": {"model": "random:tiny-cut"}, "self_speculation": {"num_layers": 1}}
TAGS = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 20}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "tags": TAGS},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
REPEATS = {"regex": r"a{12}(1, 2, ){6}[a-z]{4}"}


def registry() -> PluginRegistry:
    registry = PluginRegistry.load()
    registry.add(JsonSchema)
    return registry


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("bundled", dtype="float32", plugins={}, registry=registry()) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact_engine() -> Iterator[Engine]:
    with Engine("bundled", dtype="float64", plugins={}, registry=registry()) as engine:
        yield engine


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Engine]:
    try:
        engine = Engine("smollm2", plugins={}, registry=registry())
    except PitlaneError as error:
        pytest.skip(f"SmolLM2 is not on this machine: {error}")
    with engine:
        yield engine


def answer(engine: Engine, options: dict[str, Any], seed: int = 0, tokens: int = 300, **drafter: Any) -> Any:
    """An answer, greedy for seed 0, else sampled."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.8 * (seed > 0), seed=seed)
    return engine.generate(PROMPT, sampling, plan=engine.plan({"json_schema": options, **drafter}))


def check_valid(engine: Engine, level: int, seed: int) -> None:
    expected = schema(level, seed)
    result = answer(engine, {"schema": json.dumps(expected)}, seed)
    assert result.finish_reason == "stop", f"{expected}\n{result.text}"
    jsonschema.validate(json.loads(result.text), expected)


@pytest.mark.parametrize("level", [1, 4, 7, 10])
def test_answers_are_valid(engine: Engine, level: int) -> None:
    check_valid(engine, level, seed=level % 2)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_two_hundred_answers_are_valid(engine: Engine, level: int) -> None:
    for seed in range(20):
        check_valid(engine, level, seed)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_two_hundred_answers_of_smollm2_are_valid(smollm2: Engine, level: int) -> None:
    for seed in range(20):
        check_valid(smollm2, level, seed)


@pytest.mark.usefixtures("always_draft", "cut_tiny")
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_gives_the_ids_of_plain_constrained_decoding(make_engine: Any, name: str) -> None:
    plugin, engine = name.partition(",")[0], make_engine(registry=registry())
    drafter = {plugin: DRAFTERS[name] | TINY.get(plugin, {})}
    num_drafted = num_accepted = 0
    for options, seed in product([{"schema": json.dumps(PERSON)}, REPEATS], (0, 1)):
        plain, drafted = (answer(engine, options, seed, 80, **plugins) for plugins in ({}, drafter))
        assert drafted.token_ids == plain.token_ids, f"{plain.text}\n{drafted.text}"
        assert drafted.stats["failed"] == {}
        num_drafted += drafted.stats["draft_tokens"]
        num_accepted += drafted.stats["accepted_tokens"]
    assert num_drafted > num_accepted >= (plugin not in TINY), "a drafter that copies text guesses the repeats"


@pytest.mark.slow
@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("name", DRAFTERS)
def test_ids_are_equal_for_schemas_of_every_level(exact_engine: Engine, name: str) -> None:
    drafter = {name.partition(",")[0]: DRAFTERS[name]}
    num_drafted = num_accepted = 0
    cases = [
        *({"schema": json.dumps(schema(level, level))} for level in LEVELS),
        {"schema": json.dumps(PERSON)},
        REPEATS,
    ]
    for options, seed in product(cases, (0, 1)):
        plain, drafted = (answer(exact_engine, options, seed, **plugins) for plugins in ({}, drafter))
        assert drafted.token_ids == plain.token_ids and plain.finish_reason == "stop", f"{options}, seed {seed}"
        num_drafted += drafted.stats["draft_tokens"]
        num_accepted += drafted.stats["accepted_tokens"]
    assert num_drafted > num_accepted > 0, "both outcomes of a draft are needed to show anything"


@pytest.mark.parametrize("options, expected", [
    ({"regex": "[0-9]{3}-[a-z]{2}x"}, "[0-9]{3}-[a-z]{2}x"),
    ({"grammar": 'start: "yes" | "no, " NAME\nNAME: /[A-Z][a-z]{2,5}/'}, "yes|no, [A-Z][a-z]{2,5}"),
    ({"schema": '{"const": {"a": [1, 2]}}'}, re.escape('{"a": [1, 2]}')),
])  # fmt: skip
def test_every_kind_of_grammar(engine: Engine, options: dict[str, str], expected: str) -> None:
    result = answer(engine, options, seed=3)
    assert result.finish_reason == "stop" and re.fullmatch(expected, result.text), result.text


def test_without_options_the_answer_is_an_object(engine: Engine) -> None:
    free, constrained = (engine.generate("1, 2, 3,", SamplingParams(max_tokens=8), plan=engine.plan(plan)).text
                         for plan in ({}, {"json_schema": {}}))  # fmt: skip
    assert re.match(r'\{("|\})', constrained) and not free.startswith("{")


@pytest.mark.parametrize("options, reason", [
    ({"schema": "{"}, "json_schema.schema = '{' does not compile: .*line 1 column 2"),
    ({"schema": "[]"}, "a schema is a JSON object"),
    ({"schema": '{"type": "objekt"}'}, "does not compile: Invalid type: objekt"),
    ({"schema": '{"not": {"type": "string"}}'}, "Unimplemented keys"),
    ({"schema": '{"$ref": "http://example.org/schema"}'}, "does not fetch"),
    ({"regex": "(a"}, "json_schema.regex = .*unclosed group"),
    ({"regex": "a(?=b)"}, "look-around"),
    ({"grammar": "start: foo"}, "json_schema.grammar = .*unknown name"),
    ({"regex": "a", "grammar": "start: /a/"}, "takes one of schema, regex and grammar, got regex and grammar"),
    ({"whitespace": "some"}, "json_schema.whitespace"),
])  # fmt: skip
def test_a_grammar_that_does_not_compile_is_refused_before_a_request(
    engine: Engine, options: dict[str, str], reason: str
) -> None:
    with pytest.raises(BadOption, match=reason):
        engine.plan({"json_schema": options})


def test_after_the_end_only_the_end_follows(engine: Engine) -> None:
    """With `ignore_eos` the answer goes on after the grammar is complete."""
    plan = engine.plan({"json_schema": {"regex": "abc"}, "prompt_lookup": {"min_ngram": 1}})
    result = engine.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), plan=plan)
    assert result.text == "abc" and len(result.token_ids) == 30
    assert set(result.token_ids[10:]) == set(engine.tokenizer.eos_token_ids)


def test_two_requests_and_two_samples_at_once_keep_their_own_grammars(engine: Engine) -> None:
    schemas = [{"regex": "[0-9]{9}"}, {"regex": "[a-z]{30}"}]
    plans = [engine.plan({"json_schema": options}) for options in schemas]
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=1)
    streams = [engine.submit(PROMPT, sampling, plan=plan) for plan in (*plans, engine.plan({}))]
    digits, letters, free = (stream.result().text for stream in streams)
    assert re.fullmatch("[0-9]{9}", digits) and re.fullmatch("[a-z]{30}", letters) and free not in (digits, letters)
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=1, n=2)
    samples = engine.generate(PROMPT, sampling, plan=plans[0]).samples
    assert len({sample.text for sample in samples}) == 2
    assert all(re.fullmatch("[0-9]{9}", sample.text) for sample in samples)


@pytest.mark.slow
def test_the_cost_of_a_step_beside_llguidances_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Medians over the steps of an answer, a row per step. llguidance's own: compute the mask, then read the token."""
    options = {"schema": json.dumps(PERSON)}
    plan = engine.plan({"json_schema": options})
    (plugin,) = plan.plugins
    hook, whole, own = plan.hook("adjust_logits")[0], [], []

    def timed(rows: Any) -> Any:
        started = perf_counter()
        logits = JsonSchema.adjust_logits(plugin, rows)
        whole.append(perf_counter() - started)
        return logits

    object.__setattr__(hook, "function", timed)
    result = engine.generate(PROMPT, SamplingParams(max_tokens=300, temperature=0.8, seed=1), plan=plan)
    matcher = Vocabulary(engine.lane_of(plan)).matcher(grammar_of(plugin.options))
    for token in result.token_ids[:-1]:
        started = perf_counter()
        matcher.compute_bitmask()
        matcher.consume_token(token)
        own.append(perf_counter() - started)
    assert len(whole) == len(result.token_ids) > 20
    per_step, alone = 1e6 * median(whole), 1e6 * median(own)
    with capsys.disabled():
        print(f"\njson_schema: {per_step:.0f} us a step, llguidance alone {alone:.0f} us")
    assert per_step < alone + 400
