"""Compare: plans in turn on one prompt, speed-ups with their noise, verdicts, divergences, distributions, the command."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pitlane import BadOption, PluginRegistry, Result, SamplingParams
from pitlane.storage.db import Store
from pitlane.ui.bench import comparison as module
from pitlane.ui.bench.comparison import compare
from pitlane.ui.bench.groups import compare_in_groups, in_groups, single_changes
from pitlane.ui.bench.plan_text import parse_plans
from pitlane.ui.bench.report import answer_text, gap_text, laps_text, scores_text, speed_text
from pitlane.ui.bench.results import to_csv
from pitlane.ui.bench.scoring import Reading, read_along
from pitlane.ui.bench.summary import MIN_COMPARED_TOKENS
from pitlane.ui.bench.turns import Cancelled, Lap, Turns
from pitlane.ui.cli import main

TEXT = "one two one two one two"
GREEDY = SamplingParams(max_tokens=MIN_COMPARED_TOKENS, ignore_eos=True)


def prompt_of(engine: Any, text: str = TEXT) -> Any:
    return engine.tokenizer.render_raw(text, [])


def plans_of(engine: Any, **sets: tuple[str, ...]) -> dict[str, Any]:
    return {label: engine.plan({name: {} for name in names}) for label, names in sets.items()}


# ---- measured


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_gives_the_same_answer_and_its_laps_are_counted(make_engine: Any, temperature: float) -> None:
    engine = make_engine()
    plans = plans_of(engine, core=(), lookup=("prompt_lookup",))
    sampling = replace(GREEDY, temperature=temperature, seed=3)
    report = compare(engine, plans, prompt_of(engine), sampling, 2).to_json()
    core, lookup = report["plans"]
    assert (core["verdict"], lookup["verdict"], lookup["difference"]) == ("first", "identical", "identical")
    assert lookup["divergence"] is None and lookup["scores"] is None, "there is nothing to explain"
    assert core["draft_tokens"] == 0 and lookup["tokens_per_step"] >= 1
    assert lookup["draft_tokens"] > 0 or temperature > 0, "a greedy tiny model repeats itself"
    assert len(lookup["tokens_per_second"]["laps"]) == 2 and lookup["speed"]["pairs"] == 2
    assert lookup["plugin_ms"]["prompt_lookup"] > 0 and lookup["kv_bytes"] > 0 and lookup["weight_bytes"] > 0
    assert lookup["bought_ms"]["prompt_lookup"]["how"] == "ablated", "core is this plan without the drafter"
    assert report["seed"] == 3 and report["model"] == "random:tiny" and report["dtype"] == "float64"


def test_without_a_seed_all_plans_draw_the_same(make_engine: Any) -> None:
    engine = make_engine()
    plans = plans_of(engine, core=(), cached=("prefix_cache",))
    report = compare(engine, plans, prompt_of(engine), replace(GREEDY, temperature=1.5), 2)
    assert [plan.verdict for plan in report.plans] == ["first", "identical"] and report.seed >= 0


def test_a_plan_that_may_differ_is_measured_by_its_distributions(make_engine: Any) -> None:
    engine = make_engine()
    plans = plans_of(engine, core=(), packed=("int8",))
    report = compare(engine, plans, prompt_of(engine), replace(GREEDY, temperature=1.0, seed=1), 1).to_json()
    core, packed = report["plans"]
    assert packed["difference"] == "approximate" and packed["weight_bytes"] < core["weight_bytes"]
    assert 0 < packed["scores"]["kl"] <= packed["scores"]["kl_max"] and 0 <= packed["scores"]["top1"] <= 1
    assert core["scores"]["kl"] == 0 and core["scores"]["num_tokens"] == MIN_COMPARED_TOKENS
    assert packed["scores"]["perplexity"] != core["scores"]["perplexity"] > 1


def test_perplexity_is_of_the_models_own_log_probabilities(make_engine: Any) -> None:
    engine = make_engine()
    answer = engine.generate(prompt_of(engine), replace(GREEDY, logprobs=0))
    assert answer.logprobs is not None
    turns = Turns(engine, {}, [], GREEDY, 1, lambda done, total: None)
    reading = read_along(turns, prompt_of(engine), answer.token_ids, engine.plan({}), None, "s")
    expected = [next(iter(logprobs.values())) for logprobs in answer.logprobs]
    assert reading.logprob == pytest.approx(expected)
    again = read_along(turns, prompt_of(engine), answer.token_ids, engine.plan({}), reading, "s")
    assert max(again.kl) < 1e-6 and all(again.agrees), "a plan does not differ from itself"


def test_a_first_divergence_has_both_continuations_and_its_gap(make_engine: Any) -> None:
    """A plugin of the steering class that forbids the model's own token at one place."""
    from pitlane import Plugin, hookimpl

    class Detour(Plugin):
        name, exactness = "detour", "steering"

        @hookimpl
        def adjust_logits(self, rows: Any) -> None:
            if rows.seqs[0].num_completion_tokens == 5:
                rows.logits[0, rows.logits[0].argmax()] = rows.logits[0].min()

    engine = make_engine()
    engine.registry.add(Detour)
    plans = plans_of(engine, core=(), detour=("detour",))
    report = compare(engine, plans, prompt_of(engine), GREEDY, 1).to_json()
    core, detour = report["plans"]
    assert detour["verdict"] == "different" and detour["divergence"]["index"] == 5
    assert core["text"].startswith(detour["divergence"]["before"] + detour["divergence"]["first"][:1])
    assert detour["divergence"]["first"] != detour["divergence"]["other"]
    top = engine.generate(prompt_of(engine), replace(GREEDY, logprobs=2)).logprobs[5]
    first, second = sorted(top.values(), reverse=True)
    assert detour["divergence"]["logit_gap"] == pytest.approx(first - second, abs=1e-5)
    assert answer_text(detour) == "differs from token 6" and "logits apart" in gap_text(detour, "float64")
    assert "KL" in scores_text(detour, core) and scores_text(core, core) == ""


