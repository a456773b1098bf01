"""A tokenizer without a file, for random weights: one token per byte, two marks, and a plain chat template.

Ids 0 to 255 are bytes, 256 begins and 257 ends a text; all others of the vocabulary decode to their number, as `<300>`,
and are never the result of encoding.
"""

from __future__ import annotations

from typing import Any

BEGIN, END = 256, 257
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(vocab_size: int) -> Any:
    """A transformers tokenizer whose ids are all below `vocab_size` (at least 258)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert vocab_size > END, f"bytes and two marks need 258 tokens, got {vocab_size}"
    vocab = {letter: byte for byte, letter in enumerate(_letters())}
    vocab |= {"<s>": BEGIN, "</s>": END} | {f"<{index}>": index for index in range(END + 1, vocab_size)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _letters() -> list[str]:
    """The printable letter that byte-level tokenizers use for each byte (Radford et al. 2019)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
