"""Self-speculation: the target's first layers draft, the whole target verifies.

Changes in the loop: `propose` drafts a chain with the target's first layers, norm and head, and draws with the target's noise.
Exactness: identical. Costs: one pass through the first layers per draft token; no second model, no memory. Helps models that were
trained with early exits (`pitlane train --exit-layers`, LayerSkip). The first layers of other models predict little.
Source: Elhoushi et al. 2024, LayerSkip; Zhang et al. 2023, arXiv:2309.08168
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from pydantic import Field

from pitlane import Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl

if TYPE_CHECKING:
    from pitlane import Lane


class SelfSpeculation(Plugin):
    name, role, exactness = "self_speculation", "drafter", "identical"

    class Options(PluginOptions):
        num_layers: int = Field(
            0,
            ge=0,
            title="Drafting layers",
            description="number of first layers that draft; 0: up to the model's trained exit, else a quarter of its layers",
        )
        num_draft_tokens: int = Field(4, ge=1, le=32, title="Draft length", description="most tokens drafted per step")

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        lane.early_exit(self.options.num_layers)

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        drafter = limits.lane.early_exit(self.options.num_layers)
        return drafter.draft(seqs, limits.num_draft_tokens, [1] * self.options.num_draft_tokens)
