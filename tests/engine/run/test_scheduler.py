"""Scheduling: budget, order, chunks, preemption, prefixes. `Bench.step` takes the place of the loop and the model."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any, cast

import pytest
import torch

from pitlane import Copy, KVState, Load, PrefixMatch, PromptTooLong, SamplingParams, Sequence, StepStats
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import Column, KVGroup
from pitlane.engine.pacing.budget import MIN_TOKENS, StepBudget
from pitlane.engine.pacing.pacing import Pacing
from pitlane.engine.run.prefixes import LOAD_RATE
from pitlane.engine.run.scheduler import Scheduler, shares
from pitlane.engine.sequence import Request, Timing
from tests.integrity import assert_integrity

SIZE = 4
GROUPS = (KVGroup((0,), 1, 8), KVGroup((1,), 1, 8, window=6))


def make_seq(number: int, num_tokens: int) -> Sequence:
    return Sequence(
        id=number,
        request=Request(num_tokens, SamplingParams(), seed=0),
        plan=cast(Any, None),
        token_ids=[(7 * number + i) % 100 for i in range(num_tokens)],
        detokenizer=cast(Any, None),
        timing=Timing(0.0),
    )


class Bench:
    """A scheduler and its sequences. Every new token is 1."""

    def __init__(self, num_blocks: int = 100, budget: int = 16, max_seqs: int = 8) -> None:
        self.pool = Pool(GROUPS, [num_blocks] * len(GROUPS), SIZE, "fingerprint", max_step_tokens=1000)
        self.matches: dict[int, PrefixMatch] = {}
        self.idle: list[Column] = []  # columns that a cache holds and gives back on demand
        self.asked: list[int] = []  # ids of the sequences that a match was asked for
        self.scheduler = Scheduler(self.pool, budget, max_seqs, self.match, self.reclaim, Pacing(budget))
        self.history: dict[int, list[int]] = {}

    def match(self, seq: Sequence) -> PrefixMatch | None:
        self.asked.append(seq.id)
        match = self.matches.get(seq.id)
        if match is None or any(block not in self.idle for block in match.blocks):
            return None
        return PrefixMatch([*match.blocks], match.tail, match.loading, match.num_loading_tokens)

    def reclaim(self, num_blocks: Any) -> None:
        for column in [column for column in self.idle if self.pool.is_idle(column)][: max(num_blocks)]:
            self.idle.remove(column)
            self.pool.unlock(column)

    def add(self, number: int, num_tokens: int) -> Sequence:
        seq = make_seq(number, num_tokens)
        self.scheduler.add(seq)
        return seq

    def cache(self, num_blocks: int) -> list[Column]:
        """Give the cache some columns."""
        kv = KVState()
        assert self.pool.reserve(kv, num_blocks * SIZE)
        columns = [kv.column(index) for index in range(num_blocks)]
        for column in columns:
            self.pool.lock(column)
        self.pool.release(kv)
        self.idle += columns
        return columns

    def step_all(self, count: int) -> list[Sequence]:
        """Run several steps; return the sequences that run then."""
        for _ in range(count):
            self.step()
        return self.scheduler.running

    def step(self) -> dict[int, int]:
        """Run a step, check the invariants, and return the scheduled tokens by sequence id."""
        scheduled = self.scheduler.schedule()
        counts = {seq.id: seq.num_scheduled_tokens for seq in scheduled}
        assert len(counts) == len(scheduled), "no sequence is scheduled twice"
        assert all(seq in self.scheduler.running for seq in scheduled)
        for seq in scheduled:
            assert 0 < seq.num_scheduled_tokens <= seq.num_uncomputed_tokens
            stop = seq.kv.num_computed_tokens + seq.num_scheduled_tokens
            assert len(seq.kv.block_tables[0]) * SIZE >= stop
            seq.kv.num_computed_tokens = stop
            seq.num_scheduled_tokens = 0
            if seq.num_uncomputed_tokens == 0:
                seq.token_ids.append(1)
            self.pool.drop(seq.kv, seq.kv.num_computed_tokens // SIZE * SIZE)
            self.history.setdefault(seq.id, []).append(counts[seq.id])
        assert [seq.id for seq in self.scheduler.running] == sorted(seq.id for seq in self.scheduler.running)
        assert_integrity(self.pool, [seq.kv for seq in self.scheduler.seqs], lambda: list(self.idle))
        self.pool.queue.take()
        return counts

    def took(self, seconds: float, num_tokens: int = 1, num_prompt_tokens: int = 0) -> None:
        """Tell pacing how long the forward of a step took."""
        stats = StepStats(1, num_tokens, num_prompt_tokens, 0, 0, seconds, seconds)
        self.scheduler.pacing.after(stats, [])


# ---- budget and chunks


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench(budget=16)
    bench.add(0, 37)
    assert [bench.step() for _ in range(4)] == [{0: 16}, {0: 16}, {0: 5}, {0: 1}]


def test_prompts_share_the_rest_of_the_budget_oldest_first() -> None:
    bench = Bench(budget=16)
    for number, length in enumerate((10, 10, 12)):
        bench.add(number, length)
    assert bench.step() == {0: 10, 1: 6}
    assert bench.step() == {0: 1, 1: 4, 2: 11}
    assert bench.step() == {0: 1, 1: 1, 2: 1}
    assert bench.step() == {0: 1, 1: 1, 2: 1}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    bench = Bench(budget=16, num_blocks=200)
    bench.add(0, 400)
    bench.step()
    bench.add(1, 12)
    assert [bench.step() for _ in range(3)] == [{0: 8, 1: 8}, {0: 12, 1: 4}, {0: 15, 1: 1}]


def test_short_prompts_leave_half_of_the_budget_to_the_oldest() -> None:
    bench = Bench(budget=16, num_blocks=200, max_seqs=64)
    bench.add(0, 400)
    for number in range(1, 50):
        bench.add(number, 10)
        counts = bench.step()
        assert counts[0] >= (16 - sum(count == 1 for count in counts.values())) // 2 - 1
        for seq in [seq for seq in bench.scheduler.running if seq.num_completion_tokens > 2]:
            bench.scheduler.remove(seq)


@pytest.mark.parametrize(
    "left, budget, expected",
    [
        ([], 9, []),
        ([5], 9, [5]),
        ([20], 9, [9]),
        ([20, 20], 9, [9, 0]),
        ([20, 3], 9, [6, 3]),
        ([20, 3, 2], 9, [5, 2, 2]),
        ([20, 9, 9], 0, [0, 0, 0]),
        ([7, 1, 1], 100, [7, 1, 1]),
    ],
)
def test_shares(left: list[int], budget: int, expected: list[int]) -> None:
    assert shares(left, budget) == expected


def test_shares_with_limits() -> None:
    """A long prompt that may compute little now is still the longest: the shorter prompt comes first."""
    assert shares([5000, 300], 512, [32, 256]) == [32, 256]
    assert shares([5000, 300], 200, [256, 256]) == [100, 100]
    assert shares([300, 5000], 200, [256, 256]) == [200, 0]


class Machine:
    """A machine that reads the weights in 100 ms and computes a token in 5 ms; a forward takes the longer of both."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def step(self) -> float:
        prompt_ids = {seq.id for seq in self.bench.scheduler.running if not seq.is_decoding}
        counts = self.bench.step()
        num_tokens = sum(counts.values())
        seconds = max(0.1, 0.005 * num_tokens)
        num_prompt_tokens = sum(count for number, count in counts.items() if number in prompt_ids)
        self.bench.took(seconds, num_tokens, num_prompt_tokens)
        return seconds


