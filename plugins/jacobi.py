"""Jacobi decoding: guess the next tokens, and let every forward correct all guesses at once.

Changes in the loop: `propose` returns a window of guesses; `after_verify` replaces each by what the target says at its place,
until the front of the window stands still and is accepted.
Exactness: identical. Costs: a wider forward, no model and no index. Helps on predictable text, alone by little.
Source: Santilli et al. 2023, arXiv:2305.10427
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from pydantic import Field

from pitlane import Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl


class Jacobi(Plugin):
    name, role, exactness = "jacobi", "drafter", "identical"

    class Options(PluginOptions):
        window: int = Field(6, ge=1, le=64, title="Window", description="tokens guessed ahead")

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        return [self._draft(seq, limit) for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)]

    def _draft(self, seq: Sequence, limit: int) -> Draft | None:
        guesses: list[int] = seq.state.setdefault(self.name, [])
        while len(guesses) < self.options.window:  # what followed the last token a window ago is as good a guess as any
            guesses.append(seq.token_ids[-1 - len(guesses) % seq.num_tokens])
        return Draft(guesses[:limit]) if limit else None

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        if self.name in seq.state:
            seq.state[self.name] = targets[len(accepted) + 1 :]
