"""The tokenizer of a model as metadata of a GGUF file: a byte-level BPE whose pre-tokenizer has a name in llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pitlane import ModelSource
from pitlane.export.errors import ExportError
from pitlane.formats import DIGIT, GPT2, PRE_TOKENIZERS, read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of GGUF
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}
WAY_OUT = "choose --format compressed-tensors"


def write_tokenizer(writer: GGUFWriter, source: ModelSource) -> None:
    """Write the tokenizer. Raises ExportError unless it is a byte-level BPE with a pre-tokenizer that llama.cpp knows."""
    if source.folder is None:
        raise ExportError(f"{source.name} has no tokenizer, which gguf needs; {WAY_OUT}")
    file = source.folder / "tokenizer.json"
    if not file.is_file():
        raise ExportError(f"{source.folder} has no tokenizer.json, which gguf needs; {WAY_OUT}")
    values = json.loads(file.read_text(encoding="utf-8"))
    model, added = values["model"], {token["id"]: token for token in values.get("added_tokens") or ()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_name(file, values))
    tokens = {index: text for text, index in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    size = max(source.config.vocab_size, *(index + 1 for index in tokens))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([_type(index, tokens, added) for index in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    _write_settings(writer, source.folder, {text: index for index, text in tokens.items()})


def _type(index: int, tokens: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if index not in tokens:
        return UNUSED
    return NORMAL if index not in added else CONTROL if added[index].get("special") else USER_DEFINED


def _pre_name(file: Path, values: Mapping[str, Any]) -> str:
    """The name in llama.cpp of the tokenizer's pre-tokenizer."""
    model = values["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(f"{file} holds a tokenizer of another kind than byte-level BPE; {WAY_OUT}")
    step = values.get("pre_tokenizer") or {}
    patterns = tuple(_patterns(file, step["pretokenizers"] if step.get("type") == "Sequence" else [step]))
    normalizer = (values.get("normalizer") or {}).get("type")
    for name, known in PRE_TOKENIZERS.items():
        same_words = known.patterns == patterns and known.nfc == (normalizer == "NFC")
        if same_words and known.whole_words == bool(model.get("ignore_merges")):
            return name
    raise ExportError(f"{file} cuts words in a way that llama.cpp has no name for; {WAY_OUT}")


def _patterns(file: Path, steps: list[dict[str, Any]]) -> list[str]:
    patterns = []
    for step in steps:
        kind = step.get("type")
        if kind == "Digits" and step.get("individual_digits"):
            patterns.append(DIGIT)
        elif kind == "Split" and step.get("behavior") == "Isolated" and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif kind == "ByteLevel":
            patterns += [GPT2] if step.get("use_regex", True) else []
        elif kind != "Split" or step.get("behavior") != "Removed":
            raise ExportError(f"{file} cuts words by {kind}, which gguf does not know; {WAY_OUT}")
    return patterns


def _write_settings(writer: GGUFWriter, folder: Path, ids: Mapping[str, int]) -> None:
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    for key, name in NAMED.items():
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            getattr(writer, f"add_{name}_token_id")(ids[text])
    for name in ("bos", "eos"):
        getattr(writer, f"add_add_{name}_token")(bool(settings.get(f"add_{name}_token", False)))
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)
