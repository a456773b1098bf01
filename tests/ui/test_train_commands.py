"""`pitlane train` and `pitlane distill`: what they write and print, errors in one line, proofs on 200 kB."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pitlane.training.loop import Trainer
from pitlane.ui.cli import main

PITLANE = [sys.executable, "-c", "from pitlane.ui.cli import main; main(prog_name='pitlane')"]
SHAPE = (
    "--hidden-size", "32", "--head-dim", "16", "--kv-heads", "1", "--intermediate-size", "48", "--layers", "2",
    "--vocab-size", "280",
)  # fmt: skip
STEPS = ("--steps", "3", "--length", "32", "--rows", "4", "--threads", "1", "--device", "cpu")
RESULT = {
    "step", "steps", "loss", "lr", "tokens_per_second", "step_tokens", "eval_loss", "right", "focus_right", "model",
}  # fmt: skip
WRITTEN = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "training_state.safetensors", "loss_curve.json", "loss_curve.png",
}  # fmt: skip


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def loaded(*args: str) -> Any:
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def assert_one_line(args: Sequence[str], *words: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pitlane: "), result.stderr
    for word in words:
        assert word in lines[0]


def words(characters: int, seed: int = 0) -> str:
    """Sentences of made-up words, each of which follows another by rule more often than not."""
    rng = Random(seed)
    known = ["".join(rng.choices("bdklmnrst", k=2)) + rng.choice("aeiou") + rng.choice("nrst") for _ in range(200)]
    parts, total, at = [], 0, 0
    while total < characters:
        at = (at * 7 + 3) % 200 if rng.random() < 0.7 else rng.randrange(200)
        parts.append(known[at])
        total += len(known[at]) + 1
    return " ".join(parts)[:characters]


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(words(3000))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that was trained for three steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "words.txt").write_text(words(3000))
    assert invoke("train", str(folder / "words.txt"), "--out", str(folder / "model"), *SHAPE, *STEPS).exit_code == 0
    return str(folder / "model")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pitlane.ui.cli import main\n"
        "for command in ('train', 'distill'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} imported' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: ") == 2


@pytest.mark.slow  # seconds of imports
def test_training_draws_late() -> None:
    code = "import sys, pitlane.training.train, pitlane.training.distill; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- train


def test_train_writes_a_model_and_says_how_to_try_it(text_file: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("train", text_file, "--out", str(out), *SHAPE, *STEPS)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}: try it with  pitlane chat --model {out}\n"
    assert (
        "step 3/3: loss " in result.stderr and "tok/s, 0 s left" in result.stderr and "held-out loss" in result.stderr
    )
    assert {path.name for path in out.iterdir()} == WRITTEN
    curve = json.loads((out / "loss_curve.json").read_text())
    assert [point["step"] for point in curve] == [1, 2, 3] and "eval_loss" in curve[-1]
    answer = invoke("run", "--model", str(out), "--max-tokens", "2", "--plugins", "", "--json", "mato")
    assert answer.exit_code == 0, answer.stderr


def test_train_prints_json(text_file: str, tmp_path: Path) -> None:
    found = loaded("train", text_file, "--out", str(tmp_path / "out"), *SHAPE, *STEPS)
    assert set(found) == RESULT and found["model"] == str(tmp_path / "out")
    assert (found["step"], found["steps"], found["step_tokens"]) == (3, 3, 128)


def test_chats_are_tuned_on_a_model(model: str, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "when?"}, {"role": "assistant", "content": "in 1893", "focus": "1893"}]
    chats.write_text((json.dumps({"messages": messages}) + "\n") * 40)
    flags = ("--answers-only", "--focus-weight", "4", "--exit-layers", "1", "--eval", str(chats))
    found = loaded("train", str(chats), "--start", model, "--out", str(tmp_path / "out"), *STEPS, *flags)
    assert found["focus_right"] is not None
    ours, theirs = (json.loads((Path(folder) / "config.json").read_text()) for folder in (tmp_path / "out", model))
    assert ours == theirs | {"exit_layers": [1]}


def test_a_finished_run_is_not_begun_again(model: str, text_file: str) -> None:
    train = ("train", text_file, "--out", model, *SHAPE, *STEPS)
    before = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    assert_one_line(train, "holds a run; go on with --resume")
    assert_one_line((*train, "--resume"), "is over: all 3 steps are done")
    assert_one_line((*train, "--resume", "--lr", "1"), "other settings (lr)")
    assert {path.name: path.read_bytes() for path in Path(model).iterdir()} == before


def test_a_model_is_not_overwritten(model: str, text_file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert_one_line(("train", text_file, "--out", str(tmp_path), *SHAPE, *STEPS), "holds a model; choose another --out")
    assert_one_line(("distill", model, "layers:0", text_file, "--out", str(tmp_path), *STEPS), "holds a model")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("", (), "corpus is empty"),
        ("a few words", (), "the corpus makes 1 row of 32 tokens"),
        (None, (), "no file"),
        ("words " * 100, ("--resume",), "nothing to resume"),
        ("words " * 100, ("--start", "nowhere"), "no config.json in nowhere"),
        ("words " * 100, ("--tokenizer", "nowhere"), "no tokenizer.json in nowhere"),
        ("words " * 100, ("--hidden-size", "40"), "choose a multiple of 16"),
        ("words " * 100, ("--exit-layers", "2"), "exits after layers [2] of a model of 2 layers; name some of 1 to 1"),
        ("words " * 100, ("--exit-layers", "one"), "'one' is not a list of layer numbers"),
        ("words " * 100, ("--device", "abacus"), "abacus"),
        ("words " * 100, ("--lr", "0"), "--lr"),
    ],
    ids=lambda value: "" if isinstance(value, str) and value.startswith("words") else None,
)
def test_errors_of_train_are_one_line(content: str | None, flags: Sequence[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_text(content)
    assert_one_line(("train", str(path), "--out", str(tmp_path / "out"), *SHAPE, *STEPS, *flags), message)


def test_an_output_that_is_no_folder(text_file: str) -> None:
    assert_one_line(("train", text_file, "--out", text_file + "/out", *SHAPE, *STEPS), "cannot make the folder")


@pytest.mark.parametrize("first_step", [0, 1], ids=["before the first step", "between two steps"])
def test_a_run_that_ctrl_c_ended_before_its_first_save_is_resumed(
    text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_step: int
) -> None:
    def interrupted(trainer: Trainer, rate: float) -> float:
        if trainer.step == first_step:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, rate)

    train = ("train", text_file, *SHAPE, *STEPS)
    whole = loaded(*train, "--out", str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        step = Trainer._train_step
        patch.setattr(Trainer, "_train_step", interrupted)
        stopped = invoke(*train, "--out", str(tmp_path / "out"))
    assert stopped.exit_code == 130 and "Traceback" not in stopped.stderr
    assert ("stopped after step 2 of 3, which is saved; go on with --resume" in stopped.stderr) == bool(first_step)
    assert (tmp_path / "out" / "training_state.safetensors").is_file() == bool(first_step)
    resumed = invoke(*train, "--out", str(tmp_path / "out"), "--resume", "--json")
    assert ("begins again at its first step" in resumed.stderr) == (not first_step)
    assert json.loads(resumed.stdout)["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    assert len(json.loads((tmp_path / "out" / "loss_curve.json").read_text())) == 3


# ---- train --lora


def test_an_adapter_is_trained_served_and_resumed(model: str, text_file: str, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    train = ("train", model, text_file, "--lora", "--rank", "2", "--targets", "q,down", "--out", str(out), *STEPS)
    result = invoke(*train)
    assert result.exit_code == 0, result.stderr
    serve = ("--model", model, "--plugins", "+lora", "-o", f"lora.adapter={out}")
    assert result.stdout == f"{out}: try it with  pitlane chat {' '.join(serve)}\n"
    assert "peak memory " in result.stderr and " GiB" in result.stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (model, 2, 32)
    assert config["target_modules"] == ["q_proj", "down_proj"]
    answer = loaded("run", *serve, "--max-tokens", "2", "mato")
    assert "lora" in answer["stats"]["plugins"] and answer["stats"]["failed"] == {}
    assert_one_line((*train, "--resume"), "is over: all 3 steps are done")
    assert_one_line((*train, "--alpha", "3", "--resume"), "other settings (lora_alpha)")
    assert_one_line(
        ("run", *serve, "--model", "random:tiny", "x"), "lora cannot serve this model", "down_proj", "[32, 48]"
    )


def test_less_memory_is_one_flag(model: str, text_file: str, tmp_path: Path) -> None:
    plain, less = (
        loaded("train", text_file, "--out", str(tmp_path / f"out{number}"), *SHAPE, *STEPS, *flags)
        for number, flags in enumerate([(), ("--recompute",)])
    )
    assert less["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-3)
    name = str(tmp_path / "by-name")
    adapter = ("train", text_file, "--start", model, "--lora", "--recompute", "--out", name, *STEPS)
    assert set(loaded(*adapter)) == RESULT


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("MODEL",), "pitlane train MODEL FILES --lora"),
        (("random:tiny", "TEXT"), "random:tiny has random weights and no folder"),
        (("/nowhere/model", "TEXT"), "no such folder"),
        (("MODEL", "TEXT", "--targets", "q,x"), "no linear 'x'"),
        (("MODEL", "TEXT", "--alpha", "0"), "--alpha"),
        (("MODEL", "TEXT", "--exit-layers", "1"), "leave one of them out"),
        (("MODEL", "nowhere.txt"), "no file nowhere.txt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_adapters_are_one_line(
    model: str, text_file: str, tmp_path: Path, args: Sequence[str], message: str
) -> None:
    names = {"MODEL": model, "TEXT": text_file}
    given = [names.get(name, name) for name in args]
    assert_one_line(("train", *given, "--lora", "--out", str(tmp_path / "out"), *STEPS), message)


# ---- distill


@pytest.mark.parametrize("method", ["kd", "sequence", "on-policy"])
def test_distill_into_one_layer(model: str, text_file: str, tmp_path: Path, method: str) -> None:
    out = str(tmp_path / "out")
    more = ("--method", method, "--sampled-tokens", "4", "--steps", "2")
    found = loaded("distill", model, "layers:0", text_file, "--out", out, *STEPS, *more)
    assert found["step"] == 2 and set(found) == RESULT
    assert json.loads((Path(out) / "config.json").read_text())["num_hidden_layers"] == 1
    assert {path.name for path in Path(out).iterdir()} - {"teacher_answers.jsonl"} == WRITTEN


def test_distill_into_a_model(model: str, text_file: str, tmp_path: Path) -> None:
    assert loaded("distill", model, model, text_file, "--out", str(tmp_path / "out"), *STEPS)["step"] == 3


def test_errors_of_distill_are_one_line(model: str, text_file: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    result = invoke("train", text_file, "--out", str(other), *SHAPE, "--vocab-size", "270", *STEPS)
    assert result.exit_code == 0, result.stderr
    rest = (text_file, "--out", str(tmp_path / "out"), *STEPS)
    assert_one_line(("distill", model, str(other), *rest), "different tokenizers", "280 tokens", "270 tokens")
    assert_one_line(("distill", "./nowhere", "layers:0", *rest), "no such folder: ./nowhere")
    assert_one_line(("distill", model, "nowhere", *rest), "no tokenizer.json in nowhere")
    assert_one_line(("distill", model, "layers:0,7", *rest), "layers [0, 7] of a model that has layers 0 to 1")
    assert_one_line(("distill", model, "layers:", *rest), "is not a list of layer numbers")
    assert not (tmp_path / "out").exists()


# ---- proofs


def pitlane(*args: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PITLANE, *args, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finished(process: subprocess.Popen[str]) -> Any:
    out, error = process.communicate()
    assert process.returncode == 0, error
    return json.loads(out)


@pytest.fixture
def long_text(tmp_path: Path) -> str:
    path = tmp_path / "long.txt"
    path.write_text(words(200_000))
    return str(path)


@pytest.mark.slow
def test_both_commands_finish_on_200_kilobytes_in_three_minutes(long_text: str, tmp_path: Path) -> None:
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    start = time.monotonic()
    first = finished(pitlane("train", long_text, "--out", teacher, "--threads", "2", "--device", "cpu"))
    after_train = time.monotonic()
    finished(pitlane("distill", teacher, "layers:0", long_text, "--out", student, "--threads", "2", "--device", "cpu"))
    after_distill = time.monotonic()
    assert after_train - start < 180 and after_distill - after_train < 180
    losses = [point["loss"] for point in json.loads((Path(teacher) / "loss_curve.json").read_text())]
    assert first["eval_loss"] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "distill"])
def test_kill_9_and_resume_give_the_same_final_loss(command: str, long_text: str, tmp_path: Path) -> None:
    flags = [*STEPS, "--steps", "80", "--save-every", "10", "--eval-every", "40"]
    before: list[str] = [*SHAPE]
    if command == "distill":
        finished(pitlane("train", long_text, "--out", str(tmp_path / "teacher"), *SHAPE, *flags))
        flags, before = (
            [*flags, "--method", "on-policy", "--sampled-tokens", "4"],
            [str(tmp_path / "teacher"), "layers:0"],
        )
    given = [command, *before, long_text, *flags]
    whole = finished(pitlane(*given, "--out", str(tmp_path / "whole")))
    out = tmp_path / "killed"
    process = pitlane(*given, "--out", str(out))
    while not (out / "training_state.safetensors").is_file():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = finished(pitlane(*given, "--out", str(out), "--resume"))
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-3)
    curves = [json.loads((folder / "loss_curve.json").read_text()) for folder in (tmp_path / "whole", out)]
    assert len(curves[0]) == len(curves[1]) == 80
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
