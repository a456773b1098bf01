"""The conversation in the terminal, in a pipe: /commands, what is saved, what an error leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pitlane.storage.db import Store
from pitlane.ui.cli import main

TINY = ("--model", "random:tiny", "--dtype", "float32", "--max-tokens", "6")
LOOSE = str(Path(__file__).parent / "test_cli_plugins")  # parrot, endless, clumsy
PITLANE = [sys.executable, "-c", "from pitlane.ui.cli import main; main(prog_name='pitlane')"]


def chat(*lines: str, args: tuple[str, ...] = ()) -> Result:
    result = CliRunner().invoke(main, ["chat", *TINY, *args], input="\n".join([*lines, ""]))
    assert result.exit_code == 0, result.output
    return result


def stats_lines(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if "TTFT" in line]


def test_a_second_turn_finds_the_first_in_memory() -> None:
    lines = stats_lines(chat("Tell me about the sea, and about the ships on it.", "And the harbour?"))
    assert len(lines) == 2
    assert "cached" not in lines[0] and "cached" in lines[1]


def test_turns_are_saved_with_token_ids_and_stats() -> None:
    chat("hello there", "/save Greetings", "and again")
    with Store() as store:
        conversation = store.conversations.get(store.conversations.list()[0].id)
    assert conversation.title == "Greetings"
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2
    reply = conversation.messages[1]
    assert reply.stats and reply.token_ids and reply.stats["completion_tokens"] == len(reply.token_ids)


def test_no_save_keeps_nothing_until_asked() -> None:
    chat("hello", args=("--no-save",))
    with Store() as store:
        assert store.conversations.list() == []
    chat("hello", "/save", args=("--no-save",))
    with Store() as store:
        assert store.conversations.list()[0].num_messages == 2


def test_plugins_are_toggled_for_the_next_turn() -> None:
    chat("one", "/plugins +prompt_lookup", "two", "/plugins none", "three", "/set prompt_lookup.max_ngram 3")
    with Store() as store:
        found = store.conversations.get(store.conversations.list()[0].id).messages
    sets = [list(message.stats["plugins"]) for message in found if message.stats]
    assert sets == [["prefix_cache", "span_attention"], ["prefix_cache", "prompt_lookup", "span_attention"], []]


def test_a_plugin_takes_the_place_of_another_of_its_role_and_says_so() -> None:
    result = chat("/plugins prompt_lookup", "/plugins +jacobi", "/plugins jacobi,prompt_lookup", "/plugins +jacobi")
    assert result.stderr.count("jacobi replaces prompt_lookup; a plan has one drafter") == 1
    assert "pitlane: drafter is held by jacobi; take it out to enable prompt_lookup" in result.stderr
    assert result.stderr.splitlines()[-1] == "plugins: jacobi"


def test_a_text_that_was_dropped_is_read_whole_again_without_the_plugin_and_says_so() -> None:
    sinks = ("--plugins", "attention_sinks", "-o", "attention_sinks.window=64", "-o", "attention_sinks.stride=32")
    result = chat("word " * 40, "two", "/plugins none", "three", "four", args=sinks)
    first, second, third, fourth = stats_lines(result)
    assert "attention_sinks dropped tokens 5 to" in first and "attention_sinks dropped tokens 5 to" in second
    assert "read whole again without attention_sinks" in third
    assert not any("again" in line for line in (first, second, fourth))


def test_set_changes_sampling_and_refuses_nonsense() -> None:
    result = chat("/set max_tokens 2", "/set seed 9", "hello", "/set top_p 7", "/set colour red", "/set seed x")
    assert "top_p must be" in result.stderr and "colour" in result.stderr and "seed cannot be 'x'" in result.stderr
    with Store() as store:
        stats = store.conversations.get(store.conversations.list()[0].id).messages[1].stats
    assert stats and stats["completion_tokens"] == 2 and stats["seed"] == 9


def test_retry_and_undo_change_the_saved_conversation_too() -> None:
    chat("one", "two", "/retry", "/undo", "three", "/undo")
    with Store() as store:
        messages = store.conversations.get(store.conversations.list()[0].id).messages
    assert [message.text for message in messages if message.role == "user"] == ["one"]


def test_a_failed_turn_is_taken_back() -> None:
    result = chat("word " * 200, "short", "/stats", args=("--context", "256"))
    assert "pitlane: the prompt has" in result.stderr
    assert len(stats_lines(result)) == 1
    with Store() as store:
        messages = store.conversations.get(store.conversations.list()[0].id).messages
    assert [message.text for message in messages if message.role == "user"] == ["short"]


def test_a_refused_retry_keeps_the_old_answer() -> None:
    result = chat("hello", "/set system " + "long " * 9000, "/retry", "/set system", "again")
    assert "context holds" in result.stderr
    with Store() as store:
        conversation = store.conversations.get(store.conversations.list()[0].id)
    assert [message.text for message in conversation.messages if message.role == "user"] == ["hello", "again"]
    assert len(conversation.messages) == 4


def test_a_conversation_is_loaded_with_its_documents(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("The lamp is green.\n" * 20)
    chat(f"/doc {file}", "/docs", "What colour is the lamp?")
    with Store() as store:
        saved = store.conversations.list()[0].id
    result = chat("/load", f"/load {saved}", "/docs", "Again?", "/search lamp")
    assert "2 messages, 1 documents" in result.stderr
    assert result.stderr.count("notes.txt") >= 1
    assert f"{saved}  What colour" in result.stderr
    with Store() as store:
        assert store.conversations.get(saved).num_messages == 4


def test_load_from_the_command_line_and_new() -> None:
    chat("hello there")
    with Store() as store:
        saved = store.conversations.list()[0].id
    chat("more", "/new", "other", args=("--load", saved))
    with Store() as store:
        assert [row.num_messages for row in store.conversations.list()] == [2, 4]


def test_lines_between_quotes_are_one_message() -> None:
    chat('"""', "/not a command", "second line", '"""')
    with Store() as store:
        message = store.conversations.get(store.conversations.list()[0].id).messages[0]
    assert message.text == "/not a command\nsecond line"


def test_unknown_commands_list_the_known_and_exit_leaves() -> None:
    result = chat("/nope", "/help", "/exit", "never asked")
    assert "unknown command /nope" in result.stderr and "/retry" in result.stderr
    assert stats_lines(result) == []


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child on Windows")
def test_ctrl_c_stops_the_answer_and_twice_leaves(own_home: Path) -> None:
    process = subprocess.Popen(
        [*PITLANE, "chat", *TINY[:4], "--max-tokens", "3500", "--plugins-dir", LOOSE, "--plugins", "endless"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    while (line := process.stderr.readline()) and "TTFT" not in line:
        pass
    assert line.startswith("stopped · ")
    while not saved_messages(own_home):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors


def saved_messages(home: Path) -> int:
    with Store(home / "pitlane.db") as store:
        return sum(row.num_messages for row in store.conversations.list()) // 2


def test_run_and_chat_lay_a_question_out_alike() -> None:
    chat("/set seed 7", "hello there")
    result = CliRunner().invoke(main, ["run", *TINY, "--json", "--seed", "7", "hello there"])
    with Store() as store:
        reply = store.conversations.get(store.conversations.list()[0].id).messages[1]
    assert json.loads(result.stdout)["token_ids"] == list(reply.token_ids or ())
