"""Lookahead decoding: Jacobi iterations fill a pool of n-grams, and the pool's n-grams are verified, all in one forward.

Changes in the loop: `propose` returns one tree: n-grams that begin with the last token, and a window of guesses of several
iterations; `after_verify` takes the window's next iteration and the n-grams that it completes.
Exactness: identical. Costs: (n - 1) * (window + candidates) more tokens in a forward; the pool is the sequence's own. Helps large
models, whose forward is bound by reading weights, on text with recurring phrases.
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
        window: int = Field(4, ge=1, le=32, title="Window", description="tokens guessed ahead; W in the paper")
        ngram: int = Field(
            4,
            ge=2,
            le=8,
            title="N-gram length",
            description="tokens of an n-gram, with the known first one; N in the paper",
        )
        candidates: int = Field(
            4, ge=1, le=32, title="Candidates", description="most n-grams verified per step; G in the paper"
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
        known = state.pool.tree(seq.token_ids[-1])
        tokens, parents = list(known.token_ids[:limit]), list((known.parents or ())[:limit])
        state.window_start = len(tokens)
        for level, row in enumerate(state.levels):
            for column, token in enumerate(row):
                above = len(tokens) - options.window if level else len(tokens) - 1 if column else -1
                tokens.append(token)
                parents.append(above)
        return Draft(tokens[:limit], parents[:limit])

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        state, width = seq.state.get(self.name), self.options.window
        if state is None:
            return
        stop = state.window_start + width * len(state.levels)
        if len(draft.token_ids) < stop:
            return  # the window was cut off
        state.advance(targets[1 + stop - width : 1 + stop])


class Pool:
    """N-grams by their first token, at most `most` of each, the latest last."""

    def __init__(self, ngram: int, most: int) -> None:
        self.ngram, self.most = ngram, most
        self.num_indexed = 0
        self.found: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, ngram: tuple[int, ...]) -> None:
        first, rest = ngram[0], ngram[1:]
        rests = self.found.get(first)
        if rests is None:
            self.found[first] = {rest: None}
            return
        rests.pop(rest, None)
        rests[rest] = None
        if len(rests) > self.most:
            del rests[next(iter(rests))]

    def grow(self, token_ids: list[int]) -> None:
        """Add the n-grams of the sequence itself, prompt and answer."""
        for stop in range(max(self.num_indexed + 1, self.ngram), len(token_ids) + 1):
            self.add(tuple(token_ids[stop - self.ngram : stop]))
        self.num_indexed = len(token_ids)

    def tree(self, first: int) -> Draft:
        """The n-grams that begin with a token, the latest first."""
        return Draft.merged(reversed(self.found.get(first, ())))


@dataclass(slots=True)
class State:
    """Of one sequence: its pool, and the window, one row per iteration, the oldest first."""

    pool: Pool
    levels: list[list[int]] = field(default_factory=list)
    window_start: int = 0

    def advance(self, row: list[int]) -> None:
        """Take the window's next iteration; once there are enough, each column completes an n-gram."""
        self.levels.append(row)
        if len(self.levels) == self.pool.ngram:
            for column in zip(*self.levels, strict=True):
                self.pool.add(column)
            del self.levels[0]