def test_a_lap_replays_no_earlier_lap(make_engine: Any) -> None:
    engine = make_engine()
    plans = plans_of(engine, lookup=("prompt_lookup",), again=("prompt_lookup",))
    turns = Turns(engine, plans, [prompt_of(engine, "x y z")], GREEDY, 2, lambda done, total: None)
    laps = turns.run()
    replayed = [
        lap.results[0].stats["notes"]["prompt_lookup"]["replayed_tokens"] for side in laps.values() for lap in side
    ]
    assert replayed == [0, 0, 0, 0]


def test_a_document_is_known_to_the_plans_that_keep_kv_and_no_file_is_written(make_engine: Any, own_home: Path) -> None:
    from pitlane import Document, Page

    engine = make_engine()
    document = Document("guide", "text/plain", (Page(0, "1", "The track opens at nine. " * 12),), "0" * 64)
    prompt = engine.tokenizer.render_chat([{"role": "user", "content": "When?"}], [document])
    plans = plans_of(engine, core=(), cached=("prefix_cache",))
    core, cached = compare(engine, plans, prompt, replace(GREEDY, max_tokens=4), 1).plans
    assert core.cached_tokens == 0 and cached.cached_tokens > 0.7 * cached.prompt_tokens
    assert cached.verdict == "identical" and not list(own_home.rglob("*.safetensors"))


