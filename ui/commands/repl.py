"""The loop of `pitlane chat`: reads lines and streams answers. ui/commands/repl_commands.py has the /commands.

Works on a terminal (readline, colours) and in a pipe. Answers go to standard output, everything else to standard error. A question
that gets no answer is removed again, so that every question of the conversation has an answer.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from click.exceptions import Exit

from pitlane import BadOption, PitlaneError
from pitlane.storage.types import whole_text
from pitlane.ui.commands.transcript import Entry, Transcript
from pitlane.ui.document_plugins import document_plugins, in_effect, load, note_text
from pitlane.ui.effects import droppers_of
from pitlane.ui.render import note, printable, progress, say, stats_line
from pitlane.ui.sampling import Sampling, seed_note
from pitlane.ui.session import Chat, EngineOptions, read_answer

if TYPE_CHECKING:
    from pitlane import Engine, Settings
    from pitlane.storage.db import Store

INTERRUPTED = 130
QUOTES = '"""'


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
            raise BadOption(
                f"unknown command /{name}; known: {', '.join('/' + command for command in self.commands())}"
            )
        method(argument.strip())

    @classmethod
    def commands(cls) -> list[str]:
        """Names of the /commands."""
        return [name.removeprefix("do_") for name in vars(cls) if name.startswith("do_")]

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


def _input(prompt: str) -> str:
    if sys.stdin.isatty():
        return whole_text(input(prompt))
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return whole_text(line.rstrip("\n"))
