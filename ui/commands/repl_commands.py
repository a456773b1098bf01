"""The /commands of `pitlane chat`: `do_<name>` carries out `/name`, and the first line of its docstring is its help."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click
from click.exceptions import Exit

from pitlane import BadOption, SamplingParams
from pitlane.ui.commands.repl import QUOTES, Repl
from pitlane.ui.plugin_text import parse_settings
from pitlane.ui.render import note, say
from pitlane.ui.session import add_document

SETTABLE = {
    field.name: str(field.type)
    for field in fields(SamplingParams)
    if field.name not in ("sample_index", "n", "logprobs")
}


class Commands(Repl):
    """A conversation at a terminal, with its /commands."""

    def do_help(self, _: str) -> None:
        """/help: this list"""
        for name in self.commands():
            usage, _, meaning = (getattr(Commands, f"do_{name}").__doc__ or "").partition(": ")
            click.echo(f"{usage:<24} {meaning}", err=True)
        click.echo(f"{QUOTES} begins and ends a message of several lines.", err=True)

    def do_doc(self, file: str) -> None:
        """/doc FILE: add a document, in front of the conversation"""
        if not file:
            raise BadOption("/doc needs a file, or the id of a stored document")
        document, stored = add_document(self.store, file.strip("\"'"), self.options.plugins_dir)
        self.chat.add(document, stored)
        note(f"{stored.title}: {stored.num_pages} pages, {stored.num_chars} characters")
        self._tell_document_plugins()

    def do_docs(self, argument: str) -> None:
        """/docs [clear]: list the conversation's documents, or take them all out"""
        if argument == "clear":
            self.chat.documents.clear()
            self.chat.date = None
        for document in self.chat.documents:
            say(f"{document.content_hash[:12]}  {document.title}", err=True)
        if not self.chat.documents:
            note("no documents")

    def do_plugins(self, text: str) -> None:
        """/plugins +a,-b: toggle plugins from the next turn on; a,b: exactly these; none: the bare core"""
        if text:
            text = "" if text == "none" else text
            settings, replaced = parse_settings(text, (), self.plan.settings, self.engine.registry)
            self.plan = self.engine.plan(settings)
            for replacement in replaced:
                note(str(replacement))
        note(self._plugins())

    def do_set(self, text: str) -> None:
        """/set temperature 0.7: set a sampling value, `system`, `think`, or `plugin.option`"""
        name, _, value = text.replace("=", " ", 1).partition(" ")
        value = value.strip()
        if "." in name:
            settings, _ = parse_settings(None, [f"{name}={value}"], self.plan.settings, self.engine.registry)
            self.plan = self.engine.plan(settings)
        elif name == "system":
            self.chat.system = value or None
        elif name == "think":
            self.chat.thinking = {"on": True, "off": False}.get(value)
        elif name in SETTABLE:
            self.sampling = self.sampling.changed(**{name: _parse(name, value)})
        else:
            raise BadOption(
                f"there is no value {name!r}; /set knows {', '.join(SETTABLE)}, system, think, plugin.option"
            )

    def do_stats(self, _: str) -> None:
        """/stats: all numbers of the last answer"""
        for name, value in (self.transcript.last_stats() or {}).items():
            say(f"{name:<20} {value}", err=True)

    def do_retry(self, _: str) -> None:
        """/retry: answer the last message again"""
        index = self.transcript.last_question()
        if index is None:
            raise BadOption("there is nothing to retry; write something first")
        self.ask(self.transcript.entries[index].text, index)

    def do_undo(self, _: str) -> None:
        """/undo: take back the last message and its answer"""
        index = self.transcript.last_question()
        if index is None:
            raise BadOption("there is nothing to undo")
        self.transcript.cut(index)
        note(f"{len(self.transcript.entries)} messages left")

    def do_new(self, _: str) -> None:
        """/new: begin another conversation over the same documents"""
        self.transcript.clear()

    def do_save(self, title: str) -> None:
        """/save [TITLE]: save the conversation and say its id"""
        note(f"saved as {self._save(title)}")

    def do_load(self, name: str) -> None:
        """/load [ID]: go on with a saved conversation; without an id, list them"""
        if name:
            self.load(name)
            return
        for row in self.store.conversations.list(20):
            say(f"{row.id}  {row.num_messages:>3} messages  {row.title}", err=True)

    def load(self, conversation_id: str) -> None:
        """Replace the conversation by a saved one, documents included."""
        conversation = self.transcript.load(conversation_id)
        if self.chat.documents:
            self.do_docs("clear")
        for document_id in conversation.document_ids:
            self.chat.add(*add_document(self.store, document_id))
        title, num_documents = conversation.title or conversation.id, len(self.chat.documents)
        note(f"{title}: {conversation.num_messages} messages, {num_documents} documents")
        self._tell_document_plugins()

    def do_search(self, text: str) -> None:
        """/search TEXT: find saved conversations by their words"""
        hits = self.store.conversations.search(text, 20)
        for hit in hits:
            say(f"{hit.conversation_id}  {hit.title}: {' '.join(hit.snippet.split())}", err=True)
        if not hits:
            note("nothing found")

    def do_exit(self, _: str) -> None:
        """/exit: leave"""
        raise Exit(0)


def _parse(name: str, value: str) -> Any:
    """Parse a sampling value by the type of its field."""
    kind = SETTABLE[name]
    try:
        if kind.startswith("bool"):
            return {"on": True, "true": True, "off": False, "false": False}[value.casefold()]
        if kind.startswith("tuple[str"):
            return (value,) if value else ()
        if kind.startswith("tuple"):
            return tuple(int(part) for part in value.replace(",", " ").split())
        if kind.endswith("None") and value in ("", "none"):
            return None
        return int(value) if kind.startswith("int") else float(value)
    except (ValueError, KeyError):
        raise BadOption(f"{name} cannot be {value!r}; it is of type {kind}") from None
