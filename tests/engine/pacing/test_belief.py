"""What is believed of a drafter: estimates from drafts of any length, for chains and trees, and what a new sequence inherits."""

from __future__ import annotations

import random

import pytest

from pitlane import Draft
from pitlane.engine.pacing.belief import Belief

TREE = [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def chain(number: int) -> Draft:
    return Draft([0] * number)


def believed(rate: float) -> Belief:
    """The belief about a drafter after some drafts."""
    return Belief(accepted=10 * rate, tried=10, num_drafts=10)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("number", [1, 4, 16])
def test_acceptance_is_learned_from_drafts_of_any_length(rate: float, number: int) -> None:
    """A draft tests its tokens up to the first miss. To count the tokens behind it would call long drafts bad."""
    generator = random.Random(f"{rate} {number}")
    belief, rates = Belief(), []
    for _ in range(4000):
        accepted = 0
        while accepted < number and generator.random() < rate:
            accepted += 1
        belief.update(chain(number), accepted)
        rates.append(belief.rate)
    assert sum(rates[100:]) / len(rates[100:]) == pytest.approx(rate, abs=0.06)


def test_acceptance_follows_a_change() -> None:
    belief = Belief()
    assert 0.5 < belief.rate < 1, "a new drafter gets the benefit of the doubt"
    for accepted, low, high in ((4, 0.95, 1.0), (0, 0.0, 0.2), (4, 0.9, 1.0)):
        for _ in range(40):
            belief.update(chain(4), accepted)
        assert low <= belief.rate <= high


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_expected_tokens_of_a_chain_are_a_geometric_sum(rate: float) -> None:
    for number in (0, 1, 2, 7):
        assert believed(rate).expected(number) == pytest.approx(sum(rate**i for i in range(1, number + 1)))
    assert 4.9 < believed(1.0).expected(5) <= 5


def test_of_a_tree_the_mean_number_of_accepted_tokens_counts() -> None:
    """Three of twelve nodes are accepted: half of the tree brings half of them, and more nodes than the tree has bring no more."""
    belief = Belief()
    for _ in range(30):
        belief.update(Draft([0] * 12, TREE), 3)
    assert [belief.expected(number) for number in (6, 12, 100)] == pytest.approx([1.5, 3.0, 3.0])
    (gain,), (size,) = belief.gains(100)
    assert (gain, size) == pytest.approx((3.0, 12.0))
    for _ in range(60):
        belief.update(Draft([0] * 12, TREE), 0)
    assert belief.expected(12) < 0.1


def test_a_drafter_of_trees_is_judged_by_its_chains_too() -> None:
    """A tree with one branch is a chain."""
    belief = Belief()
    belief.update(Draft([0] * 12, TREE), 3)
    for _ in range(40):
        belief.update(chain(12), 0)
    assert belief.is_tree and belief.expected(12) < 0.1


@pytest.mark.parametrize("parents", [None, TREE], ids=["chain", "tree"])
def test_an_inherited_belief_expects_the_same_and_weighs_little(parents: list[int] | None) -> None:
    belief = Belief(decay=0.98)
    for _ in range(200):
        belief.update(Draft([0] * 12, parents), 3)
    heir = belief.inherited()
    assert [heir.expected(n) for n in (1, 5, 12)] == pytest.approx([belief.expected(n) for n in (1, 5, 12)])
    for _ in range(2):
        heir.update(Draft([0] * 12, parents), 12)
        belief.update(Draft([0] * 12, parents), 12)
    assert heir.expected(12) > 1.4 * belief.expected(12), "two drafts of its own outweigh those of other sequences"
    assert Belief().inherited() == Belief()
