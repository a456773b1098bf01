"""The command line: what it prints where, exit codes, one line for every error, where values come from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pitlane.ui.cli import COMMANDS, main

TINY = ("--model", "random:tiny")
PITLANE = [sys.executable, "-c", "from pitlane.ui.cli import main; main(prog_name='pitlane')"]
STATS = {
    "model", "device", "dtype", "plugins", "seed", "prompt_tokens", "cached_tokens", "completion_tokens", "queue_ms",
    "prefill_ms", "ttft_ms", "decode_ms", "tpot_ms", "tokens_per_second", "steps", "draft_tokens", "accepted_tokens",
    "plugin_ms", "bought_ms", "paused", "failed", "kv_bytes", "weight_bytes",
}  # fmt: skip
LOOSE = str(Path(__file__).parent / "test_cli_plugins")  # parrot, endless, clumsy
ENDLESS = ("--plugins-dir", LOOSE, "--plugins", "endless", "--max-tokens", "3500")


def invoke(*args: str, input: str | None = None, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, args, input=input, env=env)


def answer(*args: str, **options: str) -> dict[str, object]:
    """The JSON document of `run`."""
    result = invoke("run", *TINY, "--json", *args)
    assert result.exit_code == 0, result.stderr
    document: dict[str, object] = json.loads(result.stdout)
    return document


def assert_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pitlane: "), result.stderr
    for word in words:
        assert word in lines[0]


# ---- help


def test_help_imports_nothing_heavy() -> None:
    commands = [(), ("run",), ("plugins", "list"), ("docs", "cache"), ("bench",)]
    code = (
        "import sys; from pitlane.ui.cli import main\n"
        f"for command in {commands!r}:\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'transformers', 'gradio', 'sqlite_utils', 'numpy', 'rich'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{command}: {heavy} imported')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: ") == len(commands)


def test_help_takes_less_than_half_a_second() -> None:
    """Seconds of computing: other processes of the machine do not count, and help waits for nothing."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([*PITLANE, "--help"], check=True, capture_output=True)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: main {name}" in result.stdout or f"Usage: pitlane {name}" in result.stdout


def test_without_a_command_help_is_shown() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.output


@pytest.mark.slow  # `.ci/run` runs the command itself
def test_commands_page_is_current() -> None:
    script = Path(__file__).resolve().parents[2] / "docs" / "generate.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"run python docs/generate.py ({result.stdout}{result.stderr})"


# ---- run


def test_run_prints_text_to_stdout_and_stats_to_stderr() -> None:
    result = invoke("run", *TINY, "--max-tokens", "8", "--dtype", "float32", "hello")
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert " prompt" in result.stderr and "TTFT" in result.stderr and "tok/s" in result.stderr
    assert "TTFT" not in result.stdout


def test_run_json_is_one_document_as_designed() -> None:
    document = answer("--max-tokens", "8", "hello")
    assert set(document) == {"text", "token_ids", "finish_reason", "stats"}
    stats = document["stats"]
    assert isinstance(stats, dict) and set(stats) >= STATS
    assert stats["completion_tokens"] == len(document["token_ids"])  # type: ignore[arg-type]


def test_run_is_a_function_of_the_seed() -> None:
    sampled = ("--temperature", "0.8", "--max-tokens", "16", "hello", "--seed")
    first, again, other = (answer(*sampled, seed)["token_ids"] for seed in ("7", "7", "8"))
    assert first == again != other


@pytest.mark.parametrize("args", [(), ("-",)], ids=["piped", "dash"])
def test_run_reads_the_prompt_from_stdin(args: Sequence[str]) -> None:
    result = invoke("run", *TINY, "--json", "--max-tokens", "4", "--seed", "7", *args, input="hello\n")
    assert json.loads(result.stdout)["token_ids"] == answer("--max-tokens", "4", "--seed", "7", "hello")["token_ids"]


def test_run_stops_at_a_text() -> None:
    asked = ("--max-tokens", "24", "--temperature", "0", "hello")
    text = str(answer(*asked)["text"])
    stop = next(char for char in text[1:] if char.isascii() and char.isprintable() and char != " ")
    cut = answer("--stop", stop, *asked)
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == text[: text.index(stop)].rstrip("\ufffd")  # no half character ends an answer


