"""PDF document: the text of a PDF's pages and their printed labels, through pypdfium2.

Changes in the loop: none; `load_document` turns files of type application/pdf into pages of text.
Exactness: identical. Costs: about 2 ms per page once, in a child process; nothing per token.
Words that a line break divides are joined. Scans (images without text) are refused. A ligature without a Unicode value is replaced
by its letters if the document's words show which ligature it is; any other glyph without a Unicode value becomes U+FFFD.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pitlane import Document, DocumentError, Page, Plugin, hookimpl
from pitlane.storage.types import MAX_CHARS, MAX_PAGES

# pdfium writes U+FFFE for a hyphen at a line's end and drops the line break.
_BREAK = re.compile(r"(\w+(?:-\w+)*)[\ufffe\u00ad](?:\r?\n)?(\w+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufffe\uffff\u00ad\ufeff]")
_ENCRYPTED = "is encrypted; save a copy without a password (for example by printing it to a PDF) and add that"
_UNREADABLE = "[this page could not be read]"

# Characters that pdfium returns for a glyph without a Unicode value: its code in the font, or the value of a wrong table.
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd-\uffff]")
_ANY_GLYPH = frozenset({0, 0xFFFD, 0xFFFE, 0xFFFF})  # a wrong table gives these values to several glyphs
_MAYBE_TEXT = re.compile(r"[\t\n\r]")  # these are text unless pdfium reports an error for the glyph
_FIRST_LETTER = 0xF0000  # a glyph without a Unicode value gets a private character from here on, until it is resolved
_PRIVATE = re.compile(r"[\ue000-\uf8ff\U000f0000-\U000ffffd]")
_ALONE = re.compile(r"(?<!\S)[\U000f0000-\U000ffffd](?!\S)")  # a bullet or an icon: no word around it
_IN_TEXT = re.compile(rf"(?<=\S){_PRIVATE.pattern}|{_PRIVATE.pattern}(?=\S)")
_WORD = re.compile(rf"(?:\w|{_PRIVATE.pattern})+")
_LIGATURES = ("ff", "fi", "fl", "ffi", "ffl")
_PRIVATE_LIGATURES = {0xF001: "fi", 0xF002: "fl"}  # in fonts of Apple and Microsoft
_KNOWN_WORDS = frozenset(
    """affect affected affects benefit benefits briefly brief certificate certified classification classified coefficient
    coefficients configuration confidence confidential confirm confirmed conflict conflicts deficit define defined
    defines definition definitions differ difference differences different differential differs difficult difficulty
    effect effective effectively effects efficiency efficient efficiently effort efforts fiction field fields fifteen
    fifth fifty fig fight figure figures file filed files fill filled film filter filters final finally finance financial
    find finding findings finds fine fingers finish finished finite fire firm firms first fiscal fish fit fits five fix
    fixed flag flat flexible flight flights float floating flood floor floors flow flows fluid fly identification
    identified identifies identify inflation influence infinite insufficient justified justify magnificent modified
    modify notification office officer officers offices official officials off offer offered offers offset overflow
    profile profit profits reflect reflected reflects satisfied satisfy scientific significance significant
    significantly simplified specific specifically specification specified specifies specify staff stiff stuff
    suffer suffered suffering sufficient sufficiently traffic unified verified verify workflow""".split()
)


class PdfDocument(Plugin):
    """Reads application/pdf."""

    name, exactness = "pdf_document", "identical"

    @hookimpl
    def load_document(self, path: str, mime: str) -> Document | None:
        """Return the text of a PDF. pypdfium2 is not thread-safe: a process may make one call at a time."""
        if mime != "application/pdf":
            return None
        import pypdfium2

        data = Path(path).read_bytes()
        try:
            pdf = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            raise DocumentError(_refusal(error)) from None
        try:
            pages = _pages(pdf)
        finally:
            pdf.close()
        return Document(Path(path).name, mime, pages, hashlib.sha256(data).hexdigest())


def _refusal(error: Any) -> str:
    from pypdfium2 import raw

    if error.err_code == raw.FPDF_ERR_PASSWORD:
        return _ENCRYPTED
    if error.err_code == raw.FPDF_ERR_SECURITY:
        return "has a protection that cannot be read; save a copy without protection and add that"
    return "is a damaged or incomplete PDF; open it in a PDF viewer and save it again, or download it again"


def _pages(pdf: Any) -> tuple[Page, ...]:
    if not 0 < len(pdf) <= MAX_PAGES:
        raise DocumentError(f"has {len(pdf)} pages, 1 to {MAX_PAGES} can be read; split it")
    texts: list[str | None] = []
    letters: dict[tuple[bytes, int], str] = {}
    num_chars = 0
    for index in range(len(pdf)):
        texts.append(_page_text(pdf, index, letters))
        num_chars += len(texts[-1] or "")
        if num_chars > MAX_CHARS:
            raise DocumentError(f"has more than {MAX_CHARS} characters by page {index + 1}; split it")
    if not any(text and _CONTROL.sub("", _PRIVATE.sub("", text)).strip() for text in texts):
        raise DocumentError(_no_text(pdf, texts))
    texts = _resolved(texts)
    words = _words(texts)
    return tuple(
        Page(index, _label(pdf, index), _UNREADABLE if text is None else _clean(text, words))
        for index, text in enumerate(texts)
    )


def _words(texts: list[str | None]) -> set[str]:
    whole = (_BREAK.sub(" ", text or "") for text in texts)
    return set(re.findall(r"\w+(?:-\w+)*", "\n".join(whole).lower()))


def _page_text(pdf: Any, index: int, letters: dict[tuple[bytes, int], str]) -> str | None:
    """Raw text, or None where pdfium cannot read the page."""
    import pypdfium2

    try:
        page = pdf[index]
        text_page = page.get_textpage()
        text = str(text_page.get_text_range())
        odd = _NO_TEXT.search(text) or _MAYBE_TEXT.search(text.replace("\r\n", ""))
        if odd or text_page.count_chars() != len(text):
            text = _with_letters(text_page, text, letters)
        text_page.close()
        page.close()
    except pypdfium2.PdfiumError:
        return None
    return text


def _with_letters(text_page: Any, text: str, letters: dict[tuple[bytes, int], str]) -> str:
    """Insert a private character for each glyph without a Unicode value. pdfium omits the glyph or returns its font code."""
    from pypdfium2 import raw

    pieces, done, last = [], 0, -1  # last: the position in the text of the last character that is in it
    for index in range(text_page.count_chars()):
        position = raw.FPDFText_GetTextIndexFromCharIndex(text_page, index)
        last = position if position >= 0 else last
        code = raw.FPDFText_GetUnicode(text_page, index)
        wrong = _NO_TEXT.match(chr(code)) or (code < 32 and raw.FPDFText_HasUnicodeMapError(text_page, index))
        if not wrong or raw.FPDFText_IsGenerated(text_page, index) or raw.FPDFText_IsHyphen(text_page, index):
            continue
        glyph = -len(letters) if code in _ANY_GLYPH else code
        letter = letters.setdefault((_font(text_page, index), glyph), chr(_FIRST_LETTER + len(letters) % 0xFFFE))
        pieces += [text[done : position if position >= 0 else last + 1], letter]
        done = last + 1
    return "".join([*pieces, text[done:]])


def _font(text_page: Any, index: int) -> bytes:
    from ctypes import c_int, create_string_buffer

    from pypdfium2 import raw

    name = create_string_buffer(128)
    raw.FPDFText_GetFontInfo(text_page, index, name, len(name), c_int())
    return name.value


def _resolved(texts: list[str | None]) -> list[str | None]:
    """Replace private characters in words by a ligature if the words show which, else by U+FFFD.

    Lone characters from U+F0000 on are dropped (bullets, icons); other lone private characters stay.
    """
    texts = [text and _ALONE.sub("", text.translate(_PRIVATE_LIGATURES)) for text in texts]
    if not any(text and _IN_TEXT.search(text) for text in texts):
        return texts
    words = {word.lower() for text in texts for word in _WORD.findall(text or "")}
    gaps: dict[str, list[str]] = {}
    for word in words:
        if len(letters := set(_PRIVATE.findall(word))) == 1:
            gaps.setdefault(letters.pop(), []).append(word)
    known = _KNOWN_WORDS | words
    ligatures = {ord(letter): _ligature(letter, incomplete, known) for letter, incomplete in gaps.items()}
    return [text and _IN_TEXT.sub("\ufffd", text.translate(ligatures)) for text in texts]


def _ligature(letter: str, gaps: list[str], known: frozenset[str]) -> str:
    """The ligature that completes the most words, if they are at least a quarter of the words; else the letter itself."""
    hits = Counter({ligature: sum(word.replace(letter, ligature) in known for word in gaps) for ligature in _LIGATURES})
    (best, num_best), (_, num_second) = hits.most_common(2)
    return best if num_best > num_second and num_best * 4 >= len(gaps) else letter


def _label(pdf: Any, index: int) -> str:
    label = _CONTROL.sub("", str(pdf.get_page_label(index))).strip()[:40]
    return label or str(index + 1)


def _clean(text: str, words: set[str]) -> str:
    def join(match: re.Match[str]) -> str:
        left, right = match.groups()
        return f"{left}{_hyphen(left, right, words)}{right}"

    text = _BREAK.sub(join, text)
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n"))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def _hyphen(left: str, right: str, words: set[str]) -> str:
    """The hyphen at the end of a line if it belongs to the word, else "". Other words of the document decide, else the halves."""
    joined, compound = f"{left}{right}".lower(), f"{left}-{right}".lower()
    if compound in words or "-" in left or not right[0].islower() or not left[-1].islower():
        return "-"
    if joined in words:
        return ""
    return "-" if left.lower() in words and right.lower() in words else ""


def _no_text(pdf: Any, texts: list[str | None]) -> str:
    if all(text is None for text in texts):
        return f"is damaged: none of its {len(texts)} pages can be read; open it in a PDF viewer and save it again"
    num_images = sum(text is not None and _has_image(pdf, index) for index, text in enumerate(texts))
    if num_images:
        return f"has no text ({num_images} of {len(texts)} pages are images); run OCR on it first, then add the result"
    return f"has no text ({len(texts)} blank pages or drawings); export it again with text, or run OCR on it first"


def _has_image(pdf: Any, index: int) -> bool:
    from pypdfium2 import raw

    page = pdf[index]
    return next(iter(page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE], max_depth=5)), None) is not None
