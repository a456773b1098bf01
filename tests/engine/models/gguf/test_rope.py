"""The parameters of llama3 scaling come back from the factors in `rope_freqs.weight`; other factors are refused."""

from __future__ import annotations

from typing import Any

import pytest

from pitlane.engine.errors import ModelError, UnsupportedModel
from pitlane.engine.models.gguf.header import Value
from pitlane.engine.models.gguf.keys import Keys
from pitlane.engine.models.gguf.rope import rope_values
from pitlane.engine.models.presets import LLAMA32_ROPE
from tests.engine.models.gguf.model_files import rope_factors
from tests.engine.models.gguf.test_config import FILE
from tests.engine.models.test_architectures import LLAMA3


def keys(**values: Value) -> Keys:
    named = {f"llama.rope.{name.replace('__', '.')}": value for name, value in values.items()}
    return Keys(FILE, named, "llama")


def factors_of(scaling: dict[str, Any], head_dim: int) -> list[float]:
    factors = rope_factors({"head_dim": head_dim, "rope_parameters": {"rope_type": "llama3", **scaling}})
    assert factors is not None
    return [float(factor) for factor in factors]


@pytest.mark.parametrize(
    ("scaling", "head_dim"),
    [
        ({**LLAMA32_ROPE, "rope_theta": 500000.0}, 64),
        ({**LLAMA32_ROPE, "rope_theta": 500000.0, "factor": 8.0}, 128),
        (LLAMA3, 16),
        ({**LLAMA3, "factor": 2.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 1000}, 64),
    ],
)
def test_parameters_come_back(scaling: dict[str, Any], head_dim: int) -> None:
    values = rope_values(keys(freq_base=scaling["rope_theta"]), factors_of(scaling, head_dim), head_dim)
    assert values["rope_theta"] == scaling["rope_theta"]
    assert values["rope_scaling"].pop("rope_type") == "llama3"
    expected = {name: value for name, value in scaling.items() if name not in ("rope_theta", "rope_type")}
    assert values["rope_scaling"] == pytest.approx(expected, rel=1e-4)


def test_only_the_ratios_matter() -> None:
    """Low factor 2 of context 16384 is low factor 1 of context 8192."""
    scaling = {**LLAMA32_ROPE, "rope_theta": 500000.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}
    scaling["original_max_position_embeddings"] = 16384
    assert rope_values(keys(freq_base=500000.0), factors_of(scaling, 64), 64)["rope_scaling"] == LLAMA32_ROPE


def test_factors_of_one_scale_nothing() -> None:
    assert rope_values(keys(), [1.0] * 8, 16) == {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    "factors",
    [[1.0] * 7 + [3.0], [1.0, 2.0, 1.0, 3.0, 1.0, 5.0, 1.0, 8.0], [0.5] * 8, [float("nan")] * 8, [float("inf")] * 8],
)
def test_other_factors(factors: list[float]) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"factors of rope_freqs.weight, .* are not those of llama3 scaling"
    ) as e:
        rope_values(keys(freq_base=500.0), factors, 16)
    assert str(e.value).isprintable()


def test_number_of_factors() -> None:
    with pytest.raises(ModelError, match="must have 8 values, got 3"):
        rope_values(keys(), [1.0] * 3, 16)


def test_scaled_twice() -> None:
    with pytest.raises(UnsupportedModel, match="scales RoPE twice"):
        rope_values(keys(freq_base=500.0, scaling__type="linear", scaling__factor=2.0), factors_of(LLAMA3, 16), 16)


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"scaling__type": "none", "scaling__factor": 4.0}, None),
        ({"scaling__type": "linear", "scaling__factor": 1.0}, None),
        ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"scaling__type": "linear", "scaling__factor": 4.0, "scaling__finetuned": True},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "scaling__type": "yarn",
                "scaling__factor": 4.0,
                "scaling__original_context_length": 32,
                "scaling__yarn_beta_fast": 16.0,
                "scaling__attn_factor": 1.0,
                "scaling__yarn_log_multiplier": 0.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_keys(values: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    assert rope_values(keys(**values), None, 16).get("rope_scaling") == scaling
