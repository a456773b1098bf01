"""The queue of KV operations: order, receivers of saved KV, and operations after which no forward follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pitlane import Copy, Load, OperationQueue, Plugin, SamplingParams, Save, Sequence, hookimpl
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.kv.store import DenseKV, execute
from pitlane.engine.plan.registry import PluginRegistry


def test_operations_run_in_the_order_of_the_queue() -> None:
    store = DenseKV(KVGroup((0,), 1, 2), 2, 4, torch.float32, torch.device("cpu"))
    tensors = {"group.0": torch.arange(20.0).view(2, 1, 1, 5, 2)}
    queue, saved = OperationQueue(), []
    queue.append(Load([[4, 5, 6]], tensors, [1]))
    queue.append(Copy(0, [4, 5], [0, 1]))
    queue.save([[0, 1, 6]], saved.append)
    queue.append(Copy(0, [4], [6]))
    operations = queue.take()
    assert [type(operation) for operation in operations] == [Load, Copy, Save, Copy] and queue.take() == []
    queue.deliver(execute([store], operations))
    assert torch.equal(saved[0]["group.0"], tensors["group.0"][:, :, :, 1:4])
    assert torch.equal(store.export([6]), tensors["group.0"][:, :, :, 1:2])


def test_a_receiver_that_fails_keeps_no_tensors_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    queue, received = OperationQueue(), []

    def fail(tensors: Mapping[str, Tensor]) -> None:
        raise OSError("disk full")

    queue.save([[0]], fail)
    queue.save([[0]], received.append)
    queue.deliver({operation.key: {} for operation in queue.take() if isinstance(operation, Save)})
    assert received == [{}] and "disk full" in caplog.text


def test_kv_is_saved_though_no_step_follows(make_engine: Any) -> None:
    """The last request of a lane, with an error of the receiver in another request before: both answers are whole."""

    class Saver(Plugin):
        name, exactness = "saver", "identical"
        saved: ClassVar[list[int]] = []

        @hookimpl
        def sequence_finished(self, seq: Sequence, lane: Any) -> None:
            slots = [lane.pool.slots(seq.kv, 0, 0, seq.kv.num_computed_tokens)]
            lane.pool.queue.save(
                slots, lambda tensors: self.saved.append(tensors["group.0"].shape[3] // (len(slots[0]) - 14))
            )

    registry = PluginRegistry.load()
    registry.add(Saver)
    engine = make_engine(registry=registry, plugins=["saver"])
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    answers = [engine.generate(list(range(10, 10 + count)), params).token_ids for count in (10, 11)]
    engine.worker.call(lambda: None).result()
    assert [len(answer) for answer in answers] == [5, 5]
    assert Saver.saved == [15], "14 tokens have KV in the first request: its receiver divides by zero"
    assert engine.lane_of(engine.default_plan).pool.queue.operations == []


def test_a_lane_that_its_last_request_leaves_carries_out_its_operations(make_engine: Any) -> None:
    """An operation that a plugin built fails in the middle of an answer, and the request goes on in another lane."""

    class Fails(Plugin):
        name, exactness = "fails", "identical"
        is_armed = False

        @hookimpl
        def build_op(self, kind: str, context: Any) -> Any:
            return self.norm if kind == "rms_norm" else None

        def norm(self, x: Tensor, weight: Tensor, eps: float, *rest: Any) -> Tensor:
            if Fails.is_armed:
                raise RuntimeError("broken")
            return torch.nn.functional.rms_norm(x, tuple(weight.shape), weight, eps)

    class Keeper(Plugin):
        name, exactness = "keeper", "identical"
        saved: ClassVar[list[int]] = []

        @hookimpl
        def block_sealed(self, seq: Sequence, index: int, lane: Any) -> None:
            Fails.is_armed = True

        @hookimpl
        def sequence_finished(self, seq: Sequence, lane: Any) -> None:
            if seq.finish_reason is None:
                slots = [lane.pool.slots(seq.kv, 0, 0, 33)]
                lane.pool.queue.save(slots, lambda tensors: self.saved.append(tensors["group.0"].shape[3]))

    registry = PluginRegistry.load()
    registry.add(Fails)
    registry.add(Keeper)
    engine = make_engine(registry=registry, plugins=["keeper"])
    plan = engine.plan({"fails": {}, "keeper": {}})
    result = engine.generate(list(range(40)), SamplingParams(max_tokens=5, ignore_eos=True), plan=plan)
    assert list(result.stats["failed"]) == ["fails"] and len(result.token_ids) == 5
    engine.worker.call(lambda: None).result()
    assert engine.lanes.by_key[plan.lane_key].pool.queue.operations == [] and Keeper.saved == [33]
