"""`pitlane quantize` without its command line: read a model linear by linear, round it, write it in a format that others read.

Memory does not depend on the number of layers: a shard holds the tensors of one layer. Linears of the layers are quantized; embedding
and head stay as they are.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pitlane import CORE_FAMILIES, DecoderConfig, LinearPart, ModelSource, Part, parts_of
from pitlane.export.errors import ExportError
from pitlane.export.layouts import Layout, Settings, check, check_linear, scale_dtype
from pitlane.export.shards import Journal, replace, write_shard
from pitlane.formats import INDEX, QUANTIZATION_KEYS, byte_tokenizer, read_json, resolve
from pitlane.kernels.quantize_math import Codes, Grid, InputStats, quantize_linear
from pitlane.models import config_json

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
          "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt")  # fmt: skip
CHUNK = 2**22  # weights that are rounded at once by a method that treats every output alone
RANDOM = "random:"
StatsOf = Callable[[str], InputStats | None]  # canonical name of a linear -> statistics of its inputs


@dataclass(frozen=True, slots=True)
class Done:
    """A report: finished and all linears, finished bytes of the written checkpoint, seconds so far."""

    linears: int
    of: int
    num_bytes: int
    seconds: float


Report = Callable[[Done], None]


@dataclass(frozen=True, slots=True)
class Result:
    """folder: what was written. num_bytes: its tensors; dense_bytes: those of the model. seconds: of this run."""

    folder: Path
    linears: int
    num_bytes: int
    dense_bytes: int
    seconds: float


def quantize(
    source: ModelSource,
    settings: Settings,
    out: Path,
    report: Report,
    resume: bool = False,
    stats_of: StatsOf = lambda name: None,
) -> Result:
    """Write the quantized model into the folder `out`. Raises ExportError, or ModelError for a damaged source.

    resume: go on with the folder of a run that was killed; the result has the bytes of an uninterrupted run.
    """
    layout, groups = check(settings), dict(_groups(source.config))
    linears = [part for parts in groups.values() for part in parts if is_quantized(part)]
    for part in linears:
        for member in part.members:
            check_linear(member.name, member.out_features, part.in_features, settings)
    identity = {"model": source.name, "weights": source.weights.fingerprint(), "settings": asdict(settings)}
    journal, started = Journal(out, identity, resume), time.monotonic()
    count = sum(len(part.members) for part in linears)
    done = dense_bytes = 0
    for number, (group, parts) in enumerate(groups.items(), 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        members = sum(len(part.members) for part in parts if is_quantized(part))
        dense_bytes += sum(part.num_parameters for part in parts) * _dtype(source).itemsize
        if shard not in journal.done:
            tensors: dict[str, Tensor] = {}
            for part in parts:
                tensors |= _tensors(part, source, layout, settings, stats_of)
            write_shard(out / shard, tensors)
            journal.finish(shard, {name: tensor.nbytes for name, tensor in tensors.items()})
            del tensors
        done += members
        report(Done(done, count, _num_bytes(journal), time.monotonic() - started))
    _finish(source, layout, settings, out, journal)
    return Result(out, count, _num_bytes(journal), dense_bytes, time.monotonic() - started)


def quantize_folder(folder: Path, settings: Settings, out: Path) -> Result:
    """Quantize the model in a folder."""
    with torch.inference_mode():
        return quantize(resolve(str(folder)), settings, out, lambda done: None)


def is_quantized(part: Part) -> bool:
    """Whether a part is a linear of the layers. Embedding and head stay dense."""
    return isinstance(part, LinearPart) and ".layers." in part.name


def _groups(config: DecoderConfig) -> Iterator[tuple[str, list[Part]]]:
    """The parts of every layer, and the other parts together, in the order of the model."""
    groups: dict[str, list[Part]] = {}
    for part in parts_of(config):
        if part.shapes:
            pieces = next(iter(part.shapes)).split(".")
            layer = ".".join(pieces[:3]) if "layers" in pieces[:2] else ""
            groups.setdefault(layer, []).append(part)
    yield from groups.items()


def _tensors(
    part: Part, source: ModelSource, layout: Layout, settings: Settings, stats_of: StatsOf
) -> dict[str, Tensor]:
    """The tensors of a part as they are written, by their names in the checkpoint."""
    names = {name: source.stored_name(name) for name in part.shapes}
    if not isinstance(part, LinearPart) or not is_quantized(part):
        return {stored: source.weights.get(stored).clone() for stored in names.values()}
    tensors: dict[str, Tensor] = {}
    for member in part.members:
        weight = source.weights.get(names[f"{member.name}.weight"])
        module = source.stored_name(member.name)
        codes = rounded(member.name, weight, settings, _dtype(source), stats_of(member.name))
        packed = layout.tensors(codes, settings, _dtype(source))
        tensors |= {f"{module}.{last}": tensor for last, tensor in packed.items()}
        if part.bias:
            tensors[f"{module}.bias"] = source.weights.get(names[f"{member.name}.bias"]).clone()
    return tensors


def rounded(
    name: str, weight: Tensor, settings: Settings, dtype: torch.dtype, stats: InputStats | None = None
) -> Codes:
    """Round a weight [N, K]. The scales of the codes are those of the file, so nothing is rounded twice."""
    try:
        alone = settings.method == "rtn"
        rows = max(1, CHUNK // weight.shape[1]) if alone else len(weight)
        kinds = settings.bits, settings.group_size, settings.symmetric, settings.method
        parts = [
            _stored(
                piece.float(), quantize_linear(piece.float(), *kinds, stats), settings, scale_dtype(settings, dtype)
            )
            for piece in weight.split(rows)
        ]
    except ValueError as error:
        raise ExportError(f"{name} cannot be quantized: {error}") from None
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _stored(weight: Tensor, codes: Codes, settings: Settings, dtype: torch.dtype) -> Codes:
    """The codes with scales that the file's dtype holds. Round to nearest then chooses the codes for these scales."""
    scales = codes.scales.to(dtype).float()
    if torch.equal(scales, codes.scales):
        return codes
    if not bool(scales.isfinite().all()):
        raise ValueError(f"a scale does not fit into {dtype}")
    if settings.method != "rtn":
        return codes._replace(scales=scales)
    grid = Grid(settings.bits, settings.group_size or weight.shape[1], settings.symmetric)
    zeros = None if codes.zeros is None else codes.zeros[..., None]
    numbers = grid.rounded(weight.unflatten(1, (-1, grid.size)), scales[..., None], zeros)
    return grid.codes(numbers.flatten(1), scales, codes.zeros)


