"""The weight plan of a model: how every part is built under a plan, and its bytes. No tensor is read.

Knows no plugin: the function `ask` returns a plugin's plan for a part. If it returns None, the part gets the core's dense plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from pitlane.engine.models.build_context import BuildContext
from pitlane.engine.models.layers import dense_plan
from pitlane.engine.models.parts import EmbeddingPart, LinearPart, LinearPlan, Part


class Choice(NamedTuple):
    """The plan of a part. plugin: the maker of the plan (None: the core). plan None: a tied head, built with its embedding."""

    part: Part
    plan: LinearPlan | None
    plugin: Any = None

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a plugin builds the part, and says so in the plan or else in its class. A tied head follows its embedding."""
        if self.plugin is None:
            return False
        stated = self.plan.batch_invariant if self.plan else None
        return bool(self.plugin.batch_invariant if stated is None else stated)


Ask: TypeAlias = Callable[[str, Part], "tuple[LinearPlan, Any] | None"]  # name of the hook, part -> plan and plugin


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """choices: by part, in the order of the model class. A fused linear may have a choice per member.

    num_bytes: memory of all parts. peak_bytes: most memory while the parts are built one after another.
    """

    choices: dict[Part, tuple[Choice, ...]]
    num_bytes: int
    peak_bytes: int

    @classmethod
    def of(
        cls,
        parts: Iterable[Part],
        context: BuildContext,
        ask: Ask | None = None,
        is_transformed: bool = False,
    ) -> WeightPlan:
        """Ask for the plan of every part. is_transformed: plugins change the tensors of the checkpoint before they are built."""
        chooser = _Chooser(context, ask or (lambda hook, part: None), not is_transformed)
        choices = {part: chooser.choose(part) for part in parts}
        num_bytes = peak_bytes = 0
        for part, plan, _ in (choice for chosen in choices.values() for choice in chosen):
            if plan is not None:
                copies = part.num_parameters * context.stored_dtype.itemsize if is_transformed else 0
                peak_bytes = max(peak_bytes, num_bytes + copies + plan.peak_bytes)
                num_bytes += plan.num_bytes
        return cls(choices, num_bytes, peak_bytes)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether batch-invariant plugins build all linears, and no other plugin builds any part.

        In the core's linear, the result of a row depends on the number of rows.
        """
        all_choices = [choice for chosen in self.choices.values() for choice in chosen]
        needed = [choice for choice in all_choices if choice.plugin or isinstance(choice.part, LinearPart)]
        return all(choice.is_batch_invariant for choice in needed)


class _Chooser:
    """Chooses part by part. An embedding comes before its tied head."""

    def __init__(self, context: BuildContext, ask: Ask, is_mapped: bool) -> None:
        self.context, self.ask, self.is_mapped = context, ask, is_mapped
        self.embeddings: dict[str, Choice] = {}

    def choose(self, part: Part) -> tuple[Choice, ...]:
        if isinstance(part, EmbeddingPart):
            choice = self.embeddings[part.name] = self._asked("build_embedding", part) or self._dense(part)
            return (choice,)
        if not isinstance(part, LinearPart) or part.num_experts:
            return (self._dense(part),)
        embedding = self.embeddings[part.tied_to] if part.tied_to else None
        shared = (
            Choice(part, None, embedding.plugin) if embedding and embedding.plan and embedding.plan.has_head else None
        )
        if shared and shared.plugin:
            return (shared,)
        return self._linear(part) or (shared or self._dense(part),)

    def _linear(self, part: LinearPart) -> tuple[Choice, ...]:
        """The choices of a linear that a plugin takes, whole or some members of it; () if no plugin takes any of it."""
        fused = self._asked("build_linear", part)
        if fused or len(part.members) == 1:
            return (fused,) if fused else ()
        alone = [part.alone(member) for member in part.members]
        choices = [self._asked("build_linear", member) for member in alone]
        pairs = zip(choices, alone, strict=True)
        return tuple(choice or self._dense(member) for choice, member in pairs) if any(choices) else ()

    def _asked(self, hook: str, part: Part) -> Choice | None:
        answer = self.ask(hook, part)
        return None if answer is None else Choice(part, *answer)

    def _dense(self, part: Part) -> Choice:
        return Choice(part, dense_plan(part, self.context, self.is_mapped))
