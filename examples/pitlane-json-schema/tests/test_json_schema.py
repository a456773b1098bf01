import json
import re

import pytest
from pitlane_json_schema import JsonSchema

from pitlane import BadOption, Engine, PluginRegistry, SamplingParams
from pitlane.testing import check_plugin

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 4}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine():
    registry = PluginRegistry.load()
    if "json_schema" not in registry.entries:  # it is there if the package is installed
        registry.add(JsonSchema)
    with Engine("random:tiny", dtype="float64", plugins={}, registry=registry) as engine:
        yield engine


def answer(engine, options, *, seed=1, **others):
    sampling = SamplingParams(max_tokens=80, temperature=1.0, seed=seed)
    return engine.generate("An animal:", sampling, plan=engine.plan({"json_schema": options, **others}))


def test_it_keeps_its_promise():
    """The kit runs every clause of the contract, with every built-in drafter beside the plugin."""
    pattern = "(cat|dog){5}x{9}"
    check_plugin(
        JsonSchema, {"regex": pattern}, effect=lambda answer: bool(re.fullmatch(pattern, answer.text))
    ).assert_proved()


@pytest.mark.parametrize("seed", range(5))
def test_answers_match_the_schema(engine, seed):
    value = json.loads(answer(engine, {"schema": json.dumps(SCHEMA)}, seed=seed).text)
    assert value["kind"] in ("cat", "dog") and 0 <= value["legs"] <= 4 and len(value) == 2


def test_a_drafter_changes_no_token(engine):
    options = {"regex": "(cat, ){8}[a-z]{9}"}
    plain, drafted = (answer(engine, options, **plugins) for plugins in ({}, {"prompt_lookup": {"num_candidates": 3}}))
    assert drafted.token_ids == plain.token_ids and re.fullmatch(options["regex"], plain.text)
    assert drafted.stats["accepted_tokens"] > 0


def test_a_bad_schema_is_refused(engine):
    with pytest.raises(BadOption, match="Invalid type: objekt"):
        engine.plan({"json_schema": {"schema": '{"type": "objekt"}'}})
