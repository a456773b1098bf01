"""What the generated documents speak about: kinds of document, their entities, attributes, sentences and questions.

Pure data. An attribute has a name (for `Key: value` lines and table columns), a kind of value (docqa_values.VALUES),
clauses that state it and questions that ask for it. In clauses and questions `{e}` is the entity with its article
("the harbour room"), `{n}` without it ("harbour room"), `{v}` the value. A clause is also the answer. To broaden the
generator, add attributes to ATTRIBUTES, name them in a Kind, or add a Kind; docqa.py needs no change.
"""

from __future__ import annotations

from typing import NamedTuple


class Attribute(NamedTuple):
    """One thing that can be said of an entity."""

    name: str
    value: str
    clauses: tuple[str, ...]
    questions: tuple[str, ...]


class Kind(NamedTuple):
    """One kind of document: titles, entity nouns (`#person`: people), names of its attributes, headings."""

    titles: tuple[str, ...]
    nouns: tuple[str, ...]
    attributes: tuple[str, ...]
    headings: tuple[str, ...]


def _attribute(name: str, value: str, clauses: str, questions: str) -> Attribute:
    return Attribute(name, value, tuple(clauses.split("|")), tuple(questions.split("|")))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_TABLE = (
    (
        "opening time",
        "clock",
        "{e} opens at {v}|the {n} opens at {v}",
        "When does {e} open?|What time does {e} open?|At what time does {e} open?|What is the opening time of {e}?|{n} opening time?",
    ),
    (
        "closing time",
        "clock",
        "{e} closes at {v}",
        "When does {e} close?|What time does {e} close?|Until when is {e} open?|What is the closing time of {e}?",
    ),
    (
        "opening hours",
        "hours",
        "{e} is open from {v}|the opening hours of {e} are {v}",
        "What are the opening hours of {e}?|When is {e} open?|What are the hours of {e}?|{n} opening hours?",
    ),
    (
        "open days",
        "weekday",
        "{e} is open on {v}",
        "On which days is {e} open?|Which day is {e} open?|When can I go to {e}?",
    ),
    (
        "start",
        "clock",
        "{e} starts at {v}|{e} begins at {v}",
        "When does {e} start?|What time does {e} start?|When does {e} begin?|At what time does {e} begin?|What is the start time of {e}?",
    ),
    (
        "end",
        "clock",
        "{e} ends at {v}",
        "When does {e} end?|What time does {e} end?|When is {e} over?|At what time does {e} finish?",
    ),
    (
        "date",
        "date",
        "{e} takes place on {v}|{e} is on {v}|the date of {e} is {v}",
        "When is {e}?|On which date is {e}?|When does {e} take place?|What is the date of {e}?",
    ),
    (
        "deadline",
        "date",
        "the deadline for {e} is {v}|{e} is due on {v}",
        "What is the deadline for {e}?|When is {e} due?|By when must {e} be done?|What is the due date for {e}?",
    ),
    (
        "place",
        "room",
        "{e} takes place in {v}|{e} is held in {v}",
        "Where does {e} take place?|Where is {e}?|Where is {e} held?|In which room is {e}?",
    ),
    (
        "location",
        "address",
        "{e} is located at {v}|the address of {e} is {v}",
        "Where is {e}?|What is the address of {e}?|Where can I find {e}?|Where is {e} located?",
    ),
    (
        "leader",
        "person",
        "{e} is led by {v}|the leader of {e} is {v}",
        "Who leads {e}?|Who is the leader of {e}?|By whom is {e} led?|Who runs {e}?",
    ),
    (
        "contact",
        "person",
        "the contact for {e} is {v}|questions about {e} go to {v}",
        "Who is the contact for {e}?|Whom do I ask about {e}?|Who answers questions about {e}?|Who is the contact person for {e}?",
    ),
    (
        "manager",
        "person",
        "{e} is managed by {v}|the manager of {e} is {v}",
        "Who manages {e}?|Who is the manager of {e}?|Who is in charge of {e}?|What is the name of the manager of {e}?",
    ),
    (
        "speaker",
        "person",
        "{e} is presented by {v}|the speaker of {e} is {v}",
        "Who presents {e}?|Who is the speaker of {e}?|Who speaks at {e}?",
    ),
    (
        "owner",
        "person",
        "{e} belongs to {v}|the owner of {e} is {v}",
        "Who owns {e}?|Who is the owner of {e}?|To whom does {e} belong?",
    ),
    (
        "responsible",
        "person",
        "{e} was assigned to {v}|{v} is responsible for {e}",
        "Who is responsible for {e}?|Who takes care of {e}?|To whom was {e} assigned?",
    ),
    (
        "approver",
        "person",
        "{e} must be approved by {v}",
        "Who must approve {e}?|Who approves {e}?|By whom must {e} be approved?",
    ),
    (
        "record holder",
        "person",
        "the record for {e} is held by {v}",
        "Who holds the record for {e}?|Who is the record holder for {e}?|Who has the record for {e}?",
    ),
    (
        "email",
        "email",
        "the email address of {e} is {v}|requests for {e} go to {v}",
        "What is the email address of {e}?|What is the email for {e}?|Where do I write for {e}?|How do I contact {e} by email?",
    ),
    (
        "phone",
        "phone",
        "the phone number of {e} is {v}|{e} can be reached at {v}",
        "What is the phone number of {e}?|How can I reach {e}?|What number do I call for {e}?|How do I phone {e}?",
    ),
    (
        "price",
        "money",
        "{e} costs {v}|the price of {e} is {v}",
        "How much does {e} cost?|What is the price of {e}?|What does {e} cost?|How much is {e}?|{n} price?",
    ),
    (
        "deposit",
        "money",
        "the deposit for {e} is {v}",
        "What is the deposit for {e}?|How much is the deposit for {e}?|How high is the deposit for {e}?",
    ),
    (
        "fee",
        "money",
        "the fee for {e} is {v}|the {n} fee is {v}",
        "What is the fee for {e}?|How much is the fee for {e}?|What is the {n} fee?|What must I pay for {e}?",
    ),
    (
        "fine",
        "money",
        "the fine for {e} is {v}",
        "What is the fine for {e}?|How much is the fine for {e}?|What fine applies to {e}?",
    ),
    (
        "budget",
        "money",
        "the budget for {e} is {v}|the budget for {e} was set at {v}",
        "What is the budget for {e}?|How much money is there for {e}?|How large is the budget for {e}?",
    ),
    (
        "limit",
        "money",
        "the limit for {e} is {v}",
        "What is the limit for {e}?|How much may be spent on {e}?|How high is the limit for {e}?",
    ),
    (
        "total",
        "money",
        "the total for {e} is {v}|the total amount for {e} is {v}",
        "What is the total for {e}?|How much is the total for {e}?|What is the total amount for {e}?",
    ),
    (
        "discount",
        "percent",
        "the discount on {e} is {v}",
        "What is the discount on {e}?|How much discount is there on {e}?|How large is the discount on {e}?",
    ),
    (
        "share",
        "percent",
        "the share of {e} is {v}|{e} accounts for {v}",
        "What is the share of {e}?|How large is the share of {e}?|What percentage is {e}?",
    ),
    (
        "number",
        "code",
        "the number of {e} is {v}|{e} has the number {v}",
        "What is the number of {e}?|Which number does {e} have?|What number is on {e}?",
    ),
    (
        "code",
        "code",
        "the code for {e} is {v}|the {n} code is {v}",
        "What is the code for {e}?|What is the {n} code?|Which code do I use for {e}?|Tell me the {n} code.",
    ),
    (
        "serial number",
        "code",
        "the serial number of {e} is {v}",
        "What is the serial number of {e}?|Which serial number does {e} have?|{n} serial number?",
    ),
    (
        "article number",
        "code",
        "the article number of {e} is {v}",
        "What is the article number of {e}?|Which article number does {e} have?|Under which article number is {e} sold?",
    ),
    (
        "quantity",
        "count",
        "the quantity of {e} is {v}",
        "What is the quantity of {e}?|How many of {e} are there?|What quantity of {e} is listed?",
    ),
    (
        "seats",
        "count",
        "{e} has {v} seats|{e} holds {v} people",
        "How many seats does {e} have?|How many people fit in {e}?|What is the capacity of {e}?",
    ),
    (
        "votes",
        "count",
        "{e} was accepted with {v} votes",
        "With how many votes was {e} accepted?|How many votes did {e} get?|How many voted for {e}?",
    ),
    (
        "minimum age",
        "age",
        "the minimum age for {e} is {v}",
        "What is the minimum age for {e}?|How old must I be for {e}?|From what age is {e} allowed?",
    ),
    (
        "duration",
        "duration",
        "{e} takes {v}|{e} lasts {v}",
        "How long does {e} take?|How long does {e} last?|What is the duration of {e}?|How long is {e}?",
    ),
    (
        "notice",
        "duration",
        "{e} must be reported within {v}|the notice period for {e} is {v}",
        "Within what time must {e} be reported?|How soon must {e} be reported?|What is the notice period for {e}?",
    ),
    (
        "interval",
        "duration",
        "{e} must be cleaned every {v}|{e} is checked every {v}",
        "How often must {e} be cleaned?|How often is {e} checked?|What is the interval for {e}?",
    ),
    (
        "delivery time",
        "duration",
        "{e} is delivered within {v}",
        "How fast is {e} delivered?|What is the delivery time of {e}?|How long does delivery of {e} take?",
    ),
    (
        "warranty",
        "duration",
        "the warranty for {e} is {v}",
        "How long is the warranty for {e}?|What is the warranty for {e}?|How long is {e} covered?",
    ),
    (
        "length",
        "length",
        "{e} is {v} long|the length of {e} is {v}",
        "How long is {e}?|What is the length of {e}?|What length does {e} have?",
    ),
    (
        "width",
        "length",
        "{e} is {v} wide|the width of {e} is {v}",
        "How wide is {e}?|What is the width of {e}?|What width does {e} have?",
    ),
    (
        "height",
        "length",
        "{e} is {v} high|the height of {e} is {v}",
        "How high is {e}?|What is the height of {e}?|How tall is {e}?",
    ),
    (
        "weight",
        "weight",
        "{e} weighs {v}|the weight of {e} is {v}",
        "How much does {e} weigh?|What is the weight of {e}?|How heavy is {e}?",
    ),
    (
        "power",
        "power",
        "{e} runs at {v}|the power of {e} is {v}",
        "What is the power of {e}?|At what power does {e} run?|How much power does {e} need?",
    ),
    (
        "maximum temperature",
        "temperature",
        "the maximum temperature of {e} is {v}",
        "What is the maximum temperature of {e}?|How hot may {e} get?|Up to which temperature can {e} be used?",
    ),
    (
        "speed limit",
        "speed",
        "the speed limit in {e} is {v}|the maximum speed in {e} is {v}",
        "What is the speed limit in {e}?|How fast may I go in {e}?|What is the maximum speed in {e}?",
    ),
    (
        "capacity",
        "volume",
        "{e} holds {v}|the capacity of {e} is {v}",
        "How much does {e} hold?|What is the capacity of {e}?|How much fits in {e}?",
    ),
    (
        "colour",
        "colour",
        "{e} is {v}|the colour of {e} is {v}",
        "What colour is {e}?|What is the colour of {e}?|Which colour does {e} have?",
    ),
    (
        "material",
        "material",
        "{e} is made of {v}",
        "What is {e} made of?|Which material is {e} made of?|What is the material of {e}?",
    ),
    (
        "maker",
        "company",
        "{e} is made by {v}|the maker of {e} is {v}",
        "Who makes {e}?|Who is the maker of {e}?|Which company makes {e}?",
    ),
    (
        "supplier",
        "company",
        "{e} is supplied by {v}|the supplier of {e} is {v}",
        "Who supplies {e}?|Who is the supplier of {e}?|Which company supplies {e}?|Where does {e} come from?",
    ),
    (
        "built",
        "year",
        "{e} was built in {v}|{e} was opened in {v}",
        "When was {e} built?|In which year was {e} built?|When was {e} opened?|How old is {e}?",
    ),
    (
        "birth year",
        "year",
        "{e} was born in {v}",
        "When was {e} born?|In which year was {e} born?|What is the birth year of {e}?",
    ),
    (
        "birthplace",
        "place",
        "{e} comes from {v}|{e} grew up in {v}",
        "Where does {e} come from?|Where did {e} grow up?|What is the home town of {e}?",
    ),
    ("home", "place", "{e} lives in {v}", "Where does {e} live?|In which town does {e} live?|What is the home of {e}?"),
    (
        "job",
        "job",
        "{e} works as {v}|{e} is {v}",
        "What does {e} do?|What is the job of {e}?|What is the profession of {e}?|As what does {e} work?",
    ),
    (
        "employer",
        "company",
        "{e} works for {v}|the employer of {e} is {v}",
        "Who does {e} work for?|Where does {e} work?|What is the employer of {e}?",
    ),
    (
        "studies",
        "subject",
        "{e} studied {v}",
        "What did {e} study?|Which subject did {e} study?|What are the studies of {e}?",
    ),
    (
        "joined",
        "year",
        "{e} joined in {v}",
        "When did {e} join?|In which year did {e} join?|Since when is {e} with us?",
    ),
)
ATTRIBUTES = {name: _attribute(name, value, clauses, questions) for name, value, clauses, questions in _TABLE}

