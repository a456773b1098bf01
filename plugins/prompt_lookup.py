"""Prompt lookup: find the last tokens earlier in the text, and draft the tokens that followed them there.

Changes in the loop: `propose` drafts up to `num_draft_tokens` tokens from the sequence itself, or from earlier answers to the same
user; several continuations make a tree. `stats.notes` counts the accepted tokens that came from earlier answers.
Exactness: identical. Costs: one index lookup per step; no model. Helps when the answer quotes the prompt or resembles an earlier
answer. Answers are remembered per salt, so one user's text is never drafted for another user.
Source: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; earlier answers: Oliaro et al. 2024, arXiv:2411.04975
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from pydantic import Field, model_validator

from pitlane import BadOption, Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl

MAX_USERS = 32  # users whose answers are remembered; the 8,192 tokens of a user take 6 MB
END = -1  # marks the end of an answer; not a token id


class PromptLookup(Plugin):
    name, role, exactness = "prompt_lookup", "drafter", "identical"

    class Options(PluginOptions):
        num_draft_tokens: int = Field(8, ge=1, le=64, title="Draft length", description="most tokens drafted per step")
        max_ngram: int = Field(
            4, ge=1, le=16, title="Longest match", description="longest run of last tokens to look up"
        )
        num_candidates: int = Field(
            1, ge=1, le=8, title="Continuations", description="number of continuations to draft per step"
        )
        min_ngram: int = Field(
            2, ge=1, le=16, title="Shortest match", description="shortest run of last tokens to look up"
        )
        history: int = Field(
            8192,
            ge=0,
            le=1_000_000,
            title="Remembered tokens",
            description="number of tokens of a user's earlier answers to keep and draft from; 0 keeps none",
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
        history = self.histories.get(seq.salt)
        chains = self._continuations(seq.token_ids, lookup, history.indexes if history else [], count)
        return Draft.merged(chains) if len(chains) > 1 else Draft(chains[0]) if chains else None

    def _continuations(
        self, token_ids: list[int], lookup: Lookup, history: list[NgramIndex], count: int
    ) -> list[list[int]]:
        """The tokens behind earlier matches of the last tokens, best first: longest match, then own text, then latest."""
        chains: list[list[int]] = []
        for n in range(min(self.options.max_ngram, len(token_ids)), self.options.min_ngram - 1, -1):
            suffix = tuple(token_ids[-n:])
            for index in (lookup.own, *history):
                for chain in index.behind(suffix, count):
                    if chain and chain not in chains:
                        chains.append(chain)
                        if index is lookup.own:
                            lookup.own_chains.append(chain)
                    if len(chains) == self.options.num_candidates:
                        return chains
        return chains

    @hookimpl
    def sequence_finished(self, seq: Sequence) -> None:
        lookup: Lookup | None = seq.state.get(self.name)
        if lookup is not None:
            lookup.settle(seq)
            seq.notes[self.name] = {"replayed_tokens": lookup.num_replayed}
        if not self.options.history or not seq.num_completion_tokens:
            return
        history = self.histories.setdefault(seq.salt, History(self.options))
        self.histories.move_to_end(seq.salt)
        history.add(seq.token_ids[max(0, seq.num_prompt_tokens - self.options.max_ngram) :])
        if len(self.histories) > MAX_USERS:
            self.histories.popitem(last=False)


@dataclass(slots=True)
class Lookup:
    """One sequence: the index of its text, and the number of accepted tokens that came from earlier answers."""

    own: NgramIndex
    own_chains: list[list[int]] = field(default_factory=list)  # chains of the latest draft that came from `own`
    num_drafted_from: int = 0  # length of the sequence at the latest draft
    num_accepted: int = 0  # accepted tokens of the sequence at the latest draft
    num_replayed: int = 0  # accepted tokens from earlier answers

    def settle(self, seq: Sequence) -> None:
        """Count the accepted tokens of the latest draft: they are replayed if no chain of the own text holds them."""
        accepted = seq.timing.num_accepted_tokens - self.num_accepted
        tokens = seq.token_ids[self.num_drafted_from : self.num_drafted_from + accepted]
        if all(chain[:accepted] != tokens for chain in self.own_chains):
            self.num_replayed += accepted
        self.own_chains.clear()
        self.num_drafted_from, self.num_accepted = seq.num_tokens, seq.timing.num_accepted_tokens


class NgramIndex:
    """The places behind each n-gram of a growing text. Constant time per token and per lookup."""

    def __init__(self, options: PromptLookup.Options) -> None:
        self.options = options
        self.token_ids: list[int] = []
        self.num_indexed = 0
        self.places: dict[tuple[int, ...], tuple[int, ...]] = {}  # per n-gram, indices into token_ids, the latest first

    def extend(self, token_ids: list[int]) -> None:
        """Index the new tokens of a longer text. N-grams that end at its last token wait: a suffix must not match itself."""
        num_places, last = self.options.num_candidates, len(token_ids)
        for n in range(self.options.min_ngram, self.options.max_ngram + 1):
            first = max(n, self.num_indexed + 1)
            if first >= last:
                continue
            if num_places == 1 and last - first > 1:  # runs in C: 0.3 ms for a prompt of 700 tokens, the loop 1.5 ms
                ngrams = zip(*(token_ids[first - n + i : last - n + i] for i in range(n)), strict=True)
                self.places.update(zip(ngrams, zip(range(first, last)), strict=True))
                continue
            for stop in range(first, last):
                ngram = tuple(token_ids[stop - n : stop])
                self.places[ngram] = (stop, *self.places.get(ngram, ())[: num_places - 1])
        self.token_ids, self.num_indexed = token_ids, max(self.num_indexed, last - 1)

    def behind(self, ngram: tuple[int, ...], count: int) -> list[list[int]]:
        """Up to `count` tokens behind each place of an n-gram, the latest place first."""
        return [self._text(start, count) for start in self.places.get(ngram, ())]

    def _text(self, start: int, count: int) -> list[int]:
        tokens = self.token_ids[start : start + count]
        return tokens[: tokens.index(END)] if END in tokens else tokens


class History:
    """The latest answers to one user, in two indexes of `history` / 2 tokens: when the newer is full, the older goes."""

    def __init__(self, options: PromptLookup.Options) -> None:
        self.options = options
        self.indexes = [NgramIndex(options)]  # at most two, the newer first

    def add(self, token_ids: SequenceOf[int]) -> None:
        """Remember an answer. `token_ids` begins a few tokens before it, so that its first tokens have n-grams too."""
        newest, capacity = self.indexes[0], max(1, self.options.history // 2)
        newest.extend([*newest.token_ids, *token_ids[-capacity:], END])
        if len(newest.token_ids) > capacity:
            self.indexes = [NgramIndex(self.options), newest]
