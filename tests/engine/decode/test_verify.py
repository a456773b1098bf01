"""Verification: for any draft, the tokens are those of plain sampling, and the walk follows a path of the draft."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from pitlane import Draft, Limits, Plugin, PluginOptions, Rows, SamplingParams, hookimpl
from pitlane import Sequence as Seq
from pitlane.engine.decode.draft import clean, depths, merged_children
from pitlane.engine.decode.sampling import logprobs_of, sample
from pitlane.engine.decode.verify import Verified, verify, verify_rows
from pitlane.engine.plan.dispatch import Dispatcher
from pitlane.engine.plan.plan import Settings
from pitlane.engine.plan.planner import Planner
from pitlane.engine.plan.registry import PluginRegistry
from pitlane.engine.sequence import Request, Timing
from tests.integrity import assert_integrity

VOCAB = 5
MODES = [
    SamplingParams(max_tokens=100),
    SamplingParams(max_tokens=100, temperature=1.4),
    SamplingParams(max_tokens=100, temperature=0.9, top_k=3, top_p=0.9, logprobs=2, sample_index=3),
]


def make_seq(token_ids: list[int], sampling: SamplingParams, seed: int = 11) -> Seq:
    return Seq(
        id=0,
        request=Request(len(token_ids), sampling, seed),
        plan=cast(Any, None),
        token_ids=list(token_ids),
        detokenizer=cast(Any, None),
        timing=Timing(0.0),
    )


def logits_after(token_ids: Sequence[int]) -> torch.Tensor:
    """A model: logits [V] that depend on all tokens so far."""
    generator = np.random.default_rng([len(token_ids), *token_ids])
    return torch.from_numpy(generator.normal(size=VOCAB) * 2)


def rows_of(known: list[int], draft: Draft | None) -> torch.Tensor:
    """Logits [1 + K, V] after the last known token and after every draft token."""
    paths: list[list[int]] = []
    for index, token in enumerate(draft.token_ids if draft else ()):
        assert draft is not None
        parent = index - 1 if draft.parents is None else draft.parents[index]
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return torch.stack([logits_after(known + path) for path in [[], *paths]])


def plain(known: list[int], sampling: SamplingParams, count: int, seed: int = 11) -> list[int]:
    tokens = list(known)
    for _ in range(count):
        tokens.append(sample(logits_after(tokens), sampling, seed, len(tokens)))
    return tokens[len(known) :]


def walk(seq: Seq, logits: torch.Tensor, draft: Draft | None, peaks: list[float] | None = None) -> Verified:
    """Verify without known targets."""
    return verify(seq, logits, draft, [], logits, peaks or [0.0] * len(logits))


def random_tree(generator: random.Random, size: int, hint: list[int]) -> Draft:
    """A tree with random parents. Half of the nodes hold the right token of their depth, so that walks go deep."""
    tokens: list[int] = []
    parents: list[int] = []
    for index in range(size):
        parents.append(generator.randrange(max(-1, index - 4), index))
        depth = depths(parents)[index]
        tokens.append(hint[depth - 1] if generator.random() < 0.5 else generator.randrange(VOCAB))
    return Draft(tokens, parents)


def check(known: list[int], sampling: SamplingParams, draft: Draft | None) -> int:
    """Verify a draft: tokens are plain, nodes are a path, the walk ends where no child fits. Return the accepted tokens."""
    verified = walk(make_seq(known, sampling), rows_of(known, draft), draft)
    size = len(draft.token_ids) if draft else 0
    expected = plain(known, sampling, size + 1)
    assert verified.token_ids == expected[: len(verified.token_ids)]
    assert len(verified.nodes) == len(verified.token_ids) - 1
    if draft is None:
        assert verified.nodes == []
        return 0
    assert [draft.token_ids[node] for node in verified.nodes] == verified.token_ids[:-1]
    parents = draft.parents if draft.parents is not None else list(range(-1, size - 1))
    assert [depths(parents)[node] for node in verified.nodes] == list(range(1, len(verified.nodes) + 1))
    paths = {(): -1} | {tuple(path_of(draft, parents, node)): node for node in range(size)}
    assert tuple(verified.token_ids[:-1]) in paths
    assert tuple(verified.token_ids) not in paths, "a child that fits was not followed"
    if sampling.logprobs is None:
        assert verified.logprobs == []
    else:
        after = [logits_after(known + verified.token_ids[:i]) for i in range(len(verified.token_ids))]
        pairs = zip(after, verified.token_ids, strict=True)
        assert verified.logprobs == [logprobs_of(row, token, sampling.logprobs) for row, token in pairs]
    return len(verified.nodes)


def path_of(draft: Draft, parents: Sequence[int], node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.append(draft.token_ids[node])
        node = parents[node]
    return path[::-1]


# ---- the walk


@pytest.mark.parametrize("sampling", MODES)
def test_without_a_draft_a_step_gives_one_token(sampling: SamplingParams) -> None:
    for start in range(20):
        assert check([start % VOCAB, 1], sampling, None) == 0


@pytest.mark.parametrize("sampling", MODES)
def test_a_right_draft_is_accepted_whole(sampling: SamplingParams) -> None:
    for start in range(20):
        known = [start % VOCAB, start // VOCAB]
        for size in (1, 2, 7):
            truth = plain(known, sampling, size)
            assert check(known, sampling, Draft(truth)) == size
            assert check(known, sampling, Draft(truth, list(range(-1, size - 1)))) == size


@pytest.mark.parametrize("sampling", MODES)
def test_a_wrong_draft_is_rejected_whole(sampling: SamplingParams) -> None:
    for start in range(20):
        known = [start % VOCAB, start // VOCAB]
        truth = plain(known, sampling, 1)[0]
        wrong = [token for token in range(VOCAB) if token != truth]
        assert check(known, sampling, Draft([wrong[0]] * 5)) == 0
        assert check(known, sampling, Draft(wrong, [-1] * len(wrong))) == 0


@pytest.mark.parametrize("sampling", MODES)
def test_a_draft_is_accepted_up_to_its_first_wrong_token(sampling: SamplingParams) -> None:
    generator = random.Random(3)
    accepted = set()
    for _ in range(60):
        known = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 6))]
        truth = plain(known, sampling, 6)
        wrong_from = generator.randrange(7)
        draft = truth[:wrong_from] + [(token + 1) % VOCAB for token in truth[wrong_from:]]
        count = check(known, sampling, Draft(draft))
        assert count == wrong_from
        accepted.add(count)
    assert accepted == set(range(7))


@pytest.mark.parametrize("sampling", MODES)
def test_trees_give_plain_tokens(sampling: SamplingParams) -> None:
    generator = random.Random(4)
    accepted = []
    for _ in range(150):
        known = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 4))]
        size = generator.randint(1, 14)
        accepted.append(check(known, sampling, random_tree(generator, size, plain(known, sampling, size))))
    assert min(accepted) == 0 and max(accepted) >= 4 and len(set(accepted)) >= 4


def test_equal_siblings_are_merged() -> None:
    """Two equal siblings share the right path: the walk reaches the child of the later sibling through the first sibling."""
    sampling = MODES[1]
    first, second, third = plain([1, 2], sampling, 3)
    wrong = (second + 1) % VOCAB
    draft = Draft([first, first, wrong, second, second, third], [-1, -1, 0, 1, 1, 4])
    verified = walk(make_seq([1, 2], sampling), rows_of([1, 2], draft), draft)
    assert verified.nodes == [0, 3, 5] and verified.token_ids[:3] == [first, second, third]
    children = merged_children(draft)
    assert children == {-1: {first: 0}, 0: {wrong: 2, second: 3}, 3: {third: 5}}
    assert merged_children(None) == {}


def test_depths_count_from_the_last_known_token() -> None:
    assert depths([-1, 0, 1, -1, 3, 1]) == [1, 2, 3, 1, 2, 3]
    assert depths([]) == []


def test_sampled_positions_are_those_of_the_tokens() -> None:
    """Noise belongs to the position of a token, so a step with a draft draws the tokens of plain steps."""
    sampling = SamplingParams(temperature=1.0, max_tokens=100)
    flat = torch.zeros(4, VOCAB)
    truth = [sample(flat[0], sampling, 11, 2 + i) for i in range(4)]
    assert len(set(truth)) > 1
    assert walk(make_seq([0, 0], sampling), flat, Draft(truth[:3])).token_ids == truth


class Forces4(Plugin):
    """Steers every row to token 4."""

    name, exactness = "forces_4", "steering"

    @hookimpl
    def adjust_logits(self, rows: Rows) -> None:
        rows.logits[:, 4] = 99.0


def test_log_probabilities_are_those_of_the_model() -> None:
    """The token is drawn from the logits after penalties and plugins; its log-probability is taken before them."""
    sampling = SamplingParams(max_tokens=9, presence_penalty=50.0, repetition_penalty=1.5, logprobs=2)
    registry = PluginRegistry()
    registry.add(Forces4)
    planner = Planner(registry)
    seq = make_seq([1, 2, 3], sampling)
    seq.request, seq.draft = replace(seq.request, num_prompt_tokens=1), Draft([2, 0])
    logits = rows_of(seq.token_ids, seq.draft)

    def run(settings: Settings) -> Verified:
        seq.plan = planner.resolve(settings)
        rows = Rows(logits.clone(), [seq], [0, 0, 0], [-1, 0, 1], [3, 2, 0])
        ((_, verified),) = verify_rows(rows, Dispatcher(planner.resolve))
        assert seq.failed == {}
        return verified

    verified = run({"forces_4": {}})
    assert verified.token_ids == [4], "the plugin chooses"
    assert verified.logprobs == [logprobs_of(logits[0], 4, 2)]
    verified = run({})
    assert verified.token_ids[0] not in (2, 3), "the penalty chooses"
    assert verified.logprobs[0] == logprobs_of(logits[0], verified.token_ids[0], 2)


def test_the_walk_ends_before_a_row_without_a_finite_logit() -> None:
    sampling = MODES[0]
    truth = plain([1, 2], sampling, 3)
    logits, draft = rows_of([1, 2], Draft(truth)), Draft(truth)
    for broken, kept in ((1, 1), (2, 2), (3, 3)):
        peaks = [0.0] * 4
        peaks[broken] = float("-inf")
        assert walk(make_seq([1, 2], sampling), logits, draft, peaks=peaks).token_ids == truth[:kept]


# ---- drafts of any plugin


@pytest.mark.parametrize(
    "draft, expected",
    [
        (Draft([1, 2, 3]), ([1, 2, 3], None)),
        (Draft([1, 2, 3], [-1, 0, 1]), ([1, 2, 3], None)),  # a chain
        (Draft([1, 2, 3], [-1, -1, 0]), ([1, 2, 3], [-1, -1, 0])),
        (Draft([]), None),
        (Draft([], []), None),
        (Draft([1, -1, 2]), ([1], None)),
        (Draft([VOCAB, 1]), None),
        (Draft([1, 10**30]), ([1], None)),
        (Draft([1, 2, 3], [-1, 1, 0]), ([1], None)),  # its own parent
        (Draft([1, 2, 3], [-1, -1, 5]), ([1, 2], [-1, -1])),
        (Draft([1, 2, 3], [-1, -2, 0]), ([1], None)),
        (Draft([1, 2, 3], [0, 0, 0]), None),
        (Draft([1, 2, 3], [-1, -1]), ([1, 2], [-1, -1])),  # parents missing
        (Draft([1], [-1, 7, 7]), ([1], None)),  # parents left over
        (Draft([1] * 100), ([1] * 8, None)),
        (Draft([1] * 100, [-1] * 100), ([1] * 8, [-1] * 8)),
        (Draft(cast(Any, np.array([1, 2])), cast(Any, np.array([-1, -1]))), ([1, 2], [-1, -1])),
        (Draft(cast(Any, torch.tensor([1, 2])), cast(Any, torch.tensor([-1, -1]))), ([1, 2], [-1, -1])),
        (Draft(range(3)), ([0, 1, 2], None)),
        (None, None),
    ],
)
def test_clean_cuts_before_the_first_bad_node(draft: Draft | None, expected: tuple[Any, Any] | None) -> None:
    cleaned = clean(draft, 8, VOCAB)
    assert (None if cleaned is None else (cleaned.token_ids, cleaned.parents)) == expected
    if cleaned is not None:
        assert all(type(token) is int for token in [*cleaned.token_ids, *(cleaned.parents or [])])


@pytest.mark.parametrize("limit", [0, -3])
def test_clean_returns_no_draft_for_a_limit_of_zero(limit: int) -> None:
    assert clean(Draft([1, 2]), limit, VOCAB) is None


def test_every_cleaned_draft_can_be_verified() -> None:
    generator = random.Random(5)
    kept = 0
    for _ in range(300):
        size = generator.randint(0, 9)
        tokens = [generator.randint(-1, VOCAB) if generator.random() < 0.2 else 1 for _ in range(size)]
        parents = [generator.randint(-2, index + 1 if generator.random() < 0.2 else index - 1) for index in range(size)]
        draft = clean(Draft(tokens, parents if generator.random() < 0.8 else None), generator.randint(-1, 10), VOCAB)
        check([1, 2], MODES[1], draft)
        kept += draft is not None
    assert 100 < kept < 300


# ---- in the engine


class Oracle(Plugin):
    """Knows the answer. Drafts chains with wrong tokens, trees whose right branch comes late, and invalid drafts."""

    name, role, exactness = "oracle", "drafter", "identical"

    class Options(PluginOptions):
        kind: str = "tree"

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        self.answer: list[int] = []

    @hookimpl
    def propose(self, seqs: Sequence[Seq], limits: Limits) -> list[Draft | None]:
        propose: Callable[[list[int], int], Draft] = getattr(self, f"_{self.options.kind}")
        return [
            propose(self.answer[seq.num_completion_tokens :][: max(1, limit // 4)], limit) if limit else None
            for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)
        ]

    def _chain(self, truth: list[int], limit: int) -> Draft:
        return Draft([token ^ (index % 7 == 6) for index, token in enumerate(truth[:20])])

    def _tree(self, truth: list[int], limit: int) -> Draft:
        """A level has two wrong tokens and the right token twice; the next level hangs on the second right token."""
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for token in truth[:5]:
            tokens += [token ^ 1, token ^ 2, token, token]
            parents += [parent] * 4
            parent = len(tokens) - 1
        return Draft(tokens, parents)

    def _malicious(self, truth: list[int], limit: int) -> Draft:
        return Draft([*truth[:2], 10**9, *truth[2:], *[3] * 10_000], [-1, 0, 0, 10**6] * 3000)


@pytest.mark.usefixtures("always_draft")
@pytest.mark.parametrize("kind", ["chain", "tree", "malicious"])
@pytest.mark.parametrize("mode", [{}, {"temperature": 1.1, "seed": 5, "top_k": 40, "frequency_penalty": 0.2}])
def test_drafts_that_end_an_answer_in_their_middle(make_engine: Any, kind: str, mode: dict[str, Any]) -> None:
    """Answers end by length, by a token and by a text: tokens, text and reason are those without a drafter."""
    registry = PluginRegistry()
    registry.add(Oracle)
    engine = make_engine(registry=registry)
    tokens = [random.Random(0).randrange(256) for _ in range(61)]  # drafts cross the edge of a block
    whole = engine.generate(tokens, SamplingParams(max_tokens=60, ignore_eos=True, **mode))
    late = next(i for i in range(20, 60) if whole.token_ids[i] not in whole.token_ids[:i])
    plan = engine.plan({"oracle": {"kind": kind}})
    plan.plugins[0].answer = whole.token_ids
    step_ratios = []
    for ending in (
        {"max_tokens": 60},
        {"max_tokens": 7},
        {"max_tokens": 60, "stop_token_ids": (whole.token_ids[late],)},
        {"max_tokens": 60, "stop": (whole.text[25:28],)},
    ):
        params = SamplingParams(**{"ignore_eos": True, "logprobs": 1, **mode, **ending})
        expected, drafted = engine.generate(tokens, params), engine.generate(tokens, params, plan=plan)
        assert (drafted.token_ids, drafted.text, drafted.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        )
        assert drafted.logprobs is not None and expected.logprobs is not None
        for logprobs, plain_logprobs in zip(drafted.logprobs, expected.logprobs, strict=True):
            assert logprobs == pytest.approx(plain_logprobs, abs=1e-9)
        assert drafted.stats["failed"] == {}
        step_ratios.append(drafted.stats["steps"] / expected.stats["steps"])
    assert min(step_ratios) < 0.6, "drafts were accepted"
    lane = engine.lane_of(plan)
    assert_integrity(lane.pool, [])
    assert lane.pool.num_free_blocks == lane.pool.num_blocks
