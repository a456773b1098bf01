"""Plain data that the rooms pass to each other: parameters, sequences, drafts, rows, events, results.

Half-open token ranges throughout. Of a sequence's known tokens, `[0, num_computed_tokens)` have their KV in the store;
`[0, num_cached_tokens)` of them came from a prefix hit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pitlane.engine.errors import BadOption

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from torch import Tensor

    from pitlane.engine.models.config import ModelConfig
    from pitlane.engine.pacing.belief import Drafting
    from pitlane.engine.plan.plan import Plan
    from pitlane.engine.run.batch import Operation
    from pitlane.engine.run.lane import Lane
    from pitlane.engine.text.detokenizer import Detokenizer

FinishReason: TypeAlias = Literal["stop", "length", "aborted", "error"]
Column: TypeAlias = tuple[int, ...]  # one block id per KV group
MAX_SAMPLES = 32


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. temperature 0 is greedy; a seed not given is random and reported.

    top_k 0, top_p 1 and min_p 0 are off. stop: texts that end the answer and are cut from it. logprobs: number of
    alternatives reported per token (0 = the chosen one's only, None = none); they are the model's own, before penalties, plugins,
    temperature and truncation. n: answers to the same prompt, which is computed
    and held once; they are drawn with the sample indices `sample_index` to `sample_index + n - 1`.
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
        from pitlane.engine.border import checked_sampling  # needs pydantic, which `--help` does not wait for

        for name, value in checked_sampling({each.name: getattr(self, each.name) for each in fields(self)}).items():
            object.__setattr__(self, name, value)
        if any(not text for text in self.stop):
            raise BadOption("stop must not hold an empty text; leave it out")

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table. window: tokens a query sees, its own included; None = all before it."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Segment:
    """Prompt tokens `[start, end)` are a document's."""

    start: int
    end: int
    document_hash: str
    title: str


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens. `parents[i] < i` is the index of the parent draft token, -1 for the last known token.

    Any prefix of the list is a valid draft. Without parents it is a chain.
    """

    token_ids: SequenceOf[int]
    parents: SequenceOf[int] | None = None

    @classmethod
    def merged(cls, chains: Iterable[SequenceOf[int]]) -> Draft:
        """One tree of several continuations, the first one's tokens first; where they agree they share nodes."""
        tokens: list[int] = []
        parents: list[int] = []
        children: dict[tuple[int, int], int] = {}
        for chain in chains:
            node = -1
            for token in chain:
                if (node, token) not in children:
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = children[node, token]
        return cls(tokens, parents)


@dataclass(frozen=True, slots=True)
class Limits:
    """Most draft tokens per sequence: what context, answer length, memory, budget and the governor leave.

    lane: where drafters with a model get it (`open_drafter`, `early_exit`).
    """

    num_draft_tokens: list[int]
    lane: Lane


@dataclass(slots=True)
class PrefixMatch:
    """KV found for the first tokens of a sequence.

    blocks: full blocks to share. tail: copy the first n tokens of one more block. Or, instead of both, loading: a future
    of saved tensors for `num_loading_tokens` tokens (None: there is nothing to read; the match is asked for again).
    """

    blocks: list[Column] = field(default_factory=list)
    tail: tuple[Column, int] | None = None
    loading: Future[Mapping[str, Tensor] | None] | None = None
    num_loading_tokens: int = 0


@dataclass(slots=True)
class Rows:
    """Wanted logits of one plan: `logits [R, V]`; row i belongs to `seqs[seq_index[i]]` and follows row `parents[i]` (-1: none)."""

    logits: Tensor
    seqs: list[Sequence]
    seq_index: list[int]
    parents: list[int]
    token_ids: list[int]  # the draft token a row stands for; of a first row, the last known token

    def path(self, row: int) -> list[int]:
        """Draft tokens between the known ones and this row's prediction, in order."""
        path = []
        while self.parents[row] >= 0:
            path.append(self.token_ids[row])
            row = self.parents[row]
        return path[::-1]


@dataclass(slots=True)
class BuildContext:
    """What the `build_*` hooks are told."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class StepStats:
    """One step: seconds of the forward and of all of it, and what it worked on."""

    num_seqs: int
    num_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    forward_seconds: float
    seconds: float


@dataclass(slots=True)
class Timing:
    """Accumulators of one sequence; times are perf_counter seconds, None until they happen."""

    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    token_times: list[float] = field(default_factory=list)
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_extra_seconds: float = 0.0
    plain_step_seconds: float = 0.0
    plugin_seconds: dict[str, float] = field(default_factory=dict)

    def charge(self, plugin: str, seconds: float) -> None:
        self.plugin_seconds[plugin] = self.plugin_seconds.get(plugin, 0.0) + seconds


@dataclass(slots=True, eq=False)
class Sequence:
    """The running state of one request. Plugins read it, and write `state[their name]` and `notes[their name]` only."""

    id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    plan: Plan
    detokenizer: Detokenizer
    timing: Timing
    stop_token_ids: frozenset[int]
    segments: tuple[Segment, ...] = ()
    salt: str = ""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_sealed_blocks: int = 0
    num_preemptions: int = 0
    samples: tuple[int, ...] = ()  # ids of all sequences of the request, its own included
    forks: list[Sequence] = field(default_factory=list)  # the other samples, until the prompt is computed
    is_streamed: bool = False  # somebody reads the tokens as they come
    draft: Draft | None = None
    drafting: Drafting | None = None  # the governor's
    prefix: PrefixMatch | None = None
    block_tables: list[list[int]] = field(default_factory=list)  # per group; -1 = dropped
    logprobs: list[dict[int, float]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)  # asked for by plugins, carried out after the hook
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # what plugins say in the stats
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """All but the last known token have their KV."""
        return self.num_uncomputed_tokens == 1

    @property
    def is_in_step(self) -> bool:
        """The step under way computes tokens of it, or writes a piece of its saved prefix."""
        return self.num_scheduled_tokens > 0 or (self.prefix is not None and self.num_computed_tokens > 0)

    @property
    def num_remaining_tokens(self) -> int:
        return self.sampling.max_tokens - self.num_completion_tokens

    def column(self, index: int) -> Column:
        """Block `index` of every group."""
        return tuple(table[index] for table in self.block_tables)


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """num_computed of num_prompt tokens are computed; num_cached of them came from a prefix hit."""

    num_computed_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text (may be empty while a character is incomplete) and the tokens of one step, of one of the request's samples."""

    text: str
    token_ids: tuple[int, ...]
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request; of one with several samples, of all of them."""

    result: Result
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request; `to_json()` is the document that `--json` prints.

    samples: of a request with `n > 1`, the results of all its samples in order; the first one's is this result as well.
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


Event: TypeAlias = PrefillProgress | TextDelta | Finished
