"""The examples of docs/hooks.md: small plugins that implement every hook. Tests run them; docs/generate.py shows them.

A class that implements several hooks is shown at the hook of its role, or at its first hook.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pitlane import (
    CORE_FAMILIES,
    Document,
    Draft,
    EmbeddingPart,
    Families,
    Family,
    KVGroup,
    LinearPart,
    LinearPlan,
    Page,
    Part,
    Plugin,
    PrefixMatch,
    Rows,
    Sequence,
    SlidingWindow,
    StepStats,
    Tensors,
    Visibility,
    file_hash,
    hookimpl,
)

if TYPE_CHECKING:
    from pitlane import (
        Attention,
        Batch,
        BuildContext,
        Forward,
        KVStore,
        KVStorePlan,
        Lane,
        Limits,
        ModelSource,
        Output,
        RunnerContext,
    )


class Tables(Plugin):
    """Tables as documents."""

    name, exactness = "tables", "identical"

    @hookimpl
    def load_document(self, path: str, mime: str) -> Document | None:
        if mime != "text/csv":
            return None
        file = Path(path)
        text = file.read_text(encoding="utf-8").replace(",", " | ")
        return Document(file.name, mime, (Page(0, "1", text),), file_hash(file))


class Twin(Plugin):
    """Models of the architecture TwinForCausalLM, a Llama by another name, in `twin:<folder>`."""

    name, exactness = "twin", "identical"

    @hookimpl
    def register_models(self, registry: Families) -> None:
        llama: Family = next(family for family in CORE_FAMILIES if family.model_type == "llama")
        registry.add(replace(llama, architecture="TwinForCausalLM", model_type="twin", models="Twin"))

    @hookimpl
    def load_model(self, name: str) -> ModelSource | None:
        from pitlane import ModelSource

        scheme, _, folder = name.partition(":")
        families = Families(CORE_FAMILIES)
        self.register_models(families)
        return ModelSource.open(name, Path(folder), families) if scheme == "twin" else None


class RoundWeights(Plugin):
    """Weights with the precision of bfloat16, whatever the dtype."""

    name, exactness, stage = "round_weights", "approximate", 20

    @hookimpl
    def transform_weights(self, part: Part, tensors: Tensors) -> Tensors | None:
        if not isinstance(part, LinearPart):
            return None
        weight = tensors["weight"]
        return {**tensors, "weight": weight.bfloat16().to(weight.dtype)}


class PlainLinear(Plugin):
    """Linears by one matrix product."""

    name, role, exactness = "plain_linear", "linear", "rounding"

    @hookimpl
    def build_linear(self, part: LinearPart, context: BuildContext) -> LinearPlan | None:
        import torch

        def build(members: list[Tensors]) -> Callable[[Any], Any]:
            weight = torch.cat([member["weight"] for member in members]).to(context.device, context.dtype)
            return lambda x: x @ weight.T

        num_bytes = part.num_values * context.dtype.itemsize
        return None if part.bias else LinearPlan(num_bytes, 2 * num_bytes, build)


class PlainEmbedding(Plugin):
    """The embedding as an index into a table in the model's dtype."""

    name, exactness = "plain_embedding", "identical"

    @hookimpl
    def build_embedding(self, part: EmbeddingPart, context: BuildContext) -> LinearPlan | None:
        def build(members: list[Tensors]) -> Callable[[Any], Any]:
            table = members[0]["weight"].to(context.device, context.dtype)
            return lambda token_ids: table[token_ids]

        num_bytes = part.num_embeddings * part.dim * context.dtype.itemsize
        return LinearPlan(num_bytes, num_bytes, build)


class TorchNorm(Plugin):
    """The norm of torch."""

    name, exactness = "torch_norm", "rounding"

    @hookimpl
    def build_op(self, kind: str) -> Callable[..., Any] | None:
        from torch.nn.functional import rms_norm

        def norm(x: Any, weight: Any, eps: float) -> Any:
            return rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(weight.dtype)

        return norm if kind == "rms_norm" else None


class CountedAttention(Plugin):
    """The core's attention, and a count of its calls."""

    name, role, exactness = "counted_attention", "attention", "identical"
    num_calls = 0

    @hookimpl
    def build_attention(self, context: BuildContext) -> Attention | None:
        from pitlane import PlainAttention

        plugin = self

        class Counted(PlainAttention):
            def __call__(self, *arguments: Any) -> Any:
                plugin.num_calls += 1
                return super().__call__(*arguments)

        return Counted(context)


