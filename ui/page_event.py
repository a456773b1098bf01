"""Handlers of the page: what they take and return, and the wrapper of every handler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import wraps
from html import escape
from typing import Any, TypedDict, TypeVar, cast

from pitlane.storage.errors import PitlaneError
from pitlane.ui.offline_gradio import gr

Changes = dict[Any, Any]
Handler = TypeVar("Handler", bound=Callable[..., Any])


class Tab(TypedDict):
    """The state of one browser tab. documents: ids of attached documents, also before the conversation is stored."""

    conversation: str | None
    documents: list[str]


def page_event(handler: Handler) -> Handler:
    """Let a handler change nothing, and show its PitlaneErrors as warnings.

    Gradio empties all outputs of a generator that yields nothing, and refuses an empty dictionary: both become `gr.skip()`.
    """

    @wraps(handler)
    def steps(*values: Any) -> Iterator[Changes]:
        num_changes = 0
        try:
            with closing(handler(*values)) as all_changes:
                for changes in all_changes:
                    num_changes += 1
                    yield changes or gr.skip()
        except PitlaneError as error:
            warn(error)
        if not num_changes:
            yield gr.skip()

    @wraps(handler)
    def step(*values: Any) -> Any:
        try:
            return handler(*values) or gr.skip()
        except PitlaneError as error:
            warn(error)
            return gr.skip()

    return cast(Handler, steps if inspect.isgeneratorfunction(handler) else step)


def warn(error: PitlaneError) -> None:
    """Show an error in the corner of the page. Gradio takes the text for HTML, so it is escaped."""
    gr.Warning(escape(str(error), quote=False))


def session_of(request: gr.Request) -> str:
    """The browser tab that sent a request."""
    return str(request.session_hash)


def new_tab() -> Tab:
    return {"conversation": None, "documents": []}