def test_beside_a_stream_the_budget_is_a_time() -> None:
    bench = Bench(num_blocks=2000, budget=512)
    machine = Machine(bench)
    reader = bench.add(0, 3)
    reader.is_streamed = True
    quiet = [machine.step() for _ in range(5)][-1]
    prompt = bench.add(1, 4000)
    times = []
    while not prompt.is_decoding:
        times.append(machine.step())
    settled = times[5:-1]
    assert max(times) <= 2.5 * quiet
    assert min(settled) >= 1.7 * quiet, "the prompt gets the time that the stream can spare"
    assert len(times) <= 4000 / 35 + 6


def test_without_a_stream_the_budget_is_the_whole_step() -> None:
    bench = Bench(num_blocks=2000, budget=512)
    machine = Machine(bench)
    bench.add(0, 3)
    for _ in range(5):
        machine.step()
    bench.add(1, 4000)
    assert bench.step() == {0: 1, 1: 511}


def test_the_budget_recovers_after_a_slow_step() -> None:
    budget = StepBudget()
    budget.aim(0.1)
    for _ in range(30):
        budget.took(budget.num_tokens, max(0.1, 0.005 * budget.num_tokens))
    settled = budget.num_tokens
    assert 0.16 <= 0.005 * settled <= 0.2
    budget.took(settled, 30.0)
    assert budget.num_tokens >= 0.68 * settled, "a slow step lowers the budget once"
    for _ in range(3):
        budget.took(budget.num_tokens, max(0.1, 0.005 * budget.num_tokens))
    assert budget.num_tokens >= 0.95 * settled
    before = budget.num_tokens
    budget.took(before - 1, 1e-9)  # the last tokens of a prompt do not fill the budget: nothing is learned
    budget.aim(None)
    budget.took(1000, 30.0)  # nor from a step without a stream
    assert budget.num_tokens == before
    budget.aim(1e-9)
    for _ in range(100):
        budget.took(1000, 30.0)
    assert budget.num_tokens == MIN_TOKENS, "a prompt is never starved"


