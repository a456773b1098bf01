"""A real model: SmolLM2-135M-Instruct, Q4_1. Runs where PITLANE_TEST_SMOLLM2 names its GGUF file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pitlane.engine.models.families.core import parse_config
from pitlane.engine.models.registry import resolve
from pitlane.storage.adapters import DOCUMENTS, SHIPPED
from tests.engine.models.harness import Harness, load, shapes_of

FILE = Path(os.environ.get("PITLANE_TEST_SMOLLM2", "-"))  # read here: a fixture clears these settings
TOKENIZER = "pitlane.engine.text.gguf_tokenizer"
IDS = [504, 3575, 282, 4649, 314, 7042, 30, 198, 1, 4093, 198, 19556, 17, 2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason="PITLANE_TEST_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf"),
]


def decode_by_the_package(folder: Path) -> Path:
    """Decode the file with the reader and the names of the package `gguf`, and the config of the original model."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    originals = {names.get_name(name, try_suffixes=(".weight",)): name for name in shapes_of(parse_config(CONFIG))}
    tensors = {}
    for tensor in gguf.GGUFReader(FILE).tensors:
        name, weight = originals[tensor.name], np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = weight.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(weight.shape).copy()
        tensors[name] = torch.from_numpy(weight).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_shipped_adapter_knows_the_decoded_weights() -> None:
    """Another decoding gives another fingerprint: then write the new fingerprint into storage/adapters.py."""
    assert resolve(str(FILE)).weights.fingerprint() in SHIPPED[DOCUMENTS].fingerprints


def test_logits_are_those_of_the_decoded_weights(tmp_path: Path) -> None:
    source = resolve(str(FILE))
    assert source.config.eos_token_ids == (2, 0)
    ours, theirs = (Harness(load(model)).run({0: IDS}) for model in (FILE, decode_by_the_package(tmp_path)))
    assert torch.equal(ours, theirs)


def test_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, TOKENIZER)
    pytest.importorskip(TOKENIZER, reason="the tokenizer of GGUF files is missing")
    from pitlane.engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(resolve(str(FILE)))
    prompt = tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}])
    harness, ids = Harness(load(FILE), num_seqs=1, num_tokens=128), []
    logits = harness.run({0: prompt.token_ids})
    while len(ids) < 12 and int(logits[-1].argmax()) != 2:
        ids.append(int(logits[-1].argmax()))
        logits = harness.run({0: ids[-1:]})
    assert "Paris" in tokenizer.decode(ids)
