"""`pitlane ui`: the page, by default for this machine only."""

from __future__ import annotations

from dataclasses import replace

import click

from pitlane.ui.commands.options import answer_options
from pitlane.ui.session import EngineOptions


@click.command()
@answer_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free port.")
@click.option(
    "--password",
    envvar="PITLANE_PASSWORD",
    default="",
    metavar="TEXT",
    help="Ask every browser for this password; PITLANE_PASSWORD hides it from the list of processes. "
    "[default: a random password if other machines reach the address, else none]",
)
@click.option("--open/--no-open", "open_browser", default=True, show_default=True, help="Open a browser.")
def ui(options: EngineOptions, host: str, port: int, password: str, open_browser: bool) -> None:
    """Open the page: chat over documents, toggle plugins, see what each plugin saved."""
    from pitlane import ModelError
    from pitlane.sources import SMOLLM2
    from pitlane.ui.commands.model_choice import choose

    notice = {}
    try:
        options = choose(options, falls_back=False)
    except ModelError as error:
        if options.model not in (SMOLLM2.name, "bundled"):  # `bundled`: SmolLM2 was the default
            raise
        notice["notice"] = f"The bundled model answers, a small demonstration: {error}."
        options = replace(options, model="bundled")
    from pitlane.ui.app import launch

    launch(options, host=host, port=port, open_browser=open_browser, password=password, **notice)
