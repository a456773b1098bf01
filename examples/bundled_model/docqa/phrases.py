"""Phrases of the generator for all domains: modifiers of nouns, sentence frames, fillers, frames of questions.

Pure data.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


MODIFIERS = _words(
    "old, new, main, north, south, east, west, blue, red, green, small, large, upper, lower, second, third, winter, summer, "
    "spring, autumn, morning, evening, junior, senior, adult, family, guest, staff, river, harbour, city, garden, front, back, "
    "inner, outer, left, right, electric, steam, wooden, steel, glass, double, single, express, night, day, private, public, "
    "central, royal, silver, golden, mountain, island, lake, forest, castle, station, airport, school, annual, monthly, weekly, "
    "special, standard, premium, basic, spare, heavy, light, short, long, mobile, digital, indoor, outdoor, student, group, "
    "first, last, fourth, northern, southern, eastern, western, white, black, yellow, reserve, original, revised, temporary"
)
SUBTITLES = _words(
    "Edition 3, Version 2, Issue 14, Draft, Final, Summary, For members, Information sheet, Internal, Second edition, "
    "For distribution, Not for sale, Confidential, Short version, Revised, Part one, Extract, Copy"
)
FILLERS = (
    "Please read this page with care.",
    "We are glad that you are here.",
    "All details may change without notice.",
    "Nothing else was agreed on this point.",
    "Most people find this part simple.",
    "Thank you for your patience and your help.",
    "A copy of this paper hangs at the entrance.",
    "More will follow in the next issue.",
    "Some of the older parts have been renewed.",
    "Please keep this sheet in a safe place.",
    "The list below gives an overview.",
    "Ask a member of staff if anything is unclear.",
    "This section was revised last year.",
    "It is a good idea to plan ahead.",
    "The rest remains as it was.",
    "No changes were made to the other points.",
    "The figures below are rounded.",
)
# Sentences with values that no question asks for; a field is a kind of value.
DISTRACTORS = (
    "{person} sent greetings from {place}.",
    "A photograph from {year} hangs in the corridor.",
    "Printed by {company}.",
    "This page was last checked on {date}.",
    "{person} took the pictures in this paper.",
    "An earlier text by {person} was the model for this section.",
    "Form {code} is no longer in use.",
    "The drawings were made by {company} in {place}.",
    "See also {title} by {person}.",
    "On {date} a first draft was sent to {company}.",
    "The cover shows a view of {place}.",
    "Readers from {country} have asked for a map.",
    "Copies are sold at {address}.",
    "{person} and {person} read the proofs.",
    "Nearly {count} readers have sent us letters.",
)
LEADS = (
    "Please note that",
    "As a rule,",
    "At present,",
    "As before,",
    "From now on,",
    "It was agreed that",
    "According to the plan,",
    "Remember that",
    "For everyone,",
    "This season,",
    "By default,",
    "As announced,",
    "It should be said that",
    "In short,",
    "Many ask about this:",
    "As far as we know,",
    "After a long talk it was settled that",
    "Note:",
    "Important:",
)
COLON_LEADS = tuple(lead for lead in LEADS if lead.endswith(":"))
TAILS = (
    ", as in past years",
    " unless stated otherwise",
    ", without exception",
    " for the whole season",
    ", as agreed",
    ", and this will not change soon",
    " until further notice",
    ", which suits most people",
    " (see also the notes)",
    ", which came as a surprise to some",
    ", as everybody knows",
    " at the time of writing",
)
FORMER = (" (formerly {v})", ", no longer {v} as before", " instead of {v}", ", not {v} as printed in the last issue")
KEY_FORMS = (
    "{n} {a}: {v}",
    "{n} {a}: {v}",
    "{a} of {e}: {v}",
    "{n}, {a}: {v}",
    "{a} ({n}): {v}",
    "{n}: {a} {v}",
    "{n} - {a} - {v}",
    "{n} / {a}: {v}",
    "{a}, {n}: {v}",
)
FAQ_MARKS = (("Q: ", "A: "), ("Question: ", "Answer: "), ("", ""), ("- ", "  "), ("? ", "> "))
ASKS = (
    ("{}", 52),
    ("Please tell me: {}", 3),
    ("According to the document, {}", 3),
    ("I would like to know: {}", 3),
    ("{} Please answer briefly.", 2),
    ("Hi, {}", 2),
    ("Hello! {}", 1),
    ("Can you tell me: {}", 2),
    ("Quick question: {}", 2),
    ("Could you look this up for me? {}", 1),
    ("One more thing: {}", 1),
    ("In this document, {}", 1),
    ("{} Thanks!", 1),
    ("My colleague wants to know: {}", 1),
    ("Do you know this? {}", 1),
    ("{} I cannot find it.", 1),
    ("Sorry to bother you, {}", 1),
    ("What does the text say: {}", 1),
)
CHECKS = (
    "Is it true that {}?",
    "Is it correct that {}?",
    "I think {}. Is that right?",
    "Somebody told me that {}. Is that so?",
    "{}, right?",
    "Can you confirm that {}?",
)
TITLE_QUESTIONS = (
    "What is the document called?",
    "What is the title of the document?",
    "What kind of document is this?",
    "What is this document?",
    "What is the heading of the document?",
    "which document is this",
    "What is this about?",
)
SYSTEMS = (
    "Answer from the document and cite the page.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "Use only the document. Say so if the answer is not there.",
    "Be short and polite.",
    "You answer questions about the document.",
    "Quote the value and name the page.",
)
SAYS = "The document says:"
UNKNOWN = "The document does not say that."
