"""Search for one stop string in an answer that arrives piece by piece.

Algorithm: Knuth, Morris and Pratt 1977. The work per character is constant on average, for any length of the stop string.
"""

from __future__ import annotations


class StopString:
    """num_matched: length of the longest prefix of `text` that the answer ends with. text: not empty."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # _shorter[n]: failure function. Length of the next shorter match after n matched characters. Filled as matches grow.
        self._shorter = [0, 0]

    def completed_by(self, character: str) -> bool:
        """Advance by a character of the answer. True: the answer now ends with the stop string. Do not call again then."""
        self.num_matched = self._extended(self.num_matched, character)
        if self.num_matched == len(self._shorter):
            self._shorter.append(self._extended(self._shorter[-1], character))
        return self.num_matched == len(self.text)

    def _extended(self, num_matched: int, character: str) -> int:
        """Length of the match after `character`, where `num_matched` characters matched before it."""
        while num_matched and self.text[num_matched] != character:
            num_matched = self._shorter[num_matched]
        return num_matched + (self.text[num_matched] == character)
