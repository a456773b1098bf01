"""Check the types and ranges of a new SamplingParams. `requests.py` checks the rest of a request.

A wrong value raises here, before a step runs: an error inside a step could end other requests. An integer field takes
any integer type, numpy's too, but no float (40.0), no text ("40") and no bool. Every refusal is a BadOption that names
the field, its range and the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import index
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pitlane.engine.errors import BadOption

MAX_SAMPLES = 32

MAX_SHOWN = 60  # characters of a refused value in a message


def _whole(value: object) -> object:
    """Turn any integer type into an int. Return other values unchanged: pydantic refuses them."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            return index(value)  # type: ignore[arg-type]
    return value


def _items(value: object) -> object:
    """Turn a list, set or array into a tuple. Return other values unchanged: pydantic refuses them."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping)):
        with suppress(TypeError):  # a numpy array without dimensions cannot be iterated
            return tuple(value)
    return value


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else _items(value)


Whole = Annotated[int, BeforeValidator(_whole)]


class _Sampling(BaseModel):
    """The fields of SamplingParams. A field's description is the range that messages show."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)]
    temperature: float = Field(ge=0, description="in [0, inf)")
    top_k: Annotated[Whole, Field(ge=0, lt=2**31)]
    top_p: float = Field(gt=0, le=1, description="in (0, 1]")
    min_p: float = Field(ge=0, le=1, description="in [0, 1]")
    repetition_penalty: float = Field(ge=0.01, le=100, description="in [0.01, 100]")
    presence_penalty: float = Field(ge=-100, le=100, description="in [-100, 100]")
    frequency_penalty: float = Field(ge=-100, le=100, description="in [-100, 100]")
    seed: Annotated[Whole | None, Field(ge=0, lt=2**63, description="in [0, 2**63)")]
    sample_index: Annotated[Whole, Field(ge=0, lt=2**31)]
    n: Annotated[Whole, Field(ge=1, le=MAX_SAMPLES, description=f"in [1, {MAX_SAMPLES}]")]
    stop: Annotated[tuple[str, ...], BeforeValidator(_texts), Field(description="a text or a list of texts")]
    stop_token_ids: Annotated[tuple[Whole, ...], BeforeValidator(_items), Field(description="a list of token ids")]
    ignore_eos: bool
    logprobs: Annotated[Whole | None, Field(ge=0, le=50, description="in [0, 50]")]


KINDS = {"int_type": "an integer", "float_type": "a number", "bool_type": "true or false"}
BOUNDS = {"greater_than_equal": ">= {ge}", "less_than": "< {lt}"}


def checked_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SamplingParams, converted to the types of the fields. Raises BadOption."""
    try:
        return _Sampling(**values).__dict__
    except ValidationError as error:
        raise BadOption(_explained(error)) from None


def _explained(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    value, expected = first["input"], _Sampling.model_fields[name].description
    if len(first["loc"]) == 1:  # a longer `loc` points at an item of a tuple
        bound = BOUNDS.get(first["type"], "").format(**first.get("ctx", {}))
        expected = " ".join(filter(None, (KINDS.get(first["type"]), expected or bound)))
    return f"{name} must be {expected}, got {shown(value)}"


def shown(value: object) -> str:
    """Return any value as a short text for a message."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4300 digits has no repr; a caller's class may raise anything
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
