"""Speculative decoding: a small draft model proposes tokens, the target verifies them all in one forward.

Changes in the loop: `propose` drafts a chain or a tree with the draft model, and draws with the target's noise.
Exactness: identical. Costs: one forward of the draft model per draft token, and its memory. Helps when the draft model imitates the
target well and is much faster. `pitlane distill` makes draft models; the bundled drafter is one of them.
Source: Leviathan et al. 2023, arXiv:2211.17192; trees: Miao et al. 2024, arXiv:2305.09781; noise: Daliri et al. 2024
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from pydantic import Field

from pitlane import Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl

if TYPE_CHECKING:
    from pitlane import BuildContext, Lane

BUNDLED = "bundled-drafter"


class Speculative(Plugin):
    name, role, exactness = "speculative", "drafter", "identical"

    class Options(PluginOptions):
        model: str = Field(
            BUNDLED, title="Draft model", description="bundled-drafter, a folder, a .gguf file or a Hugging Face id"
        )
        num_draft_tokens: int = Field(
            6, ge=1, le=32, title="Draft length", description="depth of the draft: most draft tokens accepted per step"
        )
        branching: int = Field(
            1,
            ge=1,
            le=4,
            title="Branches",
            description="candidates at each of the first two draft positions; 1 drafts a chain",
        )

    def refusal(self, context: BuildContext) -> str | None:
        """The bundled drafter has the tokenizer of the bundled model. Other draft models are checked when they are loaded."""
        if self.options.model != BUNDLED:
            return None
        from importlib import resources

        file = resources.files("pitlane.storage.bundled.drafter").joinpath("config.json")
        drafted = json.loads(file.read_text(encoding="utf-8"))["vocab_size"]
        own = context.config.vocab_size
        if own == drafted:
            return None
        return (
            f"{BUNDLED} drafts for the bundled model alone (a vocabulary of {drafted:,}, this model has {own:,}); make a "
            "draft model, `pitlane distill MODEL layers:0,1 FILES --out DRAFTER`, and set speculative.model to it"
        )

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        lane.open_drafter(self.options.model)

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        depth = self.options.num_draft_tokens
        branching = [self.options.branching if level < 2 else 1 for level in range(depth)]
        return limits.lane.open_drafter(self.options.model).draft(seqs, limits.num_draft_tokens, branching)
