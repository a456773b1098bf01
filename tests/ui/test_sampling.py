"""The default sampling: chats are sampled, answers over documents are greedy, and the user's values win."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pitlane import BadOption, SamplingParams
from pitlane.engine.engine import Engine
from pitlane.engine.models.registry import resolve
from pitlane.ui.cli import main
from pitlane.ui.sampling import CHAT, Sampling, chat_words
from tests.ui.page_harness import TAB, last, new_tab, values

MAKER = {"temperature": 0.6, "top_k": 20}
TINY = ("--model", "random:tiny", "--dtype", "float32", "--max-tokens", "3", "--plugins", "")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The sampling parameters of all requests."""
    parameters: list[SamplingParams] = []
    submit = Engine.submit

    def watched(engine: Engine, prompt: Any, sampling: SamplingParams, **options: Any) -> Any:
        parameters.append(sampling)
        return submit(engine, prompt, sampling, **options)

    monkeypatch.setattr(Engine, "submit", watched)
    return parameters


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output looks like a terminal to the commands."""
    from click.testing import _NamedTextIOWrapper

    monkeypatch.setattr(_NamedTextIOWrapper, "isatty", lambda stream: stream.name == "<stdout>")


def invoke(*args: str, lines: str = "") -> Result:
    result = CliRunner().invoke(main, args, input=lines)
    assert result.exit_code == 0, result.output
    return result


def parts(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in CHAT}


def test_the_python_face_is_greedy() -> None:
    assert SamplingParams() == Sampling().greedy() and SamplingParams().temperature == 0


def test_values_of_the_user_come_before_the_makers_and_those_before_the_default() -> None:
    assert parts(Sampling().chat({})) == CHAT
    assert Sampling({"seed": 3}).chat(MAKER) == SamplingParams(temperature=0.6, top_k=20, seed=3), "the maker decides"
    assert Sampling().chat({"top_p": 0.5}) == SamplingParams(**{**CHAT, "top_p": 0.5})
    assert Sampling({"top_p": 0.4}).chat(MAKER) == SamplingParams(temperature=0.6, top_k=20, top_p=0.4)
    for temperature in (0, 1.0):
        assert Sampling({"temperature": temperature}).chat(MAKER) == SamplingParams(temperature=temperature)
    assert Sampling({"top_p": 0.4}).params(MAKER, is_chat=False) == SamplingParams(top_p=0.4)
    with pytest.raises(BadOption, match="top_p"):
        Sampling({"top_p": 7})


GENERATION: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({}, {}),
    ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
    ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ({"temperature": 0.6, "repetition_penalty": 1.05, "min_p": None}, {"temperature": 0.6, "repetition_penalty": 1.05}),
]


@pytest.mark.parametrize(("written", "expected"), GENERATION)
def test_a_generation_config_says_what_the_maker_recommends(
    written: dict[str, Any], expected: dict[str, float], copied_model: Path
) -> None:
    (copied_model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **written}))
    assert dict(resolve(str(copied_model)).sampling) == expected


@pytest.fixture
def copied_model(tmp_path: Path) -> Path:
    """The bundled model in a folder of its own."""
    import shutil

    source = resolve("bundled").folder
    assert source is not None
    return Path(shutil.copytree(source, tmp_path / "model"))


# ---- the command line


def test_run_samples_in_a_terminal(terminal: None, asked: list[SamplingParams]) -> None:
    result = invoke("run", *TINY, "hello")
    assert parts(asked[0]) == CHAT and "· seed " in result.stderr
    assert invoke("run", *TINY, "--temperature", "0", "hello").stderr.count("seed") == 0
    assert asked[1] == SamplingParams(max_tokens=3)


def test_run_over_a_document_is_greedy(terminal: None, asked: list[SamplingParams], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("The lamp is green. " * 5)
    invoke("run", *TINY, "--doc", str(tmp_path / "note.txt"), "Which colour?")
    invoke("run", *TINY, "--raw", "The lamp is")
    assert asked == [SamplingParams(max_tokens=3)] * 2


def test_a_batch_is_greedy(asked: list[SamplingParams], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    invoke("run", *TINY, "--batch", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "answers.jsonl"))
    assert asked == [SamplingParams(max_tokens=3)]


def test_a_pipe_samples_as_a_terminal_does_and_names_the_seed(asked: list[SamplingParams]) -> None:
    assert "· seed " in invoke("run", *TINY, "hello").stderr
    stats = json.loads(invoke("run", *TINY, "--json", "hello").stdout)["stats"]
    assert isinstance(stats["seed"], int)
    invoke("chat", *TINY, lines="hello\n")
    assert [parts(params) for params in asked] == [CHAT] * 3


def test_the_reported_seed_gives_the_same_text_again() -> None:
    long = ("--model", "random:tiny", "--max-tokens", "24", "--json", "hello")
    first = json.loads(invoke("run", *long).stdout)
    again = json.loads(invoke("run", *long, "--seed", str(first["stats"]["seed"])).stdout)
    other = json.loads(invoke("run", *long, "--seed", "7").stdout)
    assert again["token_ids"] == first["token_ids"] != other["token_ids"]


def test_a_chat_samples_until_it_has_a_document(terminal: None, asked: list[SamplingParams], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("The lamp is green. " * 5)
    lines = f"hello\n/set top_p 0.5\nagain\n/doc {tmp_path / 'note.txt'}\nWhich colour?\n/docs clear\n/set temperature 0\nx\n"
    invoke("chat", *TINY, lines=lines)
    assert [parts(params) for params in asked] == [
        CHAT,
        {**CHAT, "top_p": 0.5},
        {"temperature": 0, "top_p": 0.5, "repetition_penalty": 1},
        {"temperature": 0, "top_p": 0.5, "repetition_penalty": 1},
    ]


# ---- the page


def page_values(page: Any, enabled: tuple[str, ...] = ("prefix_cache",), temperature: Any = "") -> list[Any]:
    return [temperature, "", *values(page, enabled)[2:]]


def test_the_page_samples_a_chat_and_names_the_default(page: Any, asked: list[SamplingParams]) -> None:
    temperature, top_p = page.handlers.ui.sampling[:2]
    assert (temperature.value, top_p.value) == ("", "") and "0.7, top-p 0.9" in chat_words({})
    assert chat_words(page.engine.loader.source.sampling) in temperature.info
    last(page.handlers.ask(TAB, "Hello", new_tab(), *page_values(page)))
    assert parts(asked[-1]) == {**parts(SamplingParams()), **dict(page.engine.loader.source.sampling or CHAT)}
    last(page.handlers.ask(TAB, "Hello", new_tab(), *page_values(page, temperature="0.9")))
    assert parts(asked[-1]) == parts(SamplingParams(temperature=0.9))


def test_the_page_is_greedy_over_a_document(page: Any, asked: list[SamplingParams], tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("Facts. " * 20)
    tab = last(page.handlers.upload(TAB, [str(path)], new_tab(), *page_values(page)))[page.handlers.ui.tab]
    last(page.handlers.ask(TAB, "Which?", tab, *page_values(page)))
    assert parts(asked[-1]) == parts(SamplingParams())


def test_a_temperature_that_cannot_be_keeps_the_question(page: Any, warnings_shown: list[str]) -> None:
    for typed in ("warm", "-1"):
        changes = last(page.handlers.ask(TAB, "Hello", new_tab(), *page_values(page, temperature=typed)))
        assert page.handlers.ui.box not in changes and "temperature" in warnings_shown[-1]


def test_sampled_answers_are_compared_with_the_same_seed(page: Any) -> None:
    """A drafter keeps the tokens of a sampled answer. Another draw, or another temperature, is named."""
    store, ui = page.store.conversations, page.handlers.ui
    tab = last(page.handlers.ask(TAB, "Hello", new_tab(), *page_values(page, (), "0.8")))[ui.tab]
    first = store.get(tab["conversation"]).messages[-1].stats
    html = last(page.handlers.retry(TAB, None, tab, *page_values(page, ("prompt_lookup",), "0.8")))[ui.thread]
    second = store.get(tab["conversation"]).messages[-1].stats
    assert first["seed"] == second["seed"] and first["temperature"] == second["temperature"] == 0.8
    assert "same tokens as before" in html
    html = last(page.handlers.retry(TAB, None, tab, *page_values(page, ("prompt_lookup",), "0.8")))[ui.thread]
    assert "another seed, first difference" in html
    html = last(page.handlers.retry(TAB, None, tab, *page_values(page, ("prompt_lookup",), "1.9")))[ui.thread]
    assert "another temperature, first difference" in html
