"""The bench: a table or one JSON document, blocks in turn, ratios with an interval, sets compared by their ids."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pitlane.engine.models.registry import resolve
from pitlane.storage.errors import PitlaneError
from pitlane.ui.bench.child import children
from pitlane.ui.bench.machine import commit, machine, versions
from pitlane.ui.bench.speed import Blocks, EngineSide, measure_in_turn
from pitlane.ui.bench.summary import ratio, summary
from pitlane.ui.cli import main
from pitlane.ui.render import milliseconds, size, stats_line
from pitlane.ui.session import EngineOptions


def printed(*args: str) -> str:
    result = CliRunner().invoke(main, ["bench", *args])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def measured(*args: str) -> Any:
    return json.loads(printed(*args, "--json"))


def test_speed_beside_transformers() -> None:
    report = measured(
        "--model", "random:tiny", "--dtype", "float32", "--prompt-tokens", "48", "--steps", "6", "--repeats", "2",
        "--vs", "transformers",
    )  # fmt: skip
    assert {"machine", "versions", "commit", "model", "dtype", "pitlane", "transformers", "ratio"} <= set(report)
    assert report["plugins"] == {} and report["machine"]["threads"] >= 1
    for side in ("pitlane", "transformers"):
        assert report[side]["prefill_tokens_per_second"]["n"] == 2 and report[side]["decode_ms"]["median"] > 0
    assert 0 < report["pitlane"]["outside_forward"]["median"] < 1
    assert report["ratio"]["decode"]["low"] <= report["ratio"]["decode"]["ratio"] <= report["ratio"]["decode"]["high"]


def test_people_get_a_table_and_no_json(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one two one two\n")
    few = ("--model", "random:tiny", "--repeats", "1")
    speed = printed(*few, "--prompt-tokens", "8", "--steps", "2", "--vs", "transformers")
    sets = printed("plugins", *few, "--prompts", str(tmp_path / "prompts.txt"), "--set", "", "--max-tokens", "2")
    assert "prefill tok/s" in speed and "times as fast" in speed and "tokens/step" in sets
    assert "{" not in speed + sets


def test_plans_give_the_same_ids_in_float64(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two one two one two\n\nsay it again, say it again\n")
    report = measured(
        "plugins", "--model", "random:tiny", "--dtype", "float64", "--prompts", str(prompts), "--set", "", "--set",
        "prompt_lookup", "--set", "prefix_cache", "--max-tokens", "24", "--repeats", "2",
    )  # fmt: skip
    plain, lookup, cached = report["sets"]
    assert [row["plugins"] for row in report["sets"]] == ["", "prompt_lookup", "prefix_cache"]
    assert plain["tokens_per_step"] == cached["tokens_per_step"] == 1 and lookup["tokens_per_step"] >= 1
    assert lookup["identical"] and cached["identical"]
    assert plain["speed"]["ratio"] == 1


@pytest.mark.usefixtures("always_draft")
def test_no_repeat_drafts_from_what_another_answered(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{word} first, then the rest of it" for word in ("apples", "pears")))
    common = ["plugins", "--model", "random:tiny", "--dtype", "float64", "--prompts", str(prompts), "--max-tokens", "8"]
    once, thrice = (
        measured(*common, "--set", "prompt_lookup", "--set", "prefix_cache,prompt_lookup", "--repeats", str(repeats))
        for repeats in (1, 3)
    )
    for one, three in zip(once["sets"], thrice["sets"], strict=True):
        assert three["accepted_tokens"] == 3 * one["accepted_tokens"], (
            "a second answer to a prompt was copied from the first"
        )
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.safetensors"))


def test_without_sets_each_plugin_is_switched_and_what_cannot_serve_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one two one two\n")
    result = CliRunner().invoke(
        main, ["bench", "plugins", "--model", "random:tiny", "--dtype", "float64", "--prompts",
               str(tmp_path / "prompts.txt"), "--max-tokens", "4", "--repeats", "1", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    labels = [row["plugins"] for row in json.loads(result.stdout)["sets"]]
    assert labels[0] == "default" and {"-prefix_cache", "+prompt_lookup", "+jacobi"} <= set(labels)
    assert "+packed_linear" not in labels and "left out +packed_linear: " in result.stderr


def test_a_prompt_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    result = CliRunner().invoke(
        main, ["bench", "plugins", "--model", "random:tiny", "--prompts", str(tmp_path / "empty.txt")]
    )
    assert result.exit_code == 2 and "holds no prompt" in result.stderr


def test_sides_take_turns() -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name, self.blocks = name, Blocks()

        def measure(self, token_ids: list[int], num_steps: int) -> Blocks:
            order.append(f"{self.name}{num_steps}")
            assert len(token_ids) == 5 and max(token_ids) < 9
            return Blocks([1.0], [2.0])

    sides = [Fake("a"), Fake("b")]
    measure_in_turn(list(sides), 9, 5, 7, 2, lambda done, total: None)
    assert order == ["a4", "b4", "a7", "b7", "a7", "b7"]
    assert all(side.blocks.decode_ms == [2.0, 2.0] for side in sides)


def test_each_side_runs_in_a_process_of_its_own() -> None:
    options = EngineOptions("random:tiny", plugins="", dtype="float32", threads=2, context=64)
    with children(options, "transformers") as sides:
        ids = {side.process.pid for side in sides.values()}
        assert list(sides) == ["pitlane", "transformers"] and len(ids) == 2 and os.getpid() not in ids
        assert sides["pitlane"].facts["peer"]["threads"] == 2
        for side in sides.values():
            blocks = side.measure(list(range(9)), 3)
            assert len(blocks.decode_ms) == len(blocks.prefill_tokens_per_second) == 1 and blocks.decode_ms[0] > 0
    assert [side.process.returncode for side in sides.values()] == [0, 0], "a child ends with its last request"


def test_a_side_that_ends_early_is_an_error_with_its_status() -> None:
    with children(EngineOptions("random:tiny", plugins="", context=64), None) as sides:
        sides["pitlane"].process.kill()
        with pytest.raises(PitlaneError, match=r"the process that measures pitlane ended with status -9"):
            sides["pitlane"].measure([1, 2, 3], 2)


def test_a_side_that_cannot_be_built_says_why() -> None:
    with (
        pytest.raises(PitlaneError, match="unknown plugin 'nonsense'"),
        children(EngineOptions(plugins="nonsense"), None),
    ):
        pass


def test_time_outside_the_forward_covers_decode_steps_only(make_engine: Callable[..., Any]) -> None:
    engine = make_engine()
    before = engine.loop.step_seconds
    blocks = EngineSide(engine).measure(list(range(40)), 12)
    assert len(blocks.outside_forward) == 1 and 0 < blocks.outside_forward[0] < 1
    assert engine.loop.step_seconds > before


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm3-3b", "mistral-7b", "gemma3-270m"]
)
def test_the_peer_of_a_preset_has_its_shape(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from pitlane.models import estimate_memory
    from pitlane.ui.bench.peer_config import peer_config

    source = resolve(f"random:{name}")
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(peer_config(source))
    assert sum(tensor.numel() for tensor in peer.parameters()) == estimate_memory(f"random:{name}").parameters
    windows = tuple(layer.self_attn.sliding_window for layer in peer.model.layers) if "gemma" in name else None
    assert windows is None or windows == source.config.windows


def test_ratio_is_of_medians_and_its_interval_holds_it() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}
    found = ratio([2.0, 2.2, 1.8, 2.0], [1.0, 1.0, 1.0, 1.0])
    assert found["ratio"] == pytest.approx(2.0) and 1.8 <= found["low"] <= 2.0 <= found["high"] <= 2.2
    assert ratio([5.0], [5.0]) == {"ratio": 1.0, "low": 1.0, "high": 1.0, "pairs": 1}


def test_machine_versions_and_commit() -> None:
    assert machine()["cores"] >= 1 and "torch" in versions()
    found = commit()
    assert found is None or len(found.rstrip("+")) == 12


def test_numbers_for_people() -> None:
    assert [size(value) for value in (12, 1_500, 2e9)] == ["12 B", "1.5 kB", "2.0 GB"]
    assert [milliseconds(value) for value in (0.42, 41.2, 3200, None)] == ["0.42 ms", "41 ms", "3.2 s", "-"]
    stats = {
        "prompt_tokens": 512, "cached_tokens": 480, "ttft_ms": 41.0, "tokens_per_second": 53.2, "accepted_tokens": 37,
        "draft_tokens": 52, "bought_ms": {"prompt_lookup": {"ms": 410.0}}, "paused": {}, "failed": {"x": "broke"},
    }  # fmt: skip
    expected = "512 prompt (480 cached) · TTFT 41 ms · 53.2 tok/s · prompt_lookup 37/52 accepted, saved 410 ms · x failed: broke"
    assert stats_line(stats, "prompt_lookup") == expected
    losing = stats | {"plugin_ms": {"prompt_lookup": 436.0}, "notes": {"prompt_lookup": {"replayed_tokens": 19}}}
    assert "37/52 accepted, 19 of them replayed from earlier answers, lost 26 ms" in stats_line(losing, "prompt_lookup")


def test_history_has_the_lap_times_of_answers() -> None:
    asked = CliRunner().invoke(main, ["run", "--model", "random:tiny", "--max-tokens", "4", "--json", "hello"])
    stats = json.loads(asked.stdout)["stats"]
    (run,) = json.loads(CliRunner().invoke(main, ["bench", "history", "--json"]).stdout)
    assert {name: run[name] for name in stats} == stats
    table = CliRunner().invoke(main, ["bench", "history"])
    assert "random:tiny" in table.stdout and "prefix_cache" in table.stdout


def test_plans_are_compared_over_a_document(tmp_path: Path) -> None:
    (tmp_path / "guide.txt").write_text("The track opens at nine. " * 6)
    (tmp_path / "prompts.txt").write_text(
        "When?\nFrom when?\nAt what time?\n"
    )  # the first of each repeat reads the document
    report = measured(
        "plugins", "--model", "random:tiny", "--dtype", "float64", "--prompts", str(tmp_path / "prompts.txt"), "--doc",
        str(tmp_path / "guide.txt"), "--set", "", "--set", "prefix_cache", "--max-tokens", "8", "--repeats", "2",
    )  # fmt: skip
    plain, cached = report["sets"]
    assert cached["identical"] and cached["ttft_ms"]["median"] < plain["ttft_ms"]["median"]
