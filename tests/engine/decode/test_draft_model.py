"""Draft models: drafts are their own answers, shadows keep up with the target, blocks are given back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pitlane import BadOption, Draft, KVState, SamplingParams, Sequence
from pitlane.engine.decode.draft import clean, depths, merged_children
from pitlane.engine.decode.draft_model import MAX_SHADOWS, DraftModel, Shadow, _size
from pitlane.engine.kv.pool import Pool
from pitlane.engine.kv.state import KVGroup
from pitlane.engine.requests import make_sequence
from pitlane.engine.run.batch import BatchBuilder
from pitlane.engine.run.lane import Lane
from pitlane.engine.run.runner import EarlyExit
from tests.integrity import assert_integrity

GREEDY = SamplingParams(max_tokens=400, ignore_eos=True)
MODES = {
    "greedy": GREEDY,
    "sampled": SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.9, top_k=30, seed=5),
    "penalised": SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.7, repetition_penalty=1.4, seed=6),
}
each_mode = pytest.mark.parametrize("sampling", list(MODES.values()), ids=list(MODES))


def prompt(seed: int, length: int = 40) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


class Bench:
    """An engine whose lane the test drives itself, and a draft model. kind: `model` or `layers`."""

    def __init__(self, engine: Any, kind: str, draft_model: str) -> None:
        self.engine, self.draft_model = engine, draft_model
        self.lane: Lane = engine.lane_of(engine.default_plan)
        opened = self.lane.open_drafter(draft_model) if kind == "model" else self.lane.early_exit(1)
        self.drafter: DraftModel = opened
        self.seqs: list[Sequence] = []

    def add(self, token_ids: list[int], sampling: SamplingParams = GREEDY, salt: str = "") -> Sequence:
        """A sequence that decodes: all tokens but the last have their KV."""
        seq = make_sequence([len(self.seqs)], token_ids, sampling, self.engine.default_plan, salt, self.engine.loader)
        self.seqs.append(seq)
        if seq.num_tokens > 1:
            self.compute(seq, seq.num_tokens - 1)
        seq.num_scheduled_tokens = 1
        return seq

    def compute(self, seq: Sequence, stop: int) -> None:
        assert self.lane.pool.reserve(seq.kv, stop + 1)
        seq.num_scheduled_tokens = stop - seq.kv.num_computed_tokens
        self.lane.runner.run(self.lane.build_batch([seq]))
        seq.kv.num_computed_tokens = stop
        seq.num_scheduled_tokens = 1

    def draft(self, limits: list[int], branching: list[int] | None = None) -> list[Draft | None]:
        self.lane.flush()  # as the loop does
        assert not self.drafter.pool.queue.operations, "a shadow writes into no shared block"
        return self.drafter.draft(self.seqs, limits, branching or [1] * 32)

    def commit(self, seq: Sequence, draft: Draft | None, nodes: list[int], bonus: int) -> None:
        """Run the target on the draft, and commit the nodes that the test chose."""
        seq.draft = draft
        assert self.lane.pool.reserve(seq.kv, seq.num_tokens)
        self.lane.flush()
        self.lane.runner.run(self.lane.build_batch([seq]))
        tokens = [draft.token_ids[node] for node in nodes] if draft else []
        self.lane.commit(seq, nodes, [*tokens, bonus])
        seq.num_scheduled_tokens = 1

    def end(self) -> None:
        """End all sequences: afterwards every block of both pools is free, or held by a shadow."""
        for seq in self.seqs:
            self.lane.pool.release(seq.kv)
        assert_integrity(self.lane.pool, [])
        assert self.lane.pool.num_free_blocks == self.lane.pool.num_blocks - self.lane.pool.num_withheld
        assert_integrity(self.drafter.pool, kv_of_shadows(self.drafter))
        assert len(self.drafter.shadows) <= MAX_SHADOWS and not (self.drafter.shares_kv and self.drafter.shadows)


def kv_of_shadows(drafter: DraftModel) -> list[KVState]:
    return [shadow.kv for shadow in drafter.shadows.values()]


@pytest.fixture(params=["model", "layers"])
def make_bench(request: Any, make_engine: Any, cut_tiny: str) -> Callable[..., Bench]:
    """Benches with a draft model of one layer: a separate model, or an early exit of the target. Both have the same weights."""
    return lambda **options: Bench(make_engine(**options), request.param, cut_tiny)


@pytest.fixture
def alone(make_engine: Any, cut_tiny: str) -> Any:
    """An engine whose target is the draft model."""
    return make_engine(cut_tiny)


def said(alone: Any, token_ids: list[int], count: int, sampling: SamplingParams) -> list[int]:
    """The answer of the draft model to the known tokens."""
    params = {name: getattr(sampling, name) for name in ("temperature", "top_k", "repetition_penalty", "seed")}
    sampling = SamplingParams(max_tokens=count, ignore_eos=True, **params)
    answer: list[int] = alone.generate(token_ids, sampling).token_ids
    return answer


# ---- chains


@pytest.mark.cover(1)
@each_mode
def test_a_chain_is_the_answer_of_the_draft_model(
    make_bench: Callable[..., Bench], alone: Any, sampling: SamplingParams
) -> None:
    """An early exit drafts as the model cut to its first layers does, though it reads KV that the whole model wrote."""
    bench = make_bench()
    seqs = [bench.add(prompt(seed, 20 + 30 * seed), sampling) for seed in range(3)]
    drafts = bench.draft([7, 7, 7])
    for seq, draft in zip(seqs, drafts, strict=True):
        assert draft is not None and draft.parents is None
        assert draft.token_ids == said(alone, seq.token_ids, 7, sampling)
    assert len({tuple(draft.token_ids) for draft in drafts if draft}) == 3
    bench.end()


def test_drafts_have_the_length_that_each_sequence_is_allowed(make_bench: Callable[..., Bench], alone: Any) -> None:
    bench = make_bench()
    limits = [3, 0, 9, 1, 40, 0]
    seqs = [bench.add(prompt(seed)) for seed in range(6)]
    drafts = bench.draft(limits, [1] * 12)
    assert [len(draft.token_ids) if draft else None for draft in drafts] == [3, None, 9, 1, 12, None]
    for seq, draft in zip(seqs, drafts, strict=True):
        if draft is not None:
            assert draft.token_ids == said(alone, seq.token_ids, len(draft.token_ids), GREEDY)
    assert bench.draft([0] * 6) == [None] * 6
    bench.end()


@pytest.mark.cover(1)
@each_mode
def test_after_any_acceptance_the_next_draft_is_right(
    make_bench: Callable[..., Bench], alone: Any, sampling: SamplingParams
) -> None:
    """The shadow keeps accepted tokens, forgets rejected tokens, and reads tokens that it did not draft."""
    bench, generator = make_bench(), random.Random(1)
    seqs = [bench.add(prompt(seed, 25), sampling) for seed in range(2)]
    for step in range(8):
        limits = [generator.choice([0, 1, 5, 8]) for _ in seqs]
        for seq, draft, limit in zip(seqs, bench.draft(limits), limits, strict=True):
            assert (draft is None) == (limit == 0)
            if draft is not None:
                assert draft.token_ids == said(alone, seq.token_ids, limit, sampling), f"step {step}"
            accepted = generator.randint(0, limit)
            bench.commit(seq, draft, list(range(accepted)), generator.randrange(256))
    kvs = [seq.kv for seq in seqs]
    assert_integrity(bench.lane.pool, kvs)
    assert_integrity(bench.drafter.pool, kvs if bench.drafter.shares_kv else kv_of_shadows(bench.drafter))
    bench.end()


def test_a_shadow_catches_up_after_steps_without_a_draft(make_bench: Callable[..., Bench], alone: Any) -> None:
    bench = make_bench(max_step_tokens=16)
    seq = bench.add(prompt(1, 30))
    bench.draft([4])
    for token in prompt(2, 50):  # plain steps, as during a pause
        bench.commit(seq, None, [], token)
    (draft,) = bench.draft([4])
    assert draft is not None and draft.token_ids == said(alone, seq.token_ids, 4, GREEDY)
    bench.end()


def test_prompts_longer_than_a_step_are_read_in_pieces(make_bench: Callable[..., Bench], alone: Any) -> None:
    bench = make_bench(max_step_tokens=16)
    batches = []
    run = bench.drafter.runner.run

    def counted(batch: Any) -> Any:
        batches.append(int(batch.query_start.diff().max()))
        return run(batch)

    seqs = []
    for seed, length in enumerate((100, 3, 47)):
        seq = make_sequence([seed], prompt(seed, length), GREEDY, bench.engine.default_plan, "", bench.engine.loader)
        for stop in [*range(16, length - 1, 16), length - 1]:
            bench.compute(seq, stop)
        bench.seqs.append(seq)
        seqs.append(seq)
    bench.drafter.runner.run = counted  # type: ignore[method-assign]
    for branching in ([1] * 6, [2, 2, 1]):
        for seq, draft in zip(seqs, bench.draft([6, 6, 6], branching), strict=True):
            assert draft is not None
            assert draft.token_ids[0] == said(alone, seq.token_ids, 1, GREEDY)[0]
            if branching[0] == 1:
                assert draft.token_ids == said(alone, seq.token_ids, 6, GREEDY)
    assert max(batches) <= 16
    assert bench.drafter.shares_kv or len(batches) > 6
    bench.end()


def test_a_shadow_of_a_model_with_a_window_shares_the_blocks_of_a_shadow_that_shares_too(bench_pool: Pool) -> None:
    drafter = DraftModel(BatchBuilder(bench_pool), cast(Any, None), 512, shares_kv=False)
    document = prompt(1, 640)

    def new_shadow(number: int, token_ids: list[int]) -> Shadow:
        request = SimpleNamespace(salt="")
        seq: Any = SimpleNamespace(id=number, request=request, token_ids=token_ids, num_tokens=len(token_ids))
        drafter.shadows[number] = drafter._new_shadow(seq)
        return drafter.shadows[number]

    first = new_shadow(1, [*document, 9])
    first.token_ids = [*document, 9]
    assert bench_pool.reserve(first.kv, 641)
    first.kv.num_computed_tokens = first.num_verified_tokens = 640
    assert new_shadow(2, [*document, 8]).num_verified_tokens == 640
    drafter.shadows[1] = drafter.shadows.pop(1)  # shadow 2 is now the least recently used
    assert new_shadow(3, document[:170]).num_verified_tokens == 160
    assert_integrity(bench_pool, kv_of_shadows(drafter))


@pytest.fixture
def bench_pool() -> Pool:
    return Pool([KVGroup((0,), 1, 8), KVGroup((1,), 1, 8, window=64)], [200, 200], 32, "")


# ---- trees


@each_mode
@pytest.mark.parametrize("branching", [[2, 2, 1, 1], [1, 4]])
def test_trees_are_valid_and_hold_the_chain(
    make_bench: Callable[..., Bench], alone: Any, sampling: SamplingParams, branching: list[int]
) -> None:
    bench = make_bench()
    seqs = [bench.add(prompt(seed, 30 + seed), sampling) for seed in range(3)]
    size = _size(branching)
    for limits in ([size] * 3, [1, size // 2, size + 5]):
        for seq, draft, limit in zip(seqs, bench.draft(limits, branching), limits, strict=True):
            assert draft is not None and draft.parents is not None
            assert len(draft.token_ids) == len(draft.parents) == min(limit, size)
            kept = clean(draft, limit, 512)
            assert kept is not None and kept.token_ids == draft.token_ids, "the draft is valid as it is"
            levels = depths(draft.parents)
            assert levels == sorted(levels), "nodes come level by level, so any prefix is the best tree of its size"
            children = merged_children(draft)
            assert sum(map(len, children.values())) == len(draft.token_ids), "no equal siblings"
            for node, node_children in children.items():
                assert len(node_children) <= branching[0 if node < 0 else levels[node]]
            node, path = -1, []
            while node in children:
                token, node = next(iter(children[node].items()))
                path.append(token)
            assert path == said(alone, seq.token_ids, len(path), sampling), "the first children are the chain"
            assert len(path) == max(levels)
    bench.end()


def test_the_children_of_a_node_are_the_likeliest_tokens_behind_its_path(
    make_bench: Callable[..., Bench], alone: Any
) -> None:
    bench = make_bench()
    seq = bench.add(prompt(3, 45))
    (draft,) = bench.draft([100], [3, 2, 1])
    assert draft is not None and draft.parents is not None
    children, levels = merged_children(draft), depths(draft.parents)
    paths: dict[int, list[int]] = {-1: []}
    for node, parent in enumerate(draft.parents):
        paths[node] = [*paths[parent], draft.token_ids[node]]
    for node, path in paths.items():
        width = [3, 2, 1, 0][0 if node < 0 else levels[node]]
        params = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=max(1, width))
        logprobs = alone.generate(seq.token_ids + path, params).logprobs[0]
        best = sorted(logprobs, key=lambda token: -logprobs[token])[:width]
        assert list(children.get(node, {})) == best, f"behind {path}"
    bench.end()


def test_after_a_tree_the_next_tree_is_right(make_bench: Callable[..., Bench], alone: Any) -> None:
    bench, generator = make_bench(), random.Random(4)
    seq = bench.add(prompt(5, 28))
    for _ in range(8):
        (draft,) = bench.draft([8], [2, 2, 1])
        assert draft is not None
        children = merged_children(draft)
        first = next(iter(children[-1]))
        assert first == said(alone, seq.token_ids, 1, GREEDY)[0]
        nodes: list[int] = []
        while (nodes[-1] if nodes else -1) in children and generator.random() < 0.7:
            nodes.append(generator.choice(list(children[nodes[-1] if nodes else -1].values())))
        bench.commit(seq, draft, nodes, generator.randrange(256))
    bench.end()


# ---- room


def test_without_room_there_is_no_draft_and_no_error(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.add(prompt(1, 31))  # the draft begins in the last slot of a block
    pool = bench.drafter.pool
    pool.withhold(pool.num_free_blocks)
    assert bench.draft([5]) == [None]
    assert bench.draft([5], [2, 2]) == [None]
    bench.end()


def test_a_shadow_that_is_about_to_draft_keeps_its_blocks(make_engine: Any, cut_tiny: str, alone: Any) -> None:
    """Two sequences, and room for one draft: the second sequence gets no draft in this step."""
    bench = Bench(make_engine(), "model", cut_tiny)
    seqs = [bench.add(prompt(seed, 20)) for seed in range(2)]
    pool = bench.drafter.pool
    pool.withhold(pool.num_free_blocks - 1)
    first, second = bench.draft([4, 4])
    assert second is None
    assert first is not None and first.token_ids == said(alone, seqs[0].token_ids, 4, GREEDY)
    assert bench.drafter.draft(seqs[::-1], [4, 4], [2, 1])[0] is not None, (
        "in the next step the sequence that comes first gets the room"
    )
    bench.end()


def test_the_least_recently_used_shadow_goes_first(make_engine: Any, cut_tiny: str, alone: Any) -> None:
    bench = Bench(make_engine(), "model", cut_tiny)
    seqs = [bench.add(prompt(seed, 20)) for seed in range(4)]
    pool = bench.drafter.pool
    pool.withhold(pool.num_free_blocks - 3)
    for seq in (*seqs[:3], seqs[0], seqs[3]):  # the second shadow is the oldest when the fourth sequence comes
        (draft,) = bench.drafter.draft([seq], [3], [1] * 3)
        assert draft is not None and draft.token_ids == said(alone, seq.token_ids, 3, GREEDY)
    assert list(bench.drafter.shadows) == [seqs[2].id, seqs[0].id, seqs[3].id]
    assert_integrity(pool, kv_of_shadows(bench.drafter))
    bench.end()


# ---- shared prefixes


@each_mode
def test_shadows_share_verified_blocks_and_draft_as_before(
    make_engine: Any, cut_tiny: str, alone: Any, sampling: SamplingParams
) -> None:
    """Three prompts that begin alike, a first and then two at once: the shadows share blocks, and draft for themselves."""
    bench = Bench(make_engine(), "model", cut_tiny)
    common = prompt(1, 100)
    first = bench.add([*common, *prompt(2, 7)], sampling)
    bench.draft([4])
    others = [bench.add([*common, *prompt(3 + i, 9)], sampling) for i in range(2)]
    for step in range(3):
        for seq, draft in zip(bench.seqs, bench.draft([5, 5, 5]), strict=True):
            assert draft is not None and draft.token_ids == said(alone, seq.token_ids, 5, sampling), f"step {step}"
            bench.commit(seq, draft, [0, 1], 7 + seq.id)
    tables = [bench.drafter.shadows[seq.id].kv.block_tables[0] for seq in (first, *others)]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3], "three whole blocks of the hundred tokens"
    assert len({table[3] for table in tables}) == 3, "a shadow writes into its own block"
    bench.end()


def test_salts_never_share(make_engine: Any, cut_tiny: str, alone: Any) -> None:
    bench = Bench(make_engine(), "model", cut_tiny)
    seqs = [bench.add(prompt(1, 100), salt=salt) for salt in ("ann", "bob", "ann")]
    for seq, draft in zip(seqs, bench.draft([3] * 3), strict=True):
        assert draft is not None and draft.token_ids == said(alone, seq.token_ids, 3, GREEDY)
    first, other, same = (set(bench.drafter.shadows[seq.id].kv.block_tables[0][:3]) for seq in seqs)
    assert first == same and not first & other
    bench.end()


def test_at_most_max_shadows_are_kept(make_engine: Any, cut_tiny: str, monkeypatch: Any) -> None:
    """The oldest shadows go first; a shadow that is about to draft stays."""
    monkeypatch.setattr("pitlane.engine.decode.draft_model.MAX_SHADOWS", 3)
    bench = Bench(make_engine(), "model", cut_tiny)
    seqs = [bench.add(prompt(seed, 20)) for seed in range(5)]
    for seq in seqs:
        assert bench.drafter.draft([seq], [2], [1, 1]) != [None]
    assert list(bench.drafter.shadows) == [2, 3, 4]
    assert all(draft is not None for draft in bench.draft([2] * 5)), "a draft for all five at once"
    bench.end()


# ---- opening


def test_memory_of_the_lane_is_shared_with_its_draft_models(make_engine: Any, cut_tiny: str) -> None:
    """A draft model of one layer beside two layers takes a third of the blocks; the next draft model shares the rest."""
    engine = make_engine(kv_memory=4 * 32 * 90 * make_engine().loader.needs.kv_per_token)
    lane: Lane = engine.lane_of(engine.default_plan)
    assert lane.pool.num_free_blocks == lane.pool.num_blocks == 90
    drafter = lane.open_drafter(cut_tiny)
    assert lane.pool.num_free_blocks == 60 and drafter.pool.num_blocks == 60
    assert lane.max_tokens_per_seq == min(60 * 32, engine.loader.context)
    assert lane.open_drafter(cut_tiny) is drafter and lane.pool.num_free_blocks == 60
    other = lane.open_drafter("random:tiny")
    assert lane.pool.num_free_blocks == 30 and other.pool.num_blocks == 30
    assert_integrity(lane.pool, [])
    assert lane.early_exit(1) is lane.early_exit(1)
    assert lane.pool.num_free_blocks == 30, "early exits need no memory"


def test_a_tokenizer_that_differs_is_refused(make_engine: Any, shared_data: Path) -> None:
    engine = make_engine()
    lane = engine.lane_of(engine.default_plan)
    folder = str(shared_data / "models" / "stories260K")
    with pytest.raises(BadOption, match=r"stories260K cannot draft for random:tiny: its tokenizer differs; .*distill"):
        lane.open_drafter(folder)


@pytest.mark.parametrize("num_layers", [-1, 2, 3])
def test_an_exit_after_no_layer_or_after_all_is_refused(make_engine: Any, num_layers: int) -> None:
    engine = make_engine()
    with pytest.raises(BadOption, match=f"after {num_layers} layers: the model has 2; choose 1 to 1"):
        engine.lane_of(engine.default_plan).early_exit(num_layers)


@pytest.mark.parametrize(("exit_layers", "num_layers"), [((), 2), ((5, 7), 5)], ids=["a quarter", "trained"])
def test_the_default_exit_is_the_trained_exit_or_a_quarter(exit_layers: tuple[int, ...], num_layers: int) -> None:
    model = cast(Any, SimpleNamespace(num_layers=8, exit_layers=exit_layers, kv_groups=()))
    assert EarlyExit(model, 0).num_layers == num_layers


# ---- in the engine

# settings, and a number of blocks that leaves the target ten blocks
DRAFTERS: dict[str, tuple[dict[str, Any], int]] = {
    "chain": ({"speculative": {"model": "random:tiny-cut"}}, 15),
    "tree": ({"speculative": {"model": "random:tiny-cut", "branching": 2}}, 15),
    "itself": ({"speculative": {"model": "random:tiny", "num_draft_tokens": 12}}, 20),
    "layers": ({"self_speculation": {"num_layers": 1}}, 10),
}
each_drafter = pytest.mark.parametrize("settings, blocks", list(DRAFTERS.values()), ids=list(DRAFTERS))


def left_over(engine: Any, settings: dict[str, Any]) -> list[DraftModel]:
    """Check that all blocks were given back; return the draft models of the plan's lane."""
    lane: Lane = engine.lane_of(engine.plan(settings))
    draft_models = list(lane.draft_models.values())
    assert_integrity(lane.pool, [])
    assert lane.pool.num_free_blocks == lane.pool.num_blocks - lane.pool.num_withheld
    for drafter in draft_models:
        assert_integrity(drafter.pool, kv_of_shadows(drafter))
    return draft_models


