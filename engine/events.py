"""The events of a request, its result, and the numbers of a step that plugins receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "aborted", "error"]


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Progress of a prompt. num_cached_tokens: computed tokens that came from a prefix cache."""

    num_computed_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text and tokens of one sample. The text is empty while a character is incomplete."""

    text: str
    token_ids: tuple[int, ...]
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a sample. The reader of a `Stream` gets one `Finished`, after all samples of the request have ended."""

    result: Result
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request; `to_json()` is the document that `--json` prints.

    samples: the results of all samples, in order; empty for a single sample. The other fields belong to the first sample.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: dict[str, Any]
    logprobs: list[dict[int, float]] | None = None
    samples: tuple[Result, ...] = ()

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": self.stats,
        }
        if self.logprobs is not None:
            document["logprobs"] = self.logprobs
        if self.samples:
            document["samples"] = [sample.to_json() for sample in self.samples]
        return document


@dataclass(slots=True)
class StepStats:
    """Numbers of one step. forward_seconds: time of the forward; seconds: time of the whole step."""

    num_seqs: int
    num_tokens: int
    num_prompt_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    forward_seconds: float
    seconds: float


Event: TypeAlias = PrefillProgress | TextDelta | Finished
