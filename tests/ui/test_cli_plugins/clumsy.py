"""Clumsy: a drafter that always fails."""

from pitlane import Plugin, hookimpl


class Clumsy(Plugin):
    name, role, exactness = "clumsy", "drafter", "identical"

    @hookimpl
    def propose(self, seqs, limits):
        raise ValueError("dropped it")
