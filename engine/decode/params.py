"""How tokens are chosen, and when an answer ends."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pitlane.engine.errors import BadOption


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling parameters of a request. temperature 0 is greedy. seed None: the engine draws a seed and reports it.

    top_k 0, top_p 1 and min_p 0 are off. stop: texts that end the answer; the answer leaves them out. logprobs: number of
    alternatives to report per token. 0 reports the chosen token alone, None no log-probabilities. Log-probabilities are those of
    the model, before penalties, plugins, temperature and truncation. n: number of answers. The answers share the prompt's KV, and
    take the sample indices `sample_index` to `sample_index + n - 1`.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    sample_index: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        from pitlane.engine.border import checked_sampling  # imports pydantic; `--help` must not wait for it

        for name, value in checked_sampling({item.name: getattr(self, item.name) for item in fields(self)}).items():
            object.__setattr__(self, name, value)
        if any(not text for text in self.stop):
            raise BadOption("stop must not hold an empty text; leave it out")

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
