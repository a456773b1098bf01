"""The PDF and text loaders, called in this process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pitlane import Document, DocumentError
from pitlane.plugins.pdf_document import PdfDocument
from pitlane.plugins.text_document import PAGE_CHARS, TextDocument

PDF, TEXT = "application/pdf", "text/plain"


def make_pdf(
    pages: list[str],
    *,
    catalog: str = "",
    resources: str = "/Font << /F 3 0 R >>",
    trailer: str = "",
    font: str = "/Encoding /WinAnsiEncoding",
    unicode_values: dict[int, str] | None = None,
) -> bytes:
    """A PDF with one content stream per page, and without a table of objects: readers rebuild it.

    unicode_values: Unicode values in hex that the font's table gives to codes, besides those of ASCII.
    """
    kids = " ".join(f"{10 + 2 * index} 0 R" for index in range(len(pages)))
    objects = {
        1: f"<< /Type /Catalog /Pages 2 0 R {catalog} >>",
        2: f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} /MediaBox [0 0 600 800] >>",
        3: f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica {font} >>",
    }
    if unicode_values is not None:
        values = {**{code: f"{code:04X}" for code in range(32, 127)}, **unicode_values}
        rows = "\n".join(f"<{code:02X}> <{value}>" for code, value in values.items())
        table = f"1 begincodespacerange <00> <FF> endcodespacerange\n{len(values)} beginbfchar\n{rows}\nendbfchar"
        objects[3] = objects[3].replace(font, f"{font} /ToUnicode 4 0 R")
        objects[4] = f"<< /Length {len(table)} >>\nstream\n{table}\nendstream"
    for index, content in enumerate(pages):
        objects[10 + 2 * index] = (
            f"<< /Type /Page /Parent 2 0 R /Resources << {resources} >> /Contents {11 + 2 * index} 0 R >>"
        )
        objects[11 + 2 * index] = f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"
    body = "".join(f"{number} 0 obj\n{text}\nendobj\n" for number, text in objects.items())
    return f"%PDF-1.7\n{body}trailer << /Root 1 0 R {trailer} >>\n%%EOF\n".encode("latin-1")


def lines(*texts: str) -> str:
    shown = " ".join(f"({text}) Tj 0 -20 Td" for text in texts)
    return f"BT /F 12 Tf 50 700 Td {shown} ET"


def load_pdf(tmp_path: Path, data: bytes) -> Document:
    path = tmp_path / "a.pdf"
    path.write_bytes(data)
    document = PdfDocument().load_document(str(path), PDF)
    assert document is not None
    return document


def load_text(tmp_path: Path, data: bytes) -> Document:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    document = TextDocument().load_document(str(path), TEXT)
    assert document is not None
    return document


def test_load_document_declines_other_types(tmp_path: Path) -> None:
    assert PdfDocument().load_document(str(tmp_path / "none"), TEXT) is None
    assert TextDocument().load_document(str(tmp_path / "none"), PDF) is None


def test_pdf_text_and_labels(tmp_path: Path) -> None:
    labels = "/PageLabels << /Nums [0 << /S /r >> 2 << /S /D /P (A-) >>] >>"
    data = make_pdf([lines("Preface"), lines("More"), lines("Chapter  ", "one")], catalog=labels)
    document = load_pdf(tmp_path, data)
    assert [(page.index, page.label, page.text) for page in document.pages] == [
        (0, "i", "Preface"),
        (1, "ii", "More"),
        (2, "A-1", "Chapter\none"),
    ]
    assert (document.title, document.mime) == ("a.pdf", PDF)
    assert document.content_hash == hashlib.sha256(data).hexdigest()
    assert load_pdf(tmp_path, data).text == document.text


def test_pages_without_labels_are_numbered(tmp_path: Path) -> None:
    assert [page.label for page in load_pdf(tmp_path, make_pdf([lines("a"), lines("b")])).pages] == ["1", "2"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("a represen-", "tation here"), "a representation here"),
        (("an out-of-", "vocabulary word"), "an out-of-vocabulary word"),
        (("the FAA-", "approved form"), "the FAA-approved form"),
        (("a well-known fact is well-", "known"), "a well-known fact is well-known"),
        (("the information: infor-", "mation"), "the information: information"),
        (("real normal. a real-", "normal case"), "real normal. a real-normal case"),
    ],
)
def test_divided_words_are_joined(tmp_path: Path, given: tuple[str, ...], expected: str) -> None:
    assert load_pdf(tmp_path, make_pdf([lines(*given)])).pages[0].text == expected


FINAL_FLOW = lines(r"The \001nal \002ow")


@pytest.mark.parametrize(
    ("font", "unicode_values"),
    [
        ("", None),
        ("/Encoding /WinAnsiEncoding", None),
        ("/Encoding << /Differences [1 /fi /fl] >>", None),
        ("/Encoding << /Differences [1 /uniFB01 /uniFB02] >>", None),
        ("/Encoding << /Differences [1 /f_i /f_l] >>", None),
        ("/Encoding << /Differences [1 /g33 /g34] >>", None),
        ("", {}),
        ("", {1: "F001", 2: "F002"}),
        ("", {1: "FB01", 2: "FB02"}),
        ("", {1: "00660069", 2: "0066006C"}),
        ("", {1: "0003", 2: "0002"}),
        ("", {1: "E0A1", 2: "E0A2"}),
        ("", {1: "FFFD", 2: "FFFD"}),
        ("", {1: "0000", 2: "0000"}),
        ("", {1: "FFFE", 2: "FFFF"}),
    ],
)
def test_ligatures_without_a_unicode_value(font: str, unicode_values: dict[int, str] | None, tmp_path: Path) -> None:
    data = make_pdf([FINAL_FLOW], font=font, unicode_values=unicode_values)
    assert load_pdf(tmp_path, data).pages[0].text == "The final flow"


def test_ligatures_of_tex(tmp_path: Path) -> None:
    text = lines(r"the o\016ce \014les a di\013erent \015oor plan, \014nally")
    assert load_pdf(tmp_path, make_pdf([text])).pages[0].text == "the office files a different floor plan, finally"


def test_other_words_of_the_document_resolve_a_ligature(tmp_path: Path) -> None:
    text = lines("Fiddleford fiddles.", r"\005ddles, Fi\004", r"x\006y")
    assert load_pdf(tmp_path, make_pdf([text])).pages[0].text == "Fiddleford fiddles.\nfiddles, Fi\ufffd\nx\ufffdy"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (r"d\001sir, \001tat, \001cole", "d\ufffdsir, \ufffdtat, \ufffdcole"),  # no ligature
        (r"Total \001\002\003 EUR", "Total \ufffd\ufffd\ufffd EUR"),
        (r"a\012b c\011d e\015f", "a\ufffdb c\ufffdd e\ufffdf"),  # codes that look like blanks
        (r"e\200a \202", "e\ufffda"),
        (r"\003 a bullet", " a bullet"),
    ],
)
def test_other_letters_without_a_unicode_value_are_marked(content: str, expected: str, tmp_path: Path) -> None:
    data = make_pdf([lines(content)], font="")
    assert load_pdf(tmp_path, data).pages[0].text == expected


def test_private_characters_in_words_are_marked_and_bullets_stay(tmp_path: Path) -> None:
    data = make_pdf([lines(r"\001 The \002nal")], unicode_values={1: "F0B7", 2: "E777"})
    assert load_pdf(tmp_path, data).pages[0].text == "\uf0b7 The final"
    data = make_pdf([lines(r"x\001y \002z")], unicode_values={1: "E001", 2: "FFFD"})
    assert load_pdf(tmp_path, data).pages[0].text == "x\ufffdy \ufffdz"


def test_a_pdf_of_letters_without_any_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="has no text"):
        load_pdf(tmp_path, make_pdf([lines(r"\001\002\003 \004\005")], font=""))


def test_a_pdf_without_text_says_so(tmp_path: Path) -> None:
    image = "BI /W 1 /H 1 /CS /G /BPC 8 ID \x80 EI"
    with pytest.raises(DocumentError, match=r"has no text \(2 of 3 pages are images\); run OCR"):
        load_pdf(tmp_path, make_pdf([image, image, ""]))
    with pytest.raises(DocumentError, match=r"has no text \(1 blank pages or drawings\)"):
        load_pdf(tmp_path, make_pdf([""]))


def test_an_encrypted_pdf_says_so(tmp_path: Path) -> None:
    key = "<" + "00" * 32 + ">"
    trailer = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O {key} /U {key} >> /ID [<00> <00>]"
    with pytest.raises(DocumentError, match="is encrypted; save a copy without a password"):
        load_pdf(tmp_path, make_pdf([lines("secret")], trailer=trailer))


@pytest.mark.parametrize(
    "data", [b"%PDF-1.7\n", b"%PDF-1.7\n1 0 obj\n<< /Type", b"%PDF-1.4\n" + bytes(range(256)) * 10]
)
def test_a_damaged_pdf_says_so(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DocumentError, match="damaged or incomplete PDF"):
        load_pdf(tmp_path, data)


def test_a_pdf_of_too_many_pages_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.plugins.pdf_document.MAX_PAGES", 2)
    with pytest.raises(DocumentError, match="has 3 pages, 1 to 2 can be read"):
        load_pdf(tmp_path, make_pdf([lines("x")] * 3))
    monkeypatch.setattr("pitlane.plugins.pdf_document.MAX_CHARS", 3)
    with pytest.raises(DocumentError, match="more than 3 characters by page 2"):
        load_pdf(tmp_path, make_pdf([lines("ab")] * 2))


def test_cyclic_pages_end(tmp_path: Path) -> None:
    data = make_pdf([lines("x")]).replace(b"/Kids [10 0 R] /Count 1", b"/Kids [2 0 R 10 0 R] /Count 2")
    assert "x" in load_pdf(tmp_path, data).text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbfna\xc3\xafve", "naïve"),
        ("naïve 中".encode("utf-16"), "naïve 中"),
        ("naïve 中".encode("utf-32"), "naïve 中"),
        ("naïve 中".encode(), "naïve 中"),
        ("a \ufffd b".encode(), "a \ufffd b"),
        (b"na\xefve \x93quoted\x94", "naïve “quoted”"),
        (b"na\xefve \x81", "naïve"),
        (b"a\r\nb\rc  \nd\x07\x00e\n\n", "a\nb\nc\nde"),
        ("naïve text".encode("utf-16-le"), "naïve text"),
        ("naïve text".encode("utf-16-be"), "naïve text"),
        ("é \xadü\ufeff\xad ñ ".encode() * 9 + b"\xff", "é ü ñ " * 9 + "\ufffd"),  # one damaged byte
        ("né à çà et là".encode("latin-1"), "né à çà et là"),
        ("\ufeffna\ufeffïve".encode(), "naïve"),
        ("a repre\xad\r\nsentation".encode(), "a representation"),
        ("a中".encode("utf-16")[:-1], "a\ufffd"),
    ],
)
def test_text_encodings(tmp_path: Path, data: bytes, expected: str) -> None:
    assert load_text(tmp_path, data).pages[0].text == expected


def test_text_pages_end_where_paragraphs_end(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}. " + "word " * (40 + number) for number in range(60)]
    document = load_text(tmp_path, "\n\n".join(paragraphs).encode())
    assert 4 < len(document.pages) < 12
    assert all(page.text.startswith("Paragraph") and len(page.text) <= PAGE_CHARS for page in document.pages)
    assert [page.label for page in document.pages[:2]] == ["1", "2"]
    joined = "\n\n".join(page.text for page in document.pages)
    assert joined == "\n\n".join(paragraph.rstrip() for paragraph in paragraphs)


def test_text_without_any_break_is_still_cut(tmp_path: Path) -> None:
    document = load_text(tmp_path, b"x" * (2 * PAGE_CHARS + 1))
    assert [len(page.text) for page in document.pages] == [PAGE_CHARS, PAGE_CHARS, 1]


def test_blank_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="only blanks"):
        load_text(tmp_path, b" \n\n\t\n")


@pytest.mark.parametrize(
    ("name", "num_pages", "phrase"),
    [
        ("pdfminer__i1040nr.pdf", 50, "Instructions for Form"),
        ("pdfminer__dmca.pdf", 18, "was implemented in th"),
        ("cs336__cs336_spring2025_assignment1_basics.pdf", 49, "out-of-vocabulary"),
        ("py-pdf-sample-files__multicolumn.pdf", 3, "consectetuer adipiscing elit"),
        ("pypdf__r6-empty-password.pdf", 1, "pdf encryption test"),
    ],
)
def test_real_pdfs(shared_data: Path, name: str, num_pages: int, phrase: str) -> None:
    document = PdfDocument().load_document(str(shared_data / "pdfs" / name), PDF)
    assert document is not None and len(document.pages) == num_pages
    assert phrase in document.text
    assert not any(mark in document.text for mark in ("\r", "\ufffe", "\x04", "\f"))
