"""Hostile metadata of a GGUF file's tokenizer is refused in one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pitlane.engine.errors import ModelError
from pitlane.engine.text import gguf_tokenizer
from pitlane.engine.text.gguf_tokenizer import write_tokenizer
from pitlane.engine.text.gguf_vocabulary import BYTE, NORMAL
from tests.engine.text.gguf_sample import BYTES, GPT2, LLAMA, changed


@pytest.mark.parametrize(
    ("metadata", "changes", "says"),
    [
        (GPT2, {"model": None}, "the GGUF file lacks tokenizer.ggml.model; choose another file"),
        (GPT2, {"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; known: gpt2, llama"),
        (GPT2, {"model": 3}, "tokenizer.ggml.model must be of type str, got 3"),
        (GPT2, {"pre": "new\nkind"}, "tokenizer.ggml.pre 'new\\nkind' is not supported; known: codeshell, "),
        (GPT2, {"pre": [1] * 10**6}, "tokenizer.ggml.pre must be of type str, got [1, 1, 1, 1, 1, 1, ...]"),
        (GPT2, {"tokens": None}, "the GGUF file lacks tokenizer.ggml.tokens"),
        (GPT2, {"tokens": 5}, "tokenizer.ggml.tokens must be of type list, got 5"),
        (GPT2, {"tokens": [1, 2]}, "tokenizer.ggml.tokens must hold values of type str, got 1"),
        (GPT2, {"tokens": ["a", None]}, "tokenizer.ggml.tokens must hold values of type str, got None"),
        (GPT2, {"tokens": []}, "tokenizer.ggml.tokens has no text"),
        (GPT2, {"tokens": ["", ""]}, "tokenizer.ggml.tokens has no text"),
        (GPT2, {"tokens": ["x"] * 10**7}, "tokenizer.ggml.tokens has 10,000,000 values, at most 1,048,576"),
        (GPT2, {"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens has 'a' twice, as 0 and 2"),
        (GPT2, {"tokens": ["x" * 10**7]}, "10,000,000 letters, 10,000,000 in one token; at most 16,777,216 and 512"),
        (GPT2, {"token_type": [1]}, "tokenizer.ggml.token_type has 1 values for 803 tokens"),
        (GPT2, {"token_type": ["a"]}, "tokenizer.ggml.token_type must hold values of type int, got 'a'"),
        (GPT2, {"merges": None}, "the GGUF file lacks tokenizer.ggml.merges"),
        (GPT2, {"merges": ["a nosuch"]}, "merges has 'a nosuch', which does not join two tokens to a token"),
        (GPT2, {"merges": ["ab"]}, "tokenizer.ggml.merges has 'ab', which does not join"),
        (GPT2, {"merges": [""]}, "tokenizer.ggml.merges has '', which does not join"),
        (GPT2, {"merges": ["! "]}, "tokenizer.ggml.merges has '! ', which does not join"),
        (GPT2, {"eos_token_id": 803}, "tokenizer.ggml.eos_token_id must be an id below 803, got 803"),
        (GPT2, {"bos_token_id": -1}, "tokenizer.ggml.bos_token_id must be an id below 803, got -1"),
        (GPT2, {"eot_token_id": True}, "tokenizer.ggml.eot_token_id must be of type int, got True"),
        (GPT2, {"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be of type bool, got 1"),
        (GPT2, {"add_bos_token": True, "bos_token_id": None}, "add_bos_token is true, but the GGUF file lacks"),
        (GPT2, {"add_bos_token": True, "tokens": ["!", "a b"], "token_type": None, "merges": [], "eos_token_id": 0},
         "the tokenizer of the GGUF file is damaged: "),
        (GPT2, {"tokens": ["\ud800", "a", "b"], "token_type": None, "merges": []}, "the tokenizer of the GGUF file is damaged: "),
        (LLAMA, {"scores": None}, "the GGUF file lacks tokenizer.ggml.scores"),
        (LLAMA, {"scores": [0.0]}, "tokenizer.ggml.scores must be 900 finite numbers"),
        (LLAMA, {"scores": [float("nan")] * 900}, "tokenizer.ggml.scores must be 900 finite numbers"),
        (LLAMA, {"scores": [10**400] * 900}, "the tokenizer of the GGUF file is damaged: "),
        (LLAMA, {"tokens": ["a", "b", "c", *BYTES[:65]], "token_type": None}, "has neither <0x41> nor an unknown token"),
    ],
)  # fmt: skip
def test_hostile_metadata_is_refused_in_one_line(
    metadata: dict[str, Any], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        write_tokenizer(changed(metadata, changes), tmp_path)
    message = str(caught.value)
    assert says in message and "\n" not in message and len(message) < 600
    assert not list(tmp_path.glob("*.json"))


def test_limits_and_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"^tokenizer\.chat_template must be of type str, got 5$"):
        write_tokenizer({**GPT2, "tokenizer.chat_template": 5}, tmp_path)
    runs = ["x" * length for length in range(1, 60)]
    changes = {"tokens": [*BYTES, *runs], "token_type": [BYTE] * 256 + [NORMAL] * 59, "scores": [0.0] * 315}
    monkeypatch.setattr(gguf_tokenizer, "MAX_LETTERS", 5000)
    with pytest.raises(ModelError, match=r"the merges of tokenizer\.ggml\.tokens have more than 5,000 letters"):
        write_tokenizer(changed(LLAMA, changes), tmp_path)
    monkeypatch.setattr(gguf_tokenizer, "MAX_ADDED", 5)
    with pytest.raises(ModelError, match="the GGUF file has 6 special tokens, at most 5 are supported"):
        write_tokenizer(GPT2, tmp_path)
