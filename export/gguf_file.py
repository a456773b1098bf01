"""Write a model as one GGUF file with blocks of 4 or 8 bits (Q4_0, Q8_0). A killed run resumes at its unfinished tensor.

A block is 32 inputs of an output: a float16 scale d, then 32 int8 q (Q8_0, W = d q), or 16 bytes with n of inputs j and j + 16 in
the low and the high half (Q4_0, W = d (n - 8)). Embedding and head are Q8_0, vectors are float32. The package `gguf` writes the
header, the metadata and the places of the tensors. This module writes the blocks. Source: ggml's block_q4_0 and block_q8_0.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import log, pi
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from torch import Tensor

from pitlane import EmbeddingPart, LinearPart, ModelSource, NormPart, Part, parts_of
from pitlane.export.errors import ExportError
from pitlane.export.gguf_tokenizer import write_tokenizer
from pitlane.export.quantize import Done, Report, Result, Weights, rounded
from pitlane.export.settings import Settings, check_method, unsigned
from pitlane.export.shards import PART, Journal
from pitlane.formats import ARCHITECTURES, PER_LAYER, ROPE_FREQS, WHOLE, Calibrated, is_query_or_key
from pitlane.kernels.quantize_math import Codes

FILE, BLOCK, ALIGNMENT = "model.gguf", 32, 32
FILE_TYPES = {4: 2, 8: 7}  # general.file_type of Q4_0 and Q8_0
ROPE_KINDS = ("default", "linear", "yarn", "llama3")
YARN = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
GGUF_NAMES = {canonical: name for name, canonical in WHOLE.items()}
GGUF_LAYER_NAMES = {canonical: name for name, canonical in PER_LAYER.items()}


class Job(NamedTuple):
    """A tensor to write. part: the part that owns it; None: the tensor is the factors of RoPE. bits: of its blocks; 0: float32."""

    canonical: str
    part: Part | None
    shape: tuple[int, ...]
    bits: int = 0
    offset: float = 0.0

    @property
    def kind(self) -> GGMLQuantizationType:
        kinds = {0: GGMLQuantizationType.F32, 4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
        return kinds[self.bits]

    @property
    def num_bytes(self) -> int:
        count = int(np.prod(self.shape))
        return count // BLOCK * (2 + BLOCK * self.bits // 8) if self.bits else 4 * count


def quantize_gguf(
    source: ModelSource,
    settings: Settings,
    out: Path,
    report: Report,
    resume: bool = False,
    calibrated: Calibrated | None = None,
) -> Result:
    """Write `model.gguf` into the folder `out`. Raises ExportError. resume, calibrated: as in `quantize`."""
    check_method(settings)
    if settings.bits not in FILE_TYPES or settings.group_size != BLOCK or not settings.symmetric:
        raise ExportError(
            f"gguf holds 4 or 8 bits in symmetric groups of 32 (Q4_0, Q8_0), got {settings.bits} bits, --group-size "
            f"{settings.group_size}{'' if settings.symmetric else ', asymmetric'}; change them, or choose another --format"
        )
    architecture, weights = _architecture(source), Weights(source, calibrated)
    jobs = [job for part in parts_of(source.config) for job in _jobs(part, settings, architecture)]
    if source.config.rope.kind == "llama3":
        jobs.append(Job(ROPE_FREQS, None, (source.config.head_dim // 2,)))
    header = _header(source, jobs, architecture, settings)  # before the journal: a refused tokenizer leaves no journal
    identity = {"model": source.name, "weights": source.weights.fingerprint(), "settings": settings.to_json()}
    journal, started = Journal(out, identity, resume), time.monotonic()
    part_file, starts = out / (FILE + PART), _starts(len(header), jobs)
    count = sum(bool(job.bits) for job in jobs)
    done, end = 0, starts[-1] + jobs[-1].num_bytes
    size = end + -end % ALIGNMENT
    try:
        if not _is_finished(journal, jobs, out, size):
            journal.keep(_written(journal, jobs, starts, part_file))
            with open(part_file, "r+b" if part_file.is_file() else "w+b") as file:
                file.write(header)
                for job, start in zip(jobs, starts, strict=True):
                    if job.canonical not in journal.done:
                        file.truncate(start)
                        file.seek(start)
                        file.write(_blocks(job, weights, settings))
                        file.flush()
                        os.fsync(file.fileno())
                        journal.finish(job.canonical, {job.canonical: job.num_bytes})
                    done += bool(job.bits)
                    report(Done(done, count, start + job.num_bytes, time.monotonic() - started))
                file.truncate(size)
            os.replace(part_file, out / FILE)
    except OSError as error:
        raise ExportError(f"cannot write {out / FILE}: {error}; make room, then go on with --resume") from None
    journal.remove()
    dense = sum(int(np.prod(job.shape)) for job in jobs) * getattr(torch, source.config.dtype).itemsize
    return Result(out / FILE, count, end, dense, time.monotonic() - started)


def _starts(first: int, jobs: list[Job]) -> list[int]:
    """The places of the tensors in the file. first: the end of the header."""
    starts, end = [], first
    for job in jobs:
        starts.append(end + -end % ALIGNMENT)
        end = starts[-1] + job.num_bytes
    return starts


def _is_finished(journal: Journal, jobs: list[Job], out: Path, size: int) -> bool:
    """Whether an earlier run ended after it renamed its file and before it removed its journal."""
    file = out / FILE
    has_all = all(job.canonical in journal.done for job in jobs) and not (out / (FILE + PART)).is_file()
    return has_all and file.is_file() and file.stat().st_size == size


def _written(journal: Journal, jobs: list[Job], starts: list[int], part_file: Path) -> list[str]:
    """The finished tensors whose bytes are in the unfinished file: the first tensors, without a gap."""
    size = part_file.stat().st_size if part_file.is_file() else 0
    names = []
    for job, start in zip(jobs, starts, strict=True):
        if job.canonical not in journal.done or size < start + job.num_bytes:
            break
        names.append(job.canonical)
    return names


def _architecture(source: ModelSource) -> str:
    """The name of the model's architecture in GGUF. Raises ExportError for a model that this module cannot write."""
    config = source.config
    model_type = "llama" if config.model_type == "mistral" else config.model_type
    name = next((name for name, known in ARCHITECTURES.items() if known.model_type == model_type), None)
    has_windows = any(config.windows) and (config.model_type != "mistral" or len(set(config.windows)) > 1)
    if name is None or has_windows or config.rope.kind not in ROPE_KINDS or config.local_rope is not None:
        raise ExportError(
            f"a {config.model_type} model{' with windows in some layers' if has_windows else ''} cannot be written as gguf; "
            "choose --format compressed-tensors"
        )
    return name


