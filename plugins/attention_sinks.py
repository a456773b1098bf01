"""Attention sinks: text without end. The model sees the first tokens and the last tokens; the tokens between are dropped.

Changes in the loop: `trim_cache` shows a position the sinks and a window that moves in strides. The pool takes back the blocks
between, so the KV of a sequence stays small, and the context of the model no longer ends a prompt or an answer.
Exactness: approximate. Up to `window` tokens, nothing changes. Behind them, the model does not know the dropped tokens. Measured by
`docs/sinks.py` on the first 3,072 tokens of Moby-Dick at positions from 1,024 on (SmolLM2-135M, bfloat16, a window of 512): a
perplexity of 37.7 becomes 38.6; without sinks, it becomes 70.6.
Costs: a second query, as soon as tokens are dropped. Helps when a chat or a document outgrows the context. An answer about
dropped text is a guess.
Paper: StreamingLLM, Xiao et al. 2023, arXiv:2309.17453. No stored key changes: RoPE attention depends on distances alone, so a
position reads the sinks with a second query, rotated as if the dropped tokens did not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, field_validator

from pitlane import BLOCK_SIZE as BLOCK
from pitlane import Plugin, PluginOptions, Sequence, hookimpl, in_blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pitlane import BuildContext, KVGroup, Lane, Visibility

CHANGING_ROPE = ("dynamic", "longrope")


class AttentionSinks(Plugin):
    name, role, exactness = "attention_sinks", "eviction", "approximate"

    class Options(PluginOptions):
        num_sinks: int = Field(
            4, ge=0, le=1024, title="Sink tokens", description="first tokens of the text that always stay visible"
        )
        window: int = Field(
            1024,
            ge=BLOCK,
            le=2**20,
            title="Window",
            description=f"last tokens that stay visible, rounded up to blocks of {BLOCK} tokens",
        )
        stride: int = Field(
            256,
            ge=BLOCK,
            le=2**20,
            title="Stride",
            description=f"tokens by which the window moves at a time, rounded up to blocks of {BLOCK} tokens",
        )

        _rounded = field_validator("window", "stride")(in_blocks)

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        """The reason if stored keys or earlier tokens cannot be seen at another distance."""
        config = context.config
        kinds = {rope.kind for rope in map(config.rope_of, range(config.num_layers)) if rope is not None}
        changing = sorted(kinds.intersection(CHANGING_ROPE))
        if changing:
            return f"RoPE of kind {changing[0]} changes with the length of the text, so stored keys would go stale"
        if getattr(config, "learned_sinks", None):
            return "the model has learned attention sinks"
        if getattr(config, "recurrent_layers", None):
            return "the model has recurrent layers, whose state keeps all tokens; nothing can be dropped from it"
        return None

    def refusal(self, context: BuildContext) -> str | None:
        """The reason if the window is too large for the model, or if no layer needs it."""
        options, limit = cast(AttentionSinks.Options, self.options), context.config.max_position
        if options.stride > options.window:
            return f"stride {options.stride} is larger than window {options.window}"
        if self._span > limit:
            return f"{options.num_sinks} sinks and a window of {options.window} tokens exceed the model's context of {limit}"
        if not any(self._is_trimmed(group) for group in context.config.kv_groups):
            windows = max(window or 0 for window in context.config.windows)
            return f"its layers have windows of their own, of at most {windows} tokens; choose a smaller window"
        return None

    @hookimpl
    def trim_cache(self, group: KVGroup, context: BuildContext) -> Visibility | None:
        """Trim every group but the groups with a smaller window of their own: they hold few tokens already."""
        return self._visibility if self._is_trimmed(group) else None

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        """Note the tokens that the model no longer saw at the end of the answer."""
        import numpy as np

        last = max(0, seq.kv.num_computed_tokens - 1)
        start = int(self._visibility.starts(np.array([last]))[0])
        if start > self.options.num_sinks:
            first = self.options.num_sinks
            seq.notes[self.name] = {"dropped_tokens": start - first, "dropped": [first, start]}

    @property
    def _visibility(self) -> SinkWindow:
        options = cast(AttentionSinks.Options, self.options)
        return SinkWindow(options.num_sinks, options.window, options.stride)

    @property
    def _span(self) -> int:
        """The most tokens that a position sees, and the largest distance between them."""
        return self._visibility.max_tokens

    def _is_trimmed(self, group: KVGroup) -> bool:
        return group.window is None or group.window > self._span


@dataclass(frozen=True, slots=True)
class SinkWindow:
    """A position sees the first `num_sinks` tokens and at most `window` last tokens, its own included.

    The start of the window is a multiple of `stride`, so the window has more than `window - stride` tokens.
    """

    num_sinks: int
    window: int
    stride: int

    @property
    def max_tokens(self) -> int:
        return self.num_sinks + self.window

    def starts(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        import numpy as np

        outside = np.maximum(positions + 1 - self.window, 0)
        starts: Any = -(-outside // self.stride) * self.stride
        return cast("npt.NDArray[np.int64]", starts)
