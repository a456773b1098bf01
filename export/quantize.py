"""The work of `pitlane quantize`: read a model linear by linear, round the weights, write them in a format of other programs.

A shard holds the tensors of one layer, so memory does not grow with the number of layers. The linears of the layers are quantized;
embedding and head are copied.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pitlane import CORE_FAMILIES, DecoderConfig, LinearPart, ModelSource, Part, parts_of
from pitlane.export.compressed import compressed_tensors_config
from pitlane.export.errors import ExportError
from pitlane.export.layouts import Layout, check, check_linear
from pitlane.export.settings import Settings, of_linear, scale_dtype
from pitlane.export.shards import Journal, write, write_shard
from pitlane.formats import INDEX, QUANTIZATION_KEYS, Calibrated, byte_tokenizer, read_json, resolve
from pitlane.kernels import fp8
from pitlane.kernels.quantize_math import Codes, Grid, joined, quantize_linear
from pitlane.models import config_json

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
          "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt")  # fmt: skip
CHUNK = 2**22  # number of weights to round at once
RANDOM = "random:"


@dataclass(frozen=True, slots=True)
class Done:
    """Progress. linears: finished, `of` all linears. num_bytes: written so far. seconds: since the run began."""

    linears: int
    of: int
    num_bytes: int
    seconds: float


Report = Callable[[Done], None]


@dataclass(frozen=True, slots=True)
class Result:
    """folder: the checkpoint, or the GGUF file. num_bytes, dense_bytes: bytes of the tensors, written and of the model."""

    folder: Path
    linears: int
    num_bytes: int
    dense_bytes: int
    seconds: float


class Weights:
    """The weights to write. calibrated: recipes and transform of the plugins of a method; None: round to nearest."""

    def __init__(self, source: ModelSource, calibrated: Calibrated | None = None) -> None:
        self.source, self.calibrated = source, calibrated

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """The tensors of one part of the checkpoint, by their canonical names."""
        names = {name.rpartition(".")[2]: name for name in part.shapes}
        tensors: Any = {last: self.source.weights.get(self.source.stored_name(name)) for last, name in names.items()}
        if self.calibrated is not None:
            tensors = self.calibrated.transform(part, tensors)
        return {name: tensors[last] for last, name in names.items()}

    def codes(self, name: str, weight: Tensor, settings: Settings) -> Codes:
        """The codes of a linear, from the method's recipe. Without a recipe, the weight is rounded to nearest."""
        dtype = _dtype(self.source)
        if settings.method == "fp8":
            return float8(name, weight, settings, dtype)
        if settings.method == "mixed" and self.calibrated is not None:
            chosen = self.calibrated.roundings[name].codes(weight.float())
            return stored(chosen, scale_dtype(settings, dtype), settings, weight.float())
        recipe = self.calibrated.recipes.get(settings.method) if self.calibrated is not None else None
        codes, scales = (recipe.get(f"{name}.{last}") if recipe else None for last in ("codes", "scales"))
        if recipe is None or codes is None or scales is None:
            return rounded(name, weight, settings, dtype)
        calibrated = Codes(codes, scales, recipe.get(f"{name}.zeros"))
        return stored(calibrated, scale_dtype(settings, dtype), settings)

    def settings_of(self, name: str, settings: Settings) -> Settings:
        """The settings of a linear: the method mixed chooses its bits and its groups."""
        if settings.method != "mixed":
            return settings
        if self.calibrated is None or name not in self.calibrated.roundings:
            raise ExportError(f"mixed needs a recipe that covers {name}; make it with the plugin `mixed`")
        return of_linear(settings, self.calibrated.roundings[name].grid)


