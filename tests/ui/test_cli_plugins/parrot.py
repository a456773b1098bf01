"""Parrot: a second drafter, for conflicts; it drafts the last token again."""

from pitlane import Draft, Plugin, hookimpl


class Parrot(Plugin):
    name, role, exactness = "parrot", "drafter", "identical"

    @hookimpl
    def propose(self, seqs, limits):
        return [Draft([seq.token_ids[-1]]) for seq in seqs]


class NeedsParrot(Plugin):
    """Does nothing, beside a drafter."""

    name, exactness, requires = "needs_parrot", "identical", ("parrot",)
