"""A request and its running state.

`Request` holds the arguments of one sample and never changes. `KVState` describes the KV of the sequence. `Outlook` is the
pacing's estimate of the drafter's success on this sequence. Plugins write only the fields named in `Sequence`; the engine
writes all other fields.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from pitlane.engine.decode.draft import Draft
from pitlane.engine.decode.params import SamplingParams
from pitlane.engine.events import FinishReason
from pitlane.engine.kv.state import KVState
from pitlane.engine.pacing.belief import Outlook
from pitlane.engine.plan.plan import Plan
from pitlane.engine.text.detokenizer import Detokenizer
from pitlane.engine.text.prompt import Segment


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of one sample. sample_ids: sequence ids of all samples of the request, this sample included."""

    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    segments: tuple[Segment, ...] = ()
    salt: str = ""
    sample_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Timing:
    """Times and counters of one sequence. A time is in perf_counter seconds, and None until its event.

    gaps: seconds between two tokens; 0 = both tokens come from one step. float32, because an answer may be a million tokens long.
    plain_step_seconds: forward time that accepted draft tokens saved. draft_extra_seconds: forward time that drafts cost.
    """

    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    last_token: float | None = None
    gaps: array[float] = field(default_factory=lambda: array("f"))
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_extra_seconds: float = 0.0
    plain_step_seconds: float = 0.0
    plugin_seconds: dict[str, float] = field(default_factory=dict)

    def add_tokens(self, count: int, now: float) -> None:
        """Note `count` new tokens of one step, at least one."""
        if self.last_token is not None:
            self.gaps.append(now - self.last_token)
        self.gaps.extend([0.0] * (count - 1))
        self.last_token = now

    def charge(self, plugin: str, seconds: float) -> None:
        self.plugin_seconds[plugin] = self.plugin_seconds.get(plugin, 0.0) + seconds


@dataclass(slots=True, eq=False)
class Sequence:
    """The running state of one sample of a request. Plugins read it, and write `state[name]` and `notes[name]`.

    forks: the other samples, until the prompt is computed. is_streamed: a reader takes tokens during the run. state: objects of
    plugins, by plugin name. failed: error texts, by name of the failed plugin. notes: entries of plugins for the stats.
    """

    id: int
    request: Request
    plan: Plan
    token_ids: list[int]
    detokenizer: Detokenizer
    timing: Timing
    kv: KVState = field(default_factory=KVState)
    draft: Draft | None = None
    outlook: Outlook | None = None
    num_scheduled_tokens: int = 0
    num_preemptions: int = 0
    forks: list[Sequence] = field(default_factory=list)
    is_streamed: bool = False
    logprobs: list[dict[int, float]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.kv.num_computed_tokens

    @property
    def num_remaining_tokens(self) -> int:
        return self.request.sampling.max_tokens - self.num_completion_tokens

    @property
    def num_draft_tokens(self) -> int:
        return len(self.draft.token_ids) if self.draft is not None else 0

    @property
    def is_decoding(self) -> bool:
        """Whether only the last known token has no KV."""
        return self.num_uncomputed_tokens == 1

    @property
    def sample(self) -> int:
        """The index of this sample in the request."""
        return self.request.sample_ids.index(self.id)
