"""Turns a small model folder into a GGUF file, as llama.cpp's converter does. Writer and names are those of the package `gguf`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[Any]
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma3_text": "gemma3",
}
# The package cannot quantize to these types. Places of the float16 scales in a block, and values that give small weights.
SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q2_K": ((80, 0.01), (82, 0.01)),
    "Q3_K": ((108, 0.002),),
    "Q4_K": ((0, 0.0005), (2, 0.004)),
    "Q5_K": ((0, 0.0003), (2, 0.004)),
    "Q6_K": ((208, 0.0001),),
    "IQ4_NL": ((0, 0.002),),
    "IQ4_XS": ((0, 0.0001),),
}


def permuted(weights: Array, heads: int) -> Array:
    """`LlamaModel.permute` of the converter: the rows of q or k in the order of llama.cpp's RoPE."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def to_blocks(values: Array, kind: str, generator: np.random.Generator) -> Array:
    """The raw blocks of a matrix: quantized values, or random blocks for types that the package cannot quantize to."""
    if kind == "F32":
        return values
    if kind == "F16":
        return values.astype(np.float16)
    if kind not in SCALES:
        return gguf.quantize(values, GGMLQuantizationType[kind])
    num_values, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (values.size // num_values, num_bytes), dtype=np.uint8)
    for place, scale in SCALES[kind]:
        scales = (scale * generator.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def convert(
    folder: Path, target: Path, kind: str = "F32", dtype: torch.dtype = torch.float32, split: int = 0, **keys: Any
) -> Path:
    """Write the model of a folder as a GGUF file with matrices of type `kind`. Put the decoded weights into the folder.

    dtype: of the decoded weights. split: tensors per file, 0: all. keys: arguments by the writer's methods, called last.
    """
    raw = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    architecture = ARCHITECTURES[raw["model_type"]]
    writer = GGUFWriter(target, architecture, split_max_tensors=split)
    write_keys(writer, raw)
    for method, argument in keys.items():
        getattr(writer, method)(argument)
    layers, generator = raw["num_hidden_layers"], np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], layers)
    heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}
    decoded = {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        part = name.split(".")[-2]
        order = np.arange(values.shape[0])
        if architecture in ("llama", "smollm3") and part in heads:
            order = permuted(order, heads[part])
        offset = 1.0 if architecture == "gemma3" and name.endswith("norm.weight") else 0.0
        values = values[order] + np.float32(offset)
        block = kind if values.ndim == 2 else "F32"
        data = to_blocks(values, block, generator)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name, name
        writer.add_tensor(gguf_name, data, raw_dtype=GGMLQuantizationType[block])
        rows = np.empty(values.shape, np.float32)
        rows[order] = gguf.dequantize(data, GGMLQuantizationType[block]) - np.float32(offset)
        decoded[name] = torch.from_numpy(rows).to(dtype)
    if (factors := rope_factors(raw)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    finish(writer)
    save_file(decoded, folder / "model.safetensors", metadata={"format": "pt"})
    return next(target.parent.glob(f"{target.stem}-00001-of-*")) if split else target


def write_keys(writer: GGUFWriter, raw: dict[str, Any]) -> None:
    rope = raw.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    if "head_dim" in raw:
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
        writer.add_rope_dimension_count(raw["head_dim"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if key in rope:
                add(rope[key])
    if raw.get("sliding_window") and raw["model_type"] in ("gemma3_text", "mistral"):
        writer.add_sliding_window(raw["sliding_window"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(raw["vocab_size"])])
    writer.add_token_types([1] * raw["vocab_size"])
    writer.add_eos_token_id(raw["eos_token_id"])


def rope_factors(raw: dict[str, Any]) -> Array | None:
    """`rope_freqs.weight` of the converter, for llama3 scaling."""
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    low, high, context = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for freq in 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        wave = 2 * math.pi / freq
        smooth = (context / wave - low) / (high - low)
        if wave < context / high:
            factors.append(1.0)
        elif wave > context / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32).numpy()


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
