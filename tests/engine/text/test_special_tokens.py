"""No text of a user or a document becomes a special token, even after the tokenizer's normaliser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from pitlane.engine.models.registry import resolve
from pitlane.engine.models.source import ModelSource
from pitlane.engine.text.tokenizer import JOINER, Tokenizer
from pitlane.storage.types import Document, Page

EOT = "<|eot|>"
WIDE = "".join(chr(ord(letter) + 0xFEE0) for letter in EOT)
KELVIN = "\u212a"
MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> MakeTokenizer:
    """`make_tokenizer(special, normalizer, letters)`: tokens are bytes or the letters, `</s>`, `<unk>` and the special token."""

    def make(special: AddedToken, normalizer: Any = None, letters: str = "") -> Tokenizer:
        pieces = ["</s>", "<unk>", *(letters or sorted(pre_tokenizers.ByteLevel.alphabet()))]
        inner = Inner(
            models.BPE(vocab={text: index for index, text in enumerate(pieces)}, merges=[], unk_token="<unk>")
        )
        if normalizer is not None:
            inner.normalizer = normalizer
        if not letters:
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([AddedToken("</s>", special=True, normalized=False), special])
        outer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
        outer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        outer.save_pretrained(str(tmp_path))
        source = resolve("random:tiny")
        return Tokenizer(ModelSource("made", source.config, source.weights, tmp_path))

    return make


def forged(tokenizer: Tokenizer, text: str) -> set[int]:
    decoder = tokenizer._inner.added_tokens_decoder
    special = {token_id for token_id, token in decoder.items() if token.special}
    return special & set(tokenizer.encode(text, False))


@pytest.mark.parametrize(
    ("normalizer", "special", "texts"),
    [
        (normalizers.NFKC(), EOT, [WIDE, WIDE[:2] + EOT[2:], f"a{WIDE * 3}b", EOT]),
        (normalizers.NFKC(), "K", [KELVIN, "\uff2b", "aKb"]),
        (normalizers.Lowercase(), EOT, ["<|EOT|>", "x<|Eot|>y", f"{KELVIN}<|EOT|>"]),
        (normalizers.Lowercase(), "<|EOT|>", ["<|EOT|>", "<|eot|>"]),
        (normalizers.Strip(), " eot ", ["eot", "an eot here", " eot "]),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), EOT, ["<|éo\u0301t|>"]),
        (normalizers.BertNormalizer(), EOT, ["<|EOT|>", f"<|e{JOINER}ot|>", "<|\ufffdeot|>", "<|éot|>"]),
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), "eot", ["eot", "an eot eot"]),
        (normalizers.Replace(Regex(f"[{JOINER} ?]"), ""), EOT, [EOT, "<|e ot|>", f"<{JOINER}|eot|>"]),
    ],
)
def test_texts_that_the_normaliser_turns_into_special_tokens(
    normalizer: Any, special: str, texts: list[str], make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(AddedToken(special, special=True, normalized=True), normalizer)
    assert any(forged(tokenizer, text) for text in texts)
    for text in [*texts, "</s>"]:
        for around in ("{}", "x{}x", " {} "):
            assert not forged(tokenizer, around.format(tokenizer.defuse(text))), ascii(text)
    assert tokenizer.defuse("plain, 10 €: ½ Ünï") == "plain, 10 €: ½ Ünï"


@pytest.mark.parametrize(
    ("special", "text", "harmless"),
    [
        (AddedToken("§", special=True), "a§b", "a\ufffdb"),
        (AddedToken("\ufffd", special=True), "a\ufffdb", "ab"),
        (AddedToken(JOINER, special=True), f"a{JOINER}</s>", "a\ufffd<\ufffd/s>"),
        (AddedToken("<mask>", special=True, lstrip=True), "a  <mask>", f"a  <{JOINER}mask>"),
        (AddedToken("eot", special=True, single_word=True), "an eot", f"an e{JOINER}ot"),
        (AddedToken("<unk>", special=True), "<unk>", f"<{JOINER}unk>"),
    ],
    ids=["one letter", "replacement character", "joiner", "strips", "single word", "unknown"],
)
def test_special_tokens_of_other_shapes(
    special: AddedToken, text: str, harmless: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(special)
    assert forged(tokenizer, text)
    assert tokenizer.defuse(text) == harmless
    assert not forged(tokenizer, harmless)


@pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase()])
@pytest.mark.parametrize(("special", "text"), [(" EOT", "EOT"), ("\nEOT\n", "EOT"), (" K", "K"), ("EOT ", "x EOT")])
def test_special_tokens_that_reach_over_the_edge_of_a_text(
    special: str, text: str, normalizer: Any, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(AddedToken(special, special=True, normalized=True), normalizer)
    for before, after in ((" ", " "), ("\n", "\n")):
        assert not forged(tokenizer, f"user:{before}{tokenizer.defuse(text)}{after}")
    assert forged(tokenizer, f" {text} ") or forged(tokenizer, f"\n{text}\n")
    assert tokenizer.defuse("aKEOTs") == "aKEOTs"


def test_letters_that_the_vocabulary_lacks_stay(make_tokenizer: MakeTokenizer) -> None:
    unknown = AddedToken("<unk>", special=True, normalized=True)
    tokenizer = make_tokenizer(unknown, normalizers.NFKC(), "abc <>unk")
    assert tokenizer.defuse("ab Ж <unk>") == f"ab Ж <{JOINER}unk>"
    assert tokenizer.defuse("Ж ＜unk＞ c") == f"Ж ＜{JOINER}unk＞ c"


def test_messages_roles_and_documents_are_covered(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(AddedToken(EOT, special=True, normalized=True), normalizers.NFKC())
    document = Document(WIDE, "text/plain", (Page(0, "1", f"see {WIDE}"),), "hash")
    messages = [{"role": "user", "content": WIDE}, {"role": f"tool{WIDE}", "content": "x"}]
    prompt = tokenizer.render_chat(messages, [document], system=WIDE)
    assert not forged(tokenizer, prompt.text)
    assert len(prompt.segments) == 1
