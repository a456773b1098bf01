"""The architectures of GGUF that Pitlane reads, the names of their tensors, and what llama.cpp's converter does to the values.

The converter turns a Hugging Face model into GGUF. For `llama` and `smollm3` it permutes the rows of q and k in each head: RoPE
rotates neighbouring rows there (2i, 2i + 1), but rows i and i + D / 2 here. For `gemma3` it stores norm weights as 1 + w.
Both are undone. Source: `LlamaModel.permute` and `Gemma3Model.norm_shift` in `conversion/` of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROPE_FREQS = "rope_freqs.weight"
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "attention_output_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "mlp_output_norm",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of GGUF. name, model_type: its names in a `config.json`.

    permutes: the file holds the rows of q and k in the order of llama.cpp's RoPE. norm_offset: number that the file adds to the
    weights of norms.
    """

    name: str
    model_type: str
    permutes: bool = False
    norm_offset: float = 0.0


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", permutes=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3"),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", permutes=True),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", norm_offset=1.0),
}


def canonical(name: str) -> str | None:
    """The canonical name of a tensor (see `decoder.py`); None for a name that no architecture has."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in WHOLE:
        return f"{WHOLE[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in PER_LAYER:
        return f"model.layers.{parts[1]}.{PER_LAYER[parts[2]]}.{parts[3]}"
    return None


def is_query_or_key(canonical_name: str) -> bool:
    """Whether a tensor, weight or bias, is of a projection to queries or keys."""
    return canonical_name.rpartition(".")[0].endswith((PER_LAYER["attn_q"], PER_LAYER["attn_k"]))


def unpermuted(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Put the rows of whole heads [n * D, ...] into the order of Hugging Face: row 2i + j of a head becomes row j * D / 2 + i."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)
