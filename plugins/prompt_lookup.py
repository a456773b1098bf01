"""Prompt lookup: draft the continuation of an earlier match of the last tokens.

Changes in the loop: `propose` returns up to `num_draft_tokens` tokens copied from the sequence itself.
Exactness: identical. Costs: one index lookup per step, no model. Helps when the answer quotes the prompt.
Source: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from pydantic import Field, model_validator

from pitlane import BadOption, Draft, Limits, Plugin, PluginOptions, Sequence, hookimpl


class PromptLookup(Plugin):
    name, role, exactness = "prompt_lookup", "drafter", "identical"

    class Options(PluginOptions):
        num_draft_tokens: int = Field(8, ge=1, le=64, description="most tokens drafted per step")
        max_ngram: int = Field(4, ge=1, le=16, description="longest match of the last tokens that is tried")
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
        index = seq.state.setdefault(self.name, NgramIndex(self.options.min_ngram, self.options.max_ngram))
        start = index.find(seq.token_ids)
        count = min(limit, self.options.num_draft_tokens)
        if start is None or count <= 0:
            return None
        return Draft(seq.token_ids[start : start + count])


@dataclass(slots=True)
class NgramIndex:
    """Where the token behind each n-gram of a growing sequence stands; the latest occurrence wins."""

    min_ngram: int
    max_ngram: int
    num_indexed: int = 0
    next_index: dict[tuple[int, ...], int] = field(default_factory=dict)

    def find(self, token_ids: list[int]) -> int | None:
        """Index of the token behind an earlier occurrence of the longest known suffix of `token_ids`."""
        self._extend(token_ids)
        for n in range(min(self.max_ngram, len(token_ids) - 1), self.min_ngram - 1, -1):
            found = self.next_index.get(tuple(token_ids[-n:]))
            if found is not None:
                return found
        return None

    def _extend(self, token_ids: list[int]) -> None:
        """Index the n-grams that end before the last token, so that a suffix never finds itself."""
        for stop in range(self.num_indexed + 1, len(token_ids)):
            for n in range(self.min_ngram, min(self.max_ngram, stop) + 1):
                self.next_index[tuple(token_ids[stop - n : stop])] = stop
        self.num_indexed = max(self.num_indexed, len(token_ids) - 1)
