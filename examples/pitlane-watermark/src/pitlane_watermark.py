"""Watermark: the answer prefers the tokens of a secret green list, and a detector finds the preference in the text.

Changes in the loop: `adjust_logits` adds `delta` to the logits of green tokens. A hash of the key, the last token and the next
token decides whether the next token is green. A share `gamma` of the vocabulary is green.
Exactness: steering. The green list of a row depends on the last token of its path alone, so drafters change no token.
Costs: a hash of the vocabulary for every new last token: 1 ms for 50,000 tokens. Helps to tell later which texts this model wrote.
Paper: Kirchenbauer et al. 2023, https://arxiv.org/abs/2301.10226
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import erfc, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import Field

from pitlane import PitlaneError, Plugin, PluginOptions, Rows, hookimpl

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_LISTS = 256  # green lists to keep; a list takes a byte per token of the vocabulary
Z_LIMIT = 4.0  # a text without the watermark reaches this score once in 30,000 times


class Watermark(Plugin):
    """Let the answer prefer the tokens of a secret green list."""

    name, exactness = "watermark", "steering"
    api_version = "1.0"

    class Options(PluginOptions):
        key: str = Field(
            "pitlane", min_length=1, title="Key", description="the secret of the watermark; the detector needs it"
        )
        gamma: float = Field(
            0.25, ge=0.01, le=0.99, title="Green share", description="share of the vocabulary that is green"
        )
        delta: float = Field(2.0, ge=0, le=20, title="Strength", description="logits to add to green tokens")

    def __init__(self, options: PluginOptions | None = None) -> None:
        super().__init__(options)
        # Green lists by the token before; the least recently used list comes first.
        self.lists: OrderedDict[int, NDArray[np.bool_]] = OrderedDict()

    @hookimpl
    def adjust_logits(self, rows: Rows) -> Any:
        import numpy as np
        import torch

        vocab_size = rows.logits.shape[1]
        green = np.stack([self.green_list(token, vocab_size) for token in rows.token_ids])
        for row, index in enumerate(rows.seq_index):  # a token that ends a text is never green: lengths stay
            green[row, list(rows.seqs[index].request.stop_token_ids)] = False
        bonus = torch.from_numpy(green).to(rows.logits.device, rows.logits.dtype) * self.options.delta
        return rows.logits + bonus

    def green_list(self, before: int, vocab_size: int) -> NDArray[np.bool_]:
        """The mask [V] of the tokens that are green after the token `before`."""
        import numpy as np

        green = self.lists.get(before)
        if green is None or len(green) != vocab_size:
            green = self.lists[before] = is_green(np.full(vocab_size, before), np.arange(vocab_size), self.options)
        self.lists.move_to_end(before)
        if len(self.lists) > MAX_LISTS:
            self.lists.popitem(last=False)
        return green


WatermarkOptions: TypeAlias = Watermark.Options


def is_green(before: NDArray[np.int64], tokens: NDArray[np.int64], options: WatermarkOptions) -> NDArray[np.bool_]:
    """Whether each token is green after the token before it. The hash function is SplitMix64 (Steele et al. 2014)."""
    import numpy as np

    key = np.frombuffer(hashlib.sha256(options.key.encode()).digest()[:8], dtype="<u8")
    value = _mixed(_mixed(before.astype(np.uint64) + key) + tokens.astype(np.uint64))
    return value < np.uint64(int(options.gamma * 2**64))


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    import numpy as np

    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Detection:
    """The verdict on a text.

    num_scored: different pairs of neighbouring tokens. num_green: pairs whose second token is green. z: standard deviations above
    the number of green tokens in a text without the watermark. p_value: share of texts without the watermark that score at least z.
    """

    num_scored: int
    num_green: int
    z: float
    p_value: float

    @property
    def is_watermarked(self) -> bool:
        return self.z > Z_LIMIT


def detect(token_ids: SequenceOf[int], options: WatermarkOptions | None = None) -> Detection:
    """Score the tokens of a text. A pair of neighbours that repeats counts once: its colours are not independent.

    The score of T pairs is (green - gamma T) / sqrt(T gamma (1 - gamma)). It depends on `key` and `gamma`, not on `delta`.
    """
    import numpy as np

    scoring: WatermarkOptions = options or Watermark().options
    pairs = sorted(set(pairwise(token_ids)))
    if not pairs:
        return Detection(0, 0, 0.0, 1.0)
    before, tokens = np.array(pairs, dtype=np.int64).T
    num_green, gamma = int(is_green(before, tokens, scoring).sum()), scoring.gamma
    z = (num_green - gamma * len(pairs)) / sqrt(len(pairs) * gamma * (1 - gamma))
    return Detection(len(pairs), num_green, z, erfc(z / sqrt(2)) / 2)


def detect_text(text: str, model: str, options: WatermarkOptions | None = None) -> Detection:
    """Score a text with the tokenizer of the model that may have written it. Loads no weights."""
    from pitlane.models import open_tokenizer

    return detect(open_tokenizer(model).encode(text, add_special_tokens=False), options)


def main(arguments: SequenceOf[str] | None = None) -> int:
    """The command `pitlane-watermark`: exit code 0 for a text with the watermark, 1 without it, 2 for an error."""
    parser = argparse.ArgumentParser(prog="pitlane-watermark", description="Look for a watermark in a text.")
    parser.add_argument("file", help="the text file; - reads standard input")
    parser.add_argument(
        "--model", default="bundled", help="the model that may have written the text (default: bundled)"
    )
    parser.add_argument("--key", default="pitlane", help="the key of the watermark (default: pitlane)")
    parser.add_argument("--gamma", type=float, default=0.25, help="the green share of the watermark (default: 0.25)")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parsed = parser.parse_args(arguments)
    try:
        text = sys.stdin.read() if parsed.file == "-" else Path(parsed.file).read_text(encoding="utf-8")
        options = Watermark.parse_options({"key": parsed.key, "gamma": parsed.gamma})
        assert isinstance(options, WatermarkOptions)
        verdict = detect_text(text, parsed.model, options)
    except (OSError, UnicodeDecodeError, PitlaneError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if parsed.json:
        print(json.dumps(asdict(verdict) | {"is_watermarked": verdict.is_watermarked}))
    else:
        answer = "has the watermark" if verdict.is_watermarked else "shows no watermark"
        print(f"{answer}: {verdict.num_green} of {verdict.num_scored} pairs are green, z = {verdict.z:.1f}")
    return 0 if verdict.is_watermarked else 1
