"""The plugins that are on by default for questions about a document: command line and page, over a tiny model with an adapter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pitlane import ModelTooLarge, SamplingParams
from pitlane.storage.db import Store
from pitlane.ui import document_plugins
from pitlane.ui.cli import main
from pitlane.ui.handlers import Handlers
from tests.ui.conftest import built
from tests.ui.page_harness import TAB, card_of, event, last, new_tab

TINY = ("--model", "random:tiny", "--dtype", "float32", "--max-tokens", "6")
SAID = "lora (adapter documents) answers questions about a document; "


@pytest.fixture(autouse=True)
def adapter(ship_adapter: Any) -> Path:
    folder: Path = ship_adapter()
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "lamp.txt"
    file.write_text("The lamp weighs 300 grams and costs 20 pounds. " * 8)
    return str(file)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights with an adapter do not fit."""
    from pitlane.engine import loader

    check_fit = loader.check_fit

    def check(name: str, needs: Any, kv_bytes: int, dtype: Any, device: Any, plugins: Any = ()) -> None:
        if "lora" in plugins:
            raise ModelTooLarge("too large for the test")
        check_fit(name, needs, kv_bytes, dtype, device, plugins)

    monkeypatch.setattr(loader, "check_fit", check)


# ---- the command line


def run(*args: str) -> Result:
    result = CliRunner().invoke(main, ["run", *TINY, *args, "What does the lamp weigh?"])
    assert result.exit_code == 0, result.output
    return result


def plugins_of(*args: str) -> dict[str, Any]:
    chosen: dict[str, Any] = json.loads(run("--json", *args).stdout)["stats"]["plugins"]
    return chosen


def test_run_with_a_document_uses_the_adapter_and_says_so_once(text: str) -> None:
    result = run("--doc", text)
    assert result.stderr.count(SAID + "--plugins -lora turns this off") == 1
    assert plugins_of("--doc", text)["lora"] == {"adapter": "documents", "scale": 1.0}
    assert "lora" not in run().stderr and "lora" not in plugins_of()


@pytest.mark.parametrize(
    "args", [("--plugins", "-lora"), ("--plugins", "prefix_cache"), ("--plugins", ""), ("--raw",)], ids=" ".join
)
def test_the_user_turns_it_off(args: tuple[str, ...], text: str) -> None:
    assert "lora" not in plugins_of("--doc", text, *args)
    assert "lora" not in run("--doc", text, *args).stderr


def test_the_user_chooses_another_adapter(text: str, make_adapter: Any) -> None:
    own = str(make_adapter(seed=3))
    args = ("--plugins", "+lora", "-o", f"lora.adapter={own}")
    assert plugins_of("--doc", text, *args)["lora"]["adapter"] == own
    assert plugins_of(*args)["lora"]["adapter"] == own, "without a document too: the user asked for it"
    assert "lora" not in run("--doc", text, *args).stderr


def test_plus_lora_alone_takes_the_shipped_adapter_for_every_question() -> None:
    assert plugins_of("--plugins", "+lora")["lora"]["adapter"] == "documents"


def test_run_goes_on_without_it_if_memory_does_not_suffice(
    text: str, no_memory: None, caplog: pytest.LogCaptureFixture
) -> None:
    result = run("--doc", text, "--json")
    assert "lora" not in json.loads(result.stdout)["stats"]["plugins"]
    lines = [record.getMessage() for record in caplog.records if "lora" in record.getMessage()]
    assert lines == ["answers go on without lora (adapter documents): too large for the test"]


def test_an_adapter_that_was_asked_for_is_not_left_out(text: str, no_memory: None) -> None:
    result = CliRunner().invoke(main, ["run", *TINY, "--doc", text, "--plugins", "+lora", "x"])
    assert result.exit_code == 2 and "too large for the test" in result.stderr