def test_decoding_is_never_starved_by_prompts() -> None:
    bench = Bench(budget=4)
    for number in range(4):
        bench.add(number, 2)
    while len(bench.history) < 4:
        bench.step()
    bench.add(4, 50)
    for _ in range(3):  # four decode and the budget is four: the prompt waits
        assert bench.step() == {0: 1, 1: 1, 2: 1, 3: 1}
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.step() == {1: 1, 2: 1, 3: 1, 4: 1}
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.step() == {2: 1, 3: 1, 4: 2}


def test_more_decode_than_the_budget_holds() -> None:
    bench = Bench(budget=8)
    for number in range(5):
        bench.add(number, 1)
    bench.step()
    bench.scheduler.max_step_tokens = 2
    bench.add(5, 3)
    assert bench.step() == dict.fromkeys(range(5), 1)


def test_steps_stay_within_the_budget_and_every_sequence_ends() -> None:
    generator = random.Random(1)
    for _ in range(40):
        budget = generator.choice([1, 3, 16, 64])
        bench = Bench(num_blocks=generator.choice([12, 30, 100]), budget=budget, max_seqs=generator.randint(1, 6))
        seqs = [bench.add(number, generator.randint(1, 30)) for number in range(8)]
        for _ in range(2000):
            if not bench.scheduler.seqs:
                break
            counts = bench.step()
            assert counts, "while there is work, a sequence moves on"
            assert sum(counts.values()) <= max(budget, len(counts)), "only decoding sequences may exceed the budget"
            assert len(bench.scheduler.running) <= bench.scheduler.max_seqs
            for seq in list(bench.scheduler.running):
                if seq.num_completion_tokens >= 10:
                    bench.scheduler.remove(seq)
        assert not bench.scheduler.seqs
        assert all(seq.num_completion_tokens >= 10 for seq in seqs)
        assert bench.pool.num_free_blocks == bench.pool.num_blocks


def test_at_most_max_seqs_sequences_run() -> None:
    bench = Bench(budget=100, max_seqs=2)
    for number in range(4):
        bench.add(number, 3)
    assert bench.step() == {0: 3, 1: 3}
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.step() == {1: 1, 2: 3}


# ---- preemption


def test_the_youngest_is_preempted_and_computed_again() -> None:
    bench = Bench(num_blocks=4, budget=16)
    old, young = bench.add(0, 7), bench.add(1, 6)
    assert bench.step() == {0: 7, 1: 6}
    assert bench.step() == {0: 1, 1: 1}  # 8 and 7 tokens in two blocks each
    known = list(young.token_ids)
    assert bench.step() == {0: 1}  # the ninth token of the old sequence needs a third block
    assert young.num_preemptions == 1 and young.kv.num_computed_tokens == 0 and young.kv.block_tables == []
    assert young.token_ids == known and old.num_preemptions == 0
    assert list(bench.scheduler.waiting) == [young]
    assert bench.step() == {0: 1}, "there is no room for the young sequence yet"
    bench.scheduler.remove(old)
    assert bench.step() == {1: len(known)}, "all known tokens are computed again"
    assert young.token_ids[: len(known)] == known and young.kv.num_computed_tokens == len(known)


