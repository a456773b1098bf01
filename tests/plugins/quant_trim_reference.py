"""The logits of a decoder whose KV is quantized and trimmed, computed plainly, token by token. For Llama models without windows.

A token reads the keys and values of its own block as they are, and earlier blocks as the format stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pitlane.engine.models.layers import rms_norm, silu_mul
from tests.plugins.sink_reference import visible_tokens

BLOCK = 32


class Policy(Protocol):
    """The tokens that a position sees."""

    def seen(self, position: int) -> dict[int, int]:
        """Return the visible tokens, and for each token the position that rotates its query."""

    def complete(self, block: int, norm: Callable[[int], float]) -> None:
        """A block is complete. norm: the mean norm of the stored keys of a block."""


class Sinks:
    """The first tokens and a window. The query for a sink is rotated as if the dropped tokens did not exist."""

    def __init__(self, num_sinks: int, window: int, stride: int) -> None:
        self.num_sinks, self.window, self.stride = num_sinks, window, stride

    def seen(self, position: int) -> dict[int, int]:
        tokens = visible_tokens(position, self.num_sinks, self.window, self.stride)
        return {token: len(tokens) - 1 if number == token else position for number, token in enumerate(tokens)}

    def complete(self, block: int, norm: Callable[[int], float]) -> None: ...


class Norms:
    """Evicts the blocks with the longest keys after every interval."""

    def __init__(self, budget: int, recent: int, interval: int) -> None:
        self.budget, self.recent, self.interval = budget, recent, interval
        self.held: list[int] = []

    def seen(self, position: int) -> dict[int, int]:
        own = position // BLOCK * BLOCK
        tokens = [block * BLOCK + n for block in self.held for n in range(BLOCK)]
        return dict.fromkeys([*tokens, *range(own, position + 1)], position)

    def complete(self, block: int, norm: Callable[[int], float]) -> None:
        self.held.append(block)
        stop = (block + 1) * BLOCK
        while stop % self.interval == 0 and len(self.held) * BLOCK > self.budget:
            optional = [b for b in self.held if b > 0 and (b + 1) * BLOCK <= stop - self.recent]
            self.held.remove(max(optional, key=norm))


class Stored:
    """The keys and values of a layer: [T][Hkv, D] each, as they are and as the format stores them."""

    def __init__(self) -> None:
        self.full: list[tuple[Tensor, Tensor]] = []
        self.closed: list[tuple[Tensor, Tensor]] = []

    def close(self, rows: Any) -> None:
        """Quantize the last block."""
        keys, values = (torch.stack([pair[part] for pair in self.full[-BLOCK:]], 1) for part in (0, 1))
        keys, values = rows.decode(rows.encode(keys, values), keys.dtype)
        self.closed += zip(keys.unbind(1), values.unbind(1), strict=True)

    def read(self, tokens: list[int], position: int) -> tuple[Tensor, Tensor]:
        own = position // BLOCK * BLOCK
        pairs = [self.full[token] if token >= own else self.closed[token] for token in tokens]
        return torch.stack([key for key, _ in pairs], 1), torch.stack([value for _, value in pairs], 1)


@torch.inference_mode()
def reference_logits(model: Any, token_ids: list[int], rows: Any, policy: Policy) -> Tensor:
    """Logits [T, V] after every token. rows: the format."""
    layers = [Stored() for _ in model.layers]

    def norm(block: int) -> float:
        tokens = range(block * BLOCK, (block + 1) * BLOCK)
        return float(torch.stack([layer.closed[n][0] for layer in layers for n in tokens]).norm(dim=-1).mean())

    logits = []
    for position, token_id in enumerate(token_ids):
        logits.append(_logits(model, token_id, position, layers, policy.seen(position)))
        if (position + 1) % BLOCK == 0:
            for layer in layers:
                layer.close(rows)
            policy.complete(position // BLOCK, norm)
    return torch.stack(logits)


def _logits(model: Any, token_id: int, position: int, layers: list[Stored], seen: dict[int, int]) -> Tensor:
    config, eps = model.config, model.config.rms_norm_eps
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    x = model.embedding(torch.tensor([token_id]))
    for layer, stored in zip(model.layers, layers, strict=True):
        qkv = layer.qkv(rms_norm(x, layer.attention_norm, eps)).view(1, heads + 2 * kv_heads, dim)
        rope = model.ropes[layer.rope]
        rotated = {
            place: rope.rotate(qkv[:, : heads + kv_heads], *rope.angles(torch.tensor([place])))[0]
            for place in {*seen.values(), position}
        }
        stored.full.append((rotated[position][heads:], qkv[0, heads + kv_heads :]))
        keys, values = (x.repeat_interleave(heads // kv_heads, 0) for x in stored.read(list(seen), position))
        q = torch.stack([rotated[place][:heads] for place in seen.values()], 1)
        weights = (config.attention_scale * (q * keys).sum(-1)).softmax(-1)
        x = x + layer.output(torch.einsum("hs,hsd->hd", weights, values).reshape(1, heads * dim))
        x = x + layer.down(silu_mul(layer.gate_up(rms_norm(x, layer.mlp_norm, eps))))
    logits: Tensor = model.head(rms_norm(x, model.norm, eps))[0]
    return logits