def _finish(source: ModelSource, layout: Layout, settings: Settings, out: Path, journal: Journal) -> None:
    """Write the index, the config and the files of the tokenizer; then remove the journal."""
    for name in COPIED if source.folder is not None else ():
        if source.folder is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, out / name)
    if source.folder is None:
        byte_tokenizer(source.config.vocab_size).save_pretrained(str(out))
    places = {name: shard for shard, names in journal.done.items() for name in names}
    index = {"metadata": {"total_size": _num_bytes(journal)}, "weight_map": dict(sorted(places.items()))}
    replace(out / INDEX, json.dumps(index, indent=1).encode())
    values = {key: value for key, value in source_config(source).items() if key not in QUANTIZATION_KEYS}
    values["quantization_config"] = layout.config(settings, _dense_linears(source))
    replace(out / "config.json", json.dumps(values, indent=1).encode())
    journal.remove()


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
    """The linears that stay dense, by their names in the checkpoint."""
    linears = [part for part in parts_of(source.config) if isinstance(part, LinearPart) and not is_quantized(part)]
    return [source.stored_name(member.name) for part in linears for member in part.members]


def _dtype(source: ModelSource) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, source.config.dtype)
    return dtype


def _num_bytes(journal: Journal) -> int:
    return sum(sum(names.values()) for names in journal.done.values())
