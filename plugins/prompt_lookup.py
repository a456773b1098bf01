"""Prompt lookup: draft the continuation of an earlier match of the last tokens.

Changes in the loop: `propose` returns up to `num_draft_tokens` tokens copied from the sequence itself;
several continuations are one tree.
Exactness: identical. Costs: one index lookup per step, no model. Helps when the answer quotes the prompt.
Source: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf

from pydantic import Field, model_validator

from pitlane import BadOption, Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl


class PromptLookup(Plugin):
    name, role, exactness = "prompt_lookup", "drafter", "identical"

    class Options(PluginOptions):
        num_draft_tokens: int = Field(8, ge=1, le=64, description="most tokens drafted per step")
        max_ngram: int = Field(4, ge=1, le=16, description="longest match of the last tokens that is tried")
        num_candidates: int = Field(1, ge=1, le=8, description="continuations tried per step, of the latest matches")
        min_ngram: int = Field(2, ge=1, le=16, description="shortest match that is good enough to draft from")

        @model_validator(mode="after")
        def _ordered(self) -> PromptLookup.Options:
            if self.min_ngram > self.max_ngram:
                raise BadOption(f"min_ngram must be at most max_ngram, got {self.min_ngram} and {self.max_ngram}")
            return self

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        return [self._draft(seq, limit) for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)]

    def _draft(self, seq: Sequence, limit: int) -> Draft | None:
        index = seq.state.setdefault(self.name, NgramIndex(self.options))
        count = min(limit, self.options.num_draft_tokens)
        starts = index.find(seq.token_ids) if count > 0 else []
        if not starts:
            return None
        chains = [seq.token_ids[start : start + count] for start in starts]
        return Draft(chains[0]) if len(chains) == 1 else Draft.merged(chains)


class NgramIndex:
    """Where the tokens behind each n-gram of a growing sequence stand; constant time per token and per lookup."""

    def __init__(self, options: PromptLookup.Options) -> None:
        self.options = options
        self.num_indexed = 0
        self.next_indices: dict[tuple[int, ...], deque[int]] = {}

    def find(self, token_ids: list[int]) -> list[int]:
        """Indices of the tokens behind earlier occurrences of the longest known suffixes, the best first."""
        self._extend(token_ids)
        found: dict[int, None] = {}
        for n in range(min(self.options.max_ngram, len(token_ids) - 1), self.options.min_ngram - 1, -1):
            for index in self.next_indices.get(tuple(token_ids[-n:]), ()):
                found[index] = None
                if len(found) == self.options.num_candidates:
                    return list(found)
        return list(found)

    def _extend(self, token_ids: list[int]) -> None:
        """Index the n-grams that end before the last token, so that a suffix never finds itself."""
        most = self.options.num_candidates
        for stop in range(self.num_indexed + 1, len(token_ids)):
            for n in range(self.options.min_ngram, min(self.options.max_ngram, stop) + 1):
                places = self.next_indices.setdefault(tuple(token_ids[stop - n : stop]), deque(maxlen=most))
                places.appendleft(stop)
        self.num_indexed = max(self.num_indexed, len(token_ids) - 1)
