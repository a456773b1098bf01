"""A model as the hooks of a plan built it, and which plugin built which part."""

from __future__ import annotations

from dataclasses import dataclass

from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.run.batch import Attention
from pitlane.engine.run.runner import Model


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model that can run. variant: its weights, which other models may share; they live as long as this reference.

    parts: the linears, operations and attention that plugins built. is_batch_invariant: the result of a row depends on no other
    row of the batch.
    """

    model: Model
    attention: Attention
    variant: object
    parts: tuple[tuple[object, Plugin], ...] = ()
    is_batch_invariant: bool = False

    def culprit(self, error: BaseException) -> Plugin | None:
        """The plugin whose part raised an error: that of the innermost frame of the traceback that runs a part.

        A frame runs a part if it is a method of the part, the code of the part, or code of the plugin's module. So a part needs
        no wrapper, which every layer would pay for.
        """
        by_object = {id(part): plugin for part, plugin in self.parts}
        by_code = {id(part.__code__): plugin for part, plugin in self.parts if hasattr(part, "__code__")}
        by_module = {type(plugin).__module__: plugin for _, plugin in self.parts}
        culprit, traceback = None, error.__traceback__
        while traceback is not None:
            frame = traceback.tb_frame
            owner = by_object.get(id(frame.f_locals.get("self"))) or by_code.get(id(frame.f_code))
            culprit = owner or by_module.get(frame.f_globals.get("__name__", "")) or culprit
            traceback = traceback.tb_next
        return culprit
