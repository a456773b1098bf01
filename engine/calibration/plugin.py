"""The base of plugins that make a recipe: its key, its build, and the recipe for the plugin's hooks. Knows no method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pitlane.engine.calibration.recipe import LayerInputs, LayerRecipe, Recipe
from pitlane.engine.calibration.text import calibration_hash
from pitlane.engine.errors import BadOption
from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.plan.plugin import Plugin


class CalibratedPlugin(Plugin):
    """A plugin with a recipe. Its options have `text`, a file of calibration text, and `tokens`, the calibration tokens at most."""

    @classmethod
    def key_of(cls, options: Any) -> str:
        """Another calibration text makes another key, and so other weights."""
        return super().key_of(options) + calibration_hash(options.text)

    def depends(self, context: BuildContext) -> str:
        """The text for the digest of the recipe, beside the model, the calibration text and the plugins that change weights before.

        '': the plugin's key, which covers all its options. Override it if the recipe depends on more, or on less.
        """
        return ""

    def build_recipe(
        self, context: BuildContext, visit: Callable[[LayerInputs], LayerRecipe], hessians: bool = False
    ) -> Recipe:
        """Return the recipe; build it first if it is missing. For `prepare`. visit, hessians: as for `Calibrator.build`."""
        if context.calibrator is None:
            raise BadOption(f"{self.name} needs the weights of a model to make its recipe")
        return context.calibrator.build(self, visit, hessians, self.depends(context))

    def finished_recipe(self, context: BuildContext) -> Recipe | None:
        """The finished recipe; None if parts are planned without a recipe."""
        return context.calibrator.recipe(self, self.depends(context)) if context.calibrator else None

    def recipe(self, context: BuildContext) -> Recipe:
        """The finished recipe. Raises BadOption if there is none."""
        recipe = self.finished_recipe(context)
        if recipe is None:
            raise BadOption(f"{self.name} has no recipe for this model yet; load the model with an engine")
        return recipe
