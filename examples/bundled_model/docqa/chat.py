"""Small talk and refusals: chats without a question about a document.

Questions of general knowledge get open values, and all of them the same refusal, so that a small model does not learn to invent
answers. Knows nothing of documents.
"""

from __future__ import annotations

import re
from random import Random

from bundled_model.docqa.values import VALUES

REFUSAL = "I am only a small demo model. I can answer questions about a document."
CHATS: tuple[tuple[str, str], ...] = (
    (
        "Hello|Hi|Hello!|Hi there|Good morning|Hey|Good evening|Hello there!|hi|Good day|Greetings",
        "Hello! I am Pitlane's small demo model. Open a document and ask me about it.",
    ),
    (
        "Who are you?|What are you?|Who am I talking to?|What is your name?|Introduce yourself.|Are you a robot?|Are you human?"
        "|Which model is this?|what are you|Who made you?",
        "I am Pitlane's small demo model. I answer short questions about a document.",
    ),
    (
        "What can you do?|How can you help me?|What are you good at?|Help|How does this work?|What should I ask you?|help me"
        "|What do you know?|What are you for?|How do I use you?|Can you help me?",
        "I can look up facts in a short document and name the page. I know little else.",
    ),
    (
        "Thanks|Thank you|Thank you very much|Thanks a lot!|Great, thanks|Perfect, thank you|thx|That helps, thanks|Many thanks",
        "You are welcome.",
    ),
    (
        "How are you?|How is it going?|Are you well?|How are you today?|What's up?",
        "I am well, thank you. What would you like to know?",
    ),
    ("Bye|Goodbye|See you|Good night|See you later|bye bye|That is all", "Goodbye!"),
    ("Ok|Okay|I see|Good|Great|Fine|Nice|Interesting|Well done", "Is there anything else you would like to know?"),
    (
        "Which document is this?|Do you have a document?|What does the document say?|What is on page 2?|Summarise the document."
        "|What is this document about?|Read the file.|Can you see my file?|Who wrote the document?",
        "I see no document. Please open one first.",
    ),
)
THANKS = CHATS[3]
GENERAL_QUESTIONS = (
    "Can you write a poem?",
    "Write a poem about {animal}s.",
    "What is the capital of {country}?",
    "How many people live in {country}?",
    "Who won the game?",
    "What is the weather?",
    "What is the weather in {place} today?",
    "Tell me a story.",
    "Tell me a joke.",
    "What is two plus two?",
    "What is {count} plus {count}?",
    "What is {count} times {count}?",
    "Who was the first president of {country}?",
    "How do I cook {food}?",
    "What is the meaning of life?",
    "Translate this sentence into {language}.",
    "How do you say hello in {language}?",
    "Write a program that sorts a list.",
    "Who wrote {title}?",
    "When did the war end?",
    "What is the best film of {year}?",
    "Why is the sky blue?",
    "How far away is the moon?",
    "Which is the highest mountain of {country}?",
    "Is there life on Mars?",
    "Explain {subject} to me.",
    "What should I wear today?",
    "Recommend a restaurant in {place}.",
)


def filled(rng: Random, form: str) -> str:
    """Fill the fields of a form; a field is the name of a kind of value."""
    return re.sub(r"\{(\w+)\}", lambda field: VALUES[field[1]](rng), form)


def small_talk(rng: Random) -> list[tuple[str, str]]:
    """Draw one to three exchanges without a document; a third are questions of general knowledge."""
    return [
        (filled(rng, rng.choice(GENERAL_QUESTIONS)), REFUSAL) if rng.random() < 0.33 else _exchange(rng, *chat)
        for chat in rng.sample(CHATS, rng.randint(1, 3))
    ]


def thanks(rng: Random) -> tuple[str, str]:
    """Draw an exchange of thanks, the end of a conversation."""
    return _exchange(rng, *THANKS)


def _exchange(rng: Random, questions: str, answer: str) -> tuple[str, str]:
    question = rng.choice(questions.split("|"))
    return (question.lower().rstrip("?.!") if rng.random() < 0.1 else question), answer