def test_a_preempted_sequence_comes_back_before_later_sequences() -> None:
    bench = Bench(num_blocks=6, budget=32)
    old, middle, young = bench.add(0, 8), bench.add(1, 7), bench.add(2, 2)
    assert bench.step() == {0: 8, 1: 7, 2: 2}
    late = bench.add(3, 1)
    while not middle.num_preemptions:
        bench.step()
    assert young.num_preemptions and [seq.id for seq in bench.scheduler.waiting][:2] == [1, 2]
    bench.scheduler.remove(old)
    counts = bench.step()
    assert list(counts)[:2] == [1, 2] and late.num_preemptions == 0


def test_the_youngest_sequence_preempts_itself() -> None:
    bench = Bench(num_blocks=3, budget=16)
    bench.add(0, 3)
    young = bench.add(1, 3)
    for _ in range(3):
        bench.step()  # in the last step both sequences need a second block, and one block is free
    assert young.num_preemptions == 1 and [seq.id for seq in bench.scheduler.running] == [0]


def test_a_cache_gives_back_blocks_before_a_sequence_is_preempted() -> None:
    bench = Bench(num_blocks=5, budget=16)
    bench.cache(2)
    old, young = bench.add(0, 4), bench.add(1, 4)
    bench.step()
    for _ in range(3):
        bench.step()
    assert (old.num_preemptions, young.num_preemptions) == (0, 0)
    assert len(bench.idle) == 1


# ---- admission


def test_a_request_that_can_never_be_admitted_gets_an_error_and_the_next_request_runs() -> None:
    bench = Bench(num_blocks=4, budget=16)
    foreign = bench.cache(2)
    bench.idle.clear()  # a plugin that does not give them back holds them
    hopeless, small = bench.add(0, 12), bench.add(1, 3)
    assert bench.scheduler.schedule() == []
    assert isinstance(hopeless.error, PromptTooLong) and small.error is None
    assert "needs 4 KV blocks, 2 of 4 are free" in str(hopeless.error)
    bench.scheduler.remove(hopeless)
    assert [seq.id for seq in bench.scheduler.schedule()] == [1]
    assert_integrity(bench.pool, [seq.kv for seq in bench.scheduler.seqs], lambda: foreign)


def test_a_large_request_waits_for_room_without_an_error_and_in_order() -> None:
    bench = Bench(num_blocks=7, budget=64)
    first = bench.add(0, 10)
    bench.step()
    large, small = bench.add(1, 20), bench.add(2, 1)
    assert bench.step() == {0: 1}, "a later request does not overtake"
    assert large.error is None and small.error is None
    bench.scheduler.remove(first)
    assert bench.step() == {1: 20, 2: 1}


def test_removing_a_running_or_waiting_sequence_gives_back_its_blocks() -> None:
    bench = Bench(budget=4)
    running, waiting, unknown = bench.add(0, 20), bench.add(1, 3), make_seq(9, 3)
    bench.step()
    for seq in (running, waiting, unknown):
        bench.scheduler.remove(seq)
    assert not bench.scheduler.seqs and [a.num_free for a in bench.pool.allocators] == [100, 100]


def test_a_prompt_has_its_blocks_from_its_admission_on() -> None:
    """So the blocks are adjacent, and no other sequence is admitted into the same room."""
    bench = Bench(num_blocks=10, budget=8)
    long = bench.add(0, 31)
    late = bench.add(1, 9)
    assert bench.step() == {0: 8}
    assert long.kv.block_tables[0] == list(range(8)) and late.kv.block_tables == []
    while not long.is_decoding:
        bench.step()
    assert long.kv.block_tables[0] == list(range(8)) and late.num_preemptions == 0


# ---- several samples


def test_samples_share_the_prompt_and_part_at_its_last_token() -> None:
    bench = Bench(budget=16)
    seq = bench.add(0, 15)
    seq.forks = [make_seq(1, 15), make_seq(2, 15)]
    for fork in seq.forks:
        fork.token_ids = list(seq.token_ids)
    children = list(seq.forks)
    assert bench.step() == {0: 14}
    assert [a.num_free for a in bench.pool.allocators] == [96, 97], "the window drops a block"
    assert bench.step() == {0: 1, 1: 1, 2: 1} and seq.forks == []
    tables = [sample.kv.block_tables[0] for sample in (seq, *children)]
    assert all(table[:3] == tables[0][:3] for table in tables), "full blocks are shared"
    assert len({table[3] for table in tables}) == 3, "the last block is copied"
    for sample in (seq, *children):
        bench.scheduler.remove(sample)
    assert bench.pool.num_free_blocks == bench.pool.num_blocks


