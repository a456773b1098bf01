"""Start weights that copy: heads of the first layer read earlier tokens, heads of later layers look for the same context.

From random weights, a model learns to look something up in a document only after tens of millions of tokens. These weights repeat
an earlier run of tokens at any distance, with 98 % of the tokens right before any training. Training only has to learn which
context to look for. The circuit is that of induction heads (Olsson et al. 2022), written as ordinary Llama weights, which training
may change. The residual stream holds a constant dimension, the embedding E of the token, three sketches (random projections) of
earlier tokens, and a sketch of the page number.

    layer 0      heads read 1 and 2 tokens back and the mean of about twenty (RoPE phases on the constant), and write sketches
    layer 1      a head finds the token after the latest page marker, which is the page number, and writes its sketch
    layers 1..   a head per KV head: key = sketch of the previous token and its context, query = this token and its context
    last layer   these heads copy the token at their match, two spare heads erase the current token

Weights are [out_features, in_features]. Needs 4 heads of 64 on 2 KV heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel as Model

from pitlane.training.errors import TrainingError

HEAD, HALF, KV_HEADS, GROUP = 64, 32, 2, 2
CONSTANT, FIRST_TOKEN, TOKEN, SKETCH, PAGE = 0.5, 1, 128, 32, 24  # E is dimensions 1 to 128
POSITIONS, FIRST_CONTENT = 8, 14  # RoPE pairs that place heads, and the first slow enough to match contents
# Pairs whose cosine falls within a page and does not rise again within thousands of tokens.
RECENCY = range(POSITIONS, FIRST_CONTENT)
POSITION_GAIN, MATCH_GAIN, PAGE_GAIN, COPY, RECENT = 10.0, 12.0, 60.0, 4.0, 0.8
# Per head: tokens back, first RoPE pair, number of the sketch that it writes.
READERS = ((1.0, 0, 0), (2.0, 0, None), (2.0, 0, 1), (8.0, 5, 2))


def _orthonormal(rows: int, columns: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(columns, rows))[0]
    return basis.T


def _sketch(number: int) -> slice:
    start = FIRST_TOKEN + TOKEN + number * SKETCH
    return slice(start, start + SKETCH)


_PAGE = slice(FIRST_TOKEN + TOKEN + 3 * SKETCH, FIRST_TOKEN + TOKEN + 3 * SKETCH + PAGE)
_IS_MARKER, _AFTER_MARKER = _PAGE.stop, _PAGE.stop + 1  # MARK for a page marker; 1 for the token after a page marker
MARK = 0.1  # small, so that the norm of a marker stays that of other tokens


class _Layer:
    """Writes heads into a layer. norm: the factor of the layer's RMSNorm, 1 / rms of the residual stream."""

    def __init__(self, attention: Any, frequencies: Tensor, norm: float) -> None:
        self.q, self.k = attention.q_proj.weight, attention.k_proj.weight
        self.v, self.o = attention.v_proj.weight, attention.o_proj.weight
        self.frequencies, self.norm = frequencies, norm
        self.pairs = torch.arange(POSITIONS)
        self.gain = POSITION_GAIN / (CONSTANT * norm)
        for start in range(0, KV_HEADS * HEAD, HEAD):
            self.k[start + self.pairs] = 0.0
            self.k[start + HALF + self.pairs] = 0.0
            self.k[start + self.pairs, 0] = self.gain

    def read_back(self, head: int, tokens: float, first_pair: int = 0) -> None:
        """Let a query head attend to the place `tokens` back. Without the pairs before `first_pair` the place is wider."""
        self.q[head * HEAD : (head + 1) * HEAD] = 0.0
        used = (self.pairs >= first_pair) * self.gain
        self.q[head * HEAD + self.pairs, 0] = used * (tokens * self.frequencies).cos()
        self.q[head * HEAD + HALF + self.pairs, 0] = -used * (tokens * self.frequencies).sin()

    def match(self, kv: int, sketch: Tensor) -> None:
        """Let the first query head of a KV head look for places after the same token in the same context."""
        slow = torch.cat([torch.arange(FIRST_CONTENT, HALF), torch.arange(HALF + FIRST_CONTENT, HEAD)])
        width = len(slow) // 2
        key, query = kv * HEAD, kv * GROUP * HEAD
        before, recent = _sketch(0).start, _sketch(2).start
        gain = math.sqrt(MATCH_GAIN * 8 * TOKEN / width) / self.norm
        self.k[key + slow], self.q[query : query + HEAD] = 0.0, 0.0
        token = slice(FIRST_TOKEN, FIRST_TOKEN + TOKEN)
        self.k[key + slow[:width], before : before + width] = gain * torch.eye(width)
        self.q[query + slow[:width], token] = gain * sketch[:width]
        if kv == 0:
            rest = slow[width:]
            self.k[key + rest, recent : recent + width] = gain * RECENT * torch.eye(width)
            self.q[query + rest, recent : recent + width] = gain * RECENT * torch.eye(width)
        else:
            rest, more = slow[width:SKETCH], SKETCH - width
            self.k[key + rest[:more], before + width : before + SKETCH] = gain * torch.eye(more)[: len(rest[:more])]
            self.q[query + rest[:more], token] = gain * sketch[width:SKETCH][: len(rest[:more])]

    def copy(self, kv: int, half: int, gain: float) -> None:
        """Let a KV head carry half of E, and let its matching query head write it."""
        places = slice(FIRST_TOKEN + half * HEAD, FIRST_TOKEN + (half + 1) * HEAD)
        query = kv * GROUP * HEAD
        self.v[kv * HEAD : (kv + 1) * HEAD] = 0.0
        self.v[kv * HEAD : (kv + 1) * HEAD, places] = torch.eye(HEAD) / self.norm
        self.o[places, query : query + HEAD] = gain * torch.eye(HEAD)
        if gain:
            self.read_back(kv * GROUP + 1, 0.0)
            self.o[places, query + HEAD : query + 2 * HEAD] = -torch.eye(HEAD)

    def find_page(self) -> None:
        """Let the spare head of the first KV head look for the latest token after a page marker, and write its sketch."""
        gain = math.sqrt(PAGE_GAIN * 8 / (len(RECENCY) * CONSTANT)) / self.norm
        pairs = torch.tensor(RECENCY)
        self.q[HEAD : 2 * HEAD] = self.k[pairs + HALF] = self.k[pairs] = 0.0
        self.q[HEAD + pairs, 0] = gain
        self.k[pairs, _AFTER_MARKER] = gain
        self.o[_PAGE, HEAD : 2 * HEAD] = 1.5 * _orthonormal(PAGE, HEAD)

    def carry_page(self) -> None:
        """Let the first KV head carry the page's sketch beside part of E. Training finds a use for it."""
        self.v[HEAD - PAGE : HEAD] = 0.0
        self.v[HEAD - PAGE : HEAD, _PAGE] = torch.eye(PAGE) / self.norm


