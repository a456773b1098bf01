"""Repeat last: draft the last token again.

Changes in the loop: `propose` drafts the last token twice.
Exactness: identical. Costs: next to nothing. Helps next to nothing: it shows how small a plugin can be.
"""

from pitlane import Draft, Plugin, hookimpl


class RepeatLast(Plugin):
    """Draft the last token again."""

    name, role, exactness = "repeat_last", "drafter", "identical"

    @hookimpl
    def propose(self, seqs, limits):
        return [Draft([seq.token_ids[-1]] * min(2, n)) for seq, n in zip(seqs, limits.num_draft_tokens, strict=True)]
