"""`pitlane run --batch`: order, bad lines, failures alone, and no lost or doubled line after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pitlane.ui.cli import main

PITLANE = [sys.executable, "-c", "from pitlane.ui.cli import main; main(prog_name='pitlane')"]
TINY = ("--model", "random:tiny", "--dtype", "float64", "--max-tokens", "5", "--seed", "3", "--temperature", "1")


def write_prompts(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def run(prompts: Path, out: Path, *args: str) -> Result:
    return CliRunner().invoke(main, ["run", *TINY, "--batch", str(prompts), "--out", str(out), *args])


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def prompts_of(count: int) -> list[Any]:
    return [{"prompt": f"question {index} " * (1 + index % 7), "id": f"q{index}"} for index in range(count)]


def without_times(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in answer.items() if name != "stats"} for answer in answers]


def test_answers_are_those_of_run_in_order(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path / "in.jsonl", prompts_of(20)), tmp_path / "out.jsonl"
    result = run(prompts, out)
    assert result.exit_code == 0 and result.stdout == "", result.output
    assert "random:tiny on cpu: weights" in result.stderr and "20 answers in" in result.stderr
    answers = read(out)
    assert [(answer["line"], answer["id"]) for answer in answers] == [(i + 1, f"q{i}") for i in range(20)]
    alone = CliRunner().invoke(main, ["run", *TINY, "--json", prompts_of(20)[9]["prompt"]])
    assert json.loads(alone.stdout)["token_ids"] == answers[9]["token_ids"]


def test_bad_lines_are_named_and_spoil_nothing(tmp_path: Path) -> None:
    lines = [
        {"prompt": "good", "max_tokens": 2},
        "",
        "{not json",
        {"text": "no prompt"},
        {"prompt": "x", "temprature": 1},
        {"prompt": "x", "max_tokens": "many"},
        {"prompt": "x", "top_p": 7},
        {"prompt": "far too long " * 3000},
        '"just a text"',
        {"prompt": "two", "n": 2},
    ]
    prompts, out = write_prompts(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    result = run(prompts, out, "--json")
    assert result.exit_code == 1
    answers = {answer["line"]: answer for answer in read(out)}
    assert list(answers) == [1, 3, 4, 5, 6, 7, 8, 9, 10], "in order, blank lines left out"
    assert len(answers[1]["token_ids"]) == 2 and len(answers[9]["token_ids"]) == 5
    assert len(answers[10]["samples"]) == 2
    wanted = {
        3: "not a line of JSON",
        4: "no prompt",
        5: "'temprature' is unknown",
        6: "max_tokens must be an integer, got 'many'",
        7: "top_p must be in",
    }
    for number, words in {**wanted, 8: "the context holds"}.items():
        assert words in answers[number]["error"]
        assert f"line {number}: {answers[number]['error']}" in result.stderr
    summary = json.loads(result.stdout)
    assert [failed["line"] for failed in summary["failed"]] == [3, 4, 5, 6, 7, 8]
    assert (summary["prompts"], summary["found"], summary["completion_tokens"]) == (9, 0, 2 + 5 + 10)


BAD_LINES = [
    *("[1, 2]", "null", "5", "true", "{}", '{"prompt": ""}', '{"prompt": ["a"]}', "[" * 100_000, "{'prompt': 'a'}"),
    *('{"prompt": "a", "id": NaN}', '{"prompt": "a", "seed": ' + "9" * 5000 + "}", '{"prompt": "a", "temperature": 1e999}'),
    *({"prompt": "a", "n": 1.5}, {"prompt": "a", "seed": 1000.0}, {"prompt": "a", "stop_token_ids": None}),
    *({"prompt": "a", "top_k": True}, {"prompt": "a", "stop": {"a": 1}}, {"prompt": "a", "stop_token_ids": [10**9]}),
    *({"prompt": "a", "max_tokens": 10**30}, {"prompt": "a", "ignore_eos": "no"}, {"prompt": "a", "logprobs": [1]}),
]  # fmt: skip


def test_no_line_is_so_bad_that_the_others_are_not_answered(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path / "in.jsonl", [*BAD_LINES, {"prompt": "good"}]), tmp_path / "out.jsonl"
    prompts.write_bytes(b"\xff\xfe\n" + prompts.read_bytes())
    result = run(prompts, out)
    assert result.exit_code == 1 and f"1 answers in {out} · {1 + len(BAD_LINES)} failed" in result.stderr
    *bad, good = read(out)
    assert len(bad) == 1 + len(BAD_LINES) and all("error" in answer for answer in bad)
    assert len(good["token_ids"]) == 5


def test_what_failed_is_answered_again_in_its_place(tmp_path: Path) -> None:
    lines: list[Any] = [{"prompt": "a"}, {"prompt": "b", "max_tokens": 0}, "{broken", {"prompt": "d"}, {"prompt": "e"}]
    prompts, out = write_prompts(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(prompts, out).exit_code == 1
    whole = out.read_bytes().splitlines(keepends=True)
    again = run(prompts, out)
    assert again.exit_code == 1 and "line 2: max_tokens must be >= 1" in again.stderr, "they fail again"
    assert "3 answers in" in again.stderr and "3 of them were there before · 2 failed" in again.stderr
    assert out.read_bytes() == b"".join(whole)
    lines[1]["max_tokens"] = 3
    mended = run(write_prompts(prompts, lines), out)
    assert mended.exit_code == 1 and [answer["line"] for answer in read(out)] == [1, 2, 3, 4, 5]
    lines[2] = {"prompt": "c"}
    mended = run(write_prompts(prompts, lines), out)
    assert mended.exit_code == 0 and "4 of them were there before" in mended.stderr
    assert [len(answer["token_ids"]) for answer in read(out)] == [5, 3, 5, 5, 5]
    kept = out.read_bytes().splitlines(keepends=True)
    assert [kept[number] for number in (0, 3, 4)] == [whole[number] for number in (0, 3, 4)]
    assert list(tmp_path.glob("*.ordered")) == []


def test_a_kill_among_lines_that_are_answered_again_loses_none(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path / "in.jsonl", prompts_of(5)), tmp_path / "out.jsonl"
    run(prompts, out)
    whole = read(out)
    lines = out.read_bytes().splitlines(keepends=True)
    failed = json.dumps({"line": 2, "key": "another", "error": "no"}).encode() + b"\n"
    out.write_bytes(b"".join([lines[0], failed, *lines[2:4], lines[1], lines[4][:20]]))
    result = run(prompts, out)
    assert result.exit_code == 0 and "4 of them were there before" in result.stderr
    assert without_times(read(out)) == without_times(whole)


@pytest.mark.parametrize(
    "out", ["/dev/null", "/dev/full", "/dev/zero", "folder", "fifo", "missing/out.jsonl", "in.jsonl"]
)
def test_an_out_that_cannot_hold_answers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.setattr("pitlane.ui.session.EngineOptions.build", lambda self, documents: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    prompts = write_prompts(tmp_path / "in.jsonl", prompts_of(1))
    before = prompts.read_bytes()
    result = run(prompts, Path(out))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and out in result.stderr
    assert prompts.read_bytes() == before


def test_prompts_without_end_are_refused(tmp_path: Path) -> None:
    result = run(Path("/dev/zero"), tmp_path / "out.jsonl")
    assert result.exit_code == 2 and "/dev/zero is a device; write the prompts to a file" in result.stderr


def test_a_disk_without_room_is_one_line_and_a_rerun_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, out = write_prompts(tmp_path / "in.jsonl", prompts_of(3)), tmp_path / "out.jsonl"

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    write_prompts(prompts, [*prompts_of(2), {"prompt": "x", "n": 0}])
    run(prompts, out)
    lines = write_prompts(prompts, [{"prompt": "y"}, *prompts_of(2)[1:], {"prompt": "x"}])
    out.write_text('{"line": 1, "error": "no"}\n' + "".join(out.read_text().splitlines(keepends=True)[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        result = run(lines, out)
    assert (
        result.exit_code == 2 and "No space left on device; make room and run the same command again" in result.stderr
    )
    result = run(lines, out)
    assert result.exit_code == 0 and "3 of them were there before" in result.stderr
    assert [answer["line"] for answer in read(out)] == [1, 2, 3] and list(tmp_path.glob("*.ordered")) == []


def test_a_finished_file_is_left_as_it_is_and_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, out = write_prompts(tmp_path / "in.jsonl", prompts_of(3)), tmp_path / "out.jsonl"
    run(prompts, out)
    before = out.read_bytes()
    monkeypatch.setattr("pitlane.ui.session.EngineOptions.build", lambda self, documents: pytest.fail("loaded"))
    result = run(prompts, out)
    assert result.exit_code == 0 and "3 of them were there before" in result.stderr and out.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_what_a_kill_left_of_a_line_is_answered_again(tmp_path: Path, cut: int) -> None:
    prompts, out = write_prompts(tmp_path / "in.jsonl", prompts_of(6)), tmp_path / "out.jsonl"
    run(prompts, out)
    whole = read(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    result = run(prompts, out)
    assert result.exit_code == 0 and "3 of them were there before" in result.stderr
    assert without_times(read(out)) == without_times(whole)


@pytest.mark.parametrize("change", ["prompt", "order", "options", "fewer", "foreign"])
def test_answers_to_something_else_are_not_touched(tmp_path: Path, change: str) -> None:
    lines, args = prompts_of(4), []
    prompts, out = write_prompts(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    run(prompts, out)
    if change == "foreign":
        out.write_text("my notes\n")
    before = out.read_bytes()
    if change == "prompt":
        lines[2]["prompt"] += "?"
    elif change == "order":
        lines.reverse()
    elif change == "options":
        args = ["--top-k", "5"]
    elif change == "fewer":
        lines.pop()
    result = run(write_prompts(prompts, lines), out, *args)
    assert result.exit_code == 2 and out.read_bytes() == before
    assert "is not an answer to these prompts under these options" in result.stderr and "--out" in result.stderr


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    import fcntl

    prompts, out = write_prompts(tmp_path / "in.jsonl", prompts_of(2)), tmp_path / "out.jsonl"
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = run(prompts, out)
    assert result.exit_code == 2 and "is being written by another run" in result.stderr


@pytest.mark.parametrize("args", [("--batch", "in"), ("--out", "o"), ("--batch", "in", "--out", "o", "a prompt")])
def test_flags_that_do_not_go_together(tmp_path: Path, args: tuple[str, ...]) -> None:
    prompts = write_prompts(tmp_path / "in.jsonl", prompts_of(1))
    result = CliRunner().invoke(main, ["run", *[str(prompts) if arg == "in" else arg for arg in args]])
    assert result.exit_code == 2 and "go together" in result.stderr


def test_no_prompts_is_an_error(tmp_path: Path) -> None:
    result = run(write_prompts(tmp_path / "in.jsonl", ["", "  "]), tmp_path / "out.jsonl")
    assert result.exit_code == 2 and "holds no prompts" in result.stderr


def killed_runs(tmp_path: Path, num_prompts: int, num_kills: int, max_tokens: int) -> None:
    """Kill it again and again, at any moment of its work, until it ends by itself; the file is as without kills."""
    prompts = write_prompts(tmp_path / "in.jsonl", prompts_of(num_prompts))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    args = ["run", *TINY, "--max-tokens", str(max_tokens), "--threads", "1", "--batch", str(prompts), "--out"]
    generator, sizes, kills = random.Random(7), [0], 0
    while True:
        process = subprocess.Popen([*PITLANE, *args, str(out)], stderr=subprocess.DEVNULL)
        target = sizes[-1] + generator.randint(1, 30_000)
        while process.poll() is None and (kills >= num_kills or _size(out) < target):
            time.sleep(0.001)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        sizes.append(_size(out))
    assert kills >= min(num_kills, 1), "it was killed while it worked"
    assert CliRunner().invoke(main, [*args, str(whole)]).exit_code == 0
    assert without_times(read(out)) == without_times(read(whole))
    assert [answer["line"] for answer in read(out)] == list(range(1, num_prompts + 1))
    print(f"{kills} kills, {num_prompts} answers")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_kill_loses_and_doubles_no_line(tmp_path: Path) -> None:
    killed_runs(tmp_path, num_prompts=40, num_kills=1, max_tokens=10)


@pytest.mark.sizes("num_prompts, num_kills", sample=[(600, 10)], whole=[(1500, 25)])
def test_many_kills_lose_and_double_no_line(tmp_path: Path, num_prompts: int, num_kills: int) -> None:
    killed_runs(tmp_path, num_prompts, num_kills, max_tokens=40)
