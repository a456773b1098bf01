"""Prompt lookup: draft the continuation of an earlier match of the last tokens.

Changes in the loop: `propose` returns up to `num_draft_tokens` tokens copied from the sequence itself, or from earlier answers
to the same user; several continuations are one tree. `stats.notes` counts the accepted tokens that came from earlier answers.
Exactness: identical. Costs: one index lookup per step, no model. Helps when the answer quotes the prompt, or says what others
of its kind said. Answers are remembered by salt, so no user's text is drafted for another.
Source: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; earlier answers: Oliaro et al. 2024, arXiv:2411.04975
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from pydantic import Field, model_validator

from pitlane import BadOption, Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl

MAX_USERS = 32  # whose answers are remembered at a time; 8,192 tokens of one take 6 MB
END = -1  # between answers; no token


class PromptLookup(Plugin):
    name, role, exactness = "prompt_lookup", "drafter", "identical"

    class Options(PluginOptions):
        num_draft_tokens: int = Field(8, ge=1, le=64, title="Draft length", description="most tokens drafted per step")
        max_ngram: int = Field(
            4, ge=1, le=16, title="Longest match", description="most last tokens that are looked up in the text before"
        )
        num_candidates: int = Field(
            1, ge=1, le=8, title="Continuations", description="how many continuations of a match are tried in a step"
        )
        min_ngram: int = Field(
            2, ge=1, le=16, title="Shortest match", description="fewest matching tokens that are enough for a draft"
        )
        history: int = Field(
            8192,
            ge=0,
            le=1_000_000,
            title="Remembered tokens",
            description="tokens of a user's earlier answers to draft from too; 0 remembers none",
        )

        @model_validator(mode="after")
        def _ordered(self) -> PromptLookup.Options:
            if self.min_ngram > self.max_ngram:
                raise BadOption(f"min_ngram must be at most max_ngram, got {self.min_ngram} and {self.max_ngram}")
            return self

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.histories: OrderedDict[str, History] = OrderedDict()  # by salt, the least recently used first

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        return [self._draft(seq, limit) for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)]

    def _draft(self, seq: Sequence, limit: int) -> Draft | None:
        lookup: Lookup = seq.state.setdefault(self.name, Lookup(NgramIndex(self.options)))
        lookup.settle(seq)
        lookup.own.extend(seq.token_ids)
        count = min(limit, self.options.num_draft_tokens)
        if count <= 0:
            return None
        known = self.histories.get(seq.salt)
        chains = self._continuations(seq.token_ids, lookup, known.indexes if known else [], count)
        return Draft.merged(chains) if len(chains) > 1 else Draft(chains[0]) if chains else None

    def _continuations(
        self, token_ids: list[int], lookup: Lookup, history: list[NgramIndex], count: int
    ) -> list[list[int]]:
        """What came behind the longest known suffixes, the best first: longer ones, the sequence's own, the latest."""
        found: list[list[int]] = []
        for n in range(min(self.options.max_ngram, len(token_ids)), self.options.min_ngram - 1, -1):
            suffix = tuple(token_ids[-n:])
            for index in (lookup.own, *history):
                for chain in index.behind(suffix, count):
                    if chain and chain not in found:
                        found.append(chain)
                        if index is lookup.own:
                            lookup.own_chains.append(chain)
                    if len(found) == self.options.num_candidates:
                        return found
        return found

    @hookimpl
    def sequence_finished(self, seq: Sequence) -> None:
        lookup: Lookup | None = seq.state.get(self.name)
        if lookup is not None:
            lookup.settle(seq)
            seq.notes[self.name] = {"replayed_tokens": lookup.num_replayed}
        if not self.options.history or not seq.num_completion_tokens:
            return
        known = self.histories.setdefault(seq.salt, History(self.options))
        self.histories.move_to_end(seq.salt)
        known.add(seq.token_ids[max(0, seq.num_prompt_tokens - self.options.max_ngram) :])
        if len(self.histories) > MAX_USERS:
            self.histories.popitem(last=False)


@dataclass(slots=True)
class Lookup:
    """One sequence: the index of its text, and how many accepted tokens came from earlier answers (replayed)."""

    own: NgramIndex
    own_chains: list[list[int]] = field(default_factory=list)  # of the latest draft, from the sequence's own text
    num_drafted_from: int = 0  # tokens of the sequence when that draft was made
    num_accepted: int = 0  # of all drafts before it
    num_replayed: int = 0

    def settle(self, seq: Sequence) -> None:
        """Count what was accepted of the latest draft."""
        accepted = seq.timing.num_accepted_tokens - self.num_accepted
        tokens = seq.token_ids[self.num_drafted_from : self.num_drafted_from + accepted]
        if all(chain[:accepted] != tokens for chain in self.own_chains):
            self.num_replayed += accepted
        self.own_chains.clear()
        self.num_drafted_from, self.num_accepted = seq.num_tokens, seq.timing.num_accepted_tokens


class NgramIndex:
    """Where the tokens behind each n-gram of a growing text stand; constant time per token and per lookup."""

    def __init__(self, options: PromptLookup.Options) -> None:
        self.options = options
        self.token_ids: list[int] = []
        self.num_indexed = 0
        self.places: dict[tuple[int, ...], tuple[int, ...]] = {}  # the latest first

    def extend(self, token_ids: list[int]) -> None:
        """Take in a text that begins as before: n-grams that end before its last token, so that a suffix never finds itself."""
        most, last = self.options.num_candidates, len(token_ids)
        for n in range(self.options.min_ngram, self.options.max_ngram + 1):
            first = max(n, self.num_indexed + 1)
            if first >= last:
                continue
            if most == 1 and last - first > 1:  # at the speed of C: a prompt of 700 tokens in 0.3 ms, one by one in 1.5
                ngrams = zip(*(token_ids[first - n + i : last - n + i] for i in range(n)), strict=True)
                self.places.update(zip(ngrams, zip(range(first, last)), strict=True))
                continue
            for stop in range(first, last):
                ngram = tuple(token_ids[stop - n : stop])
                self.places[ngram] = (stop, *self.places.get(ngram, ())[: most - 1])
        self.token_ids, self.num_indexed = token_ids, max(self.num_indexed, last - 1)

    def behind(self, ngram: tuple[int, ...], count: int) -> list[list[int]]:
        """Up to `count` tokens behind each of the latest occurrences of an n-gram, the latest first."""
        return [self._text(start, count) for start in self.places.get(ngram, ())]

    def _text(self, start: int, count: int) -> list[int]:
        tokens = self.token_ids[start : start + count]
        return tokens[: tokens.index(END)] if END in tokens else tokens


class History:
    """The latest answers to one user, at least half of `history` tokens: the older half goes when the newer one is full."""

    def __init__(self, options: PromptLookup.Options) -> None:
        self.options = options
        self.indexes = [NgramIndex(options)]  # the newest first

    def add(self, token_ids: SequenceOf[int]) -> None:
        """Remember an answer and the few tokens before it."""
        newest, most = self.indexes[0], max(1, self.options.history // 2)
        newest.extend([*newest.token_ids, *token_ids[-most:], END])
        if len(newest.token_ids) > most:
            self.indexes = [NgramIndex(self.options), newest]
