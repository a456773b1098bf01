"""A draft: proposed tokens as a chain or a tree, checked before the engine uses it."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens. `parents[i] < i` is the index of the parent draft token, -1 for the last known token.

    Any prefix of the list is a valid draft. Without parents it is a chain.
    """

    token_ids: SequenceOf[int]
    parents: SequenceOf[int] | None = None

    @property
    def links(self) -> SequenceOf[int]:
        """The parents, those of a chain too."""
        return self.parents if self.parents is not None else range(-1, len(self.token_ids) - 1)

    @classmethod
    def merged(cls, chains: Iterable[SequenceOf[int]]) -> Draft:
        """Merge chains into one tree: equal prefixes share nodes, and the tokens of the first chain come first."""
        tokens: list[int] = []
        parents: list[int] = []
        children: dict[tuple[int, int], int] = {}
        for chain in chains:
            node = -1
            for token in chain:
                if (node, token) not in children:
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = children[node, token]
        return cls(tokens, parents)


def merged_children(draft: Draft | None) -> dict[int, dict[int, int]]:
    """Children of each node by token id: {node: {token id: child}}, node -1 being the last known token.

    Equal siblings are merged: the first sibling takes the children of the later sibling.
    """
    children: dict[int, dict[int, int]] = {}
    if draft is None:
        return children
    merged = {-1: -1}
    for index, (token, parent) in enumerate(zip(draft.token_ids, draft.links, strict=True)):
        merged[index] = children.setdefault(merged[parent], {}).setdefault(token, index)
    return children


def depths(parents: SequenceOf[int]) -> list[int]:
    """Depth of each draft token: 1 for a child of the last known token."""
    levels: list[int] = []
    for parent in parents:
        levels.append(1 if parent < 0 else levels[parent] + 1)
    return levels


def up_to_depth(draft: Draft, max_depth: int) -> Draft | None:
    """Cut a draft before its first token of a greater depth. None if no token is left."""
    levels = depths(draft.links)
    count = next((index for index, level in enumerate(levels) if level > max_depth), len(levels))
    if count == 0:
        return None
    return Draft(draft.token_ids[:count], None if draft.parents is None else draft.parents[:count])


def clean(draft: Draft | None, limit: int, vocab_size: int) -> Draft | None:
    """Cut a draft to `limit` tokens, and before the first invalid token or parent. None if no token is left."""
    if draft is None:
        return None
    tokens: list[int] = []
    parents = None if draft.parents is None else [int(parent) for parent in draft.parents]
    for index, token in enumerate(list(draft.token_ids)[: max(0, limit)]):
        bad_parent = parents is not None and (index >= len(parents) or not -1 <= parents[index] < index)
        if bad_parent or not 0 <= int(token) < vocab_size:
            break
        tokens.append(int(token))
    if not tokens:
        return None
    if parents is not None and parents[: len(tokens)] == list(range(-1, len(tokens) - 1)):
        parents = None
    return Draft(tokens, None if parents is None else parents[: len(tokens)])


def fault(draft: Draft | None, limit: int, vocab_size: int, kept: Draft | None) -> str:
    """Why `clean` cut a draft to `kept`, or ''. Of a draft of a wrong type, `clean` has raised."""
    size, num_kept = (
        (len(draft.token_ids) if draft is not None else 0),
        (len(kept.token_ids) if kept is not None else 0),
    )
    if draft is None or size == num_kept:
        return ""
    if num_kept == max(0, limit):
        return f"{size} tokens, where at most {max(0, limit)} were asked for"
    token = int(draft.token_ids[num_kept])
    if not 0 <= token < vocab_size:
        return f"token {token}, which is not in [0, {vocab_size})"
    return f"draft token {num_kept} has no parent before it"