@torch.no_grad()
def init_copying(model: Model, page_marker: int | None = None) -> None:
    """Overwrite a model's random weights in place. page_marker: id of the token before a page number."""
    config = model.config
    if (config.num_attention_heads, config.num_key_value_heads, config.head_dim) != (4, KV_HEADS, HEAD):
        raise TrainingError(
            f"copying start weights need 4 heads of 64 on 2 KV heads, not {config.num_attention_heads} of {config.head_dim} "
            f"on {config.num_key_value_heads}; choose hidden size 256"
        )
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(POSITIONS) / HALF)
    embedding = model.get_input_embeddings().weight
    embedding.zero_()
    embedding[:, FIRST_TOKEN : FIRST_TOKEN + TOKEN] = torch.nn.functional.normalize(torch.randn(len(embedding), TOKEN))
    embedding[:, 0] = CONSTANT
    if page_marker is not None:
        embedding[page_marker, _IS_MARKER] = MARK
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    squared = 1 + CONSTANT**2
    sketches = [_orthonormal(SKETCH, TOKEN) for _ in range(KV_HEADS)]
    _write_readers(model, frequencies, squared, sketches)
    squared += 3 * SKETCH / TOKEN
    layers = model.model.layers
    for number in range(1, len(layers)):
        layer = _Layer(layers[number].self_attn, frequencies, math.sqrt(config.hidden_size / squared))
        layers[number].self_attn.q_proj.weight.mul_(0.5)
        for kv in range(KV_HEADS):
            layer.match(kv, sketches[0])
            layer.copy(kv, (kv + number) % 2, COPY if number == len(layers) - 1 else 0.0)
        if page_marker is not None and number == 1:
            layer.find_page()
        elif page_marker is not None and number < len(layers) - 1:
            layer.carry_page()


def _write_readers(model: Model, frequencies: Tensor, squared: float, sketches: list[Tensor]) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.zero_()
    attention.v_proj.weight.zero_()
    layer = _Layer(attention, frequencies, math.sqrt(model.config.hidden_size / squared))
    for kv, sketch in enumerate(sketches):
        layer.v[kv * HEAD : kv * HEAD + SKETCH, FIRST_TOKEN : FIRST_TOKEN + TOKEN] = sketch
    layer.v[SKETCH, _IS_MARKER] = 1.0
    layer.o[_AFTER_MARKER, SKETCH] = 1 / (MARK * layer.norm)  # head 0 reads one token back
    for head, (tokens, first_pair, number) in enumerate(READERS):
        layer.read_back(head, tokens, first_pair)
        if number is not None:
            layer.o[_sketch(number), head * HEAD : head * HEAD + SKETCH] = torch.eye(SKETCH) / layer.norm
