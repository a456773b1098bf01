"""The loop of `pitlane chat`: reads lines, streams answers, carries out /commands.

Works on a terminal (readline, colours) and in a pipe. Answers go to standard output, everything else to standard error. A question
that gets no answer is removed again, so that every question of the conversation has an answer.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

from pitlane import BadOption, PitlaneError, SamplingParams
from pitlane.storage.types import whole_text
from pitlane.ui.commands.transcript import Entry, Transcript
from pitlane.ui.document_plugins import document_plugins, in_effect, load, note_text
from pitlane.ui.effects import droppers_of
from pitlane.ui.plugin_text import parse_settings
from pitlane.ui.render import note, printable, progress, say, stats_line
from pitlane.ui.sampling import Sampling, seed_note
from pitlane.ui.session import Chat, EngineOptions, add_document, read_answer

if TYPE_CHECKING:
    from pitlane import Engine, Settings
    from pitlane.storage.db import Store

INTERRUPTED = 130
QUOTES = '"""'
SETTABLE = {
    field.name: str(field.type)
    for field in fields(SamplingParams)
    if field.name not in ("sample_index", "n", "logprobs")
}


class Repl:
    """One conversation at a terminal."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        chat: Chat,
        sampling: Sampling,
        options: EngineOptions,
        *,
        autosave: bool = True,
    ) -> None:
        self.engine, self.store, self.chat, self.sampling, self.options = engine, store, chat, sampling, options
        self.autosave = autosave
        self.plan = engine.document_plan  # with a document; see `_in_effect`
        self._was_told = False  # that document plugins answer
        self.transcript = Transcript(store, options.model)
        self._interrupted = False

    # ---- lines

    def loop(self) -> int:
        """Read lines and act on them until the end; return the exit code."""
        if sys.stdin.isatty():
            import readline  # noqa: F401 (gives input() a history and editing)
        description = self.engine.loader.describe()
        note(f"{description['model']} · {description['dtype']} on {description['device']} · {self._plugins()} · /help")
        note(self.engine.loader.describe_memory())
        self._tell_document_plugins()
        while True:
            try:
                line = self._read()
                self._interrupted = False
                if line.strip():
                    self.do(line)
            except EOFError:
                return 0
            except Exit as leaving:
                return leaving.exit_code
            except PitlaneError as error:
                say(f"pitlane: {error}", err=True)
            except KeyboardInterrupt:
                if self._interrupted:
                    return INTERRUPTED
                self._interrupted = True
                click.echo(err=True)
                note("Ctrl-C again or /exit leaves")

    def _read(self) -> str:
        """One line, or the lines between triple quotes."""
        line = _input("> ")
        if not line.lstrip().startswith(QUOTES):
            return line
        text = line.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + _input("… ")
        return " " + text.rstrip().removesuffix(QUOTES).strip("\n")  # the space makes it a message, not a /command

    def do(self, line: str) -> None:
        """Carry out a /command, or answer a message. A space before / makes a message."""
        if not line.startswith("/"):
            self.ask(line.strip())
            return
        name, _, argument = line[1:].partition(" ")
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise BadOption(f"unknown command /{name}; known: {', '.join('/' + command for command in commands())}")
        method(argument.strip())

    # ---- answers

    def ask(self, text: str, index: int | None = None) -> None:
        """Answer a message, print its stats, save. index: the message replaces the entries from here on, once it has an answer."""
        before = self.transcript.entries
        self.transcript.entries = [*before[:index], Entry("user", text)]
        try:
            self._answer()
        except (PitlaneError, KeyboardInterrupt) as error:
            self._interrupted = isinstance(error, KeyboardInterrupt)  # a second Ctrl-C: the first aborts the answer
            self.transcript.entries = before
            raise
        if index is not None:
            self.transcript.forget(before[index:])
        if self.autosave:
            self._save("")

    def _answer(self) -> None:
        self.chat.messages = self.transcript.messages()
        prompt = self.chat.prompt()
        params = self.sampling.params(self.engine.loader.source.sampling, is_chat=not self.chat.documents)
        plan, left_out = load(self.engine, self._in_effect())
        with (
            self.engine.submit(prompt, params, plan=plan) as stream,
            progress("Reading the prompt", self.chat.place(prompt)) as advance,
        ):
            try:
                result = read_answer(stream, lambda piece: click.echo(printable(piece), nl=False), advance)
            finally:
                click.echo()
        result.stats["failed"] |= left_out
        before = self.transcript.last_stats()
        if before is not None:
            result.stats["read_again"] = [name for name in droppers_of(before) if name not in result.stats["plugins"]]
        self._interrupted = result.finish_reason == "aborted"
        self.transcript.add(Entry("assistant", result.text, result.token_ids, result.stats))
        drafter = next((plugin.name for plugin in plan.plugins if plugin.role == "drafter"), None)
        stopped = "stopped · " if self._interrupted else ""
        note(stopped + stats_line(result.stats, drafter) + seed_note(params, result.stats["seed"]))

    def _save(self, title: str) -> str:
        return self.transcript.save([document.content_hash for document in self.chat.documents], title)

    def _plugins(self) -> str:
        active = self._in_effect()
        names = [name if name in active else f"{name} (with a document)" for name in self.plan.names]
        return "plugins: " + (", ".join(names) or "none")

    def _in_effect(self) -> Settings:
        """The settings of the next answer."""
        return in_effect(self.engine, self.plan.settings, bool(self.chat.documents))

    def _tell_document_plugins(self) -> None:
        """With the first document, say once which plugins are on because of it."""
        names = document_plugins(self.engine, self._in_effect())
        if names and not self._was_told and self.chat.documents:
            note(note_text(self.engine, names, "/plugins"))
            self._was_told = True

    # ---- commands: do_<name>; the first line of each docstring is its help

    def do_help(self, _: str) -> None:
        """/help: this list"""
        for name in commands():
            usage, _, meaning = (getattr(Repl, f"do_{name}").__doc__ or "").partition(": ")
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


def commands() -> list[str]:
    """Names of the /commands."""
    return [name.removeprefix("do_") for name in vars(Repl) if name.startswith("do_")]


def _input(prompt: str) -> str:
    if sys.stdin.isatty():
        return whole_text(input(prompt))
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return whole_text(line.rstrip("\n"))


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
