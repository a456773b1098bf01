"""A tokenizer that needs no file, for models with random weights: one token per byte, and a plain chat template.

Ids 0 to 255 are bytes. Id 256 begins a text and id 257 ends it. Every other id decodes to its number, such as `<300>`,
and no text encodes to it.
"""

from __future__ import annotations

from typing import Any

BEGIN, END = 256, 257
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(vocab_size: int) -> Any:
    """Return a transformers tokenizer with ids `[0, vocab_size)`; `vocab_size` is at least 258."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert vocab_size > END, f"256 bytes, begin and end need a vocabulary of 258 tokens, got {vocab_size}"
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
    """The letter that byte-level tokenizers write for each byte (Radford et al. 2019)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare_letters = map(chr, range(256, 512))
    return [chr(byte) if byte in printable else next(spare_letters) for byte in range(256)]