def quantize(
    source: ModelSource,
    settings: Settings,
    out: Path,
    report: Report,
    resume: bool = False,
    calibrated: Calibrated | None = None,
) -> Result:
    """Write the quantized model into the folder `out`. Raises ExportError, or ModelError for a damaged source.

    resume: complete the folder of a killed run; the result has the bytes of an uninterrupted run. calibrated: recipes of the
    plugins of `settings.method`; the method rtn needs none.
    """
    layout, groups, weights = check(settings), _groups(source.config), Weights(source, calibrated)
    linears = [part for parts in groups for part in parts if is_quantized(part)]
    for linear in linears:
        for member in linear.members:
            grid = weights.settings_of(member.name, settings)
            check_linear(member.name, member.out_features, linear.in_features, grid)
    identity = {"model": source.name, "weights": source.weights.fingerprint(), "settings": settings.to_json()}
    journal, started = Journal(out, identity, resume), time.monotonic()
    journal.keep([shard for shard in journal.done if (out / shard).is_file()])
    count = sum(len(linear.members) for linear in linears)
    done = dense_bytes = 0
    for number, parts in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        members = sum(len(part.members) for part in parts if is_quantized(part))
        dense_bytes += sum(part.num_parameters for part in parts) * _dtype(source).itemsize
        if shard not in journal.done:
            tensors: dict[str, Tensor] = {}
            for part in parts:
                tensors |= _tensors(part, weights, layout, settings)
            write_shard(out / shard, tensors)
            journal.finish(shard, {name: tensor.nbytes for name, tensor in tensors.items()})
            del tensors
        done += members
        report(Done(done, count, _num_bytes(journal), time.monotonic() - started))
    _finish(weights, layout, settings, out, journal)
    return Result(out, count, _num_bytes(journal), dense_bytes, time.monotonic() - started)


def quantize_folder(folder: Path, settings: Settings, out: Path) -> Result:
    """Quantize the model in `folder` into the folder `out`."""
    with torch.inference_mode():
        return quantize(resolve(str(folder)), settings, out, lambda done: None)


def is_quantized(part: Part) -> TypeGuard[LinearPart]:
    """Whether a part is a linear of the layers. Embedding and head stay dense."""
    return isinstance(part, LinearPart) and ".layers." in part.name


def _groups(config: DecoderConfig) -> list[list[Part]]:
    """The parts of the model in groups: a group for every layer, and a group for all other parts."""
    groups: dict[str, list[Part]] = {}
    for part in parts_of(config):
        if part.shapes:
            pieces = next(iter(part.shapes)).split(".")
            layer = ".".join(pieces[:3]) if "layers" in pieces[:2] else ""
            groups.setdefault(layer, []).append(part)
    return list(groups.values())


def _tensors(part: Part, weights: Weights, layout: Layout, settings: Settings) -> dict[str, Tensor]:
    """The tensors to write for a part, by their names in the checkpoint."""
    source = weights.source
    if not isinstance(part, LinearPart) or not is_quantized(part):
        return {source.stored_name(name): tensor.clone() for name, tensor in weights.tensors(part).items()}
    tensors: dict[str, Tensor] = {}
    for member in part.members:
        stored = weights.tensors(part.alone(member))
        module, grid = source.stored_name(member.name), weights.settings_of(member.name, settings)
        codes = weights.codes(member.name, stored[f"{member.name}.weight"], grid)
        packed = layout.tensors(codes, grid, _dtype(source))
        tensors |= {f"{module}.{last}": tensor for last, tensor in packed.items()}
        if part.bias:
            tensors[f"{module}.bias"] = stored[f"{member.name}.bias"].clone()
    return tensors