def test_plugins_off_and_options() -> None:
    assert answer("--plugins", "", "--max-tokens", "2", "x")["stats"]["plugins"] == {}  # type: ignore[index]
    document = answer(
        "--plugins", "+prompt_lookup,-prefix_cache", "-o", "prompt_lookup.num_draft_tokens=3", "abcabcabc"
    )
    plugins = document["stats"]["plugins"]  # type: ignore[index]
    kernels = {"packed_linear", "flash_attention", "fused_ops", "compiled_step"}
    assert set(plugins) - kernels == {"prompt_lookup"} and plugins["prompt_lookup"]["num_draft_tokens"] == 3


@pytest.mark.parametrize(
    "args", [("--temperature", "0.0"), ("--temperature", "0.8", "--seed", "3")], ids=["greedy", "seed"]
)
def test_a_drafter_changes_no_token(args: Sequence[str]) -> None:
    asked = ("--dtype", "float64", "--max-tokens", "64", *args, "one two one two one two one")
    plain, drafted = answer("--plugins", "", *asked), answer("--plugins", "prompt_lookup", *asked)
    assert plain["token_ids"] == drafted["token_ids"]


def unusable_home(home: Path, how: str) -> None:
    if how == "home is a file":
        home.write_text("")
    else:
        (home / "pitlane.db").mkdir(parents=True)


@pytest.mark.parametrize("how", ["home is a file", "database is a folder"])
def test_run_answers_without_a_home_and_warns_once(own_home: Path, how: str) -> None:
    unusable_home(own_home, how)
    result = invoke("run", *TINY, "--json", "--max-tokens", "2", "hello")
    assert result.exit_code == 0 and json.loads(result.stdout)["token_ids"]
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("pitlane: the lap times of this answer are not kept: ") and str(own_home) in warning


