"""A folder of safetensors files with quantized linears. It shows the names and shapes of the dense model.

`get` decodes a packed linear to one tensor `weight`; `tensors` returns the stored numbers. Opening the folder compares all headers
with the config. So only wrong values can make `read` fail. An error names the tensor and the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pitlane.engine.errors import ModelError
from pitlane.engine.models.config import DecoderConfig
from pitlane.engine.models.config_file import escaped, read_json
from pitlane.engine.models.decoder import parts_of
from pitlane.engine.models.parts import LinearPart
from pitlane.engine.models.quantized.config import KEYS, reader_in
from pitlane.engine.models.quantized.packing import PackedTensors, PackedWeight, Packing
from pitlane.engine.models.quantized.spec import BadTensor, Reader, Spec
from pitlane.engine.models.weights import SafetensorsFolder, StoredName

WEIGHT = "weight"
DENSE_DTYPES = ("F64", "F32", "F16", "BF16")
WAY_OUT = "correct quantization_config, or download the model again"
# Scales of activations and of KV. Pitlane keeps both in the model's dtype.
NOT_USED = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
)


class Linear(NamedTuple):
    """A packed linear of the checkpoint. tensors: last part of a tensor's name -> name in the file."""

    packing: Packing
    outputs: int
    inputs: int
    tensors: Mapping[str, str]


class QuantizedFolder(SafetensorsFolder):
    """Shows a quantized checkpoint as a dense model. packings: by the canonical name of a linear."""

    def __init__(self, path: Path, reader: Reader, config: DecoderConfig, stored_name: StoredName) -> None:
        super().__init__(path)
        self.reader, self.dtype_name = reader, config.dtype
        self.linears: dict[str, Linear] = {}  # by the name of the weight
        self.files_of: dict[str, Path] = dict(self.owner)
        self.packings: dict[str, Packing] = {}
        for name, outputs, inputs, has_bias in _linears(config):
            stored = stored_name(name)
            linear = self._packed(stored, outputs, inputs)
            if linear is not None:
                self._take(stored, linear, has_bias)
                self.packings[name] = linear.packing
        for name in [name for name in self.owner if name.rpartition(".")[2] in NOT_USED]:
            del self.owner[name]

    def tensors(self, module: str, names: Iterable[str]) -> PackedTensors | None:
        """The tensors of a linear; None if it is dense. names: last parts of the tensors' names, with `weight`."""
        linear = self.linears.get(f"{module}.{WEIGHT}")
        if linear is None:
            return None
        plain = {name: self.get(f"{module}.{name}") for name in names if name != WEIGHT}
        return PackedTensors(partial(self._read, module, linear), self._dtype, plain)

    def get(self, name: str) -> Tensor:
        linear = self.linears.get(name)
        if linear is None:
            return super().get(name)
        return self._read(name.removesuffix(f".{WEIGHT}"), linear).dense(self._dtype)

    def release(self, name: str) -> None:
        linear = self.linears.get(name)
        if linear is None:
            super().release(name)
            return
        for stored in linear.tensors.values():
            self._release(self.files_of[stored], self.handles[self.files_of[stored]].get_tensor(stored))

    def shape(self, name: str) -> tuple[int, ...]:
        linear = self.linears.get(name)
        return super().shape(name) if linear is None else (linear.outputs, linear.inputs)

    def dtype(self, name: str) -> str:
        if name not in self.linears:
            return super().dtype(name)
        return {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[self.dtype_name]

    def fingerprint(self) -> str:
        """A digest of the files and of the quantization config: the weights depend on both."""
        raw = read_json(self.folder / "config.json")
        method = repr([raw.get(key) for key in KEYS])
        return hashlib.sha256(f"{super().fingerprint()} {method}".encode()).hexdigest()

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def _packed(self, module: str, outputs: int, inputs: int) -> Linear | None:
        """The linear, if the files hold packed tensors for it, else None. Raises ModelError for tensors that do not fit."""
        weight = f"{module}.{WEIGHT}"
        if weight in self.owner and self.dtype(weight) in DENSE_DTYPES:
            return None
        try:
            packing = self.reader.packing_of(module, inputs)
        except ModelError as error:
            raise type(error)(f"{self.folder / 'config.json'}: {error}") from None
        if packing is None:
            return None
        specs = self.reader.specs(packing, outputs, inputs)
        stored = {part: f"{module}.{part}" for part in specs if f"{module}.{part}" in self.owner}
        if not stored:
            return None  # `checked` names the missing weight
        for part, spec in specs.items():
            self._check(module, part, spec, packing)
        return Linear(packing, outputs, inputs, stored)

    def _check(self, module: str, part: str, spec: Spec, packing: Packing) -> None:
        name = f"{module}.{part}"
        if name not in self.owner:
            if spec.is_needed:
                file = next(self.owner[other] for other in self.owner if other.startswith(f"{module}."))
                raise ModelError(f"{file} lacks {escaped(name)}, which {packing.method} needs; {WAY_OUT}")
            return
        shape, dtype = self.shape(name), self.dtype(name)
        if shape not in spec.shapes:
            shapes = " or ".join(map(str, spec.shapes))
            raise ModelError(
                f"{self.owner[name]}: {escaped(name)} must be {shapes} by config.json ({packing}), got {shape}; {WAY_OUT}"
            )
        if dtype not in spec.dtypes:
            raise ModelError(
                f"{self.owner[name]}: {escaped(name)} must be {' or '.join(spec.dtypes)}, got {dtype}; {WAY_OUT}"
            )

    def _take(self, module: str, linear: Linear, has_bias: bool) -> None:
        """Replace the packed tensors by the name of the weight. Drop a bias of zeros if the model has no bias."""
        weight, bias = f"{module}.{WEIGHT}", f"{module}.bias"
        file = self.owner[next(iter(linear.tensors.values()))]
        for stored in linear.tensors.values():
            del self.owner[stored]
        self.owner[weight], self.linears[weight] = file, linear
        if not has_bias and bias in self.owner and not bool(super().get(bias).any()):
            del self.owner[bias]  # AutoGPTQ writes a bias for every linear
        if linear.packing.symmetric:
            self.owner.pop(f"{module}.weight_zero_point", None)

    def _read(self, module: str, linear: Linear) -> PackedWeight:
        def get(part: str) -> Tensor:
            stored = linear.tensors[part]
            tensor: Tensor = self.handles[self.files_of[stored]].get_tensor(stored)
            return tensor

        try:
            packed = self.reader.read(linear.packing, linear.outputs, linear.inputs, get)
        except BadTensor as error:
            raise ModelError(f"{self.owner[f'{module}.{WEIGHT}']}: {escaped(module)}.{error}") from None
        if not bool(packed.scales.isfinite().all()):
            raise ModelError(
                f"{self.owner[f'{module}.{WEIGHT}']}: a scale of {escaped(module)} is not finite; download the model again"
            )
        return packed


def open_weights(folder: Path, config: DecoderConfig, stored_name: StoredName) -> SafetensorsFolder:
    """Open the files of a model folder, packed or dense. Raises ModelError."""
    reader = reader_in(folder)
    return SafetensorsFolder(folder) if reader is None else QuantizedFolder(folder, reader, config, stored_name)


def _linears(config: DecoderConfig) -> Iterable[tuple[str, int, int, bool]]:
    """Name, outputs, inputs of every linear of the checkpoint, and whether it has a bias."""
    for part in parts_of(config):
        if isinstance(part, LinearPart) and part.tied_to is None:
            for member in part.members:
                yield member.name, member.out_features, part.in_features, part.bias
