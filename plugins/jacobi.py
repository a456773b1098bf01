"""Jacobi decoding: guess the next tokens, and let every forward correct all guesses at once.

Changes in the loop: `propose` drafts a window of guesses. The engine accepts the right guesses at its front, and `after_verify`
replaces the others by the target's tokens at their positions.
Exactness: identical. Costs: more rows in a forward; no model and no index. Helps predictable text, a little.
Source: Santilli et al. 2023, arXiv:2305.10427
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from pydantic import Field

from pitlane import Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl


class Jacobi(Plugin):
    name, role, exactness = "jacobi", "drafter", "identical"

    class Options(PluginOptions):
        window: int = Field(6, ge=1, le=64, title="Window", description="number of tokens to guess ahead")

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        return [self._draft(seq, limit) for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)]

    def _draft(self, seq: Sequence, limit: int) -> Draft | None:
        guesses: list[int] = seq.state.setdefault(self.name, [])
        while len(guesses) < self.options.window:  # any start will do: take the last known tokens, backwards
            guesses.append(seq.token_ids[-1 - len(guesses) % seq.num_tokens])
        return Draft(guesses[:limit]) if limit else None

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        if self.name in seq.state:
            seq.state[self.name] = targets[len(accepted) + 1 :]
