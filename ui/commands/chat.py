"""`pitlane chat`: a conversation in the terminal. Lines that begin with / are commands (ui/commands/repl_commands.py)."""

from __future__ import annotations

import click

from pitlane.ui.commands.options import answer_options, prompt_options, sampling_options
from pitlane.ui.sampling import Sampling
from pitlane.ui.session import Chat, EngineOptions, add_documents


@click.command()
@answer_options
@prompt_options
@sampling_options
@click.option("--load", metavar="ID", help="Go on with a saved conversation.")
@click.option("--save/--no-save", default=True, show_default=True, help="Keep the conversation in the database.")
@click.pass_context
def chat(
    ctx: click.Context,
    options: EngineOptions,
    sampling: Sampling,
    doc: tuple[str, ...],
    system: str | None,
    think: bool | None,
    load: str | None,
    save: bool,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, twice leaves.

    \b
    pitlane chat --doc report.pdf
    > /plugins +prompt_lookup
    """
    from pitlane.storage.db import Store
    from pitlane.ui.commands.model_choice import choose
    from pitlane.ui.commands.repl_commands import Commands

    documents = add_documents(doc, options.plugins_dir)
    options = choose(options, asks=True)
    with Store() as store, options.build() as engine:
        conversation = Chat(engine.tokenizer, system, think)
        for document in documents:
            conversation.add(*document)
        repl = Commands(engine, store, conversation, sampling, options, autosave=save)
        if load:
            repl.load(load)
        ctx.exit(repl.loop())
