"""Rotary position embedding (Su et al. 2021), with the scalings of position interpolation, YaRN and Llama 3.1.

Frequencies and angles are float64, so that large positions stay exact; cos and sin are cast to the model's dtype once per
forward. RoPE rotates pairs of dimensions (i, i + D/2), as in Hugging Face checkpoints. Shapes: cos, sin [T, 1, D]. The
first half of sin is negated, so the rotation is x * cos + roll(x, D/2) * sin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pitlane.engine.models.rope_config import RopeConfig


class Rope:
    """Computes cos and sin once per forward, and rotates queries and keys together."""

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.half = head_dim // 2
        self.frequencies = frequencies(config, head_dim).to(device)
        self.amplitude = amplitude(config)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [T] -> cos, sin [T, 1, D] in the model's dtype."""
        angles = positions.to(torch.float64)[:, None] * self.frequencies
        cos, sin = angles.cos() * self.amplitude, angles.sin() * self.amplitude
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos.to(self.dtype)[:, None], sin.to(self.dtype)[:, None]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, heads, D] -> x rotated, a new tensor."""
        return torch.addcmul(x * cos, torch.roll(x, self.half, -1), sin)


def frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position [D/2], float64."""
    unscaled = config.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if config.kind == "linear":
        return unscaled / config.parameters["factor"]
    if config.kind == "llama3":
        return _llama3(unscaled, config)
    if config.kind == "yarn":
        return _yarn(unscaled, config, head_dim)
    return unscaled


def amplitude(config: RopeConfig) -> float:
    """Factor on cos and sin: 1 except for YaRN (Peng et al. 2023, equation 22)."""
    if config.kind != "yarn":
        return 1.0
    given = config.parameters
    if "attention_factor" in given:
        return given["attention_factor"]

    def mscale(weight: float) -> float:
        return 1.0 if given["factor"] <= 1 else 0.1 * weight * math.log(given["factor"]) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


def _llama3(unscaled: Tensor, config: RopeConfig) -> Tensor:
    """Divide low frequencies by the factor, keep high frequencies, and blend the frequencies between them."""
    given = config.parameters
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * unscaled / (2 * math.pi)  # full turns in the trained context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return unscaled / given["factor"] * (1 - blend) + unscaled * blend


def _yarn(unscaled: Tensor, config: RopeConfig, head_dim: int) -> Tensor:
    """Keep dimensions that turn often in the trained context, divide slow dimensions by the factor, with a ramp between."""
    given = config.parameters

    def dimension(turns: float) -> float:
        context = given["original_max_position_embeddings"]
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", 1):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    blend = ramp.clamp(0, 1)
    return unscaled / given["factor"] * blend + unscaled * (1 - blend)