def test_every_sample_counts_as_a_running_sequence() -> None:
    bench = Bench(budget=64, max_seqs=4)
    for number in (0, 10):
        seq = bench.add(number, 5)
        seq.forks = [make_seq(number + 1, 5), make_seq(number + 2, 5)]
    bench.step()
    assert [seq.id for seq in bench.step_all(3)] == [0, 1, 2]


# ---- prefixes


def test_cached_blocks_are_shared_and_the_tail_is_copied() -> None:
    bench = Bench(budget=64)
    columns = bench.cache(3)
    bench.matches[0] = PrefixMatch(columns[:2], (columns[2], 3))
    seq = bench.add(0, 13)
    assert bench.scheduler.schedule() == [seq] and seq.num_scheduled_tokens == 2
    assert [seq.kv.column(0), seq.kv.column(1)] == columns[:2] and seq.kv.column(2) != columns[2]
    assert (seq.kv.num_computed_tokens, seq.kv.num_cached_tokens, seq.kv.num_sealed_blocks) == (11, 11, 2)
    copies = [operation for operation in bench.pool.queue.operations if isinstance(operation, Copy)]
    assert [copy.group for copy in copies] == [0, 1]
    for group, copy in enumerate(copies):
        assert copy.sources == [columns[2][group] * SIZE + i for i in range(3)]
        assert copy.targets == bench.pool.slots(seq.kv, group, 8, 11)


def test_matched_blocks_are_not_given_back_to_make_room_for_their_match() -> None:
    """The cache holds six idle blocks, and four of them match. The sequence needs eight blocks, and two are free."""
    bench = Bench(num_blocks=8, budget=64)
    columns = bench.cache(6)
    bench.matches[0] = PrefixMatch(columns[:4])
    seq = bench.add(0, 30)
    assert bench.step() == {0: 14}
    assert seq.kv.num_cached_tokens == 16 and seq.kv.block_tables[0][:4] == [column[0] for column in columns[:4]]
    assert bench.idle == columns[:4]


def test_a_tail_that_leaves_no_room_is_given_up() -> None:
    bench = Bench(num_blocks=4, budget=64)
    columns = bench.cache(2)
    bench.matches[0] = PrefixMatch(columns[:1], (columns[1], 2))
    seq = bench.add(0, 15)  # needs four blocks with the next token; three of them must be free
    assert bench.step() == {0: 11}
    assert seq.error is None and seq.kv.num_cached_tokens == 4 and bench.idle == columns[:1]


def test_a_match_that_waits_for_room_is_asked_for_again() -> None:
    """Blocks that matched in an earlier step may belong to another sequence now."""
    bench = Bench(num_blocks=8, budget=64)
    columns = bench.cache(2)
    first = bench.add(0, 20)
    bench.step()
    bench.matches[1] = PrefixMatch(columns[:2])
    second = bench.add(1, 16)  # needs five blocks with the next token; one is free
    assert bench.step() == {0: 1} and bench.asked == [0, 1]
    while bench.idle:
        bench.step()  # the first sequence grows into the cached blocks
    bench.scheduler.remove(first)
    assert bench.step() == {1: 16} and second.kv.num_cached_tokens == 0


@pytest.mark.parametrize("bad", ["all tokens", "more tokens", "tail", "loading"])
def test_a_match_that_leaves_nothing_to_compute_is_not_used(bad: str) -> None:
    bench = Bench(budget=64)
    columns = bench.cache(3)
    done: Future[Any] = Future()
    done.set_result({})
    bench.matches[0] = {
        "all tokens": PrefixMatch(columns[:2]),
        "more tokens": PrefixMatch(columns),
        "tail": PrefixMatch(columns[:1], (columns[1], 4)),
        "loading": PrefixMatch(loading=done, num_loading_tokens=8),
    }[bad]
    seq, other = bench.add(0, 8), bench.add(1, 3)
    assert bench.step() == {0: 8, 1: 3}
    assert seq.kv.num_cached_tokens == 0 and other.error is None


