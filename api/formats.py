"""What the writers of checkpoints need to know of the formats that the engine reads: names, layouts of bits, tokenizers of GGUF."""

from __future__ import annotations

from pitlane.engine.models.config_file import read_json
from pitlane.engine.models.gguf.blocks import BLOCK_TYPES
from pitlane.engine.models.gguf.names import ARCHITECTURES, PER_LAYER, ROPE_FREQS, WHOLE, is_query_or_key
from pitlane.engine.models.quantized.awq import ORDER as AWQ_ORDER
from pitlane.engine.models.quantized.bits import pack, unpack, words_for
from pitlane.engine.models.quantized.config import KEYS as QUANTIZATION_KEYS
from pitlane.engine.models.recorder import shapes_in
from pitlane.engine.models.registry import resolve
from pitlane.engine.models.weights import INDEX, SINGLE
from pitlane.engine.text.byte_tokenizer import byte_tokenizer
from pitlane.engine.text.pretokenizers import DIGIT, GPT2, PRE_TOKENIZERS

__all__ = [
    "ARCHITECTURES",
    "AWQ_ORDER",
    "BLOCK_TYPES",
    "DIGIT",
    "GPT2",
    "INDEX",
    "PER_LAYER",
    "PRE_TOKENIZERS",
    "QUANTIZATION_KEYS",
    "ROPE_FREQS",
    "SINGLE",
    "WHOLE",
    "byte_tokenizer",
    "is_query_or_key",
    "pack",
    "read_json",
    "resolve",
    "shapes_in",
    "unpack",
    "words_for",
]
