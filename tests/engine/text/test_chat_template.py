"""Chat templates that fail or never end become a named error with the template's own words."""

from __future__ import annotations

import datetime
import sys

import pytest

from pitlane.engine.errors import ModelError
from pitlane.engine.text.byte_tokenizer import byte_tokenizer
from pitlane.engine.text.chat_template import apply_template


def apply(template: str) -> str:
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = template
    return apply_template(tokenizer, [{"role": "user", "content": "Why?"}], None, datetime.date(2025, 3, 9))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('users\nmust alternate') }}", "users must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError: maximum recursion depth"),
        ("{{ 5 | dictsort }}", "AttributeError: 'int' object has no attribute 'items'"),
        ("{{ 'x'.encode('nosuch') }}", "LookupError: unknown encoding: nosuch"),
        ("{{ (1e308 * 10) | int }}", "NameError"),
        ("{{ nosuch.name }}", "'nosuch' is undefined"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 | nosuch }}", "No filter named 'nosuch'"),
        ("{% for %}", "Expected an expression"),
        ("{{ '\\ud800'.encode('utf-8') }}", "UnicodeEncodeError"),
        ("{{ 'x' * 10**15 }}", "MemoryError"),
        ("{{ [1] | sum(start='a') }}", "TypeError"),
    ],
)
def test_a_template_that_fails_says_so_in_its_own_words(template: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        apply(template)
    message = str(caught.value)
    assert message.startswith("the model's chat template refuses this conversation: ") and message.endswith(
        "; try --raw"
    )
    assert says in message and "\n" not in message


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{% for i in range(99999) %}{% for j in range(999) %}x{% endfor %}{% endfor %}{% endmacro %}{{ m() }}",
        "{% for i in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}",
    ],
)
def test_a_template_without_an_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitlane.engine.text.chat_template.MAX_LINES", 50_000)
    monkeypatch.setattr("pitlane.engine.text.chat_template.MAX_CHARS", 10**8)
    traced = sys.gettrace()
    with pytest.raises(ModelError, match=r"it ran \d+ lines and wrote \d+ characters without coming to an end"):
        apply(template)
    assert sys.gettrace() is traced


def test_a_long_conversation_is_within_bounds() -> None:
    template = "{% for i in range(1000) %}{% for j in range(50) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    assert apply(template) == "Why?" * 50_000
