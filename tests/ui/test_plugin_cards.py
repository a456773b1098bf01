"""The pit wall without a browser: groups, bounds, the advice, drafters as a choice of at most one, resets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pitlane
from pitlane import PluginEntry, PluginRegistry
from pitlane.storage import certificates
from pitlane.storage.db import Store
from pitlane.ui.advice import advice, advice_html, gains_ms, replaced_by
from pitlane.ui.catalogue import code_hash
from pitlane.ui.chat_flow import badge
from pitlane.ui.controls import about_html, faults_html, others_html
from pitlane.ui.effects import effect_html
from pitlane.ui.option_widgets import default_options, option_widget
from pitlane.ui.plugin_about import ORDER, bound, costs_text, exactness_text, group_of
from tests.ui.page_harness import TAB, card_of, event, new_tab, values
from tests.ui.test_page import ROLES, stats


def switches(page: Any, *enabled: str) -> list[Any]:
    return values(page, enabled)[len(page.handlers.ui.sampling) :]


def test_every_plugin_has_a_group_and_built_in_plugins_state_bounds_and_costs(monkeypatch: Any) -> None:
    monkeypatch.setenv("PITLANE_LOAD", "")
    registry = PluginRegistry.load()
    groups = {name: group_of(registry.entries[name]) for name in registry.togglable()}
    assert set(groups.values()) == set(ORDER) - {"Sampling", "Other", "Third-party"}
    assert [groups[name] for name in ("attention_sinks", "kv_quant", "prefix_cache")] == ["KV cache"] * 3
    assert [groups[name] for name in ("jacobi", "compiled_step", "int8")] == ["Decode", "Decode", "Weights"]
    for name in groups:
        plugin = registry.get(name)
        assert costs_text(plugin).startswith("Costs: "), name
        if plugin.exactness in ("rounding", "approximate"):
            assert exactness_text(plugin).startswith(plugin.exactness), name
    assert bound(registry.get("int8")) == "4.4 %" and bound(registry.get("packed_linear")) == "2⁻⁸"
    assert bound(registry.get("prompt_lookup")) == "" and bound(registry.get("attention_sinks")) == ""
    assert "perplexity" in about_html(registry.get("int4"))
    assert "4.4 %" in badge("approximate", bound="4.4 %", detail="half the scale") and "half the scale" in badge(
        "approximate", detail="half the scale"
    )


def test_a_card_names_the_faults_that_do_not_stop_the_plugin() -> None:
    entry = PluginEntry(
        "slow", "slow.py", notes=["its import took 8 s; <do> slow work in lane_opened", "it has no hook"]
    )
    assert faults_html(entry).count('<p class="cannot">Fault: it') == 2 and "8 s; &lt;do&gt; slow" in faults_html(entry)
    assert faults_html(PluginEntry("good", "good.py")) == ""


def test_a_card_says_what_was_proved_on_this_machine() -> None:
    plugin = PluginRegistry.load().get("int8")
    assert "declared approximate, not checked on this machine: pitlane plugins check int8" in about_html(plugin)
    record = {"source": "built-in", "pitlane": pitlane.__version__, "declared": "approximate", "passed": True}
    record |= {"proved": True, "model": "random:tiny", "dtype": "float64", "code": code_hash(plugin), "bound": 0.05}
    record |= {"num_tokens": 64, "options": {"group_size": 32}}
    certificates.save("int8", record)
    conditions = "(random:tiny, float64, bound 0.05, 64 tokens, with group_size=32)"
    assert f"approximate, proved on this machine {conditions}" in about_html(plugin, "built-in")
    other = about_html(plugin, "pitlane-int8 2.0")
    assert "not checked on this machine since the check of built-in: pitlane plugins check int8" in other
    certificates.save("int8", record | {"passed": False, "proved": False, "broken": ["exactness: <b>"]})
    assert "broken on this machine, with group_size=32: exactness: &lt;b&gt;" in about_html(plugin)
    certificates.save("int8", record | {"code": "0"})
    assert "not checked on this machine since its code changed: pitlane plugins check int8" in about_html(plugin)
    certificates.save("int8", record | {"pitlane": "0.0.1"})
    assert "not checked on this machine since the check under Pitlane 0.0.1: pitlane" in about_html(plugin)


def test_plugins_that_are_not_ok_are_shown_with_status_and_reason() -> None:
    statuses = ("ok", "failed", "incompatible", "disabled")
    entries = [PluginEntry(f"is_{status}", "x 1.0", None, f"<{status}>", status) for status in statuses]  # type: ignore[arg-type]
    html = others_html(entries)
    assert all(f">{status}</span><p>&lt;{status}&gt;</p>" in html for status in statuses[1:]) and "is_ok" not in html


def test_a_plugin_that_fails_later_is_listed_with_the_next_drawing(page: Any) -> None:
    entry, others = page.engine.registry.entries["echo"], page.handlers.ui.others
    assert "echo" not in page.handlers.new(TAB, new_tab())[others]
    entry.status, entry.reason = "failed", "it broke <often>"
    shown = page.handlers.new(TAB, new_tab())[others]
    assert "<b>echo</b>" in shown and "it broke &lt;often&gt;" in shown


def test_a_plugin_of_a_stranger_is_in_a_group_of_its_own(page: Any) -> None:
    entry = SimpleNamespace(name="echo", source="echo 1.0", hooks=["propose"])
    assert group_of(entry) == "Third-party"  # type: ignore[arg-type]
    headings = [
        block.value for block in page.blocks.blocks.values() if str(getattr(block, "value", "")).startswith("<h4>")
    ]
    assert headings[0] == "<h4>Decode</h4>" and headings[-1] == "<h4>Third-party</h4>"


def test_the_largest_measured_gain_is_tried_first_and_else_a_plain_rule_decides() -> None:
    every = ("int8", "prompt_lookup", "jacobi")
    measured = advice({"jacobi": 40.0, "int8": 90.0, "gone": 900.0}, every, True)
    assert measured is not None and measured.name == "int8" and "90 ms" in measured.reason
    assert [choice and choice.name for choice in (advice({}, every, True), advice({}, every, False))] == [
        "prompt_lookup", "int8",
    ]  # fmt: skip
    assert advice({}, ("jacobi",), False) is None and advice_html(None, ()) == ""
    replaced = replaced_by(["int4", "jacobi"], {"int4": "linear", "int8": "linear", "jacobi": "drafter", "lora": None})
    assert replaced == {"int8"} and advice({}, every, False, replaced) is None, "the user has chosen for this role"
    assert replaced_by(["int8"], {"int8": "linear", "lora": None}) == set()
    assert advice({"int8": 9.0}, every, False, replaced) is not None, "a measured gain counts all the same"
    choice = advice({}, every, False)
    assert 'data-do="switch_on" data-id="int8"' in advice_html(choice, ())
    assert 'data-do="compare"' in advice_html(choice, ("int8",)), "what is on already is measured"


def test_only_gains_beyond_noise_count() -> None:
    def plan(**bought: tuple[float, float]) -> dict[str, Any]:
        gains = {name: {"ms": ms, "low": low, "high": ms} for name, (ms, low) in bought.items()}
        return {"bought_ms": gains}

    with Store() as store:
        store.comparisons.add({"model": "m", "plans": [plan(jacobi=(50.0, 20.0))]})
        store.comparisons.add({"model": "m", "plans": [plan(int8=(30.0, 10.0), lookahead=(9.0, -2.0))]})
        store.comparisons.add({"model": "m", "plans": [plan(jacobi=(-5.0, -9.0))]})
        store.comparisons.add({"model": "other", "plans": [plan(int4=(99.0, 90.0))]})
        assert gains_ms(store, "m") == {"int8": 30.0}, "the latest comparison of a plugin counts"


def test_the_advice_turns_its_plugin_on_and_then_offers_to_measure_it(page: Any) -> None:
    ui, card = page.handlers.ui, card_of(page, "prompt_lookup")
    tab = new_tab(documents=("any",))
    assert 'data-id="prompt_lookup"' in page.handlers.next_plan(tab, {})[ui.advice]
    changes = page.handlers.switch_on(event(id="prompt_lookup"), tab, *switches(page, "prefix_cache"))
    assert changes[card.switch] is True and "prompt_lookup" in changes[ui.plan]
    assert "Measure it" in changes[ui.advice] and changes[ui.controls.no_drafter] is False


def test_a_plan_has_one_drafter_or_none(page: Any) -> None:
    ui, handlers = page.handlers.ui, page.handlers
    none, first, second = ui.controls.no_drafter, card_of(page, "prompt_lookup"), card_of(page, "echo")
    assert none.value is True
    changes = handlers.toggled(first)(new_tab(), *switches(page, "prompt_lookup"))
    assert changes[none] is False
    changes = handlers.toggled(second)(new_tab(), *switches(page, "prompt_lookup", "echo"))
    assert changes[first.switch] is False and changes[none] is False
    changes = handlers.toggled(second)(new_tab(), *switches(page, "prefix_cache"))  # off again
    assert changes[none] is True
    changes = handlers.leave_out_drafters(new_tab(), *switches(page, "prefix_cache", "echo"))
    assert changes[second.switch] is False and changes[none] is True
    assert "echo" not in changes[ui.plan] and "prefix_cache" in changes[ui.plan]


def test_a_card_says_whether_its_plugin_was_active(page: Any) -> None:
    assert '<b class="state">active</b> saved' in effect_html("prompt_lookup", stats(), ROLES)
    paused = effect_html("prompt_lookup", stats(paused={"prompt_lookup": "loses"}), ROLES)
    assert "paused in the last answer: loses" in paused and "active" not in paused
    failed = effect_html("prompt_lookup", stats(plugins={}, failed={"prompt_lookup": "boom"}), ROLES)
    assert "failed in the last answer: boom" in failed and "active" not in failed
    assert effect_html("jacobi", stats(), ROLES) == '<p class=""></p>'


def test_options_have_units_and_a_reset_to_their_defaults(page: Any) -> None:
    card = card_of(page, "prompt_lookup")
    assert card.fields["num_draft_tokens"].label == "Draft length (tokens)"
    assert default_options(card.plugin) == [field.value for field in card.fields.values()]
    assert card.reset is not None and card_of(page, "echo").reset is None
    widget = option_widget("delay", {"type": "number", "title": "Delay", "unit": "ms"}, 1.0)
    assert widget.label == "Delay (ms)"
