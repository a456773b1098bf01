"""`pitlane eval`: its numbers are those of the logits, methods add to the default set, bad input is refused."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pitlane import BadOption
from pitlane.ui.bench.quality import measure, method_settings, plot, read_questions
from pitlane.ui.cli import main
from tests.engine.models.harness import Harness, load


def nothing(done: int, total: int) -> None:
    pass


def test_the_measures_are_those_of_the_logits(make_engine: Any) -> None:
    """Against forwards without the engine: two windows, and a method that moves a lot."""
    engine = make_engine("random:tiny", dtype="float32", plugins={})
    ids = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(2)).tolist()
    first, rough = measure(engine, ids, ["few_bits:bits=2,group_size=0"], 50, nothing)
    from pitlane.plugins.few_bits import FewBits

    plugin = FewBits(FewBits.parse_options({"bits": 2, "group_size": 0}))
    tables = []
    for transform in (None, plugin):
        model = load("random:tiny") if transform is None else _transformed(plugin)
        rows = [Harness(model, 1, 96).run({0: part})[:-1].log_softmax(-1) for part in (ids[:50], ids[50:])]
        tables.append(torch.cat(rows).double())
    targets = torch.tensor([*ids[1:50], *ids[51:]])[:, None]
    exact, rounded = tables
    assert first.num_tokens == 78 and first.kl == first.moved == 0 and first.top1 == 1
    assert first.perplexity == pytest.approx(exp(-float(exact.gather(1, targets).mean())), rel=1e-4)
    assert rough.perplexity == pytest.approx(exp(-float(rounded.gather(1, targets).mean())), rel=1e-4)
    assert rough.kl == pytest.approx(float((exact.exp() * (exact - rounded)).sum(1).mean()), rel=1e-3)
    assert rough.kl > 0.01
    assert rough.moved == pytest.approx(float((exact.exp() - rounded.exp()).abs().sum(1).mean() / 2), rel=1e-3)
    assert rough.top1 == pytest.approx(float((exact.argmax(1) == rounded.argmax(1)).double().mean()), abs=0.02)
    assert rough.weight_bytes == first.weight_bytes and rough.tokens_per_second


def _transformed(plugin: Any) -> Any:
    from pitlane import BuildContext, parts_of
    from pitlane.engine.models.builder import Builder
    from pitlane.engine.models.decoder import Decoder
    from pitlane.engine.models.registry import resolve
    from pitlane.engine.models.weight_plan import WeightPlan
    from tests.engine.models.harness import CPU

    source = resolve("random:tiny")
    context = BuildContext(source.config, torch.float32, CPU)
    plan = WeightPlan.of(parts_of(source.config), context, None, True)

    def transform(part: Any, tensors: Any) -> Any:
        return plugin.transform_weights(part, tensors) or tensors

    with torch.inference_mode():
        return Decoder(source.config, Builder(plan, source.weights, torch.float32, CPU, transform))


def test_methods_add_to_the_default_set(make_engine: Any) -> None:
    engine = make_engine("random:tiny", dtype="float32", plugins={"prompt_lookup": {}, "int8": {}})
    settings = method_settings(engine, "int4:group_size=64, symmetric=true + awq:bits=3")
    assert settings.pop("prompt_lookup") == engine.default_plan.settings["prompt_lookup"]
    assert settings == {"int4": {"group_size": "64", "symmetric": "true"}, "awq": {"bits": "3"}}
    settings["prompt_lookup"] = {}
    plan = engine.plan(settings)
    assert plan.settings["int4"]["group_size"] == 64 and plan.settings["int4"]["symmetric"] is True
    for method, words in (("+awq", "is not of the form"), ("int4:64", "not of the form plugin.key=value")):
        with pytest.raises(BadOption, match=words):
            method_settings(engine, method)


def test_methods_that_measure_the_same_plan(make_engine: Any) -> None:
    """A drafter is left out of the measured plan, a spelling changes no option, and `int8` is in the default set here."""
    engine = make_engine("random:tiny", dtype="float32", plugins={"int8": {}, "prefix_cache": {}})
    first, *others = measure(engine, list(range(80)), ["prompt_lookup", "int8", " int8"], 50, nothing)
    assert [other.method for other in others] == ["prompt_lookup", "int8", " int8"]
    for other in others:
        assert other.num_tokens == first.num_tokens == 78 and other.top1 == 1 and other.kl == other.moved == 0
        assert other.perplexity == first.perplexity


def test_the_command_prints_a_table_a_document_and_a_plot(tmp_path: Path) -> None:
    text, picture = tmp_path / "text.txt", tmp_path / "plot.png"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    arguments = ["eval", "random:tiny", "--text", str(text), "--tokens", "100", "--window", "64", "--dtype", "float32"]
    done = CliRunner().invoke(main, [*arguments, "-M", "int8", "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert "same top token" in done.output
    report = json.loads(done.output.strip().splitlines()[-1])
    assert [method["method"] for method in report["methods"]] == ["none", "int8"]
    assert report["tokens"] == 100 and report["methods"][1]["num_tokens"] == 98
    assert report["methods"][1]["weight_bytes"] < report["methods"][0]["weight_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(main, [*arguments, "-M", "", "--json"])
    assert [method["method"] for method in json.loads(again.output)["methods"]] == ["none"]


def test_questions_about_documents_are_asked(make_engine: Any, tmp_path: Path) -> None:
    """The bundled model answers questions about its sample PDF; a wrong answer is not right."""
    file = tmp_path / "questions.json"
    lines = [
        {"question": "When does the workshop open?", "answer": "9:40"},
        {"question": "When is the track open?", "answer": "nowhere", "accept": ["10:00 to 21:30"]},
        {"question": "Where is the club?", "answer": "on the moon"},
    ]
    file.write_text(json.dumps(lines))
    questions = read_questions(file)
    assert questions[0].is_answered("The workshop  opens at 9:40 [p. 1].") and not questions[2].is_answered(
        "27 Quarry Lane"
    )
    engine = make_engine("bundled", dtype="bfloat16", plugins=None)
    (result,) = measure(engine, list(range(20)), [], 32, nothing, questions)
    assert result.questions_right == 2
    for text in ("{", "[]", '[{"question": "Who?"}]', '[{"question": 1, "answer": "x"}]', "[1]"):
        file.write_text(text)
        with pytest.raises(BadOption, match="questions.json holds no questions .* it must be a JSON list"):
            read_questions(file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-M", "int5"], "unknown plugin 'int5'"),
        (["-M", "awq"], "awq requires int4"),
        (
            ["-M", "prompt_lookup"],
            "'prompt_lookup' is no method of quantization: prompt_lookup only drafts tokens; methods: awq, ",
        ),
        (
            ["-M", "int8+jacobi"],
            "'int8+jacobi' is no method of quantization: jacobi only drafts tokens; methods: awq, ",
        ),
        (
            ["-M", "prefix_cache"],
            "no plugin in it rounds weights or KV; methods: awq, few_bits, fp8, gptq, int4, int8, kv_quant",
        ),
        (["--plot", "/missing/plot.png"], "no such folder: /missing"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 20)
    done = CliRunner().invoke(main, ["eval", "random:tiny", "--text", str(text), *arguments])
    assert done.exit_code == 2 and words in done.output and len(done.output.strip().splitlines()) == 1
    text.write_text("few")
    short = CliRunner().invoke(main, ["eval", "random:tiny", "--text", str(text)])
    assert short.exit_code == 2 and "the text has" in short.output


def test_a_plot_needs_no_speed(make_engine: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    engine = make_engine("random:tiny", dtype="float32", plugins={})
    results = measure(engine, list(range(40)), [], 32, nothing)
    plot([replace(results[0], tokens_per_second=None)], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").is_file()