@pytest.mark.usefixtures("always_draft", "cut_tiny")
@each_drafter
def test_requests_that_end_leave_nothing_behind(make_engine: Any, settings: dict[str, Any], blocks: int) -> None:
    """Requests end by length, by a stop token and by abort: the blocks of both pools come back."""
    engine = make_engine(kv_memory=4 * 32 * 10 * blocks * make_engine().loader.needs.kv_per_token)
    plan = engine.plan(settings)
    whole = engine.generate(prompt(1), SamplingParams(max_tokens=60, ignore_eos=True))
    result = engine.generate(prompt(1), SamplingParams(max_tokens=60, ignore_eos=True), plan=plan)
    assert result.token_ids == whole.token_ids and result.stats["failed"] == {}
    stop = SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(whole.token_ids[31],))
    assert engine.generate(prompt(1), stop, plan=plan).finish_reason == "stop"
    stream = engine.submit(prompt(2), SamplingParams(max_tokens=900, ignore_eos=True), plan=plan)
    for event in stream:
        if getattr(event, "token_ids", ()):
            stream.abort()
    assert stream.result().finish_reason == "aborted"
    engine.generate(
        prompt(3), SamplingParams(max_tokens=2), plan=plan
    )  # when this request is done, the abort is done too
    assert len(left_over(engine, settings)) == 1


