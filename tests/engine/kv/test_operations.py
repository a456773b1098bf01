"""The queue of KV operations: order, receivers of saved KV, and operations after which no forward follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pitlane import (
    Copy,
    Draft,
    Limits,
    Load,
    OperationQueue,
    PitlaneError,
    Plugin,
    SamplingParams,
    Save,
    Segment,
    Sequence,
    hookimpl,
)
from pitlane.engine.kv.state import KVGroup, KVState
from pitlane.engine.kv.store import DenseKV, execute
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.text.tokenizer import Prompt


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


SAMPLED = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, seed=3)
DOCUMENT = list(range(256)) * 4
ASKED = Prompt([*DOCUMENT, *range(45)], (Segment(0, len(DOCUMENT), "0" * 64, "d.pdf"),), "")
CASES: dict[str, dict[str, Any]] = {
    "load": {},
    "load beside drafts": {"self_speculation": {"num_layers": 1}},
    "copy": {"oracle": {}},
}


class Oracle(Plugin):
    """Drafts the true answer behind a wrong token, so that accepted tokens move."""

    name, role, exactness = "oracle", "drafter", "identical"
    answer: ClassVar[list[int]] = []

    @hookimpl
    def propose(self, seqs: list[Sequence], limits: Limits) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True):
            rest = self.answer[seq.num_completion_tokens :][: max(0, limit - 1)]
            wrong = 255 - rest[0] if rest else 0
            drafts.append(Draft([wrong, *rest], [-1, -1, *range(1, len(rest))]) if rest else None)
        return drafts


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("case", CASES)
def test_an_operation_that_fails_ends_its_requests_and_leaves_no_wrong_kv(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The prefix of a document is loaded, or accepted nodes of a draft tree are moved. Both change KV that a request needs."""
    registry = PluginRegistry.load()
    registry.add(Oracle)
    prompt = ASKED if case != "copy" else list(range(40))
    expected = Oracle.answer = make_engine().generate(prompt, SAMPLED).token_ids
    plugins = {"prefix_cache": {}, **CASES[case]}
    if case != "copy":
        first = make_engine(plugins=plugins)
        first.generate(prompt, SAMPLED)
        first.close()
    engine = make_engine(plugins=plugins, registry=registry)
    lane = engine.lane_of(engine.default_plan)
    for store in lane.stores:
        store.data.fill_(3.0)
    name = case.split()[0]
    working, num_calls = getattr(DenseKV, name), 0

    def fail_once(*args: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise MemoryError("no memory for the copy")
        working(*args)

    if case == "load beside drafts":
        reader = iter(engine.submit(list(range(40)), SamplingParams(max_tokens=3000, ignore_eos=True)))
        next(reader)
    monkeypatch.setattr(DenseKV, name, fail_once)
    with pytest.raises(PitlaneError, match="stored KV could not be moved: MemoryError: no memory for the copy"):
        engine.generate(prompt, SAMPLED)
    for _ in range(2):
        assert engine.generate(prompt, SAMPLED).token_ids == expected
    assert num_calls > 1 and lane.pool.queue.operations == []


def test_an_operation_that_fails_ends_every_sequence_with_kv_and_no_other(make_engine: Any) -> None:
    engine = make_engine()
    lane = engine.lane_of(engine.default_plan)
    streams = [engine.submit([seed] * 40, SamplingParams(max_tokens=3000, ignore_eos=True)) for seed in (1, 2)]
    readers = [iter(stream) for stream in streams]
    for reader in readers:
        next(reader)
    received: list[Any] = []
    late: list[Any] = []

    def fail() -> None:
        lane.pool.queue.append(Copy(0, [0], [10**9]))
        lane.pool.queue.save([[0]], received.append)
        late.append(engine.submit([7] * 40, SamplingParams(max_tokens=3)))

    engine.worker.call(fail).result()
    for reader in readers:
        with pytest.raises(PitlaneError, match="stored KV could not be moved: "):
            list(reader)
    assert len(late[0].result().token_ids) == 3
    assert received == [] and not lane.pool.queue._sinks


def test_a_warm_up_carries_out_the_operations_that_wait(make_engine: Any) -> None:
    """A released block waits to be saved, and the warm-up of another plan writes into it."""
    engine = make_engine()
    lane = engine.lane_of(engine.default_plan)
    saved: list[Any] = []

    def save_and_warm_up() -> None:
        for store in lane.stores:
            store.data.fill_(3.0)
        kv = KVState()
        assert lane.pool.reserve(kv, 64)
        lane.pool.queue.save([lane.pool.slots(kv, 0, 0, 64)], lambda tensors: saved.append(tensors["group.0"].clone()))
        lane.pool.release(kv)
        lane.warm_up(64)

    engine.worker.call(save_and_warm_up).result()
    assert (saved[0] == 3.0).all() and not lane.pool.queue._sinks