ZEROS = torch.zeros(2, 1, 1, 8, 8)


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"keys": ZEROS},
        {"group.0": ZEROS},
        {"group.0": ZEROS, "group.1": ZEROS[:, :, :, :2]},
        {"group.0": ZEROS[:, :, :, 1:], "group.1": ZEROS},
        {"group.0": ZEROS, "group.1": ZEROS[..., :4]},
        {"group.0": ZEROS, "group.1": ZEROS[0]},
        {"group.0": ZEROS, "group.1": [0.0] * 8},
        ZEROS,
    ],
)
@pytest.mark.parametrize("is_done", [True, False])
def test_wrong_saved_tensors_are_computed(result: Any, is_done: bool, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(budget=64)
    loading: Future[Any] = Future()
    bench.matches[0] = PrefixMatch(loading=loading, num_loading_tokens=8)
    if is_done:
        loading.set_result(result)
    seq, other = bench.add(0, 11), bench.add(1, 5)
    counts = bench.step()
    if not is_done:
        loading.set_result(result)
        counts |= bench.step()
    assert counts == {0: 11, 1: 5 if is_done else 1} and bench.asked == [0, 1]
    assert seq.kv.num_cached_tokens == 0 and seq.error is None and other.error is None
    assert "gave no saved KV of 8 tokens" in caplog.text


def test_pending_loads_do_not_block_others() -> None:
    bench = Bench(budget=64)
    loading: Future[Any] = Future()
    bench.matches[0] = PrefixMatch(loading=loading, num_loading_tokens=14)
    slow = bench.add(0, 17)
    assert bench.step() == {} and bench.scheduler.is_loading
    bench.add(1, 5)
    assert not bench.scheduler.is_loading
    assert bench.step() == {1: 5}
    assert bench.step() == {1: 1} and bench.asked.count(0) == 1, "one match while the prefix loads"
    tensors = {"group.0": torch.zeros(2, 1, 1, 14, 8), "group.1": torch.zeros(2, 1, 1, 14, 8)}
    loading.set_result(tensors)
    assert [seq.id for seq in bench.scheduler.schedule()] == [0, 1] and slow.num_scheduled_tokens == 3
    (load,) = bench.pool.queue.operations
    assert isinstance(load, Load) and load.tensors is tensors
    # The next token sees the tokens from 9 on. The cache may share the full blocks, and the token behind them sees 7 and later.
    assert load.starts == [0, 4] and load.slots == [
        bench.pool.slots(slow.kv, g, s, 14) for g, s in enumerate(load.starts)
    ]
    assert (slow.kv.num_cached_tokens, slow.kv.num_sealed_blocks, slow.kv.prefix) == (14, 0, None)


def loaded(bench: Bench, number: int, num_tokens: int) -> Sequence:
    """A sequence with one token more than its saved prefix, which takes 512 bytes a token."""
    loading: Future[Any] = Future()
    loading.set_result(
        {f"group.{group}": torch.zeros(2, 1, 1, num_tokens, 8, dtype=torch.complex128) for group in (0, 1)}
    )
    bench.matches[number] = PrefixMatch(loading=loading, num_loading_tokens=num_tokens)
    return bench.add(number, num_tokens + 1)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_load_beside_a_stream_takes_pieces(streamed: bool) -> None:
    """A piece takes as long as a step of the stream, 20 * 512 B / LOAD_RATE seconds: that is 20 tokens, and one more."""
    bench = Bench(budget=64)
    bench.took(20 * 512 / LOAD_RATE)
    stream = bench.add(0, 5)
    stream.is_streamed = streamed
    bench.step()
    seq = loaded(bench, 1, 50)
    pieces = []
    while seq.kv.num_computed_tokens < 50:
        scheduled = [other.id for other in bench.scheduler.schedule()]
        (load,) = bench.pool.queue.operations
        assert isinstance(load, Load) and load.slots[0] == bench.pool.slots(
            seq.kv, 0, load.starts[0], seq.kv.num_computed_tokens
        )
        pieces.append((load.starts[0], seq.kv.num_computed_tokens))
        assert scheduled == ([0, 1] if seq.kv.num_computed_tokens == 50 else [0])
        bench.pool.queue.take()
        stream.num_scheduled_tokens = seq.num_scheduled_tokens = 0
    assert pieces == ([(0, 21), (21, 42), (42, 50)] if streamed else [(0, 50)])
    assert seq.kv.prefix is None and seq.kv.num_cached_tokens == 50


def test_a_sequence_preempted_in_the_middle_of_a_load_starts_anew() -> None:
    bench = Bench(num_blocks=16, budget=64)
    bench.took(4 * 512 / LOAD_RATE)
    stream = bench.add(0, 5)
    stream.is_streamed = True
    bench.step()
    seq = loaded(bench, 1, 40)
    bench.step()
    assert 0 < seq.kv.num_computed_tokens < 40 and seq.kv.prefix is not None
    bench.scheduler.preempt(seq)
    assert seq.kv.num_computed_tokens == 0 and seq.kv.prefix is None and seq.kv.block_tables == []
    bench.scheduler.remove(stream)
    assert bench.step() == {1: 1} and seq.kv.num_cached_tokens == 40 and bench.asked.count(1) == 2


@pytest.mark.parametrize("how", ["no tensors", "error", "cancelled"])
def test_an_unreadable_prefix_is_computed(how: str) -> None:
    bench = Bench(budget=64)
    loading: Future[Any] = Future()
    bench.matches[0] = PrefixMatch(loading=loading, num_loading_tokens=8)
    seq = bench.add(0, 11)
    bench.add(1, 2)
    assert bench.step() == {1: 2}
    if how == "no tensors":
        loading.set_result(None)
    elif how == "error":
        loading.set_exception(OSError("disk gone"))
    else:
        loading.cancel()
    assert bench.step() == {1: 1, 0: 11}
    assert bench.asked.count(0) == 2 and seq.kv.num_cached_tokens == 0 and seq.error is None


def test_a_look_up_that_ends_at_once_is_asked_for_its_outcome() -> None:
    bench, looked = Bench(budget=64), Future[Any]()
    looked.set_result(None)
    outcomes = [PrefixMatch(loading=looked), PrefixMatch(bench.cache(2))]
    bench.scheduler.prefixes.match = lambda seq: outcomes.pop(0)
    seq = bench.add(0, 11)
    bench.step()
    assert seq.kv.num_cached_tokens == 8 and outcomes == []


def test_a_pool_of_whole_blocks_uses_no_part_of_a_block() -> None:
    """Neither the tail of a match, nor the last tokens of a saved prefix. Saved tensors have a last dimension of their own."""
    bench = Bench(budget=64)
    bench.pool.whole_blocks, bench.pool.saved_dims = True, (3, 5)
    columns = bench.cache(2)
    bench.matches[0] = PrefixMatch(columns[:1], (columns[1], 3))
    loading: Future[Any] = Future()
    loading.set_result({f"group.{group}": torch.zeros(2, 1, 1, 10, dim) for group, dim in ((0, 3), (1, 5))})
    bench.matches[1] = PrefixMatch(loading=loading, num_loading_tokens=10)
    first, second = bench.add(0, 11), bench.add(1, 12)
    bench.scheduler.schedule()
    assert (first.kv.num_cached_tokens, second.kv.num_cached_tokens) == (4, 8)
    loads = [operation for operation in bench.pool.queue.operations if isinstance(operation, Load)]
    assert [len(slots) for load in loads for slots in load.slots] == [8, 8]


def test_a_load_that_waits_for_room_is_kept() -> None:
    bench = Bench(num_blocks=4, budget=64)
    loading: Future[Any] = Future()
    loading.set_result({f"group.{group}": torch.zeros(2, 1, 1, 8, 8) for group in (0, 1)})
    first = bench.add(0, 8)
    bench.step()
    bench.matches[1] = PrefixMatch(loading=loading, num_loading_tokens=8)
    second = bench.add(1, 10)
    bench.step()
    assert second.kv.block_tables == []
    bench.scheduler.remove(first)
    assert bench.step() == {1: 2} and bench.asked.count(1) == 1


def test_a_preempted_sequence_is_matched_again() -> None:
    bench = Bench(num_blocks=6, budget=16)
    columns = bench.cache(1)
    bench.matches[1] = PrefixMatch(columns)
    old, young = bench.add(0, 8), bench.add(1, 7)
    bench.step()
    while not young.num_preemptions:
        bench.step()
    bench.scheduler.remove(old)
    known = young.num_tokens
    assert bench.step() == {1: known - 4} and bench.asked.count(1) >= 2
    assert young.kv.block_tables[0][0] == columns[0][0]
