"""The sampling of an answer: the user's values first, then the values of the model's maker, then the default of Pitlane.

A chat without documents is sampled, in a terminal, in a pipe and on the page: a small model that always takes the likeliest token
soon repeats itself without end. Its seed is reported, and `--seed` gives the same text again. An answer over documents is greedy:
it shall quote, not vary. Also greedy are a raw prompt, the lines of `--batch`, a comparison, and the default of the Python face,
`SamplingParams()`. A user or a maker who names a temperature decides alone: no other default applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pitlane import SamplingParams

CHAT: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}


@dataclass(frozen=True, slots=True)
class Sampling:
    """The values that the user has set, by the names of SamplingParams; a name that is missing has its default.

    Raises BadOption for a value out of range.
    """

    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.greedy()

    def greedy(self) -> SamplingParams:
        """The parameters of an answer over documents, of a raw prompt, and of a line of `--batch`."""
        return SamplingParams(**self.given)

    def chat(self, recommended: Mapping[str, float]) -> SamplingParams:
        """The parameters of a chat without documents. recommended: values of the model's maker (`ModelSource.sampling`)."""
        return SamplingParams(**{**({} if "temperature" in self.given else chat_values(recommended)), **self.given})

    def params(self, recommended: Mapping[str, float], *, is_chat: bool) -> SamplingParams:
        """The parameters of an answer. is_chat: there are no documents, and the prompt has a chat template."""
        return self.chat(recommended) if is_chat else self.greedy()

    def changed(self, **values: Any) -> Sampling:
        """These values with some of them set anew."""
        return Sampling({**self.given, **values})


def chat_values(recommended: Mapping[str, float]) -> dict[str, float]:
    """The default values of a chat."""
    return {**({} if "temperature" in recommended else CHAT), **recommended}


def chat_words(recommended: Mapping[str, float]) -> str:
    """The default values of a chat in words: `0.7, top-p 0.9`."""
    values = {"temperature": 0.0, **chat_values(recommended)}
    others = (f", {name.replace('top_', 'top-').replace('_', ' ')} {value:g}" for name, value in values.items())
    return f"{values['temperature']:g}" + "".join(list(others)[1:])


def seed_note(params: SamplingParams, seed: int) -> str:
    """The seed as the end of a line of stats, if the answer was drawn with it."""
    return f" · seed {seed}" if params.temperature else ""