class WideKV(Plugin):
    """Keys and values in float64, whatever the dtype."""

    name, role, exactness = "wide_kv", "kv_store", "rounding"

    @hookimpl
    def build_kv_store(self, group: KVGroup, context: BuildContext) -> KVStorePlan | None:
        import torch

        from pitlane import DenseKV, KVStorePlan

        def build(num_blocks: int, block_size: int) -> KVStore:
            return DenseKV(group, num_blocks, block_size, torch.float64, context.device)

        bytes_per_token = 2 * len(group.layers) * group.num_kv_heads * group.head_dim * 8
        return KVStorePlan("dense", bytes_per_token, build)


class ShortSight(Plugin):
    """Every token sees the last 64 tokens."""

    name, role, exactness = "short_sight", "eviction", "approximate"

    @hookimpl
    def trim_cache(self, group: KVGroup) -> Visibility | None:
        return SlidingWindow(64)


class Stopwatch(Plugin):
    """The time of all forwards."""

    name, exactness = "stopwatch", "identical"
    seconds = 0.0

    @hookimpl
    def build_runner(self, forward: Forward, context: RunnerContext) -> Forward | None:
        def timed(batch: Batch) -> Output:
            started = perf_counter()
            output = forward(batch)
            self.seconds += perf_counter() - started
            return output

        return timed


class Table(dict[Any, Any]):
    """A dict that a lane can hold."""

    def close(self) -> None:
        self.clear()


class Successors(Plugin):
    """Draft the token that followed the last token in an earlier text of the same user."""

    name, role, exactness = "successors", "drafter", "identical"

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        lane.state.setdefault(self.name, Table())

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None] | None:
        table = limits.lane.state[self.name]
        followers = [table.get((seq.request.salt, seq.token_ids[-1])) for seq in seqs]
        pairs = zip(followers, limits.num_draft_tokens, strict=True)
        return [Draft([token]) if token is not None and limit else None for token, limit in pairs]

    @hookimpl
    def after_verify(self, seq: Sequence, draft: Draft, targets: list[int], accepted: list[int]) -> None:
        counts = seq.state.setdefault(self.name, {"right": 0, "wrong": 0})
        counts["right" if accepted else "wrong"] += 1

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        salt = seq.request.salt
        lane.state[self.name].update({(salt, token): follower for token, follower in pairwise(seq.token_ids)})
        seq.notes[self.name] = seq.state.get(self.name, {})


class FirstBlock(Plugin):
    """Prompts of a user that begin with the same block of tokens share its KV."""

    name, exactness = "first_block", "identical"

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        lane.state.setdefault(self.name, Table())

    @hookimpl
    def match_prefix(self, seq: Sequence, lane: Lane) -> PrefixMatch | None:
        column = lane.state[self.name].get(self._key(seq, lane))
        return PrefixMatch([column]) if column and seq.num_tokens > lane.pool.block_size else None

    @hookimpl
    def reclaim_blocks(self, lane: Lane, num_blocks: SequenceOf[int]) -> None:
        columns = lane.state[self.name]
        while columns:
            lane.pool.unlock(columns.popitem()[1])

    @hookimpl
    def block_sealed(self, seq: Sequence, index: int, lane: Lane) -> None:
        columns, key = lane.state[self.name], self._key(seq, lane)
        if index == 0 and key not in columns:
            columns[key] = seq.kv.column(0)
            lane.pool.lock(columns[key])

    def _key(self, seq: Sequence, lane: Lane) -> tuple[str, tuple[int, ...]]:
        return seq.request.salt, tuple(seq.token_ids[: lane.pool.block_size])


class NoEcho(Plugin):
    """No token comes twice in a row."""

    name, exactness = "no_echo", "steering"

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        logits = rows.logits.clone()
        for row, index in enumerate(rows.seq_index):
            last = [rows.seqs[index].token_ids[-1], *rows.path(row)][-1]
            logits[row, last] = float("-inf")
        return logits


class Counter(Plugin):
    """The number of steps, and the tokens in them."""

    name, exactness = "counter", "identical"
    num_steps = num_tokens = 0

    @hookimpl
    def step_finished(self, stats: StepStats) -> None:
        self.num_steps += 1
        self.num_tokens += stats.num_tokens