def rounded(name: str, weight: Tensor, settings: Settings, dtype: torch.dtype) -> Codes:
    """Round a weight [N, K] to nearest. The scales already have the file's dtype, so writing does not round them again."""
    rows = max(1, CHUNK // weight.shape[1])
    grid = settings.bits, settings.group_size, settings.symmetric
    file_dtype = scale_dtype(settings, dtype)
    try:
        return joined(
            [
                stored(quantize_linear(piece.float(), *grid), file_dtype, settings, piece.float())
                for piece in weight.split(rows)
            ]
        )
    except ValueError as error:
        raise ExportError(f"{name} cannot be quantized: {error}") from None


def float8(name: str, weight: Tensor, settings: Settings, dtype: torch.dtype) -> Codes:
    """Round a weight [N, K] to e4m3, with scales that have the file's dtype. codes: float8 [N, K]; scales: float32 [N, G]."""
    try:
        made = fp8.quantize(weight, settings.granularity, scale_dtype(settings, dtype))
    except ValueError as error:
        raise ExportError(f"{name} cannot be quantized: {error}") from None
    return Codes(made.numbers, made.scales)


def stored(codes: Codes, dtype: torch.dtype, settings: Settings, weight: Tensor | None = None) -> Codes:
    """The codes with their scales rounded to a file's dtype. weight: if given, it is rounded to nearest again with these scales."""
    scales = codes.scales.to(dtype).float()
    if torch.equal(scales, codes.scales):
        return codes
    if not bool(scales.isfinite().all()):
        raise ValueError(f"a scale does not fit into {str(dtype).removeprefix('torch.')}")
    if weight is None:
        return codes._replace(scales=scales)
    grid = Grid(settings.bits, settings.group_size or weight.shape[1], settings.symmetric)
    zeros = None if codes.zeros is None else codes.zeros[..., None]
    numbers = grid.rounded(weight.unflatten(1, (-1, grid.size)), scales[..., None], zeros)
    return grid.codes(numbers.flatten(1), scales, codes.zeros)


def _finish(weights: Weights, layout: Layout, settings: Settings, out: Path, journal: Journal) -> None:
    """Write the index, the config and the files of the tokenizer; then remove the journal."""
    source = weights.source
    for name in COPIED if source.folder is not None else ():
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, out / name)
    if source.folder is None:
        byte_tokenizer(source.config.vocab_size).save_pretrained(str(out))
    places = {name: shard for shard, names in journal.done.items() for name in names}
    index = {"metadata": {"total_size": _num_bytes(journal)}, "weight_map": dict(sorted(places.items()))}
    write(out / INDEX, json.dumps(index, indent=1).encode())
    values = {key: value for key, value in source_config(source).items() if key not in QUANTIZATION_KEYS}
    values["quantization_config"] = _config(weights, layout, settings)
    write(out / "config.json", json.dumps(values, indent=1).encode())
    journal.remove()


def _config(weights: Weights, layout: Layout, settings: Settings) -> dict[str, Any]:
    """The `quantization_config`. With the method mixed, a group of linears for every grid."""
    source = weights.source
    if settings.method != "mixed":
        return layout.config(settings, _dense_linears(source))
    targets: dict[Settings, list[str]] = {}
    for part in filter(is_quantized, parts_of(source.config)):
        for member in part.members:
            targets.setdefault(weights.settings_of(member.name, settings), []).append(source.stored_name(member.name))
    return compressed_tensors_config(targets, _dense_linears(source))


def source_config(source: ModelSource) -> Mapping[str, Any]:
    """The values of the model's `config.json`."""
    if source.folder is not None:
        return read_json(source.folder / "config.json")
    if not source.name.startswith(RANDOM):
        raise ExportError(f"{source.name} has no folder; name a model that has a folder")
    values = config_json(source.name.removeprefix(RANDOM))
    names = [family.architecture for family in CORE_FAMILIES if family.model_type == values["model_type"]]
    return values | {"architectures": names[:1], "eos_token_id": list(source.config.eos_token_ids)}


def _dense_linears(source: ModelSource) -> list[str]:
    """The names in the checkpoint of the linears that stay dense."""
    linears = [part for part in parts_of(source.config) if isinstance(part, LinearPart) and not is_quantized(part)]
    return [source.stored_name(member.name) for part in linears for member in part.members]


def _dtype(source: ModelSource) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, source.config.dtype)
    return dtype


def _num_bytes(journal: Journal) -> int:
    return sum(sum(names.values()) for names in journal.done.values())