def test_a_comparison_is_cancelled_from_outside(make_engine: Any) -> None:
    engine = make_engine()
    started: list[Turns] = []
    seen: list[tuple[int, int]] = []

    def advance(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            started[0].cancel()

    with pytest.raises(Cancelled):
        compare(engine, plans_of(engine, core=(), same=()), prompt_of(engine), GREEDY, 3, advance, started)
    assert [done for done, _ in seen] == [0, 1, 2, 3] and seen[0][1] == 10
    assert engine.generate(prompt_of(engine), GREEDY).finish_reason == "length", "the engine goes on"


def test_more_ways_to_run_than_an_engine_keeps_are_refused(make_engine: Any) -> None:
    engine = make_engine()

    class Fake:
        def __init__(self, key: int) -> None:
            self.lane_key = (str(key),)

    plans: Any = {str(key): Fake(key) for key in range(9)}
    with pytest.raises(BadOption, match="9 ways, and an engine keeps 4"):
        compare(engine, plans, prompt_of(engine), GREEDY, 1)


# ---- more plans than lanes


def test_plans_are_divided_into_groups_that_an_engine_keeps_open() -> None:
    plans: Any = {label: SimpleNamespace(lane_key=key) for label, key in zip("abcdefg", "AAABCDE", strict=True)}
    assert [list(group) for group in in_groups(plans, 3)] == [["a", "b", "c", "d", "e"], ["a", "f", "g"]]
    assert [list(group) for group in in_groups({"a": plans["a"]}, 3)] == [["a"]]


def test_groups_have_one_seed_and_one_report_and_name_what_was_left_out(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    monkeypatch.setattr(type(engine), "max_lanes", 2)
    plans = plans_of(engine, core=(), lookup=("prompt_lookup",), eight=("int8",), four=("int4",), kv=("kv_quant",))
    opened = type(engine).lane_of

    def lane_of(self: Any, plan: Any) -> Any:
        if "int4" in plan.settings:
            raise BadOption("no room")
        return opened(self, plan)

    monkeypatch.setattr(type(engine), "lane_of", lane_of)
    steps: list[tuple[int, int]] = []
    report = compare_in_groups(
        engine, plans, prompt_of(engine), replace(GREEDY, temperature=1.0), 1, lambda *step: steps.append(step)
    )
    assert [plan.label for plan in report.plans] == ["core", "lookup", "eight", "kv"]
    assert report.plans[1].verdict == "identical" and report.plans[2].speed is not None
    assert report.notes[0].startswith("measured in 2 groups") and "four was left out: no room" in report.notes
    assert steps == sorted(steps) and {total for _, total in steps} == {steps[-1][1]} and steps[-1][0] == steps[-1][1]


def test_every_plugin_is_a_change_of_the_first_plan_or_has_a_reason(make_engine: Any) -> None:
    engine = make_engine(plugins=["prefix_cache", "jacobi"])
    plans, reasons = single_changes(engine, engine.default_plan)
    assert {label[1:] for label in plans} | set(reasons) == set(engine.registry.togglable())
    assert set(plans["-prefix_cache"].settings) == {"jacobi"}
    assert set(plans["+prompt_lookup"].settings) == {"prefix_cache", "prompt_lookup"}, "one drafter"
    assert all(reasons.values())


# ---- judged, on made-up laps


def lap(speed: float, count: int = 40, ttft: float = 10.0, ids: int = 7, **stats: Any) -> Lap:
    """A lap of so many tokens a second."""
    record = {
        "ttft_ms": ttft, "decode_ms": 1e3 * (count - 1) / speed, "prompt_tokens": 9, "cached_tokens": 0,
        "draft_tokens": 0, "accepted_tokens": 0, "tpot_ms": {"p50": 1.0, "p95": 2.0}, "plugin_ms": {}, "kv_bytes": 1,
        "weight_bytes": 2, "paused": {}, "failed": {},
    } | stats  # fmt: skip
    return Lap([Result("text", [ids] * count, "length", record)], count)


@pytest.fixture
def judged(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The results of plans with given laps: `judged(first=[...], other=[...])`. The label `same` is the first plan again."""
    engine = make_engine()

    def run(**laps: list[Lap]) -> Any:
        names = {label: () if label in ("first", "same") else ("prompt_lookup",) for label in laps}
        monkeypatch.setattr(module.Turns, "run", lambda self: laps)
        repeats = len(laps["first"])
        monkeypatch.setattr(module, "_score", lambda *_: None)
        return compare(engine, plans_of(engine, **names), prompt_of(engine), GREEDY, repeats)

    return run


def test_a_speed_up_is_the_median_and_range_of_paired_ratios(judged: Any) -> None:
    report = judged(first=[lap(100), lap(104), lap(98)], other=[lap(190), lap(208), lap(186.2)])
    other = report.plans[1]
    assert other.speed == {"ratio": 1.9, "low": 1.9, "high": 2.0, "pairs": 3} and other.outcome == "faster"
    assert report.notes == [] and speed_text(other.to_json()) == "1.90 (1.90 to 2.00)"
    assert other.bought_ms["prompt_lookup"]["ms"] == pytest.approx(1e3 * (39 / 98 - 39 / 186.2), rel=0.1)
    assert "prompt_lookup saved" in laps_text(other.to_json())


def test_a_slower_plan_is_called_slower(judged: Any) -> None:
    assert judged(first=[lap(100), lap(101)], other=[lap(50), lap(51)]).plans[1].outcome == "slower"


def test_a_gain_within_the_noise_of_the_first_plan_is_none(judged: Any) -> None:
    report = judged(first=[lap(100), lap(110), lap(90)], other=[lap(104), lap(113), lap(93)])
    assert report.plans[1].speed["low"] > 1 and report.plans[1].outcome == "no difference"
    assert ["busy" in note for note in report.notes] == [True] and "20 %" in report.notes[0]


def test_the_difference_of_a_plan_with_itself_is_noise_and_bounds_the_claims_about_others(judged: Any) -> None:
    report = judged(first=[lap(100), lap(101)], same=[lap(107), lap(108)], other=[lap(105), lap(106)])
    _, same, other = report.plans
    assert (same.outcome, same.verdict, other.outcome) == ("same plan", "identical", "no difference")


def test_a_plan_against_itself_says_one_within_its_spread(make_engine: Any) -> None:
    engine = make_engine()
    report = compare(engine, plans_of(engine, core=(), same=()), prompt_of(engine), GREEDY, 3)
    _, same = report.plans
    assert (same.outcome, same.verdict, same.difference) == ("same plan", "identical", "identical")
    assert same.speed is not None and same.speed["low"] <= same.speed["ratio"] <= same.speed["high"]
    assert 1 / 3 < same.speed["ratio"] < 3, "the same work takes about the same time, on a busy machine too"


def test_short_answers_are_not_compared(judged: Any) -> None:
    report = judged(first=[lap(100, 31), lap(100, 31)], other=[lap(200, 31), lap(200, 31)])
    assert report.plans[1].outcome == "too short" and "31 tokens, at least 32" in report.notes[0]
    assert not report.plans[1].bought_ms and speed_text(report.plans[1].to_json()) == "too short to compare"
    assert judged(first=[lap(9, 1)], other=[lap(9, 1)]).plans[1].speed is None, "one token has no speed"


def test_one_repeat_has_no_spread(judged: Any) -> None:
    report = judged(first=[lap(100)], other=[lap(200)])
    assert "one repeat" in report.notes[0] and report.plans[1].outcome == "one lap"


def test_laps_that_differ_among_themselves_are_no_proof(judged: Any) -> None:
    report = judged(first=[lap(100), lap(100)], other=[lap(100, ids=7), lap(100, ids=8)])
    assert report.plans[1].verdict == "unstable" and answer_text(report.plans[1].to_json()) == "varies between laps"


def test_a_failed_plugin_is_said(judged: Any) -> None:
    report = judged(first=[lap(100)] * 2, other=[lap(100, failed={"prompt_lookup": "broke"})] * 2)
    assert "prompt_lookup failed" in report.notes[-1]


def test_a_report_is_json_and_csv_and_leaves_out_words_on_request(judged: Any) -> None:
    report = judged(first=[lap(100)] * 2, other=[lap(200, ids=8)] * 2)
    document = json.loads(json.dumps(report.to_json()))
    (first, other) = csv.DictReader(io.StringIO(to_csv(document)))
    assert (first["verdict"], other["verdict"], other["speed_ratio"]) == ("first", "different", "2.0")
    assert other["first_difference"] == "0" and other["plugins"] == "prompt_lookup" and other["model"] == "random:tiny"
    bare = report.to_json(texts=False)
    assert "text" not in bare["plans"][0] and set(bare["plans"][1]["divergence"]) == {"index", "logit_gap"}
    assert to_csv(bare) == to_csv(document)


def test_distributions_without_a_record_have_no_scores() -> None:
    assert Reading().scores() is None
    assert Reading([-1e9], [1.0], [True], [torch.zeros(1)]).scores().perplexity < float("inf")  # type: ignore[union-attr]


# ---- plans from text


def test_plans_are_written_as_plugin_sets_with_options_behind() -> None:
    registry = PluginRegistry.load()
    default = {"prefix_cache": {}}
    texts = ["core", "default", "+prompt_lookup prompt_lookup.num_draft_tokens=4", "prompt_lookup", "default", ""]
    plans = parse_plans(texts, default, registry, ["prompt_lookup.max_ngram=3"])
    assert list(plans) == ["core", "default", texts[2], "prompt_lookup", "default #2", "core #2"]
    settings = [plan.settings for plan in plans.values()]
    assert settings[0] == settings[5] == {} and settings[1] == settings[4] == default
    assert settings[2] == default | {"prompt_lookup": {"max_ngram": "3", "num_draft_tokens": "4"}}
    assert settings[3] == {"prompt_lookup": {"max_ngram": "3"}}
    with pytest.raises(BadOption, match="no plan holds lookahead"):
        parse_plans(["core"], default, registry, ["lookahead.window=3"])


# ---- the command


def run_compare(*args: str) -> Any:
    few = ("--model", "random:tiny", "--dtype", "float64", "--max-tokens", "6", "--repeats", "1")
    return CliRunner().invoke(main, ["compare", *few, *args])


def test_the_command_prints_a_table_or_json_and_writes_csv_and_history(tmp_path: Path) -> None:
    out = tmp_path / "laps.csv"
    result = run_compare("--csv", str(out), "--plan", "core", "--plan", "+prompt_lookup", "--plan", "int8", TEXT)
    assert result.exit_code == 0, result.output
    assert "+prompt_lookup" in result.stdout and "identical" in result.stdout and "KL" in result.stdout
    assert "too short" in result.stderr and len(out.read_text().splitlines()) == 4
    result = run_compare("--json", TEXT)
    report = json.loads(result.stdout)
    assert [plan["label"] for plan in report["plans"]] == ["core", "default"] and {"machine", "commit"} <= set(report)
    with Store() as store:
        latest, before = store.comparisons.list()
        assert latest.model == "random:tiny" and len(before.report["plans"]) == 3
        assert store.comparisons.list(model="another") == [] and "text" not in latest.report["plans"][0]
    listed = CliRunner().invoke(main, ["compare", "--history"])
    assert "random:tiny" in listed.stdout and "int8" in listed.stdout
    assert len(json.loads(CliRunner().invoke(main, ["compare", "--history", "--json", "--limit", "1"]).stdout)) == 1


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--plan", "nope", TEXT), "nope"),
        (("--plan", "+prompt_lookup,jacobi", TEXT), "mixes names"),
        (("-o", "lookahead.window=3", TEXT), "no plan holds lookahead"),
        ((" ",), "the prompt is empty"),
        (("--all", "--plan", "core", TEXT), "--all makes the plans itself"),
    ],
)
def test_wrong_calls_are_named_errors(args: tuple[str, ...], reason: str) -> None:
    result = run_compare(*args)
    assert result.exit_code == 2 and reason in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_one_command_compares_every_plugin() -> None:
    result = run_compare("--all", "--repeats", "1", "--max-tokens", "4", "--json", TEXT)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    labels = [plan["label"] for plan in report["plans"]]
    named = set(re.findall(r"(\w+) is not compared", result.stderr))
    assert labels[0] == "default" and {label[1:] for label in labels[1:]} | named >= set(
        PluginRegistry.load().togglable()
    )
