"""Recipes of plugins: checked for fit first, built beside other loads, shown with progress, cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any, ClassVar

import pytest

from pitlane import (
    BuildContext,
    Engine,
    LayerInputs,
    LayerRecipe,
    ModelError,
    ModelTooLarge,
    Plugin,
    PluginOptions,
    PluginRegistry,
    RecipeProgress,
    SamplingParams,
    hookimpl,
)
from pitlane.plugins.speculative import Speculative
from pitlane.ui.panels import Live, live_html, recipe_html

WAIT = 30.0


class Slow(Plugin):
    """A recipe whose second layer waits for the test."""

    name, exactness = "slow", "approximate"
    begun: ClassVar[Event] = Event()
    goes_on: ClassVar[Event] = Event()
    visited: ClassVar[list[int]] = []

    class Options(PluginOptions):
        text: str = ""
        tokens: int = 64

    def prepare(self, context: BuildContext) -> None:
        assert context.calibrator is not None
        context.calibrator.build(self, self.visit)

    def visit(self, layer: LayerInputs) -> LayerRecipe:
        self.visited.append(layer.index)
        if layer.index == 0:
            self.begun.set()
            assert self.goes_on.wait(WAIT)
        return LayerRecipe({}, {}, {})

    @hookimpl
    def transform_weights(self, part: Any, tensors: Any, context: BuildContext) -> None:
        return None


class SlowDraft(Slow):
    """A recipe of the draft model waits for the test: it follows the recipe of the model, which has 8 layers."""

    name, exactness = "slow_draft", "rounding"

    def visit(self, layer: LayerInputs) -> LayerRecipe:
        self.visited.append(layer.index)
        if len(self.visited) > 8:
            self.begun.set()
            assert self.goes_on.wait(WAIT)
        return LayerRecipe({}, {}, {})


class Other(Plugin):
    """A plugin with weights of its own and without a recipe."""

    name, exactness = "other", "approximate"

    @hookimpl
    def transform_weights(self, part: Any, tensors: Any, context: BuildContext) -> None:
        return None


@pytest.fixture
def engine() -> Iterator[Engine]:
    for event in (Slow.begun, Slow.goes_on):
        event.clear()
    Slow.visited.clear()
    registry = PluginRegistry()
    for plugin in (Slow, SlowDraft, Other, Speculative):
        registry.add(plugin)
    with Engine("bundled", dtype="float32", plugins={}, registry=registry) as engine:
        yield engine
        Slow.goes_on.set()


def test_another_plan_loads_and_answers_while_a_recipe_is_built(engine: Engine) -> None:
    slow, other = engine.plan({"slow": {}}), engine.plan({"other": {}})
    assert engine.loader.recipe_of(slow) is None
    stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=2), plan=slow)
    assert Slow.begun.wait(WAIT)
    recipe = engine.loader.recipe_of(slow)
    assert recipe is not None and (recipe.plugin, recipe.done, recipe.num_layers) == ("slow", 0, 8)
    assert engine.loader.recipe_of(other) is None, "the recipe of another plan"
    answers: list[Any] = []
    ask = Thread(
        target=lambda: answers.append(engine.generate([1, 2, 3], SamplingParams(max_tokens=2), plan=other)), daemon=True
    )
    ask.start()
    ask.join(WAIT)
    assert answers and engine.is_loaded(other) and not engine.is_loaded(slow)
    Slow.goes_on.set()
    assert len(stream.result().token_ids) == 2 and engine.loader.recipe_of(slow) is None
    assert Slow.visited == list(range(8))


def test_another_plan_loads_and_answers_while_the_recipe_of_a_draft_model_is_built(engine: Engine) -> None:
    drafted, other = engine.plan({"slow_draft": {}, "speculative": {}}), engine.plan({"other": {}})
    stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=2), plan=drafted)
    assert Slow.begun.wait(WAIT)
    answers: list[Any] = []
    ask = Thread(
        target=lambda: answers.append(engine.generate([1, 2, 3], SamplingParams(max_tokens=2), plan=other)), daemon=True
    )
    ask.start()
    ask.join(WAIT / 3)
    Slow.goes_on.set()
    assert answers and len(stream.result().token_ids) == 2


def test_a_cancelled_recipe_ends_with_a_reason_and_goes_on_later(engine: Engine) -> None:
    slow = engine.plan({"slow": {}})
    stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=2), plan=slow)
    assert Slow.begun.wait(WAIT)
    recipe = engine.loader.recipe_of(slow)
    assert recipe is not None
    recipe.is_cancelled = True
    Slow.goes_on.set()
    with pytest.raises(ModelError, match=r"slow: its recipe was cancelled behind layer 1 of 8; .* goes on from there"):
        stream.result()
    assert len(engine.generate([1, 2, 3], SamplingParams(max_tokens=2), plan=slow).token_ids) == 2
    assert Slow.visited == list(range(8)), "the finished layer is not built again"


def test_weights_that_do_not_fit_are_refused_before_the_recipe(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ModelTooLarge("too large")

    monkeypatch.setattr(engine.loader, "_check_fit", refuse)
    with pytest.raises(ModelTooLarge):
        engine.lane_of(engine.plan({"slow": {}}))
    assert not Slow.visited


def test_the_page_shows_the_layer_and_a_button_to_cancel() -> None:
    recipe = RecipeProgress(("key",), "gptq", 3, 30)
    live = Live(loading=True, recipe=lambda: recipe)
    html = live_html(live, ())
    assert "gptq" in html and "layer 4 of 30" in html and "width:10.0%" in html and 'data-do="cancel_recipe"' in html
    recipe.is_cancelled = True
    assert "Cancelling" in recipe_html(recipe) and "cancel_recipe" not in recipe_html(recipe)
    live.recipe = lambda: None
    assert "Loading the weights" in live_html(live, ())