@pytest.mark.usefixtures("always_draft", "cut_tiny")
@each_drafter
def test_preempted_sequences_draft_on(make_engine: Any, settings: dict[str, Any], blocks: int) -> None:
    """Six requests of four blocks each, in a lane of ten blocks."""
    params = SamplingParams(max_tokens=70, ignore_eos=True)
    roomy = make_engine()
    expected = [result.token_ids for result in roomy.generate([prompt(seed, 40) for seed in range(6)], params)]
    tight = make_engine(kv_memory=4 * 32 * blocks * roomy.loader.needs.kv_per_token)
    plan = tight.plan(settings)
    streams = [tight.submit(prompt(seed, 40), params, plan=plan) for seed in range(6)]
    results = [stream.result() for stream in streams]
    assert [result.token_ids for result in results] == expected
    assert sum(result.stats["preemptions"] for result in results) > 0
    assert sum(result.stats["draft_tokens"] for result in results) > 0
    assert all(result.stats["failed"] == {} for result in results)
    left_over(tight, settings)


def test_an_answer_that_fills_the_blocks_beside_a_draft_model_ends_by_length(make_engine: Any) -> None:
    """Half of eight blocks are withheld for the draft model: a sequence has four blocks and no error."""
    needs = make_engine().loader.needs
    engine = make_engine(kv_memory=4 * 32 * 8 * needs.kv_per_token)
    plan = engine.plan({"speculative": {"model": "random:tiny"}})
    result = engine.generate(prompt(1), SamplingParams(max_tokens=1000, ignore_eos=True), plan=plan)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 4 * 32 - 40