def _jobs(part: Part, settings: Settings, architecture: str) -> Iterator[Job]:
    for name, shape in part.shapes.items():
        bits, offset = 0, 0.0
        if isinstance(part, NormPart):
            offset = ARCHITECTURES[architecture].norm_offset
        elif isinstance(part, EmbeddingPart) or part.name == "lm_head":
            bits = 8
        elif isinstance(part, LinearPart) and len(shape) == 2:
            bits = settings.bits
        if bits and shape[-1] % BLOCK:
            raise ExportError(
                f"gguf needs inputs that are a multiple of 32, got {shape[-1]} ({name}); choose another --format"
            )
        yield Job(name, part, shape, bits, offset)


def gguf_name(canonical: str) -> str:
    """The name of a tensor in GGUF."""
    module, _, last = canonical.rpartition(".")
    if canonical == ROPE_FREQS:
        return canonical
    if module in GGUF_NAMES:
        return f"{GGUF_NAMES[module]}.{last}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[inner]}.{last}"


def _blocks(job: Job, weights: Weights, settings: Settings) -> bytes:
    """The bytes of a tensor."""
    if job.part is None:
        return bytes(rope_factors(weights.source).astype("<f4").tobytes())
    part = job.part
    if isinstance(part, LinearPart):
        part = part.alone(next(member for member in part.members if job.canonical.startswith(f"{member.name}.")))
    weight, head_dim = weights.tensors(part)[job.canonical], 0
    if ARCHITECTURES[_architecture(weights.source)].permutes and is_query_or_key(job.canonical):
        head_dim = weights.source.config.head_dim
    if not job.bits:
        weight = permuted(weight, head_dim) if head_dim else weight
        return (weight.float() + job.offset).numpy().astype("<f4").tobytes()
    name = job.canonical.removesuffix(".weight")
    if job.bits == settings.bits and ".layers." in name:
        codes = weights.codes(name, weight, settings)
    else:
        codes = rounded(name, weight, replace(settings, method="rtn", bits=job.bits), weight.dtype)
    if head_dim:
        codes = codes._replace(codes=permuted(codes.codes, head_dim), scales=permuted(codes.scales, head_dim))
    return blocks(codes, job.bits)