KINDS: dict[str, Kind] = {
    "manual": Kind(
        _words("Owner's Manual, User Guide, Operating Manual, Care and Use, Service Handbook"),
        _words(
            "pump, filter, motor, belt, boiler, heater, compressor, valve, lamp, fan, oven, blade, tank, battery, sensor, drill, saw, printer, mixer, door lock, grill, charger"
        ),
        _words(
            "interval, maximum temperature, power, serial number, warranty, capacity, weight, code, duration, maker, colour, contact, phone, length"
        ),
        _words("Safety, Before first use, Cleaning, Care, Technical notes, Settings, Parts, Service"),
    ),
    "price list": Kind(
        _words("Price List, Our Prices, Rates and Fees, Tariff, Menu and Prices"),
        _words(
            "ticket, helmet, breakfast, locker, bicycle, boat, tent, soup, cake, lesson, day pass, membership, wash, haircut, tour, sauna, lunch, chair, lamp, kettle, training session, card"
        ),
        _words(
            "price, deposit, fee, discount, article number, delivery time, duration, supplier, minimum age, weight, colour"
        ),
        _words("Prices, Hire, Extras, Groups, Discounts, Food and drink, Members"),
    ),
    "schedule": Kind(
        _words("Timetable, Weekly Schedule, Course Plan, Summer Schedule, Training Plan"),
        _words(
            "class, lesson, lecture, seminar, training, choir, meeting, workshop, swim, exam, rehearsal, yoga class, practice, course, ferry, shift, race"
        ),
        _words("start, end, place, leader, open days, duration, seats, fee, contact, minimum age, date"),
        _words("Morning, Afternoon, Evening, Week one, Week two, Weekend, Notes"),
    ),
    "minutes": Kind(
        _words("Minutes of the Meeting, Board Minutes, Meeting Notes, Committee Report"),
        _words(
            "roof repair, website, garden project, new fence, summer party, parking plan, audit, newsletter, bus contract, heating, survey, loan, kitchen, playground, move, app, motion, grant"
        ),
        _words("budget, responsible, deadline, votes, date, supplier, contact, total, share, approver"),
        _words("Decisions, Finances, Open points, Next steps, Reports, Any other business"),
    ),
    "policy": Kind(
        _words("Staff Policy, House Rules, Travel Policy, Terms of Use, Data Policy, Rules and Regulations"),
        _words(
            "damage, sick leave, travel, overtime, remote work, late return, smoking, hotel stay, training leave, visitor badge, purchase, accident, key loss, parking, complaint, pet, noise, guest"
        ),
        _words("notice, limit, approver, email, fine, deadline, contact, fee, minimum age, duration, open days, phone"),
        _words("Scope, Rules, Limits, Reporting, Exceptions, Contacts, Penalties"),
    ),
    "profile": Kind(
        _words("Our Team, Short Biography, Staff Profiles, Speakers, Members, About the Author"),
        ("#person",),
        _words("birth year, birthplace, home, job, employer, studies, joined, phone, email"),
        _words("Early life, Career, Today, Team, Personal, Background"),
    ),
    "specification": Kind(
        _words("Data Sheet, Technical Specification, Product Sheet, Specifications"),
        _words(
            "bridge, engine, frame, pump, tower, cable, panel, kart, trailer, tent, screen, camera, container, ladder, wheel, boat, module, antenna, cabin, track, tank"
        ),
        _words(
            "length, width, height, weight, power, capacity, colour, material, maker, maximum temperature, serial number, warranty, built, price"
        ),
        _words("Dimensions, Electrical data, Materials, Limits, General, Options"),
    ),
    "invoice": Kind(
        _words("Invoice, Order Confirmation, Statement, Delivery Note, Quotation"),
        _words(
            "order, invoice, delivery, shipment, repair, rental, paper, paint, timber, cable, transport, cleaning, insurance, bolt, window, consulting, carpet, printing"
        ),
        _words(
            "total, number, deadline, quantity, price, discount, article number, supplier, contact, delivery time, share, email"
        ),
        _words("Items, Payment, Delivery, Terms, Summary"),
    ),
    "programme": Kind(
        _words("Festival Programme, Open Day, Conference Programme, Concert Season, Summer Fair"),
        _words(
            "concert, talk, opening, dance, film, workshop, exhibition, play, dinner, tour, quiz, market, debate, reading, parade, race, award, panel"
        ),
        _words("start, end, place, speaker, fee, seats, date, duration, price, minimum age, contact, leader"),
        _words("Friday, Saturday, Sunday, Main stage, Tickets, Getting there, Highlights"),
    ),
    "guide": Kind(
        _words("Visitor Guide, Club Handbook, Welcome Guide, Site Guide, Museum Guide, Member Information"),
        _words(
            "workshop, cafe, shop, track, pool, library, office, gate, garden, hall, museum, car park, paddock, tower, gym, reception, studio, harbour, bar, pit lane, zoo, camp, sauna, court"
        ),
        _words(
            "opening time, closing time, opening hours, open days, phone, email, manager, speed limit, location, built, record holder, seats, code, fee, minimum age, length, price, owner"
        ),
        _words("Opening hours, Getting here, Rules, Contacts, Facilities, Prices, History, Safety"),
    ),
}

