"""Typed access to the metadata of a GGUF model. An error names the key, shows the value, and says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config_file import escaped, short
from pitlane.engine.models.gguf.header import Value

Number = TypeVar("Number", int, float)


class Keys:
    """The metadata of a file. Keys are given without the architecture: `rope.freq_base` for `llama.rope.freq_base`."""

    def __init__(self, file: Path, metadata: Mapping[str, Value], architecture: str) -> None:
        self.file, self.metadata, self.architecture = file, metadata, architecture

    def get(self, key: str) -> Value | None:
        return self.metadata.get(f"{self.architecture}.{key}")

    def size(self, key: str) -> int:
        """A whole number that the file must have. A list with a number per layer counts if all numbers are equal."""
        return self.required(key, self.optional_size(key))

    def optional_size(self, key: str) -> int | None:
        value = self.get(key)
        values = value if isinstance(value, list) else [value]
        if value is None:
            return None
        if not values or any(other != values[0] for other in values):
            raise self.error(key, value, "must be the same for all layers")
        if isinstance(values[0], bool) or not isinstance(values[0], int):
            raise self.error(key, value, "must be a whole number")
        return int(values[0])

    def required(self, key: str, value: Number | None) -> Number:
        if value is None:
            raise ModelError(f"{self.file} lacks the metadata key {self.architecture}.{key}; download it again")
        return value

    @overload
    def decimal(self, key: str) -> float | None: ...
    @overload
    def decimal(self, key: str, default: float) -> float: ...
    def decimal(self, key: str, default: float | None = None) -> float | None:
        """A number. A float32 becomes the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "must be a number")
        return shortest(value)

    def error(self, key: str, value: object, rule: str) -> ModelError:
        return ModelError(f"{self.file}: {self.architecture}.{escaped(key)} {rule}, got {short(value)}; correct it")


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32; the value itself if it is no float32."""
    with np.errstate(all="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else float(value)
