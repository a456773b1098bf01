"""Self-speculation: the target's own first layers draft, all of it verifies.

Changes in the loop: `propose` returns a chain that the first layers, norm and head draw with the target's own noise.
Exactness: identical. Costs: the early layers' share of a forward per draft token; no second model, no memory. Helps when the model
was trained with early exits (`pitlane train --exit-layers`, LayerSkip); of others, early layers predict little.
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
            description="how many first layers draft; 0 takes the model's trained exit, or a quarter of its layers",
        )
        num_draft_tokens: int = Field(4, ge=1, le=32, title="Draft length", description="most tokens drafted per step")

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        lane.early_exit(self.options.num_layers)

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        drafter = limits.lane.early_exit(self.options.num_layers)
        return drafter.draft(seqs, limits.num_draft_tokens, [1] * self.options.num_draft_tokens)