# Things that are their own attribute ("the door code is 4411"): what a label is called, by the kind of its value.
_LABELS = (
    (
        "code",
        "door code, wifi password, gate code, customer number, account number, reference, room number, booking code, file number, licence",
        "What is {e}?|Tell me {e}.|Which is {e}?|{n}?",
    ),
    (
        "person",
        "chair, treasurer, president, head coach, caretaker, secretary, winner, director, doctor, driver, champion, marshal, trainer, host, editor, founder, first aider",
        "Who is {e}?|What is the name of {e}?|Tell me the name of {e}.|{n}?",
    ),
    (
        "money",
        "entrance fee, annual fee, monthly rent, hourly rate, grand total, late fee, basic price, prize, salary, daily allowance",
        "What is {e}?|How much is {e}?|How high is {e}?|{n}?",
    ),
    (
        "clock",
        "lunch break, first race, last entry, check-in, closing time, kick-off, arrival, departure, roll call, curfew",
        "When is {e}?|What time is {e}?|At what time is {e}?|{n}?",
    ),
    (
        "date",
        "final, next meeting, start date, opening day, registration deadline, release, inspection, holiday, election, due date",
        "When is {e}?|What is the date of {e}?|On which day is {e}?|{n}?",
    ),
    (
        "phone",
        "hotline, emergency number, phone number, fax, front desk, help line",
        "What is {e}?|Which number is {e}?|Tell me {e}.|{n}?",
    ),
    (
        "email",
        "email address, contact address, help desk, press office",
        "What is {e}?|How do I write to {e}?|Tell me {e}.|{n}?",
    ),
    (
        "length",
        "track length, total length, safe distance, wheel base, maximum height, lane width, range",
        "What is {e}?|How much is {e}?|How large is {e}?|{n}?",
    ),
    ("speed", "top speed, speed limit, wind speed, lap average", "What is {e}?|How high is {e}?|How fast is {e}?|{n}?"),
    ("age", "minimum age, age limit, average age", "What is {e}?|How high is {e}?|{n}?"),
    (
        "duration",
        "lap record, waiting time, fastest lap, trial period, travel time, notice period, session length, return period",
        "What is {e}?|How long is {e}?|How much is {e}?|{n}?",
    ),
    (
        "count",
        "number of members, maximum group size, number of rooms, head count, number of laps, score",
        "What is {e}?|How high is {e}?|How large is {e}?|{n}?",
    ),
    (
        "address",
        "meeting point, address, head office, car park, entrance, next station",
        "What is {e}?|Where is {e}?|{n}?",
    ),
    (
        "temperature",
        "room temperature, water temperature, boiling point, oil temperature",
        "What is {e}?|How high is {e}?|{n}?",
    ),
    ("percent", "tax rate, interest rate, discount, turnout, success rate", "What is {e}?|How high is {e}?|{n}?"),
)
LABELS = tuple((_words(nouns), _attribute("", value, "{e} is {v}", questions)) for value, nouns, questions in _LABELS)

