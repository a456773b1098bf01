"""Search for one stop string in an answer that arrives piece by piece.

Algorithm: Knuth, Morris and Pratt 1977. The work per character is constant on average, however long the stop string is.
"""

from __future__ import annotations


class StopString:
    """num_matched: how many first characters of `text` the answer ends with so far. text: not empty."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # shorter[n]: at the end of a match of n characters, the length of the next shorter match. Filled as matches grow.
        self._shorter = [0, 0]

    def completed_by(self, character: str) -> bool:
        """Take the next character of the answer. True: the answer now ends with the stop string; give no more."""
        self.num_matched = self._extended(self.num_matched, character)
        if self.num_matched == len(self._shorter):
            self._shorter.append(self._extended(self._shorter[-1], character))
        return self.num_matched == len(self.text)

    def _extended(self, num_matched: int, character: str) -> int:
        """Length of the match after `character`, where `num_matched` characters matched before it."""
        while num_matched and self.text[num_matched] != character:
            num_matched = self._shorter[num_matched]
        return num_matched + (self.text[num_matched] == character)
