"""A batch is plain data: it runs padded, and after a journey through bytes, with the same logits and the same KV."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from pitlane import Batch, Copy, Forward, Load, Output, Plugin, RunnerContext, SamplingParams, Save, hookimpl
from pitlane.engine.run.batch import GroupBatch

OPERATIONS = {operation.__name__: operation for operation in (Copy, Load, Save)}
TENSORS = ("token_ids", "positions", "parents", "query_start", "logit_rows")
GROUP_TENSORS = ("slots", "block_table", "window_start", "sink_positions", "places")  # the last two may be None
PROMPTS = [list(range(40)), list(range(7, 90)), [3, 1, 4, 1, 5] * 30]
PLAN: dict[str, dict[str, Any]] = {"prompt_lookup": {"min_ngram": 1, "num_candidates": 4}, "prefix_cache": {}}


def to_bytes(batch: Batch) -> bytes:
    """Tensors as safetensors, all other values as JSON in the metadata."""
    tensors = {name: getattr(batch, name) for name in TENSORS}
    for index, group in enumerate(batch.groups):
        values = {name: getattr(group, name) for name in GROUP_TENSORS}
        tensors |= {f"{index}.{name}": tensor for name, tensor in values.items() if tensor is not None}
    operations: list[Any] = []
    for number, operation in enumerate(batch.operations):
        values = asdict(operation)
        for name, tensor in values.pop("tensors", {}).items():
            tensors[f"operation {number}/{name}"] = tensor
        operations.append([type(operation).__name__, values])
    num_sinks = [group.num_sinks for group in batch.groups]
    metadata = {"operations": operations, "block_size": batch.block_size, "num_sinks": num_sinks}
    return save({name: t.contiguous() for name, t in tensors.items()}, {"batch": json.dumps(metadata)})


def from_bytes(data: bytes) -> Batch:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["batch"])
    tensors = load(data)
    operations = []
    for number, (kind, values) in enumerate(metadata["operations"]):
        own = f"operation {number}/"
        carried: dict[str, Tensor] = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
        operations.append(OPERATIONS[kind](**values, **({"tensors": carried} if kind == "Load" else {})))
    groups = [
        GroupBatch(**{name: tensors.get(f"{index}.{name}") for name in GROUP_TENSORS}, num_sinks=count)
        for index, count in enumerate(metadata["num_sinks"])
    ]
    return Batch(*(tensors[n] for n in TENSORS), tuple(groups), tuple(operations), metadata["block_size"])


class Remote(Plugin):
    """Sends every batch through bytes, as a rank would receive it."""

    name, exactness = "remote", "identical"
    kinds: ClassVar[set[str]] = set()

    @hookimpl
    def build_runner(self, forward: Forward, context: RunnerContext) -> Forward:
        def remote(batch: Batch) -> Output:
            self.kinds.update(type(operation).__name__ for operation in batch.operations)
            return forward(from_bytes(to_bytes(batch)))

        return remote


class Padded(Plugin):
    """Pads every batch by some tokens, and by some rows."""

    name, exactness, stage = "padded", "identical", 1

    @hookimpl
    def build_runner(self, forward: Forward, context: RunnerContext) -> Forward:
        null_blocks = [store.null_block for store in context.stores]

        def padded(batch: Batch) -> Output:
            num_rows = len(batch.logit_rows)
            if batch.num_tokens:
                batch = batch.padded(batch.num_tokens + 5, num_rows + 3, null_blocks)
            output = forward(batch)
            return output._replace(logits=output.logits[:num_rows])

        return padded


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize(
    "names, temperature",
    [
        (["remote"], 0.0),
        (["padded"], 0.9),
        (["remote", "padded"], 0.9),
        pytest.param(["remote", "padded"], 0.0, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_the_same_padded_and_from_bytes(make_engine: Any, names: list[str], temperature: float) -> None:
    from pitlane.engine.plan.registry import PluginRegistry

    registry = PluginRegistry.load()
    for plugin in (Remote, Padded):
        registry.add(plugin)
    engine = make_engine(registry=registry, plugins=PLAN)
    plan = engine.plan(PLAN | {name: {} for name in names})
    for seed, prompts in enumerate((PROMPTS, [prompt + [9] * 20 for prompt in PROMPTS])):  # the second time with hits
        sampling = SamplingParams(max_tokens=40, ignore_eos=True, temperature=temperature, seed=seed)
        expected = engine.generate(prompts, sampling)
        results = engine.generate(prompts, sampling, plan=plan)
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]
        assert sum(r.stats["draft_tokens"] for r in results) > 0
    assert "remote" not in names or "Copy" in Remote.kinds, "trees and hits move KV"


@pytest.mark.parametrize(
    "plugin",
    [
        {"key_norm_eviction": {"budget": 64, "recent": 32, "interval": 32}},
        {"attention_sinks": {"num_sinks": 4, "window": 32, "stride": 32}},
    ],
    ids=lambda plugin: next(iter(plugin)),
)
def test_batches_without_dropped_blocks_are_padded_and_from_bytes(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, plugin: dict[str, Any]
) -> None:
    from pitlane.engine.kv import pool
    from pitlane.engine.plan.registry import PluginRegistry

    monkeypatch.setattr(pool, "NUM_LEFT_OUT", 1)
    registry = PluginRegistry.load()
    for runner in (Remote, Padded):
        registry.add(runner)
    engine = make_engine(registry=registry, plugins=plugin)
    plan = engine.plan({**plugin, "remote": {}, "padded": {}, "span_attention": {}})
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.9, seed=1)
    expected = [result.token_ids for result in engine.generate(PROMPTS, sampling)]
    assert [result.token_ids for result in engine.generate(PROMPTS, sampling, plan=plan)] == expected


def test_padding_writes_into_the_null_block_alone(make_engine: Any) -> None:
    engine = make_engine()
    lane = engine.lane_of(engine.default_plan)
    (store,) = lane.stores
    batch = lane.builder.build([])
    null_blocks = [store.null_block]
    before = [keys.clone() for keys in store.tensors(0)]
    with torch.inference_mode():
        output = lane.runner.forward(batch.padded(3, 2, null_blocks))
    assert output.logits.shape == (2, engine.loader.vocab_size)
    size, first = batch.block_size, store.null_block * batch.block_size
    for old, new in zip(before, store.tensors(0), strict=True):
        assert new.shape[1] == first + size
        torch.testing.assert_close(old[:, :first], new[:, :first], equal_nan=True)
