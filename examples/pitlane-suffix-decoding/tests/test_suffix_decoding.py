import random
from types import SimpleNamespace

import pytest
from pitlane_suffix_decoding import Automaton, Histories, Match, SuffixDecoding

from pitlane import Engine, PluginRegistry, SamplingParams
from pitlane.testing import check_plugin


def texts(seed):
    generator = random.Random(seed)
    return [[generator.randrange(3) for _ in range(generator.randrange(1, 30))] for _ in range(6)]


def automaton_of(texts):
    automaton = Automaton()
    for text in texts:
        automaton.begin()
        automaton.extend(text)
    return automaton


def node_of(automaton, substring):
    node = 0
    for token in substring:
        node = automaton.follow[node].get(token)
        if node is None:
            return None
    return node


def occurrences(texts, substring):
    size = len(substring)
    return sum(text[i : i + size] == substring for text in texts for i in range(len(text) - size + 1))


@pytest.mark.parametrize("seed", range(5))
def test_the_automaton_counts_every_substring(seed):
    known = texts(seed)
    automaton = automaton_of(known)
    for text in known:
        for start in range(len(text)):
            for stop in range(start + 1, len(text) + 1):
                substring = text[start:stop]
                assert automaton.counts[node_of(automaton, substring)] == occurrences(known, substring)
    strangers = [s for s in texts(seed + 100) if not occurrences(known, s)]
    assert strangers and all(node_of(automaton, stranger) is None for stranger in strangers)
    assert len(automaton.counts) <= 2 * sum(map(len, known))


@pytest.mark.parametrize("seed", range(5))
def test_a_match_is_the_longest_suffix_that_is_known_now(seed):
    """The automaton grows while the match follows another text."""
    known, match, text = [], Match(Automaton()), [3]
    for new in texts(seed):
        known.append(new)
        match.automaton.begin()
        match.automaton.extend(new)
        for token in texts(seed + 50)[0][:10]:
            text.append(token)
            match.read(text)
            suffixes = [text[start:] for start in range(len(text) + 1)]
            longest = next(suffix for suffix in suffixes if not suffix or any_has(known, suffix))
            # a new answer makes a longer match known only from the next token on
            assert (
                match.length <= len(longest) and suffixes[len(text) - match.length] == text[len(text) - match.length :]
            )
            assert match.node == node_of(match.automaton, text[len(text) - match.length :])
    fresh = Match(match.automaton).read(text)
    assert fresh.length == len(longest)


def any_has(texts, substring):
    return occurrences(texts, substring) > 0


def guess(automaton, substring, limit=9, **options):
    return automaton.guess(node_of(automaton, substring), limit, SuffixDecoding.parse_options(options))


def test_the_likeliest_continuations_come_first():
    automaton = automaton_of([[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 5, 6]])
    tree = guess(automaton, [1])
    assert tree.token_ids[:3] == [2, 3, 5] and tree.parents[:3] == [-1, 0, -1]  # 3/4, 2/4, 1/4; then 4 and 6, 1/4
    assert sorted(tree.token_ids[3:]) == [4, 6] and tree.score == pytest.approx(2.0)
    chain = guess(automaton, [1], is_tree=False)
    assert (chain.token_ids, chain.parents) == ([2, 3], [-1, 0]) and chain.score == pytest.approx(1.25)
    assert guess(automaton, [1], min_probability=0.4).token_ids == [2, 3]
    assert guess(automaton, [1], limit=1).token_ids == [2]
    assert guess(automaton, [3]).token_ids == [], "no text goes on after 3"
    assert guess(automaton_of([[7, 1, 2], [1, 2, 9]]), [7, 1, 2]).token_ids == [9], "after `1 2`, a suffix that goes on"


def test_a_user_sees_no_other_users_answers_and_old_answers_go():
    histories = Histories()
    histories.add("ada", [1, 2, 3], 8)
    assert histories.automata("bob") == [] and Match(histories.automata("ada")[0]).read([2]).length == 1
    histories.add("ada", [4, 5], 8)
    histories.add("ada", [6, 7], 8)
    newer, older = histories.automata("ada")
    assert newer.num_tokens == 2 and older.num_tokens == 5
    for _ in range(3):
        histories.add("ada", [8, 9], 8)
    assert all(Match(automaton).read([1]).length == 0 for automaton in histories.automata("ada"))


@pytest.fixture(scope="module")
def engine():
    registry = PluginRegistry()
    registry.add(SuffixDecoding)
    with Engine("random:tiny", dtype="float64", plugins={}, registry=registry) as engine:
        yield engine


@pytest.mark.parametrize("options", [{}, {"is_tree": False, "factor": 4.0}, {"own_text": False}])
def test_it_keeps_its_promise(options):
    check_plugin(SuffixDecoding, options).assert_proved()


def test_a_second_answer_is_drafted_from_the_first(engine):
    plan = engine.plan({"suffix_decoding": {"own_text": False, "history": 1000}})
    prompt, sampling = list(range(40)), SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, seed=4)
    first, second = (engine.generate(prompt, sampling, plan=plan, salt="ada") for _ in range(2))
    stranger = engine.generate(prompt, sampling, plan=plan, salt="bob")
    assert first.token_ids == second.token_ids == stranger.token_ids
    assert first.stats["accepted_tokens"] == stranger.stats["accepted_tokens"] == 0
    assert second.stats["accepted_tokens"] > 0.5 * second.stats["completion_tokens"]


def test_a_long_prompt_is_indexed_over_several_steps():
    plugin, lane = SuffixDecoding(), SimpleNamespace(state={})
    plugin.lane_opened(lane)
    request = SimpleNamespace(salt="", num_prompt_tokens=1200)
    seq = SimpleNamespace(token_ids=[1, 2, 3] * 400, request=request, state={})
    limits = SimpleNamespace(num_draft_tokens=[4], lane=lane)
    drafts = [plugin.propose([seq], limits)[0] for _ in range(3)]
    assert drafts[:2] == [None, None] and list(drafts[2].token_ids) == [1, 2, 3, 1]