@pytest.mark.parametrize("how", ["home is a file", "database is a folder"])
@pytest.mark.parametrize(
    "args", [("run", "--doc", "README.md", "x"), ("chat",), ("docs", "add", "README.md"), ("ui",)], ids=" ".join
)
def test_what_needs_a_home_says_so_before_a_model_is_loaded(
    own_home: Path, how: str, args: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unusable_home(own_home, how)
    monkeypatch.setattr("pitlane.engine.engine.Engine.__init__", None)
    assert_one_line(invoke(*args), str(own_home), "PITLANE_HOME")


# ---- errors


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("run", "--model", "./nowhere", "x"), ["./nowhere", "random:<preset>"]),
        (("run", "--model", "random:huge", "x"), ["huge", "llama-1b"]),
        (("run", "--model", "nobody/nothing", "x"), ["nobody/nothing", "cache"]),
        (("run", *TINY, "--plugins", "turbo", "x"), ["turbo", "prompt_lookup"]),
        (("run", *TINY, "--plugins", "+turbo", "x"), ["turbo", "prompt_lookup"]),
        (("run", *TINY, "--plugins", "prefix_cache,+prompt_lookup", "x"), ["mixes"]),
        (("run", *TINY, "--context", "64", "word " * 100), ["tokens", "64"]),
        (("run", *TINY, "--context", "1M", "x"), ["context", "4096"]),
        (("run", *TINY, "--context", "lots", "x"), ["lots", "32k"]),
        (("run", *TINY, "--kv-memory", "1parsec", "x"), ["1parsec", "2GB"]),
        (("run", *TINY, "--temperature", "-1", "x"), ["temperature", "-1"]),
        (("run", *TINY, "--dtype", "int3", "x"), ["int3", "bfloat16"]),
        (("run", *TINY, "--device", "toaster", "x"), ["toaster"]),
        (("run", *TINY, "--plugins", "prompt_lookup", "-o", "prompt_lookup.num_draft_tokens=900", "x"), ["900", "64"]),
        (("run", *TINY, "-o", "prompt_lookup.max_ngram=2", "x"), ["prompt_lookup", "plan"]),
        (("run", *TINY, "-o", "nonsense", "x"), ["nonsense", "plugin.key=value"]),
        (("run", *TINY, "--doc", "no-such.pdf", "x"), ["no-such.pdf"]),
        (("run", "--modle", "x"), ["--modle", "--model"]),
        (("docs", "rm", "nothing"), ["nothing"]),
        (("docs", "cache", "pin", "7"), ["7"]),
        (("plugins", "info", "turbo"), ["turbo", "prompt_lookup"]),
        (("memory", "random:huge"), ["huge"]),
        (("walk",), ["walk"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_an_error_is_one_line_and_exit_code_2(args: Sequence[str], words: list[str]) -> None:
    assert_one_line(invoke(*args), *words)


def test_conflicting_plugins_are_refused_with_a_reason() -> None:
    result = invoke("run", *TINY, "--plugins-dir", LOOSE, "--plugins", "parrot,prompt_lookup", "x")
    assert_one_line(result, "drafter is held by", "parrot", "prompt_lookup")


def test_a_plugin_that_takes_the_place_of_another_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.plugins.prompt_lookup.PromptLookup.is_default", True)
    monkeypatch.setattr("pitlane.plugins.prefix_cache.PrefixCache.is_default", False)
    result = invoke("run", *TINY, "--max-tokens", "1", "--json", "--plugins", "+jacobi", "x")
    assert result.stderr == "pitlane: jacobi replaces prompt_lookup; a plan has one drafter\n"
    plugins = json.loads(result.stdout)["stats"]["plugins"]
    assert "jacobi" in plugins and "prompt_lookup" not in plugins


def test_a_model_that_does_not_fit_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.engine.kv.memory.available", lambda device: 10**9)
    assert_one_line(invoke("run", "--model", "random:llama-1b", "--dtype", "bfloat16", "x"), "2.1 GiB", "953.7 MiB")


@pytest.mark.parametrize("args", [(), ("-",), ("",)], ids=["piped", "dash", "argument"])
def test_an_empty_prompt_is_refused(args: Sequence[str]) -> None:
    assert_one_line(invoke("run", *TINY, *args, input=" \n"), "empty")


def test_a_drafter_that_fails_is_named_and_the_answer_goes_on() -> None:
    asked = ("--dtype", "float64", "--max-tokens", "8", "--temperature", "0", "hello")
    result = invoke("run", *TINY, "--json", "--plugins-dir", LOOSE, "--plugins", "clumsy", *asked)
    assert result.exit_code == 0 and "Traceback" not in result.stderr
    assert "clumsy" in result.stderr and "dropped it" in result.stderr
    document = json.loads(result.stdout)
    assert "dropped it" in document["stats"]["failed"]["clumsy"]
    assert document["token_ids"] == answer("--plugins", "", *asked)["token_ids"]


def test_debug_shows_the_traceback() -> None:
    result = invoke("run", *TINY, "--plugins", "turbo", "x", env={"PITLANE_DEBUG": "1"})
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "UnknownPlugin"


# ---- where values come from


def test_flag_then_environment_then_file_then_default(own_home: Path) -> None:
    own_home.mkdir()
    (own_home / "config.toml").write_text('[defaults]\nmodel = "random:tiny"\nmax-tokens = 3\n[run]\nseed = 11\n')

    def tokens(*args: str, **env: str) -> dict[str, int]:
        result = invoke("run", "--json", *args, "hello", env=env)
        assert result.exit_code == 0, result.stderr
        stats = json.loads(result.stdout)["stats"]
        return {name: stats[name] for name in ("completion_tokens", "seed")}

    assert tokens() == {"completion_tokens": 3, "seed": 11}
    assert tokens(PITLANE_MAX_TOKENS="4") == {"completion_tokens": 4, "seed": 11}
    assert tokens("--max-tokens", "5", PITLANE_MAX_TOKENS="4") == {"completion_tokens": 5, "seed": 11}


def test_environment_names_the_model_of_every_command() -> None:
    env = {"PITLANE_MODEL": "random:tiny", "PITLANE_JSON": "1"}
    assert json.loads(invoke("run", "--max-tokens", "1", "x", env=env).stdout)["stats"]["model"] == "random:tiny"
    assert json.loads(invoke("memory", env=env).stdout)["model"] == "random:tiny"


def test_an_empty_plugin_set_in_the_environment_is_the_bare_core() -> None:
    result = invoke("run", *TINY, "--json", "--max-tokens", "1", "x", env={"PITLANE_PLUGINS": ""})
    assert json.loads(result.stdout)["stats"]["plugins"] == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run\n", ["config.toml", "line 1"]),
        ("model = 'x'\n", ["line 1: model stands outside a table", "[defaults]"]),
        ("[run]\nmodle = 'x'\n", ["line 2: [run] has no option 'modle'", "did you mean model?"]),
        ("# top\n[defaults]\n\nmax-tokes = 3\n", ["line 4: [defaults] has no option 'max-tokes'", "did you mean max-tokens?"]),
        ("[defaults]\nzzz = 3\n", ["line 2: [defaults] has no option 'zzz'; `pitlane COMMAND --help` lists the options"]),
        ("[defualts]\nmodel = 'x'\n", ["line 1: there is no command 'defualts'; did you mean defaults?"]),
        ("[caht]\n", ["line 1", "did you mean chat?"]),
        ('[run]\nsystem = """\nmax-tokens = 1\n"""\nmax-tokens = "many"\n', ["line 5, max-tokens: 'many' is not a valid integer"]),
        ("[defaults]\nmax-tokens = 2.5\n", ["line 2, max-tokens: '2.5' is not a valid integer"]),
        ("[defaults]\nmax-tokens = true\n", ["line 2, max-tokens: True is neither a text nor a number"]),
        ("[defaults]\nmax-tokens = [3]\n", ["line 2, max-tokens: [3] is neither a text nor a number"]),
        ("[defaults]\njson = 'yes'\n", ["line 2, json: 'yes' is neither true nor false"]),
        ("[defaults]\ntop-p = 7\n", ["top_p must be in", "it is set in", "line 2, top-p"]),
        ("run.plugins = 'turbo'\n", ["unknown plugin 'turbo'", "line 1, plugins"]),
        ("[run]\ndoc = 'no-such.pdf'\n", ["no-such.pdf: there is no such file", "line 2, doc"]),
    ],
)  # fmt: skip
def test_a_config_file_that_cannot_be_is_named(own_home: Path, text: str, words: list[str]) -> None:
    own_home.mkdir()
    (own_home / "config.toml").write_text(text)
    result = invoke("run", *TINY, "x")
    assert_one_line(result, str(own_home / "config.toml"), *words)
    assert result.stderr.count("config.toml") == 1