def permuted(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads [n D, ...] in the order of llama.cpp's RoPE: row j D / 2 + i of a head becomes row 2 i + j."""
    heads: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
    return heads.flatten(0, 2)


def blocks(codes: Codes, bits: int) -> bytes:
    """The blocks of a weight [N, K] with symmetric codes in groups of 32."""
    scales = codes.scales.half().reshape(-1, 1).numpy().view(np.uint8)
    if bits == 8:
        numbers = codes.codes.reshape(-1, BLOCK).numpy().view(np.uint8)
    else:
        halves = unsigned(codes, bits)[0].reshape(-1, 2, BLOCK // 2)
        numbers = (halves[:, 0] | halves[:, 1] << 4).numpy()
    return np.concatenate([scales, numbers], 1).tobytes()


def _header(source: ModelSource, jobs: list[Job], architecture: str, settings: Settings) -> bytes:
    """Header, metadata and places of all tensors, padded. Raises ExportError for a tokenizer that GGUF does not hold."""
    try:
        return _written_header(source, jobs, architecture, settings)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ExportError(
            f"cannot write the header of {FILE} into the folder for temporary files: {reason}; make room there, or let TMPDIR "
            "name another folder"
        ) from None


def _written_header(source: ModelSource, jobs: list[Job], architecture: str, settings: Settings) -> bytes:
    with tempfile.TemporaryDirectory(prefix="pitlane-gguf-") as folder:
        file = Path(folder) / "header"  # the package writes to files alone
        with closing(GGUFWriter(file, architecture)) as writer:
            _write_keys(writer, source, settings)
            write_tokenizer(writer, source)
            for job in jobs:
                name = gguf_name(job.canonical)
                writer.add_tensor_info(name, job.shape, np.dtype(np.float32), job.num_bytes, job.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        content = file.read_bytes()
    return content + bytes(-len(content) % ALIGNMENT)


def _write_keys(writer: GGUFWriter, source: ModelSource, settings: Settings) -> None:
    config, rope = source.config, source.config.rope
    writer.add_name(Path(source.name).name)
    writer.add_file_type(FILE_TYPES[settings.bits])
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope.theta)
    if config.windows[0]:
        writer.add_sliding_window(config.windows[0])
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[rope.kind.upper()])
        writer.add_rope_scaling_factor(rope.parameters["factor"])
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope.parameters["original_max_position_embeddings"]))
        for name, key in YARN.items():
            if name in rope.parameters:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(rope.parameters[name])


def rope_factors(source: ModelSource) -> Any:
    """`rope_freqs.weight` of llama.cpp's converter: a factor on the wavelength of each frequency."""
    config, rope = source.config, source.config.rope
    low, high, context, factor = (
        rope.parameters[key]
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor")
    )
    places = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    waves = 2 * pi * np.exp(places * log(rope.theta))
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
