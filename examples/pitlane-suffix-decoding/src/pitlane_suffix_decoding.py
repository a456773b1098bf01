"""Suffix decoding: find the last tokens in earlier answers, and draft their most frequent continuations.

Changes in the loop: `propose` drafts a chain or a tree from two suffix automata: of the user's earlier answers, and of the
sequence itself. A longer match gives a longer draft.
Exactness: identical. Costs: microseconds per token to index and to match; no model; about 0.8 kB per remembered token. Helps when
answers resemble earlier answers: agents, edits of a text, the same form filled again and again.
Paper: Oliaro et al. 2024, https://arxiv.org/abs/2411.04975
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple, cast

from pydantic import Field

from pitlane import Draft, Plugin, PluginOptions, Sequence, hookimpl

if TYPE_CHECKING:
    from pitlane import Lane, Limits

MAX_USERS = 32  # users with remembered answers, per lane
MAX_INDEXED = 512  # tokens of a prompt to index per step, in about 2 ms: other requests wait no longer
MAX_FIRST = 64  # tokens of a prompt to match with earlier answers
MAX_COUNTED = 64  # suffixes to count per token; only a text that repeats itself has more
ROOT = 0


class SuffixDecoding(Plugin):
    """Draft the tokens that followed the longest match of the last tokens in earlier answers."""

    name, role, exactness = "suffix_decoding", "drafter", "identical"
    api_version = "1.0"

    class Options(PluginOptions):
        num_draft_tokens: int = Field(16, ge=1, le=64, title="Draft length", description="maximum tokens per draft")
        factor: float = Field(
            1.0, gt=0, le=16, title="Tokens per match", description="maximum draft tokens per token of the match"
        )
        min_probability: float = Field(
            0.1, gt=0, le=1, title="Least probability", description="least probability of a draft token, by frequency"
        )
        is_tree: bool = Field(True, title="Trees", description="draft a tree of continuations, not a chain alone")
        own_text: bool = Field(True, title="Own text", description="draft from the prompt and the present answer too")
        history: int = Field(
            16384,
            ge=0,
            le=1_000_000,
            title="Remembered tokens",
            description="number of tokens of a user's earlier answers to keep; 0 keeps none",
        )

    @hookimpl
    def lane_opened(self, lane: Lane) -> None:
        lane.state.setdefault(self.name, Histories())

    @hookimpl
    def propose(self, seqs: SequenceOf[Sequence], limits: Limits) -> list[Draft | None]:
        histories = cast(Histories, limits.lane.state[self.name])
        return [self._draft(seq, limit, histories) for seq, limit in zip(seqs, limits.num_draft_tokens, strict=True)]

    def _draft(self, seq: Sequence, limit: int, histories: Histories) -> Draft | None:
        state: State = seq.state.setdefault(self.name, State())
        limit = min(limit, self.options.num_draft_tokens)
        matches = []
        if self.options.own_text:
            start = state.own.num_tokens
            state.own.extend(seq.token_ids[start : start + MAX_INDEXED])
            if state.own.num_tokens == len(seq.token_ids):
                matches.append(state.own.repeated)
        if self.options.history:
            automata = histories.automata(seq.request.salt)
            matches += [match.read(seq.token_ids) for match in state.matches_in(automata)]
        guesses = [self._guess(match, limit) for match in matches if limit > 0 and match.length > 0]
        best = max(guesses, key=lambda guess: guess.score, default=None)
        return Draft(best.token_ids, best.parents) if best is not None and best.token_ids else None

    def _guess(self, match: Match, limit: int) -> Guess:
        length = max(1, int(match.length * self.options.factor))
        return match.automaton.guess(match.node, min(limit, length), self.options)

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        if self.options.history and seq.num_completion_tokens:
            answer = seq.token_ids[seq.request.num_prompt_tokens :]
            cast(Histories, lane.state[self.name]).add(seq.request.salt, answer, self.options.history)


class Guess(NamedTuple):
    """A tree of draft tokens. score: the mean number of accepted tokens, if frequencies are probabilities."""

    token_ids: list[int]
    parents: list[int]
    score: float


class Automaton:
    """A suffix automaton of texts: its nodes stand for all substrings, and count the occurrences of each substring.

    A node holds the substrings with the same end positions. lengths: tokens of a node's longest substring. links: the node of its
    longest suffix with other end positions, -1 for the root. follow: the node after one more token. An automaton has at most two
    nodes per token.
    """

    def __init__(self) -> None:
        self.lengths, self.links, self.counts = [0], [-1], [0]
        self.follow: list[dict[int, int]] = [{}]
        self.last = ROOT
        self.num_tokens = 0

    def begin(self) -> None:
        """Begin another text."""
        self.last = ROOT

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens to the text. Algorithm: Blumer et al. 1985, for several texts."""
        for token in token_ids:
            self.num_tokens += 1
            self.last = self._step(token)
            node, num_counted = self.last, 0
            while node > ROOT and num_counted < MAX_COUNTED:
                self.counts[node] += 1
                node, num_counted = self.links[node], num_counted + 1

    def _step(self, token: int) -> int:
        known = self.follow[self.last].get(token)
        if known is not None:  # an earlier text has this substring
            return self._split(self.last, token, known)
        new = self._add(self.lengths[self.last] + 1, {}, 0)
        node = self.last
        while node >= 0 and token not in self.follow[node]:
            self.follow[node][token] = new
            node = self.links[node]
        self.links[new] = self._split(node, token, self.follow[node][token]) if node >= 0 else ROOT
        return new

    def _split(self, node: int, token: int, target: int) -> int:
        """Return the node of the longest substring of `node` with `token` behind it; split it from `target` if needed."""
        if self.lengths[target] == self.lengths[node] + 1:
            return target
        clone = self._add(self.lengths[node] + 1, dict(self.follow[target]), self.counts[target])
        self.links[clone], self.links[target] = self.links[target], clone
        while node >= 0 and self.follow[node].get(token) == target:
            self.follow[node][token] = clone
            node = self.links[node]
        return clone

    def _add(self, length: int, follow: dict[int, int], count: int) -> int:
        self.lengths.append(length)
        self.links.append(-1)
        self.follow.append(follow)
        self.counts.append(count)
        return len(self.lengths) - 1

    @property
    def repeated(self) -> Match:
        """The longest suffix of the present text that occurs at another place too."""
        node = max(ROOT, self.links[self.last])
        return Match(self, node, self.lengths[node])

    def guess(self, node: int, limit: int, options: SuffixDecoding.Options) -> Guess:
        """Return the likeliest continuations of a node. The tree takes the likeliest next token until it has `limit` tokens."""
        tokens: list[int] = []
        parents: list[int] = []
        score, parent, probability = 0.0, -1, 1.0
        border: list[tuple[float, int, int, int, int]] = []  # a heap: -probability, order, parent, token, node
        while len(tokens) < limit:
            if not options.is_tree:
                border.clear()
            for token, target, share in self._next(node):
                if share * probability >= options.min_probability:
                    heappush(border, (-share * probability, len(border) + len(tokens), parent, token, target))
            if not border:
                break
            negative, _, origin, token, node = heappop(border)
            parent, probability = len(tokens), -negative
            tokens.append(token)
            parents.append(origin)
            score += probability
        return Guess(tokens, parents, score)

    def _next(self, node: int) -> list[tuple[int, int, float]]:
        """The tokens that followed a node, their nodes and their shares. At the end of a text, a shorter suffix counts."""
        while node > ROOT and not self.follow[node]:
            node = self.links[node]
        if node <= ROOT:  # the root matches no token, so it predicts nothing
            return []
        total = sum(self.counts[target] for target in self.follow[node].values())
        return [(token, target, self.counts[target] / total) for token, target in self.follow[node].items()]