MODIFIERS = _words(
    "old, new, main, north, south, east, west, blue, red, green, small, large, upper, lower, second, third, winter, summer, "
    "spring, autumn, morning, evening, junior, senior, adult, family, guest, staff, river, harbour, city, garden, front, back, "
    "inner, outer, left, right, electric, steam, wooden, steel, glass, double, single, express, night, day, private, public, "
    "central, royal, silver, golden, mountain, island, lake, forest, castle, station, airport, school, annual, monthly, weekly, "
    "special, standard, premium, basic, spare, heavy, light, short, long, mobile, digital, indoor, outdoor, student, group"
)
SUBTITLES = _words("Edition 3, Version 2, Issue 14, Draft, Final, Summary, For members, Information sheet, Internal")
FILLERS = (
    "Please read this page with care.",
    "We are glad that you are here.",
    "All details may change without notice.",
    "Nothing else was agreed on this point.",
    "Most people find this part simple.",
    "Thank you for your patience and your help.",
    "The weather was fine and the mood was good.",
    "A copy of this paper hangs at the entrance.",
    "More will follow in the next issue.",
    "Some of the older parts have been renewed.",
    "Please keep this sheet in a safe place.",
    "Children stay with their parents at all times.",
    "The list below gives an overview.",
    "Ask a member of staff if anything is unclear.",
    "This section was revised last year.",
    "Everybody is welcome to take part.",
    "We wish you a pleasant stay.",
    "It is a good idea to plan ahead.",
    "Do not leave bags or coats unattended.",
    "Several guests have praised the friendly service.",
    "The rest remains as it was.",
    "Water and tea are free for all.",
    "No changes were made to the other points.",
    "Photographs are allowed for private use.",
    "The figures below are rounded.",
    "Safety comes first, for beginners and experts alike.",
    "Wear sturdy shoes and warm clothes.",
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
)
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
)
ASKS = (
    "{}",
    "{}",
    "{}",
    "{}",
    "{}",
    "Please tell me: {}",
    "According to the document, {}",
    "I would like to know: {}",
    "{} Please answer briefly.",
    "Hi, {}",
)
SYSTEMS = (
    "Answer from the document and cite the page.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "Use only the document. Say so if the answer is not there.",
    "Be short and polite.",
)
UNKNOWN = "The document does not say that."
CHATS: tuple[tuple[str, str], ...] = (
    (
        "Hello|Hi|Hello!|Hi there|Good morning|Hey",
        "Hello! I am Pitlane's small demo model. Open a document and ask me about it.",
    ),
    (
        "Who are you?|What are you?|Who am I talking to?|What is your name?|Introduce yourself.",
        "I am Pitlane's small demo model. I answer short questions about a document.",
    ),
    (
        "What can you do?|How can you help me?|What are you good at?|Help|How does this work?",
        "I can look up facts in a short document and name the page. I know little else.",
    ),
    ("Thanks|Thank you|Thank you very much|Thanks a lot!|Great, thanks", "You are welcome."),
    ("How are you?|How is it going?|Are you well?", "I am well, thank you. What would you like to know?"),
    ("Bye|Goodbye|See you|Good night", "Goodbye!"),
    (
        "Can you write a poem?|What is the capital of France?|Who won the game?|What is the weather?|Tell me a story.|What is two plus two?",
        "I am only a small demo model. I can answer questions about a document.",
    ),
    (
        "Which document is this?|Do you have a document?|What does the document say?",
        "I see no document. Please open one first.",
    ),
)
