"""Every hook, in call order. pluggy registers and validates; order and folds are the engine's.

How results combine: first = the first implementation that returns something else than None; all = every one is called;
fold = each gets the previous one's result. Implementations run by `Plugin.stage`, then by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pitlane.engine.kv.pool import Pool
    from pitlane.engine.models.layers import Linear, LinearPart
    from pitlane.engine.run.attention import Attention
    from pitlane.engine.run.lane import Lane
    from pitlane.engine.types import BuildContext, Draft, Limits, PrefixMatch, Rows, Sequence, StepStats
    from pitlane.storage.types import Document

hookspec = pluggy.HookspecMarker("pitlane")

COMBINE: Mapping[str, str] = {
    "load_document": "first",
    "build_linear": "first",
    "build_op": "first",
    "build_attention": "first",
    "lane_opened": "all",
    "match_prefix": "first",
    "reclaim_blocks": "all",
    "block_sealed": "all",
    "propose": "first",
    "adjust_logits": "fold",
    "after_verify": "all",
    "step_finished": "all",
    "sequence_finished": "all",
    "engine_closed": "all",
}
VARIANT_HOOKS = frozenset({"load_model", "transform_weights", "build_linear"})
LANE_HOOKS = frozenset({"build_op", "build_attention", "build_kv_store", "build_runner"})
LOADING_HOOKS = VARIANT_HOOKS | LANE_HOOKS | {"lane_opened"}  # called for whoever asks for a plan: errors are theirs
HOST_HOOKS = frozenset({"load_document"})  # serve the host, not a plan: always on, nothing to toggle


@hookspec
def load_document(path: str, mime: str) -> Document | None:
    """Read a file into pages of text. Called in a child process with limits of time and memory. First.

    May change output: no plan is involved. Raise DocumentError with a message for people.
    """


@hookspec
def build_linear(parts: list[LinearPart], context: BuildContext) -> Linear | None:
    """Build one linear from its parts (fused: q, k, v or gate, up). Called at load: fused list first, then each part. First.

    Returns a callable [T, in_features] -> [T, sum of out_features], or None to decline. May change output as declared.
    """


@hookspec
def build_op(kind: str, context: BuildContext) -> Callable[..., Any] | None:
    """Give a lane's model one of its operations. Called once per lane and kind, at load. First.

    kind: `rms_norm` (x [T, D], weight [D], eps -> [T, D], fresh) or `silu_mul` ([T, 2 I] -> [T, I], fresh). May change output
    as declared.
    """


@hookspec
def build_attention(context: BuildContext) -> Attention | None:
    """Make the attention of a lane. Called once per lane, at load. First.

    Returns an object with `plan`, called once per step and KV group, and `__call__`, once per layer: q [T, H, D], fresh k and v
    [T, Hkv, D] -> [T, H, D]. May change output as declared.
    """


@hookspec
def lane_opened(lane: Lane) -> None:
    """Told that a plan will use a lane. Called once per plan and lane, in the asking thread, before its first request. All.

    The place to load what takes time (`lane.open_drafter`). A PitlaneError reaches whoever asked.
    """


@hookspec
def match_prefix(seq: Sequence, pool: Pool) -> PrefixMatch | None:
    """Find KV for the first tokens of a sequence. Called when it is to be admitted, before any compute. First.

    Returns blocks to share, and optionally a tail to copy or tensors to load; at least one prompt token is left to compute.
    Called again while the sequence waits for room, and after a preemption.
    Must not change output: KV is shared only for equal tokens, fingerprint and salt.
    """


@hookspec
def reclaim_blocks(pool: Pool, num_blocks: int) -> None:
    """Unlock blocks that the pool needs. Called when it runs dry, before any sequence is preempted. All."""


@hookspec
def block_sealed(seq: Sequence, index: int) -> None:
    """Told that block `index` of a sequence is full of committed tokens and will not change. All."""


@hookspec
def propose(seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None] | None:
    """Draft tokens for each sequence. Called once per step and plan, with its decoding sequences. First.

    Returns one Draft or None per sequence, of at most `limits.num_draft_tokens[i]` tokens: what context, memory and the governor
    leave; 0 is nothing. `limits.lane` opens draft models. Cannot change output: the engine verifies.
    """


@hookspec
def adjust_logits(rows: Rows) -> Any:
    """Change logits [R, V] before temperature and truncation. Called once per step and plan. Fold over `rows.logits`.

    Returns a tensor [R, V]. What a row is given may depend on `rows.path(i)`, never on draft or batch. May change output.
    """


@hookspec
def after_verify(seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
    """Told what the target says about a draft. Called after a draft is verified, before it is committed. All.

    targets: the target's token after the last known token, then after every draft token, rejected ones too. accepted: indices
    of the accepted draft tokens, in order. Cannot change output.
    """


@hookspec
def step_finished(stats: StepStats) -> None:
    """Told what a step did and took. Called after each step. All."""


@hookspec
def sequence_finished(seq: Sequence) -> None:
    """Told that a sequence ended, was aborted or failed; its state is dropped next. All."""


@hookspec
def engine_closed() -> None:
    """Told that the engine closes: finish writes, stop threads. All."""