def test_a_value_of_the_command_line_is_not_blamed_on_the_file(own_home: Path) -> None:
    own_home.mkdir()
    (own_home / "config.toml").write_text("[defaults]\nmax-tokens = 7\ntop-p = 7\n")
    result = invoke("run", *TINY, "--max-tokens", "many", "x")
    assert_one_line(result, "'--max-tokens': 'many' is not a valid integer")
    assert_one_line(invoke("run", *TINY, "--top-p", "9", "x"), "top_p must be")
    assert "config.toml" not in result.stderr + invoke("run", *TINY, "--top-p", "9", "x").stderr


def test_a_text_for_a_repeatable_option_is_one_value(own_home: Path) -> None:
    own_home.mkdir()
    (own_home / "config.toml").write_text(
        "[defaults]\nplugins = 'prompt_lookup'\noption = 'prompt_lookup.max_ngram=2'\n"
    )
    plugins = answer("--max-tokens", "1", "x")["stats"]["plugins"]  # type: ignore[index]
    assert plugins["prompt_lookup"]["max_ngram"] == 2


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"PITLANE_MAX_TOKENS": "many"}, ["PITLANE_MAX_TOKENS: 'many' is not a valid integer"]),
        ({"PITLANE_TOP_P": "7"}, ["top_p must be in", "it is set in PITLANE_TOP_P"]),
        ({"PITLANE_OPTION": "prompt_lookup.max_ngram=2"}, ["prompt_lookup is not in the plan", "PITLANE_OPTION"]),
        ({"PITLANE_MODEL": "./nowhere"}, ["./nowhere", "it is set in PITLANE_MODEL"]),
    ],
)
def test_a_bad_value_in_the_environment_is_named(env: dict[str, str], words: list[str]) -> None:
    model = () if "PITLANE_MODEL" in env else TINY
    assert_one_line(invoke("run", *model, "x", env=env), *words)


def test_a_misspelt_variable_is_named_and_one_of_another_command_is_not() -> None:
    env = {"PITLANE_MODLE": "x", "PITLANE_VERY_OWN": "1", "PITLANE_PORT": "1", "PITLANE_MODEL": "random:tiny"}
    result = invoke("memory", "--json", env=env)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "pitlane: PITLANE_MODLE is set, but nothing reads it; did you mean PITLANE_MODEL?",
        "pitlane: PITLANE_VERY_OWN is set, but nothing reads it",
    ]


def test_the_variable_that_names_plugin_packages_is_no_conversation() -> None:
    result = CliRunner().invoke(main, ["chat", *TINY], input="/exit\n", env={"PITLANE_LOAD": "no_such_package"})
    assert result.exit_code == 0, result.stderr


# ---- a process: signals and pipes


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child on Windows")
def test_ctrl_c_prints_what_there_is_and_exits_130() -> None:
    process = subprocess.Popen(
        [*PITLANE, "run", *TINY, *ENDLESS, "go on"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert first and process.returncode == 130, errors
    assert b"Traceback" not in errors and b"TTFT" in errors


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="pipes break in another way on Windows")
def test_a_broken_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [*PITLANE, "run", *TINY, *ENDLESS, "go on"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert b"Traceback" not in errors and b"Exception" not in errors, errors
