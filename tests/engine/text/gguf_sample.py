"""Two small vocabularies as the metadata of GGUF files, and 200 lines with their ids by llama.cpp: gguf_tokenizer_sample.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAMPLE = json.loads((Path(__file__).parent / "gguf_tokenizer_sample.json").read_text(encoding="utf-8"))
GPT2: dict[str, Any] = SAMPLE["gpt2"]
LLAMA: dict[str, Any] = SAMPLE["llama"]
LINES: list[str] = SAMPLE["lines"]
KEY = "tokenizer.ggml."
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def changed(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The metadata with other values of `tokenizer.ggml` keys. A value of None removes the key."""
    merged = {**metadata, **{KEY + name: value for name, value in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}