def test_a_batch_over_a_document_uses_the_adapter(text: str, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('"What is it?"\n')
    args = ["run", *TINY, "--doc", text, "--batch", str(prompts), "--out", str(out)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and result.stderr.count(SAID) == 1
    assert "lora" in json.loads(out.read_text())["stats"]["plugins"]


def test_kv_that_docs_add_saves_is_read_by_a_question(text: str) -> None:
    added = CliRunner().invoke(main, ["docs", "add", "--model", "random:tiny", text])
    assert added.exit_code == 0, added.output
    stats = json.loads(CliRunner().invoke(main, ["run", *TINY[:2], "--doc", text, "--json", "x"]).stdout)["stats"]
    assert "lora" in stats["plugins"] and stats["cached_tokens"] > 64


def chat(*lines: str, args: tuple[str, ...] = ()) -> Result:
    result = CliRunner().invoke(main, ["chat", *TINY, *args], input="\n".join([*lines, ""]))
    assert result.exit_code == 0, result.output
    return result


def stored_plugins() -> list[bool]:
    """Whether `lora` was on, for every stored answer."""
    with Store() as store:
        conversation = store.conversations.get(store.conversations.list()[0].id)
    return ["lora" in message.stats["plugins"] for message in conversation.messages if message.stats]


def test_chat_uses_it_from_the_first_document_on(text: str) -> None:
    result = chat(
        "hello", f"/doc {text}", "What?", "/plugins -lora", "And?", "/plugins +lora", "So?", "/docs clear", "x"
    )
    assert stored_plugins() == [False, True, False, True, False]
    assert result.stderr.count(SAID + "/plugins -lora turns this off") == 1
    assert "plugins: lora (with a document), " in result.stderr.splitlines()[0]
    assert chat("hi", args=("--doc", text)).stderr.count(SAID) == 1
    assert "lora" not in chat("hi", args=("--doc", text, "--plugins", "-lora")).stderr


def test_an_option_that_the_user_sets_makes_it_a_plugin_like_any_other() -> None:
    chat("hello", "/set lora.scale 0.5", "hello")
    assert stored_plugins() == [False, True]


def test_chat_goes_on_without_it_if_memory_does_not_suffice(text: str, no_memory: None) -> None:
    result = chat("What?", args=("--doc", text))
    assert stored_plugins() == [False]
    assert [
        line.count("lora failed: too large for the test") for line in result.stderr.splitlines() if "TTFT" in line
    ] == [1]


# ---- the page


@pytest.fixture
def page(make_engine: Any) -> Iterator[Any]:
    """A page over the default plugins of a tiny model that an adapter is shipped for."""
    engine = make_engine(plugins=None)
    with Store() as store:
        blocks = asyncio.run(built(engine, store))
        handlers = next(
            fn.fn.__self__ for fn in blocks.fns.values() if isinstance(getattr(fn.fn, "__self__", None), Handlers)
        )
        yield SimpleNamespace(blocks=blocks, handlers=handlers, store=store, desk=handlers.desk, engine=engine)


def values(page: Any, changed: dict[str, Any] | None = None) -> list[Any]:
    """The values of all widgets as the page is built. changed: values of plugin widgets by name, such as `lora.scale`."""
    names = page.handlers.ui.controls.names
    kept = {name: widget.value for name, widget in zip(names, page.handlers.ui.controls.inputs, strict=True)}
    assert (changed or {}).keys() <= kept.keys()
    kept |= changed or {}
    return [0, 1, 8, None, "", "auto", "", "", "", *kept.values()]


def attached(page: Any) -> dict[str, Any]:
    return new_tab(documents=(page.desk.add_sample().id,))


def answered_with(page: Any, tab: dict[str, Any], *given: Any) -> dict[str, Any]:
    """Stats of the answer to a question in a tab."""
    last(page.handlers.ask(TAB, "What is the price?", tab, *given))
    conversation = page.store.conversations.list()[0]
    stats: dict[str, Any] = page.store.conversations.get(conversation.id).messages[-1].stats
    return stats


def test_the_switch_is_on_and_serves_documents_alone(page: Any) -> None:
    assert card_of(page, "lora").switch.value is True
    with_document, without = (answered_with(page, tab, *values(page)) for tab in (attached(page), new_tab()))
    assert with_document["plugins"]["lora"] == {"adapter": "documents", "scale": 1.0}
    assert "lora" not in without["plugins"] and without["exactness"] != "steering"
    assert "lora" not in answered_with(page, attached(page), *values(page, {"lora": False}))["plugins"]


def test_another_adapter_serves_every_question(page: Any, make_adapter: Any) -> None:
    own = str(make_adapter(seed=4))
    assert answered_with(page, new_tab(), *values(page, {"lora.adapter": own}))["plugins"]["lora"]["adapter"] == own


def test_the_page_says_when_it_is_active(page: Any) -> None:
    ui, state, given = page.handlers.ui, card_of(page, "lora").state, values(page)[len(page.handlers.ui.sampling) :]
    without = page.handlers.replan(new_tab(), *given)
    assert "waits: it answers questions about a document" in without[state]
    assert without[ui.document_plugins] == "" and "lora" not in without[ui.plan]
    active = page.handlers.replan(attached(page), *given)
    assert "active: a document is attached" in active[state] and '<span class="chip">lora</span>' in active[ui.plan]
    assert "lora (adapter documents)" in active[ui.document_plugins]
    off = page.handlers.toggled(card_of(page, "lora"))(
        attached(page), *values(page, {"lora": False})[len(page.handlers.ui.sampling) :]
    )
    assert off[state] == off[ui.document_plugins] == "" and "lora" not in off[ui.plan]
    loaded = page.handlers.load(TAB, attached(page), "", json.dumps({"documents": attached(page)["documents"]}))
    assert "active" in loaded[state] and "lora" in loaded[ui.document_plugins]


def test_a_change_of_documents_draws_the_plan_again(page: Any) -> None:
    ui = page.handlers.ui
    events = [fn for fn in page.blocks.fns.values() if (ui.tab._id, "change") in fn.targets]
    after_reading = [fn for fn in page.blocks.fns.values() if any(name == "then" for _, name in fn.targets)]
    # documents are read in three places; after them, and after the weights of the plan are loaded, the plan is drawn
    assert len(events) == 1 and sum(fn.name == "replan" for fn in after_reading) == 4
    assert events[0].inputs == [ui.tab, *ui.controls.inputs]
    assert set(events[0].outputs) == {*ui.planned, ui.document_plugins, card_of(page, "lora").state}


def test_an_attached_document_loads_the_weights_and_its_kv_is_used(page: Any) -> None:
    lanes = len(page.engine.lanes.all)
    changes = last(page.handlers.sample(TAB, new_tab(), *values(page)))
    assert len(page.engine.lanes.all) == lanes + 1, "before the first question"
    tab = changes[page.handlers.ui.tab]
    stats = answered_with(page, tab, *values(page))
    assert "lora" in stats["plugins"] and stats["cached_tokens"] > 0.8 * stats["prompt_tokens"]


def test_an_attached_document_loads_the_weights_also_without_a_cache(page: Any) -> None:
    lanes = len(page.engine.lanes.all)
    changes = last(page.handlers.sample(TAB, new_tab(), *values(page, {"prefix_cache": False})))
    assert "KV saved" not in changes[page.handlers.ui.documents]
    assert len(page.engine.lanes.all) == lanes + 1


def test_the_page_goes_on_without_it_if_memory_does_not_suffice(page: Any, no_memory: None) -> None:
    ui, changes = page.handlers.ui, last(page.handlers.sample(TAB, new_tab(), *values(page)))
    assert "Answers go on without lora: too large for the test" in changes[ui.notice]
    tab = changes[ui.tab]
    changes = last(page.handlers.ask(TAB, "What is the price?", tab, *values(page)))
    stats = page.store.conversations.get(page.store.conversations.list()[0].id).messages[-1].stats
    assert "lora" not in stats["plugins"] and stats["failed"] == {"lora": "too large for the test"}
    assert "lora failed" in changes[ui.thread] and "failed in the last answer" in changes[card_of(page, "lora").effect]


def test_an_empty_adapter_is_explained_at_its_card(page: Any) -> None:
    card = card_of(page, "lora")
    changes = page.handlers.toggled(card)(
        new_tab(), *values(page, {"lora.adapter": ""})[len(page.handlers.ui.sampling) :]
    )
    assert "lora needs an adapter: set lora.adapter to &#x27;documents&#x27;" in changes[card.note]
    assert 'role="alert"' in changes[card.note] and changes[card.switch] is False


def test_asking_again_with_the_same_switches_draws_a_new_seed(page: Any) -> None:
    """A question without a document leaves the plugin out: this is no change of plugins."""
    for tab in (new_tab(), attached(page)):
        stats = answered_with(page, tab, *values(page))
        answer = page.store.conversations.get(page.store.conversations.list()[0].id).messages[-1]
        assert page.handlers.read(values(page), tab["documents"], answer).sampling.greedy().seed is None
        other = [] if tab["documents"] else ["a document"]
        assert page.handlers.read(values(page), other, answer).sampling.greedy().seed == stats["seed"]


def test_turn_off_asks_without_it(page: Any) -> None:
    answered_with(page, attached(page), *values(page))
    conversation = page.store.conversations.list()[0]
    tab = page.handlers.tab_of(page.store.conversations.get(conversation.id))
    last(page.handlers.turn_off(TAB, event(id="lora"), tab, *values(page)))
    assert "lora" not in page.store.conversations.get(conversation.id).messages[-1].stats["plugins"]


def test_another_model_has_no_such_plugin(make_engine: Any) -> None:
    engine = make_engine("bundled", plugins=None)
    with Store() as store:
        blocks = asyncio.run(built(engine, store))
    handlers = next(
        fn.fn.__self__ for fn in blocks.fns.values() if isinstance(getattr(fn.fn, "__self__", None), Handlers)
    )
    card = next(card for card in handlers.ui.controls.cards if card.plugin.name == "lora")
    assert card.state is None and card.switch.value is False
    (replan,) = [fn for fn in blocks.fns.values() if (handlers.ui.tab._id, "change") in fn.targets]
    expected = {*handlers.ui.planned, handlers.ui.document_plugins}
    assert set(replan.outputs) == expected, "the advice depends on documents, and no card does"


# ---- the rule


def test_settings_in_effect(make_engine: Any) -> None:
    engine = make_engine(plugins=None)
    chosen = engine.document_plan.settings
    assert document_plugins.in_effect(engine, chosen, has_document=True) == chosen
    assert document_plugins.in_effect(engine, chosen, has_document=False) == engine.default_plan.settings
    explicit = {**chosen, "lora": {"scale": 0.5}}
    assert document_plugins.in_effect(engine, explicit, has_document=False) == explicit
    assert document_plugins.in_effect(engine, {"lora": {"no": "option"}}, has_document=False) == {
        "lora": {"no": "option"}
    }


def test_a_failure_of_another_kind_is_no_reason_to_leave_it_out(make_engine: Any, adapter: Path) -> None:
    engine = make_engine(plugins=None)
    plan = engine.document_plan
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match="adapter"):
        document_plugins.load(engine, plan.settings)
    assert engine.generate("x", SamplingParams(max_tokens=2)).stats["failed"] == {}
