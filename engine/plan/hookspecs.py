"""The signature of every hook, in call order. pluggy checks that an implementation fits its signature.

`hookspec` declares how results combine, what the hook belongs to and which role may implement it (`HookSpec`). Implementations run
in the order of `Plugin.stage`, then of the plugins' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from pitlane.engine.plan.hooks import Combine, HookSpec, Kind
from pitlane.engine.plan.plugin import Role

if TYPE_CHECKING:
    from pitlane.engine.decode.draft import Draft
    from pitlane.engine.decode.rows import Rows
    from pitlane.engine.events import StepStats
    from pitlane.engine.kv.state import KVGroup, PrefixMatch
    from pitlane.engine.kv.store import KVStorePlan
    from pitlane.engine.kv.visibility import Visibility
    from pitlane.engine.models.build_context import BuildContext
    from pitlane.engine.models.families.family import Families
    from pitlane.engine.models.parts import EmbeddingPart, LinearPart, LinearPlan, Part, Tensors
    from pitlane.engine.models.source import ModelSource
    from pitlane.engine.run.batch import Attention
    from pitlane.engine.run.lane import Lane
    from pitlane.engine.run.limits import Limits
    from pitlane.engine.run.runner import Forward, RunnerContext
    from pitlane.engine.sequence import Sequence
    from pitlane.storage.types import Document

SPECS: dict[str, HookSpec] = {}
_MARKER = pluggy.HookspecMarker("pitlane")
Function = TypeVar("Function", bound=Callable[..., Any])


def hookspec(
    combine: Combine,
    kind: Kind = "step",
    role: Role | None = None,
    folds: str | None = None,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Function], Function]:
    """Declare a hook. renamed: former names of arguments, and their names now; a plugin with a former name runs with a warning.

    pluggy knows a former name as one more argument of the signature, which follows the others.
    """

    def declare(function: Function) -> Function:
        name = function.__name__
        SPECS[name] = HookSpec(name, combine, kind, role, folds, renamed)
        warnings = {
            former: DeprecationWarning(f"{name}({former}) is now {name}({now}); it goes with version 2.0 of the API")
            for former, now in renamed.items()
        }
        return _MARKER(function, warn_on_impl_args=warnings)

    return declare


@hookspec("first", kind="host")
def load_document(path: str, mime: str) -> Document | None:
    """Read a file into pages of text. Called in a child process with limits of time and memory.

    The document loaders serve every plan. Raise DocumentError with a message for people.
    """


@hookspec("all", kind="host")
def register_models(registry: Families) -> None:
    """Add model families: `registry.add(Family(...))`. Called when the plugin is loaded; the families serve every plan.

    `add` raises ValueError if a name of the family is taken. Then none of the plugin's families is added, and the plugin does
    not load.
    """


@hookspec("first", kind="host", renamed={"source": "name"})
def load_model(name: str, source: str) -> ModelSource | None:
    """Open a model by its name, or a file by its path. `source` is the former name of `name`.

    Called for every name except `bundled`, `bundled-drafter`, `smollm2`, `pip:...`, `random:<preset>` and folders. Returns a
    ModelSource, or None for a name that the plugin does not know. If all return None, the core opens a `.gguf` file, and takes any
    other name as a Hugging Face id.
    Raise ModelError with a message for people.
    """


@hookspec("fold", kind="variant", folds="tensors")
def transform_weights(part: Part, tensors: Tensors, context: BuildContext) -> Tensors | None:
    """Change the tensors of one part of the checkpoint before it is built. Called at load. Fold over `tensors`.

    part: a linear of the checkpoint, a norm, an embedding or another tensor. tensors: {"weight": ..., "bias": ...} as stored, on
    the CPU; do not write to them. Returns new tensors of the same names and shapes, or None for no change. May change output.
    """


@hookspec("first", kind="variant", role="linear")
def build_linear(part: LinearPart, context: BuildContext) -> LinearPlan | None:
    """Plan a linear before any tensor is read. Called with the fused part (q, k, v or gate, up); after None, with each member.

    Returns a LinearPlan, or None to decline. Its `build` gets the tensors of every member, and returns a callable
    [T, in_features] -> [T, out_features]. May change output within the plugin's exactness.
    """


@hookspec("first", kind="variant")
def build_embedding(part: EmbeddingPart, context: BuildContext) -> LinearPlan | None:
    """Plan the embedding. Called before anything is read.

    Returns a LinearPlan, or None to decline. Its `build` returns a callable: token ids [T] -> a new tensor [T, dim] in
    `context.dtype`. With `has_head`, the callable of a tied part has an attribute `linear`: the head over the same table. May
    change output within the plugin's exactness.
    """


@hookspec("first", kind="lane")
def build_op(kind: str, context: BuildContext) -> Callable[..., Any] | None:
    """Build one operation of a model. Called at load, once per kind for a lane and for every draft model.

    kind: `rms_norm` (x [T, D], weight [D], eps -> [T, D] in the weight's dtype); and the model's activation, `silu_mul` or
    `gelu_mul` ([T, 2 I] -> [T, I]). The result is a new tensor. The residual stream x is float32 where `context.dtype` is bfloat16
    or float16; so a norm takes float32 and `context.dtype`. Then the fused kinds, which the model calls instead of plain
    operations: `add_rms_norm` (x, out [T, D], weight [D], eps -> x + out in x's dtype and its norm in the weight's dtype; out has
    x's dtype or `context.dtype`), used if the same plugin gives `rms_norm`; and
    `rope_store` (qk [T, H + Hkv, D], v [T, Hkv, D], cos, sin [T, 1, D], keys, values [Hkv, S, D], slots [T] -> qk rotated, a
    new tensor; it also writes keys and v to the slots), used for layers with RoPE over the core's KV store. At last `sample`:
    logits [R, V] and lists of R values (noise keys, temperatures, top_k, top_p, min_p) -> token ids [R]. May change output within
    the plugin's exactness.
    """


@hookspec("first", kind="lane", role="attention")
def build_attention(context: BuildContext) -> Attention | None:
    """Build the attention of a model. Called at load, once for a lane and for every draft model.

    Returns an object with `prepare`, called once per step and KV group, and `__call__`, once per layer: q [T, H, D], new k and v
    [T, Hkv, D] -> [T, H, D]. May change output within the plugin's exactness.
    """


@hookspec("first", kind="lane", role="kv_store")
def build_kv_store(group: KVGroup, context: BuildContext) -> KVStorePlan | None:
    """Choose the KV store of a group. Called once per lane and group, at load, before memory is taken.

    Returns a `KVStorePlan`, or None for the core's dense store. An attention that cannot read the format is refused. May change
    output within the plugin's exactness.
    """


@hookspec("first", kind="lane", role="eviction")
def trim_cache(group: KVGroup, context: BuildContext) -> Visibility | None:
    """Narrow the tokens that the positions of a KV group see. Called at load, once per group of a lane and of every draft model.

    Returns a `Visibility`, or None. Blocks before the start of the next position are given back, except those of its sinks. An
    `Eviction` chooses blocks to give back by their keys. May change output within the plugin's exactness.
    """


@hookspec("fold", kind="lane", folds="forward")
def build_runner(forward: Forward, context: RunnerContext) -> Forward | None:
    """Wrap the forward of a lane, or replace it. Called once per lane and draft model, at load. Fold over `forward`.

    Returns a callable that turns a `Batch` into an `Output`, or None. A batch without tokens has operations alone. May change
    output within the plugin's exactness.
    """


@hookspec("all", kind="opening")
def lane_opened(lane: Lane) -> None:
    """Prepare a lane for a plan. Called once per plan and lane before the plan's first request, never on the engine's thread.

    Load draft models here (`lane.open_drafter`). Put an object that outlives the plugin's options into `lane.state[name]`: all
    plans with this plugin share it, and its `close()` is called when the lane is dropped. A PitlaneError reaches the request.
    """


@hookspec("first")
def match_prefix(seq: Sequence, lane: Lane) -> PrefixMatch | None:
    """Find KV for the first tokens of a sequence. Called before the sequence is admitted, and before any compute.

    Returns blocks to share and optionally a tail to copy, or tensors to load instead. Leave at least one token to compute.
    Called again while the sequence waits for room, and after a preemption.
    Must not change output: KV is shared only for equal tokens, fingerprint and salt.
    """


@hookspec("all")
def reclaim_blocks(lane: Lane, num_blocks: SequenceOf[int]) -> None:
    """Unlock at least `num_blocks[group]` blocks of every KV group if possible.

    Called when too few are free, before a sequence waits or is preempted. `lane.pool.unlock` takes a column in part: -1 for a group
    keeps its block.
    """


@hookspec("all")
def block_sealed(seq: Sequence, index: int, lane: Lane) -> None:
    """Note that block `index` of a sequence is full of committed tokens and will not change."""


@hookspec("first", role="drafter")
def propose(seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None] | None:
    """Draft tokens for each sequence. Called once per step and plan, with the plan's decoding sequences.

    Returns a Draft or None per sequence. `limits.num_draft_tokens[i]` limits draft i: context, memory and pacing set it.
    `limits.lane` opens draft models. Cannot change output: the engine verifies every draft.
    """


@hookspec("fold")
def adjust_logits(rows: Rows) -> Any:
    """Change logits [R, V] before temperature and truncation. Called once per step and plan. Fold over `rows.logits`.

    Returns a tensor [R, V]. The change of a row may depend on `rows.path(i)`, never on draft or batch. May change output.
    """


@hookspec("all")
def after_verify(seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
    """Learn from a verified draft. Called after a draft is verified, before it is committed.

    targets: tokens of the target model after the last known token, then after every draft token, also a rejected token. accepted:
    indices of the accepted draft tokens, in order. Cannot change output.
    """


@hookspec("all")
def step_finished(stats: StepStats) -> None:
    """Learn from the numbers of a step. Called after every step."""


@hookspec("all")
def sequence_finished(seq: Sequence, lane: Lane) -> None:
    """Note that a sequence leaves its lane: it ended, or goes on in another lane. Then `seq.state` is cleared."""
