"""Lookahead decoding: Jacobi iterations fill a pool of n-grams, and the same forward verifies n-grams of the pool.

Changes in the loop: `propose` drafts one tree: the pool's n-grams that begin with the last token, and a window with the guesses of
the last `ngram` - 1 iterations. `after_verify` takes the window's next iteration from the target's tokens; every column of the
window then is an n-gram, and enters the pool.
Exactness: identical. Costs: (`ngram` - 1) * (`window` + `candidates`) more tokens in a forward. Every sequence has its own pool.
Helps large models on text that repeats phrases: their forward is bound by reading weights, so more tokens cost little.
Source: Fu et al. 2024, arXiv:2402.02057
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from pydantic import Field

from pitlane import Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl


class Lookahead(Plugin):
    name, role, exactness = "lookahead", "drafter", "identical"

    class Options(PluginOptions):
        window: int = Field(
            4, ge=1, le=32, title="Window", description="number of tokens to guess ahead; W in the paper"
        )
        ngram: int = Field(
            4,
            ge=2,
            le=8,
            title="N-gram length",
            description="tokens in an n-gram, its known first token included; N in the paper",
        )
        candidates: int = Field(
            4, ge=1, le=32, title="Candidates", description="most n-grams to verify per step; G in the paper"
        )

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        return [self._draft(seq, limit) for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)]

    def _draft(self, seq: Sequence, limit: int) -> Draft | None:
        if not limit:
            return None
        options = self.options
        state = seq.state.get(self.name)
        if state is None:
            state = seq.state[self.name] = State(Pool(options.ngram, options.candidates))
        state.pool.grow(seq.token_ids)
        if not state.levels:
            state.levels = [[seq.token_ids[-1 - i % seq.num_tokens] for i in range(options.window)]]
        ngrams = state.pool.tree(seq.token_ids[-1])
        tokens, parents = list(ngrams.token_ids[:limit]), list((ngrams.parents or ())[:limit])
        state.window_start = len(tokens)
        for level, row in enumerate(state.levels):
            for column, token in enumerate(row):
                parent = len(tokens) - options.window if level else len(tokens) - 1 if column else -1
                tokens.append(token)
                parents.append(parent)
        return Draft(tokens[:limit], parents[:limit])

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        state, width = seq.state.get(self.name), self.options.window
        if state is None:
            return
        stop = state.window_start + width * len(state.levels)
        if len(draft.token_ids) < stop:
            return  # the limit cut the window: its next iteration is not known
        state.advance(targets[1 + stop - width : 1 + stop])


class Pool:
    """N-grams by their first token: at most `limit` for a token, the latest last. Stores an n-gram without its first token."""

    def __init__(self, ngram: int, limit: int) -> None:
        self.ngram, self.limit = ngram, limit
        self.num_indexed = 0
        self.rests: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, ngram: tuple[int, ...]) -> None:
        first, rest = ngram[0], ngram[1:]
        rests = self.rests.get(first)
        if rests is None:
            self.rests[first] = {rest: None}
            return
        rests.pop(rest, None)
        rests[rest] = None
        if len(rests) > self.limit:
            del rests[next(iter(rests))]

    def grow(self, token_ids: list[int]) -> None:
        """Add the n-grams of a sequence's known tokens that are not in the pool yet."""
        for stop in range(max(self.num_indexed + 1, self.ngram), len(token_ids) + 1):
            self.add(tuple(token_ids[stop - self.ngram : stop]))
        self.num_indexed = len(token_ids)

    def tree(self, first: int) -> Draft:
        """The n-grams that begin with token `first`, merged to a tree, the latest first."""
        return Draft.merged(reversed(self.rests.get(first, ())))


@dataclass(slots=True)
class State:
    """One sequence: its pool, and its window with one level per iteration, the oldest first."""

    pool: Pool
    levels: list[list[int]] = field(default_factory=list)
    window_start: int = 0  # index of the window's first token in the draft

    def advance(self, row: list[int]) -> None:
        """Append the window's next iteration. With `ngram` iterations every column is an n-gram, and the oldest iteration goes."""
        self.levels.append(row)
        if len(self.levels) == self.pool.ngram:
            for column in zip(*self.levels, strict=True):
                self.pool.add(column)
            del self.levels[0]
