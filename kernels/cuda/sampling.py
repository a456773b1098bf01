"""Sampling on the device: top-k, top-p, min-p and Gumbel noise over logits [R, V], with the rules of engine/decode/sampling.py.

A token is the argmax over the survivors of scaled + Gumbel(hash(key, token id)), where scaled = (logit - largest) / temperature;
all in float64. The survivors are the first tokens in the order of falling logits; equal logits are in the order of their ids. So a
cut is a logit and a number of tokens that equal it. A program takes a row and finds the cut by bisection over the 32 bits of a
logit: top-k counts the tokens above it, top-p sums their weights. Moves 4 R V bytes for each pass: 2 passes, 32 more for top-k, 32
for top-p (with 8 bytes per weight). Rows must have a finite largest logit and no NaN; penalties come before.
Reference: `sample_ref`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


def gumbel_ref(keys: list[int], count: int) -> Tensor:
    """Noise [R, count] of the tokens [0, count), float64."""
    tokens = np.arange(count, dtype=np.uint64) * np.uint64(GOLDEN.value)
    bits = tokens + np.array(keys, np.uint64)[:, None]
    for _ in range(2):
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(FIRST.value)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(SECOND.value)
        bits ^= bits >> np.uint64(31)
    uniform = torch.from_numpy((bits >> np.uint64(11) | np.uint64(1)).astype(np.float64) * 2.0**-53)
    return -(-uniform.log()).log()


def sample_ref(
    logits: Tensor,
    keys: list[int],
    temperatures: list[float],
    top_ks: list[int],
    top_ps: list[float],
    min_ps: list[float],
) -> Tensor:
    """The reference: sort every row, cut it, add the noise. The arguments are those of `sample`."""
    temperature, top_k, top_p, min_p = (
        torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]
        for values in (temperatures, top_ks, top_ps, min_ps)
    )
    values = logits.double() - logits.double().amax(1, keepdim=True)
    scaled, order = (values / torch.where(temperature == 0, 1.0, temperature)).sort(dim=1, descending=True, stable=True)
    places = torch.arange(logits.shape[1], device=logits.device)[None]
    kept = places < torch.where(top_k == 0, logits.shape[1], top_k)
    weights = scaled.exp() * kept
    kept &= (weights.cumsum(1) - weights < top_p * weights.sum(1, keepdim=True)) | (top_p >= 1)
    kept &= scaled >= min_p.log()
    noise = gumbel_ref(keys, logits.shape[1]).to(logits.device).gather(1, order)
    scores = torch.where(kept, scaled + noise * (temperature > 0), float("-inf"))
    return order.gather(1, scores.argmax(1, keepdim=True))[:, 0]


@triton.jit
def ranks_of(value):
    """int32 of float32 values, in the order of the values; -0 equals 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def gumbel(key, tokens):
    """Gumbel noise of tokens, float64. key: uint64, the hash of seed, sample index and position."""
    bits = tokens.to(tl.uint64) * GOLDEN + key
    for _ in tl.static_range(2):
        bits = (bits ^ (bits >> 30)) * FIRST
        bits = (bits ^ (bits >> 27)) * SECOND
        bits = bits ^ (bits >> 31)
    uniform = ((bits >> 11) | 1).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit
def sample_kernel(
    logits, keys, temperatures, top_ks, top_ps, log_min_ps, weights, out, stride, V,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights [R, V] float64: memory for top-p. TOP_K, TOP_P: a row of the batch wants the filter."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    weights += row * V
    inner = tl.arange(0, BLOCK)
    peak = tl.full([1], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        value = tl.load(logits + start + inner, start + inner < V, float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, tl.max(value, 0))
    temperature, log_min_p = tl.load(temperatures + row), tl.load(log_min_ps + row)
    greedy = temperature == 0
    divisor = tl.where(greedy, 1.0, temperature)
    lowest = tl.full([1], -0x80000000, tl.int64)  # rank of the cut: tokens above it survive, and `ties` tokens at it
    ties = tl.full([1], 0x7FFFFFFF, tl.int64)
    if TOP_K:
        k = tl.load(top_ks + row)
        if (k > 0) & (k < V):
            low, high = lowest, tl.max(ranks_of(peak), 0).to(tl.int64) + tl.zeros([1], tl.int64)
            for _ in range(32):  # the lowest rank with fewer than k tokens above
                middle = (low + high) >> 1
                above = tl.zeros([1], tl.int64)
                for start in range(0, V, BLOCK):
                    value = tl.load(logits + start + inner, start + inner < V, float("-inf")).to(tl.float32)
                    is_above = (ranks_of(value).to(tl.int64) > middle) & (start + inner < V)
                    above += tl.sum(is_above.to(tl.int64), 0)
                low, high = tl.where(above < k, low, middle + 1), tl.where(above < k, middle, high)
            above = tl.zeros([1], tl.int64)
            for start in range(0, V, BLOCK):
                value = tl.load(logits + start + inner, start + inner < V, float("-inf")).to(tl.float32)
                is_above = (ranks_of(value).to(tl.int64) > low) & (start + inner < V)
                above += tl.sum(is_above.to(tl.int64), 0)
            lowest, ties = low, k - above
    if TOP_P:
        p = tl.load(top_ps + row)
        if p < 1:
            total = tl.zeros([1], tl.float64)
            num_ties = tl.zeros([1], tl.int64)
            for start in range(0, V, BLOCK):
                inside = start + inner < V
                value = tl.load(logits + start + inner, inside, float("-inf")).to(tl.float32)
                rank = ranks_of(value).to(tl.int64)
                is_tie = (rank == lowest) & inside
                kept = inside & ((rank > lowest) | (is_tie & (num_ties + tl.cumsum(is_tie.to(tl.int64), 0) <= ties)))
                num_ties += tl.sum(is_tie.to(tl.int64), 0)
                weight = tl.exp((value.to(tl.float64) - peak.to(tl.float64)) / divisor)
                weight = tl.where(kept, weight, 0.0)
                tl.store(weights + start + inner, weight, inside)
                total += tl.sum(weight, 0)
            tl.debug_barrier()  # other threads read these weights
            limit = p * total
            low, high = lowest, tl.max(ranks_of(peak), 0).to(tl.int64) + tl.zeros([1], tl.int64)
            for _ in range(32):  # the lowest rank with less weight above than the limit
                middle = (low + high) >> 1
                above = tl.zeros([1], tl.float64)
                for start in range(0, V, BLOCK):
                    inside = start + inner < V
                    value = tl.load(logits + start + inner, inside, float("-inf")).to(tl.float32)
                    weight = tl.load(weights + start + inner, inside, 0.0)
                    above += tl.sum(tl.where(ranks_of(value).to(tl.int64) > middle, weight, 0.0), 0)
                low, high = tl.where(above < limit, low, middle + 1), tl.where(above < limit, middle, high)
            above = tl.zeros([1], tl.float64)
            at_cut = tl.zeros([1], tl.float64)
            for start in range(0, V, BLOCK):
                inside = start + inner < V
                value = tl.load(logits + start + inner, inside, float("-inf")).to(tl.float32)
                weight = tl.load(weights + start + inner, inside, 0.0)
                rank = ranks_of(value).to(tl.int64)
                above += tl.sum(tl.where(rank > low, weight, 0.0), 0)
                at_cut = tl.maximum(at_cut, tl.max(tl.where((rank == low) & inside, weight, 0.0), 0))
            # tie number i, from 0 on, has above + i * at_cut before it, and survives below the limit
            room = tl.ceil((limit - above) / tl.where(at_cut > 0, at_cut, 1.0))
            num_kept = tl.maximum(tl.minimum(room, 2147483647.0), 1.0).to(tl.int64)
            ties = tl.where(low == lowest, tl.minimum(ties, num_kept), num_kept)
            lowest = low
    key = tl.load(keys + row).to(tl.uint64, bitcast=True)
    best = tl.full([1], float("-inf"), tl.float64)
    token = tl.zeros([1], tl.int64)
    num_ties = tl.zeros([1], tl.int64)
    for start in range(0, V, BLOCK):
        inside = start + inner < V
        value = tl.load(logits + start + inner, inside, float("-inf")).to(tl.float32)
        rank = ranks_of(value).to(tl.int64)
        is_tie = (rank == lowest) & inside
        kept = inside & ((rank > lowest) | (is_tie & (num_ties + tl.cumsum(is_tie.to(tl.int64), 0) <= ties)))
        num_ties += tl.sum(is_tie.to(tl.int64), 0)
        scaled = (value.to(tl.float64) - peak.to(tl.float64)) / divisor
        noisy = scaled + gumbel(key, start + inner)
        noisy = tl.where(kept & (scaled >= log_min_p), noisy, float("-inf"))
        score = tl.where(greedy, value.to(tl.float64), noisy)
        largest = tl.max(score, 0)
        first = tl.min(tl.where((score == largest) & inside, start + inner, 0x7FFFFFFF), 0)
        token = tl.where(largest > best, first.to(tl.int64), token)
        best = tl.maximum(best, largest)
    tl.store(out + row + tl.zeros([1], tl.int64), token)


def sample(
    logits: Tensor,
    keys: list[int],
    temperatures: list[float],
    top_ks: list[int],
    top_ps: list[float],
    min_ps: list[float],
) -> Tensor:
    """logits [R, V] in 16 or 32 bits, whose rows may be strided -> token ids [R] int64 on their device.

    The lists hold a value per row. keys: hashes of seed, sample index and position, in [0, 2^64). Temperature 0 is greedy; top-k 0,
    top-p 1 and min-p 0 are off.
    """
    rows, vocabulary = logits.shape
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not vocabulary:
        raise ValueError(f"logits must be of 16 or 32 bits [R, V], got {logits.dtype} {list(logits.shape)}")
    lengths = [len(values) for values in (keys, temperatures, top_ks, top_ps, min_ps)]
    if any(length != rows for length in lengths):
        raise ValueError(f"the lists must have {rows} values, one for each row, got {lengths}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out

    def moved(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)

    signed = moved([key - 2**64 if key >= 2**63 else key for key in keys], torch.int64)
    temperature, top_p = (moved(values, torch.float64) for values in (temperatures, top_ps))
    has_p = any(p < 1 for p in top_ps)
    weights = torch.empty(rows * vocabulary if has_p else 0, dtype=torch.float64, device=logits.device)
    sample_kernel[(rows,)](
        logits, signed, temperature, moved(top_ks, torch.int64), top_p, moved(min_ps, torch.float64).log(), weights, out,
        logits.stride(0), vocabulary, TOP_K=any(0 < k < vocabulary for k in top_ks), TOP_P=has_p, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out