@dataclass(slots=True)
class Match:
    """A suffix of a growing text that the automaton knows. length: its number of tokens. num_read: tokens read so far."""

    automaton: Automaton
    node: int = ROOT
    length: int = 0
    num_read: int = 0

    def read(self, token_ids: list[int]) -> Match:
        """Read the new tokens of the text; find the longest suffix that the automaton knows. Returns self."""
        automaton = self.automaton
        if self.num_read == 0:  # the last tokens of a prompt are enough
            self.num_read = max(0, len(token_ids) - MAX_FIRST)
        for token in token_ids[self.num_read :]:
            self._correct()
            while self.node > ROOT and token not in automaton.follow[self.node]:
                self.node = automaton.links[self.node]
                self.length = automaton.lengths[self.node]
            target = automaton.follow[self.node].get(token)
            self.node, self.length = (ROOT, 0) if target is None else (target, self.length + 1)
        self.num_read = len(token_ids)
        self._correct()
        return self

    def _correct(self) -> None:
        """Go to the node that holds the suffix now. The automaton may have split the node since the last call."""
        while self.node > ROOT and self.length <= self.automaton.lengths[self.automaton.links[self.node]]:
            self.node = self.automaton.links[self.node]


@dataclass(slots=True)
class State:
    """State of a sequence: the automaton of its text, and its matches in earlier answers."""

    own: Automaton = field(default_factory=Automaton)
    matches: list[Match] = field(default_factory=list)

    def matches_in(self, automata: list[Automaton]) -> list[Match]:
        """The match in every automaton. A new automaton begins with a new match."""
        known = {id(match.automaton): match for match in self.matches}
        self.matches = [known.get(id(automaton)) or Match(automaton) for automaton in automata]
        return self.matches


class Histories:
    """The earlier answers of a lane, by user (salt). A user has at most two automata, the newer first.

    An automaton forgets nothing. When the newer automaton is full, it replaces the older automaton, and an empty automaton begins.
    """

    def __init__(self) -> None:
        self.by_salt: OrderedDict[str, list[Automaton]] = OrderedDict()  # the least recently used first

    def automata(self, salt: str) -> list[Automaton]:
        return self.by_salt.get(salt, [])

    def add(self, salt: str, answer: list[int], capacity: int) -> None:
        """Remember an answer. capacity: tokens to keep per user; each of the two automata holds about half of them."""
        half = max(1, capacity // 2)
        automata = self.by_salt.setdefault(salt, [Automaton()])
        if automata[0].num_tokens >= half:
            automata = self.by_salt[salt] = [Automaton(), automata[0]]
        automata[0].begin()
        automata[0].extend(answer[-half:])
        self.by_salt.move_to_end(salt)
        if len(self.by_salt) > MAX_USERS:
            self.by_salt.popitem(last=False)

    def close(self) -> None:
        """Forget all answers."""
        self.by_salt.clear()
