"""Write the bundled sample document: the track guide of a karting club that does not exist, three pages.

Written by hand, in plain sentences such as the bundled model can answer from; it is in no training data.
Byte-reproducible: the same reportlab gives the same file. Needs `pip install reportlab`. Run as
`python -m pitlane.plugins.training.sample_pdf FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reportlab.lib import colors
from reportlab.lib.pagesizes import A5
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Flowable, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle
from reportlab.platypus.doctemplate import PageBreak

RED, INK, PALE = colors.HexColor("#b3261e"), colors.HexColor("#1f2328"), colors.HexColor("#f3f1ec")
BODY = ParagraphStyle("body", fontName="Helvetica", fontSize=11, leading=16, textColor=INK, spaceAfter=7)
TITLE = ParagraphStyle("title", parent=BODY, fontName="Helvetica-Bold", fontSize=27, leading=33, spaceAfter=2)
SUBTITLE = ParagraphStyle("subtitle", parent=BODY, fontSize=14, leading=19, textColor=RED, spaceAfter=16)
HEADING = ParagraphStyle(
    "heading", parent=BODY, fontName="Helvetica-Bold", fontSize=15, leading=20, spaceBefore=12, textColor=RED
)

PRICES = (
    ("Item", "Price"),
    ("Junior session", "£12.50"),
    ("Adult session", "£18"),
    ("Helmet hire", "£3.20"),
    ("Day pass", "£64"),
)
PAGES: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("title", "Northfield Karting Club"),
        ("subtitle", "Track Guide"),
        ("body", "Welcome to Northfield. This guide tells you when to come, what it costs and how to drive safely."),
        ("heading", "Opening hours"),
        ("body", "The track is open from 10:00 to 21:30. The workshop opens at 9:40. The cafe closes at 22:15."),
        ("body", "The club is open on Wednesday to Sunday. It stays shut in January, when the kerbs are painted."),
        ("heading", "Getting here"),
        ("body", "The address of the club is 27 Quarry Lane. The car park has 85 spaces and is free for drivers."),
        (
            "body",
            "The phone number of the office is 0441 720 318. The email address of the office is hello@northfield.example.",
        ),
    ),
    (
        ("heading", "Prices"),
        ("table", ""),
        ("body", "A session lasts 12 minutes. The annual membership costs £145. The deposit for the race suit is £40."),
        ("heading", "Who may drive"),
        ("body", "The minimum age for the junior kart is 8 years. The minimum age for the adult kart is 16 years."),
        ("body", "The weight of the junior kart is 74 kg. The top speed of the adult kart is 68 km/h."),
    ),
    (
        ("heading", "Safety"),
        ("body", "The speed limit in the pit lane is 15 km/h. A blue flag means that a faster kart wants to pass."),
        ("body", "Every accident must be reported within 30 minutes. The fine for smoking is £25."),
        ("heading", "The track"),
        ("body", "The length of the track is 1,140 metres. The track was built in 1987."),
        ("body", "The lap record is 48.213 seconds. It is held by Tobias Renwick, who set it in the rain."),
        ("heading", "People"),
        ("body", "The manager of the club is Ingrid Solheim. The head mechanic is Paul Adeyemi."),
        ("body", "The summer race takes place on 14 June."),
    ),
)


def _price_table() -> Table:
    table = Table(PRICES, colWidths=(60 * mm, 32 * mm), hAlign="LEFT", spaceAfter=12)
    table.setStyle(
        TableStyle(
            [
                ("FONT", (0, 0), (-1, 0), "Helvetica-Bold", 11),
                ("FONT", (0, 1), (-1, -1), "Helvetica", 11),
                ("TEXTCOLOR", (0, 0), (-1, 0), colors.white),
                ("BACKGROUND", (0, 0), (-1, 0), RED),
                ("ROWBACKGROUNDS", (0, 1), (-1, -1), (PALE, colors.white)),
                ("ALIGN", (1, 0), (1, -1), "RIGHT"),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 6),
                ("TOPPADDING", (0, 0), (-1, -1), 5),
                ("LINEBELOW", (0, -1), (-1, -1), 0.7, INK),
            ]
        )
    )
    return table


def _story() -> list[Flowable]:
    styles = {"title": TITLE, "subtitle": SUBTITLE, "heading": HEADING, "body": BODY}
    story: list[Flowable] = []
    for page in PAGES:
        for kind, text in page:
            story.append(_price_table() if kind == "table" else Paragraph(text, styles[kind]))
        story += [Spacer(1, 4 * mm), PageBreak()]
    return story[:-1]


def _decorate(canvas: Canvas, _: SimpleDocTemplate) -> None:
    width, height = A5
    canvas.setFillColor(INK)
    canvas.rect(0, height - 9 * mm, width, 9 * mm, stroke=0, fill=1)
    canvas.setFillColor(colors.white)
    side = 4.5 * mm
    for column in range(int(width / side) + 1):
        canvas.rect(column * side, height - (9 if column % 2 else 4.5) * mm, side, side, stroke=0, fill=1)


def write_sample_pdf(path: Path) -> None:
    """Write the sample document."""
    document = SimpleDocTemplate(
        str(path),
        pagesize=A5,
        leftMargin=15 * mm,
        rightMargin=15 * mm,
        topMargin=20 * mm,
        bottomMargin=14 * mm,
        title="Northfield Karting Club - Track Guide",
        author="Pitlane",
        invariant=1,
    )
    document.build(_story(), onFirstPage=_decorate, onLaterPages=_decorate)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write Pitlane's sample PDF.")
    parser.add_argument("file", type=Path)
    write_sample_pdf(parser.parse_args().file)


if __name__ == "__main__":
    main()
