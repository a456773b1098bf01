"""Wrong calls of every command: one line that names the value, the right exit code, no traceback, nothing on standard output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from pitlane.ui.cli import main

BIG = "9" * 30
RUN = ("run", "-m", "random:tiny")
CHAT = ("chat", "-m", "random:tiny")
BENCH = ("bench", "-m", "random:tiny")
TRAIN = ("train", "words.txt", "--out", "new")

# Files of the working folder: words.txt, empty.txt, folder/, bytes.txt (no UTF-8), one.json (no list of prompts).
CALLS: list[tuple[Sequence[str], str | Sequence[str]]] = [
    # no such thing
    (("walk",), "No such command 'walk'"),
    (("rum",), ("'rum'", "run")),
    (("docs", "lst"), ("'lst'",)),
    (("docs", "cache", "pni"), ("'pni'",)),
    ((*RUN, "--modle", "x"), ("--modle", "--model")),
    ((*RUN, "-z", "x"), "-z"),
    ((*RUN, "one", "two"), "two"),
    ((*RUN, "--plugins", "turbo", "x"), ("'turbo'", "prompt_lookup")),
    ((*RUN, "--plugins", "-turbo", "x"), "'turbo'"),
    ((*RUN, "--plugins", "+", "x"), "''"),
    ((*RUN, "--plugins", "pdf_document", "x"), "pdf_document is always on"),
    ((*RUN, "--doc", "no-such.pdf", "x"), "no-such.pdf"),
    ((*RUN, "--doc", "folder", "x"), "folder"),
    ((*RUN, "--doc", "empty.txt", "x"), "empty.txt"),
    ((*RUN, "--doc", "n" * 5000, "x"), "nnnn"),
    ((*RUN, "--doc", "~nobody-here/a.txt", "x"), "~nobody-here/a.txt"),
    ((*RUN, "--plugins-dir", "nowhere", "x"), "nowhere"),
    ((*RUN, "--plugins-dir", "words.txt", "x"), "words.txt"),
    (("run", "-m", "./nowhere", "x"), "./nowhere"),
    (("run", "-m", "folder", "x"), "folder"),
    (("run", "-m", "words.txt", "x"), "words.txt"),
    (("run", "-m", "random:huge", "x"), "huge"),
    (("run", "-m", "", "x"), "no such folder"),
    (("run", "-m", "a/b/c", "x"), "a/b/c"),
    (("run", "-m", "nul\0", "x"), "nul"),
    ((*CHAT, "--load", "nothing"), "'nothing'"),
    ((*CHAT, "--load", "\udcff"), "conversation"),
    (("docs", "rm", "nothing"), "'nothing'"),
    (("docs", "rm", "\udcff"), "no document"),
    (("docs", "add", "no-such.pdf"), "no-such.pdf"),
    (("docs", "add", "folder"), "folder"),
    (("docs", "add", "empty.txt"), "empty.txt"),
    (("docs", "cache", "pin", "7"), "7"),
    (("docs", "cache", "unpin", "7"), "7"),
    (("plugins", "info", "turbo"), "'turbo'"),
    (("plugins", "list", "--plugins-dir", "nowhere"), "nowhere"),
    (("memory", "random:huge"), "huge"),
    (("memory", "./nowhere"), "./nowhere"),
    (("models", "pull", "not a name"), "not a name"),
    (("models", "pull", "nobody/nothing"), "nobody/nothing"),
    (("models", "rm", "-y", "nobody/nothing"), "nobody/nothing"),
    (("doctor", "everything"), "everything"),
    # values
    ((*RUN, "--max-tokens", "many", "x"), ("--max-tokens", "'many'")),
    ((*RUN, "--max-tokens", "-3", "x"), "-3"),
    ((*RUN, "--max-tokens", "0", "x"), "max_tokens"),
    ((*RUN, "--temperature", "nan", "x"), ("temperature", "nan")),
    ((*RUN, "--temperature", "-1", "x"), ("temperature", "-1")),
    ((*RUN, "--top-p", "7", "x"), ("top_p", "7")),
    ((*RUN, "--top-k", "-1", "x"), ("top_k", "-1")),
    ((*RUN, "--min-p", "2", "x"), ("min_p", "2")),
    ((*RUN, "--seed", BIG, "x"), ("seed", BIG)),
    ((*RUN, "--stop", "", "x"), "stop"),
    ((*RUN, "--samples", "0", "x"), "0"),
    ((*RUN, "--context", BIG, "x"), BIG),
    ((*RUN, "--context", "-4", "x"), "-4"),
    ((*RUN, "--kv-memory", "1", "x"), "--kv-memory 1 B"),
    ((*RUN, "--kv-memory", BIG + "TB", "x"), BIG),
    ((*RUN, "--kv-memory", "9" * 400, "x"), "bytes"),
    ((*RUN, "--threads", "0", "x"), ("--threads", "0")),
    ((*RUN, "--threads", BIG, "x"), "--threads"),
    ((*RUN, "--dtype", "int3", "x"), "int3"),
    ((*RUN, "--device", "cuda:99", "x"), "cuda"),
    ((*RUN, "--device", "toaster", "x"), "toaster"),
    ((*RUN, ""), "empty"),
    ((*RUN, "-o", "nonsense", "x"), "'nonsense'"),
    ((*RUN, "-o", "prefix_cache.disk=1", "x"), ("'disk'", "disk_gb")),
    ((*RUN, "-o", "prefix_cache.disk_gb=-1", "x"), "-1"),
    ((*RUN, "-o", "prefix_cache.disk_gb=much", "x"), "'much'"),
    ((*RUN, "--plugins", "prompt_lookup", "-o", "prompt_lookup.num_draft_tokens=1e99", "x"), "1e99"),
    (("docs", "cache", "pin", BIG), BIG),
    (("docs", "cache", "pin", "-1"), "-1"),
    (("docs", "cache", "prune", "--keep", "lots"), "'lots'"),
    (("compare", "-m", "random:tiny", "--plan", "nope", "Hi"), "nope"),
    (("compare", "-m", "random:tiny", "--repeats", "0", "Hi"), "--repeats"),
    (("compare", "-m", "random:tiny", "--plan", "core", "-o", "jacobi.x=3", "Hi"), "no plan holds jacobi"),
    (("compare", "--history", "--limit", "0"), "--limit"),
    (("bench", "history", "--limit", BIG), BIG),
    (("compare", "--repeats", "0", "a"), "0"),
    (("compare", "--plan", "nonsense", "-m", "random:tiny", "a"), "nonsense"),
    ((*BENCH, "--steps", "1"), ("--steps", "1")),
    ((*BENCH, "--prompt-tokens", BIG), "context"),
    ((*BENCH, "--vs", "nobody"), "'nobody'"),
    (("memory", "--context", BIG, "random:tiny"), "context"),
    (("memory", "--batch", "0", "random:tiny"), "--batch"),
    (("ui", "--port", "70000"), "70000"),
    (("eval", "random:tiny", "-M", "turbo"), "'turbo'"),
    (("quantize", "random:tiny", "--method", "magic", "--out", "o"), "'magic'"),
    # two that contradict each other
    ((*RUN, "--plugins", "prompt_lookup,jacobi", "x"), ("drafter", "prompt_lookup", "jacobi")),
    ((*RUN, "--plugins", "+prompt_lookup,-prompt_lookup", "x"), "prompt_lookup"),
    ((*RUN, "--plugins", "prefix_cache,+jacobi", "x"), "mixes"),
    ((*RUN, "--plugins", "", "-o", "prefix_cache.disk_gb=1", "x"), "prefix_cache"),
    ((*RUN, "--batch", "words.txt", "x"), ("--batch", "--out")),
    ((*RUN, "--out", "answers.jsonl", "x"), ("--batch", "--out")),
    # files
    ((*RUN, "--batch", "no-such.jsonl", "--out", "o.jsonl"), "no-such.jsonl"),
    ((*RUN, "--batch", "folder", "--out", "o.jsonl"), "folder"),
    ((*RUN, "--batch", "empty.txt", "--out", "o.jsonl"), "empty.txt"),
    ((*BENCH[:1], "plugins", *BENCH[1:], "--prompts", "no-such.txt"), "no-such.txt"),
    ((*BENCH[:1], "plugins", *BENCH[1:], "--prompts", "folder"), "folder"),
    ((*BENCH[:1], "plugins", *BENCH[1:], "--prompts", "empty.txt"), "empty.txt"),
    ((*BENCH[:1], "plugins", *BENCH[1:], "--prompts", "bytes.txt"), "bytes.txt"),
    ((*BENCH[:1], "plugins", *BENCH[1:], "--set", "turbo"), "'turbo'"),
    (("train", "no-such.txt", "--out", "new"), "no-such.txt"),
    (("train", "folder", "--out", "new"), "folder"),
    (("train", "empty.txt", "--out", "new"), "empty"),
    (("train", "bytes.txt", "--out", "new"), "bytes.txt"),
    (("train", "bad.jsonl", "--out", "new"), "bad.jsonl"),
    (("train", "words.txt"), "--out"),
    (("train", "words.txt", "--out", "words.txt"), "words.txt"),
    (("train", "words.txt", "--out", "/dev/full"), "/dev/full"),
    (("train", "words.txt", "--out", "new", "--resume"), "nothing to resume"),
    ((*TRAIN, "--steps", "0"), "--steps"),
    ((*TRAIN, "--lr", "-1"), "--lr"),
    ((*TRAIN, "--lr", "nan"), "--lr"),
    ((*TRAIN, "--device", "abacus"), "abacus"),
    ((*TRAIN, "--exit-layers", "a"), "'a'"),
    ((*TRAIN, "--vocab-size", "1"), "vocab"),
    ((*TRAIN, "--length", "1"), "length"),
    ((*TRAIN, "--start", "words.txt"), "words.txt"),
    (("distill", "nowhere", "layers:0", "words.txt", "--out", "new"), "nowhere"),
    (("distill", "folder", "layers:", "words.txt", "--out", "new"), "''"),
    (("distill", "folder"), "Missing"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files of every kind that a command cannot use."""
    work = tmp_path / "work"
    (work / "folder").mkdir(parents=True)
    (work / "words.txt").write_text("words and more words, of sea and harbour. " * 20)
    (work / "empty.txt").write_text("")
    (work / "bytes.txt").write_bytes(b"caf\xe9 \xff\xfe\n")
    (work / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize(
    ("args", "words"), CALLS, ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else ""
)
def test_a_wrong_call_is_one_line_that_names_the_value(
    folder: Path, args: Sequence[str], words: str | Sequence[str]
) -> None:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2, f"{result.output}{result.exception!r}"
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("pitlane: ") and len(line) < 1000 and line.isprintable()
    for word in [words] if isinstance(words, str) else words:
        assert word in line, line


def test_there_are_at_least_sixty_of_all_commands() -> None:
    from pitlane.ui.cli import COMMANDS

    assert len(CALLS) >= 60 and {args[0] for args, _ in CALLS} >= {*COMMANDS}
