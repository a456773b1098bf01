"""Write the bundled sample document: the track guide of a karting club that does not exist, four pages.

The text is written by hand, in plain sentences, and is in no training data. Its facts were chosen among facts that the first
bundled model could find, so the model's score on it says nothing about other documents. The same version of reportlab writes the
same bytes. Needs `pip install reportlab`. Run as `python -m bundled_model.sample_pdf FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reportlab.lib import colors
from reportlab.lib.pagesizes import A5
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Flowable, Paragraph, SimpleDocTemplate, Spacer
from reportlab.platypus.doctemplate import PageBreak

RED, INK = colors.HexColor("#b3261e"), colors.HexColor("#1f2328")
BODY = ParagraphStyle("body", fontName="Helvetica", fontSize=11, leading=16, textColor=INK, spaceAfter=7)
TITLE = ParagraphStyle("title", parent=BODY, fontName="Helvetica-Bold", fontSize=27, leading=33, spaceAfter=2)
SUBTITLE = ParagraphStyle("subtitle", parent=BODY, fontSize=14, leading=19, textColor=RED, spaceAfter=16)
HEADING = ParagraphStyle(
    "heading", parent=BODY, fontName="Helvetica-Bold", fontSize=15, leading=20, spaceBefore=12, textColor=RED
)

PAGES: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("title", "Northfield Karting Club"),
        ("subtitle", "Track Guide"),
        ("body", "Welcome to Northfield. This guide tells you when to come and what it costs."),
        ("heading", "Opening hours"),
        ("body", "The track is open from 10:00 to 21:30. The workshop opens at 9:40. The cafe closes at 22:15."),
        ("heading", "Getting here"),
        ("body", "The address of the club is 27 Quarry Lane. The phone number of the office is 0441 720 318."),
    ),
    (
        ("heading", "Prices"),
        ("body", "The junior session costs £12.50. The day pass costs £64.20. The annual membership costs £145.60."),
        ("body", "The deposit for the race suit is £40.20."),
        ("heading", "Who may drive"),
        ("body", "The minimum age for the junior kart is 8 years."),
    ),
    (
        ("heading", "Safety"),
        ("body", "The speed limit in the pit lane is 15 km/h."),
        ("heading", "The track"),
        ("body", "The track was built in 1987. The length of the track is 1140 metres."),
        ("heading", "People"),
        ("body", "The manager of the club is Ingrid Solheim. The champion is Tobias Renwick."),
        ("body", "The summer race takes place on 14 June."),
    ),
    (
        ("heading", "Good manners on the track"),
        (
            "body",
            "Listen to the marshals and follow their flags. A yellow flag means danger ahead: slow down and do not pass. A blue "
            "flag means that somebody faster is behind you, so let them by on the straight. A red flag means that everybody "
            "comes back slowly. When you see the chequered flag, finish your lap and return to the pit lane.",
        ),
        (
            "body",
            "Keep both hands on the wheel and both feet inside. Do not push, do not block, and leave room in the corners. If "
            "you spin, raise a hand and stay in your seat until a marshal reaches you. Never walk on the tarmac while others "
            "are driving. Long hair is tied back, scarves stay in the changing room, and shoes are closed.",
        ),
        (
            "body",
            "Before your first drive we walk round the track together and show you the braking points, the kerbs and the way "
            "into the pit lane. Nobody is in a hurry on that walk, so ask whatever you like. Beginners start at the back, "
            "and everybody waits for the green light. In the rain we change the tyres, leave more room and brake earlier.",
        ),
        (
            "body",
            "Tell us about every contact, even a small one, so that we can look over the karts before the next group goes out. "
            "Friends and family are welcome behind the fence. Dogs wait outside. Please take your rubbish home, and come "
            "back soon.",
        ),
    ),
)


def _story() -> list[Flowable]:
    styles = {"title": TITLE, "subtitle": SUBTITLE, "heading": HEADING, "body": BODY}
    story: list[Flowable] = []
    for page in PAGES:
        for kind, text in page:
            story.append(Paragraph(text, styles[kind]))
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
