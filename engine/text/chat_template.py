"""Run a model's chat template: a program by the model's author, in the sandbox of transformers, within bounds.

Any exception of the template becomes a ModelError with the template's own words. A template that runs too many lines or
writes too much text is stopped. Work inside one expression is not bounded: `'x' * 10**9` takes its gigabyte. Templates
see a fixed date, so that the same conversation gives the same prompt. Knows no documents and no special tokens.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pitlane.engine.errors import ModelError

MAX_LINES = 2_000_000  # executed lines of the compiled template; a conversation of 1000 turns runs thousands
MAX_CHARS = 200_000_000
DATE_CODES = ("%a", "%A", "%b", "%B", "%d", "%m", "%y", "%Y", "%j", "%H", "%I", "%M", "%S", "%p")
# transformers 5.23 passes data to templates, no functions. So `strftime_now`, which templates call, is a macro over strings.
FROZEN_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set now = namespace(text=format) -%}"
    "{%- for code, text in frozen_date.items() -%}"
    "{%- set now.text = now.text | replace('%-' ~ code[1], text.lstrip('0')) | replace(code, text) -%}"
    "{%- endfor -%}{{- now.text -}}{%- endmacro -%}{{ '' }}"
)


def apply_template(tokenizer: Any, turns: list[dict[str, str]], thinking: bool | None, date: datetime.date) -> str:
    """Render a conversation as text, up to the place where the answer begins. Raises ModelError.

    tokenizer: a tokenizer of transformers. thinking: the template's `enable_thinking`; None leaves it undefined.
    """
    from jinja2 import TemplateError

    variables: dict[str, Any] = {"date_string": date.strftime("%d %b %Y")}
    if thinking is not None:
        variables["enable_thinking"] = thinking
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = FROZEN_CLOCK + template
            variables["frozen_date"] = {code: date.strftime(code) for code in DATE_CODES}
        with _bounded():
            text: str = tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
            )
    except Exception as error:  # a template may raise anything
        words = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        words = " ".join(words.split()).rstrip(": ")[:500]
        raise ModelError(f"the model's chat template refuses this conversation: {words}; try --raw") from None
    return text


@contextmanager
def _bounded() -> Iterator[None]:
    """Count the lines that the template runs and the characters that it yields in this thread; raise at the limits."""
    from jinja2 import TemplateError

    lines = chars = 0

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal lines, chars
        if frame.f_code.co_filename != "<template>":
            return None
        lines += event == "line"
        chars += len(value) if event == "return" and isinstance(value, str) else 0
        if lines > MAX_LINES or chars > MAX_CHARS:
            raise TemplateError(f"it ran {lines} lines and wrote {chars} characters without coming to an end")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
