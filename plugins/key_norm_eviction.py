"""Key-norm eviction: a long text in a fixed amount of KV. Drops the blocks whose keys have large norms: they get little attention.

Changes in the loop: `trim_cache` scores every full block of KV by the mean L2 norm of its keys, over all layers and heads of its
KV group. After every `interval` tokens, the pool takes back the blocks with the highest scores, until a sequence holds
`budget` tokens. The first block and the last `recent` tokens always stay.
Exactness: approximate. Up to `budget` tokens, nothing changes. After that, the model does not know the dropped tokens, so an
answer about dropped text is a guess. Measured by `docs/sinks.py` on the first 3,072 tokens of Moby-Dick at positions from 1,024 on
(SmolLM2-135M, bfloat16, a position sees 448 to 512 tokens): a perplexity of 37.7 becomes 39.4; with attention sinks and a window of
512 tokens it becomes 38.6.
Costs: a read of the keys of every block, once. A forward ends at the place of an eviction. A prefix cache cannot serve the plan,
because it needs all blocks of a text: the next turn of a chat computes the text again. Helps when KV memory or the time of
attention is short. A text cannot outgrow the context of the model: kept tokens keep their positions.
Paper: Devoto et al. 2024, arXiv:2406.11430. There, single tokens are dropped, per layer and head, and the first two layers drop
none. Blocks of this pool belong to all layers of a KV group, so here a block goes as a whole, by its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pydantic import Field, field_validator

from pitlane import BLOCK_SIZE as BLOCK
from pitlane import Plugin, PluginOptions, Sequence, hookimpl, in_blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from pitlane import BuildContext, KVGroup, Lane, Visibility


class KeyNormEviction(Plugin):
    name, role, exactness = "key_norm_eviction", "eviction", "approximate"
    conflicts = ("prefix_cache",)

    class Options(PluginOptions):
        budget: int = Field(
            1024,
            ge=2 * BLOCK,
            le=2**20,
            title="Budget",
            description=f"tokens that a sequence keeps after an eviction, rounded up to blocks of {BLOCK} tokens",
        )
        recent: int = Field(
            256,
            ge=BLOCK,
            le=2**20,
            title="Recent tokens",
            description=f"last tokens that always stay, rounded up to blocks of {BLOCK} tokens",
        )
        interval: int = Field(
            256,
            ge=BLOCK,
            le=2**20,
            title="Interval",
            description=f"tokens between two evictions, rounded up to blocks of {BLOCK} tokens",
        )

        _rounded = field_validator("budget", "recent", "interval")(in_blocks)

    @classmethod
    def unavailable(cls, context: BuildContext) -> str | None:
        """The reason if the norms of keys say nothing, or if no layer keeps the whole text."""
        if context.config.qk_norm:
            return "the model normalises its keys, so their norms do not tell which tokens get attention"
        if all(group.window is not None for group in context.config.kv_groups):
            return "all of its layers have windows of their own"
        return None

    def refusal(self, context: BuildContext) -> str | None:
        """The reason if the options leave no block to choose from."""
        options = cast(KeyNormEviction.Options, self.options)
        if options.recent + BLOCK > options.budget:
            return f"a budget of {options.budget} tokens does not hold the first {BLOCK} and {options.recent} recent tokens"
        return None

    @hookimpl
    def trim_cache(self, group: KVGroup, context: BuildContext) -> Visibility | None:
        """Evict blocks of the groups that keep the whole text. A group with a window of its own holds few tokens already."""
        return self._policy if group.window is None else None

    @hookimpl
    def sequence_finished(self, seq: Sequence, lane: Lane) -> None:
        """Note the tokens that the model no longer saw at the end of the answer."""
        evicted = [
            index
            for table, visibility in zip(seq.kv.block_tables, lane.pool.visibilities, strict=False)
            if isinstance(visibility, KeyNorms)
            for index, block in enumerate(table)
            if block < 0
        ]
        blocks = sorted(set(evicted))
        if blocks:
            runs = [[index * BLOCK, (index + 1) * BLOCK] for index in blocks]
            seq.notes[self.name] = {"dropped_tokens": len(blocks) * BLOCK, "dropped_runs": _joined(runs)}

    @property
    def _policy(self) -> KeyNorms:
        options = cast(KeyNormEviction.Options, self.options)
        return KeyNorms(options.budget, options.recent, options.interval)


@dataclass(frozen=True, slots=True)
class KeyNorms:
    """Drops the blocks with the longest keys. All counts are in tokens, in whole blocks."""

    budget: int
    recent: int
    interval: int

    @property
    def max_tokens(self) -> int:
        return self.budget + self.interval

    def starts(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        import numpy as np

        return np.zeros_like(positions)

    def score(self, keys: Tensor) -> float:
        """The mean L2 norm of keys [L, Hkv, N, D]. A rotation by RoPE changes no norm."""
        import torch

        return float(keys.to(torch.promote_types(keys.dtype, torch.float32)).norm(dim=-1).mean())

    def evicted(self, scores: Mapping[int, float]) -> list[int]:
        """The blocks with the highest scores, but not the first block nor the recent blocks. Of equal blocks, the older goes."""
        num_evicted = len(scores) - self.budget // BLOCK
        candidates = list(scores)[1 : len(scores) - self.recent // BLOCK]
        return sorted(candidates, key=lambda index: -scores[index])[: max(0, num_evicted)]


def _joined(runs: list[list[int]]) -> list[list[int]]:
    """Join adjacent half-open runs."""
    joined: list[list[int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    return joined
