"""The rotary embedding (RoPE) of a GGUF model as the keys of a `config.json`.

llama3 scaling has no key in GGUF. The converter stores its result, a factor on the wavelength of each frequency, in the tensor
`rope_freqs.weight`. The parameters are computed back from the factors, and must reproduce all of them. With a = 1 / (h - l):
factor(w) is 1 for w < n / h, `factor` for w > n / l, and between them 1 / factor(w) = (1 - s) / factor + s with
s = a * (n / w - l). l, h: low and high frequency factor. n: original context. Only n / l and n / h matter, so l is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose, isfinite, pi
from typing import Any

from pitlane.engine.errors import UnsupportedModel
from pitlane.engine.models.config_file import short
from pitlane.engine.models.gguf.keys import Keys

DEFAULT_BASE = 10000.0  # of llama.cpp, for a file without `rope.freq_base`
MAX_BASE = 1e15
SCALING = "rope.scaling."
YARN = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
UNUSED = ("finetuned", "type", "factor", "original_context_length")  # read by name, or without a meaning here
NEUTRAL = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "alpha": 0.0}  # values that change nothing
TOLERANCE = 1e-4  # relative; the converter computes the factors in float32


def rope_values(keys: Keys, factors: Sequence[float] | None, head_dim: int) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` if the RoPE is scaled. factors: of `rope_freqs.weight`. Raises ModelError."""
    num_rotated = keys.optional_size("rope.dimension_count")
    if num_rotated not in (None, head_dim):
        raise UnsupportedModel(
            f"{keys.file}: RoPE on {num_rotated} of {head_dim} values of a head is not supported; choose another model"
        )
    base = keys.decimal("rope.freq_base", DEFAULT_BASE)
    if not 1 < base < MAX_BASE:
        raise keys.error("rope.freq_base", base, f"must be between 1 and {MAX_BASE:.0e}")
    scaling = _from_keys(keys)
    if factors is not None:
        from_tensor = _from_factors(keys, factors, base, head_dim)
        if scaling and from_tensor:
            raise UnsupportedModel(f"{keys.file} scales RoPE twice, by keys and by a tensor; choose another file")
        scaling = scaling or from_tensor
    return {"rope_theta": base, **({"rope_scaling": scaling} if scaling else {})}


def _from_keys(keys: Keys) -> dict[str, Any]:
    """The scaling of the keys `rope.scaling.*`, or of the old key `rope.scale_linear`."""
    kind, factor = keys.get(SCALING + "type"), keys.decimal(SCALING + "factor")
    old_factor = keys.decimal("rope.scale_linear")
    if kind is None and (factor or old_factor):
        kind = "linear"
    factor = factor or old_factor or 1.0
    if kind in (None, "none") or (kind == "linear" and factor == 1.0):
        return {}
    _check_other_keys(keys)
    values: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        values["original_max_position_embeddings"] = keys.optional_size(SCALING + "original_context_length")
        values |= {name: keys.decimal(SCALING + key) for key, name in YARN.items()}
    return {name: value for name, value in values.items() if value is not None}


def _check_other_keys(keys: Keys) -> None:
    prefix = f"{keys.architecture}.{SCALING}"
    for key in (key.removeprefix(prefix) for key in keys.metadata if key.startswith(prefix)):
        value = keys.get(SCALING + key)
        if key not in UNUSED and key not in YARN and value != NEUTRAL.get(key, 0):
            raise UnsupportedModel(f"{keys.file}: {prefix}{key} {short(value)} is not supported; choose another file")


def _from_factors(keys: Keys, factors: Sequence[float], base: float, head_dim: int) -> dict[str, Any]:
    if len(factors) != head_dim // 2:
        raise keys.error("rope_freqs.weight", len(factors), f"must have {head_dim // 2} values")
    if all(isclose(factor, 1, rel_tol=TOLERANCE) for factor in factors):
        return {}
    waves = [2 * pi * base ** (2 * index / head_dim) for index in range(len(factors))]
    if all(isfinite(factor) and factor >= 1 - TOLERANCE for factor in factors):
        for candidate in (_parameters(max(factors), 4.0, 8192.0), _fitted(factors, waves)):
            if candidate and _reproduces(candidate, factors, waves):
                return candidate
    raise UnsupportedModel(
        f"{keys.file}: the factors of rope_freqs.weight, {min(factors):.4g} to {max(factors):.4g}, are not those of llama3 "
        "scaling; other scaling by a tensor is not supported: choose another file"
    )


def _parameters(factor: float, high: float, context: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": float(f"{factor:.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(f"{high:.6g}"),
        "original_max_position_embeddings": round(context),
    }


def _fitted(factors: Sequence[float], waves: Sequence[float]) -> dict[str, Any] | None:
    """The parameters by the two outermost factors between 1 and the largest; None if there are not two."""
    largest = max(factors)
    between = [
        ((1 / factor - 1 / largest) / (1 - 1 / largest), 1 / wave)
        for factor, wave in zip(factors, waves, strict=True)
        if 1 + TOLERANCE < factor < largest * (1 - TOLERANCE)
    ]
    if len(between) < 2:
        return None
    (s_first, x_first), (s_last, x_last) = between[0], between[-1]
    slope = (s_first - s_last) / (x_first - x_last)
    start = slope * x_first - s_first  # s = slope / w - start, so start = l / (h - l) and slope = n / (h - l)
    if start <= 0 or slope <= 0:
        return None
    return _parameters(largest, 1 + 1 / start, slope / start)


def _reproduces(scaling: dict[str, Any], factors: Sequence[float], waves: Sequence[float]) -> bool:
    context, high, factor = (scaling[key] for key in ("original_max_position_embeddings", "high_freq_factor", "factor"))
    if context < 1 or high <= 1:
        return False
    smooth = [min(1.0, max(0.0, (context / wave - 1) / (high - 1))) for wave in waves]
    expected = [1 / ((1 - s) / factor + s) for s in smooth]
    return all(isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(expected, factors, strict=True))
