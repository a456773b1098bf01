"""The plugins that are on by default for questions about a document, and only for them.

Such a plugin was made for documents and for the model that runs, such as the adapter of SmolLM2. The engine has two default plans:
`default_plan`, and `document_plan` with these plugins. A user sees the switches of the document plan. A question without a document
leaves out the plugins that only the document plan has. If the user changes an option of such a plugin, it is a plugin like any
other: it serves every question.

Knows no terminal and no page.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from pitlane import BadOption, ModelTooLarge

if TYPE_CHECKING:
    from pitlane import Engine, Plan, Settings


class Loaded(NamedTuple):
    """A plan whose weights are loaded. left_out: plugins that do not fit into memory, with the reason."""

    plan: Plan
    left_out: dict[str, str]


def document_plugins(engine: Engine, settings: Settings) -> list[str]:
    """Names of the plugins in `settings` that serve only questions about a document."""
    default, added = engine.document_plan.settings, set(engine.document_plan.names) - set(engine.default_plan.names)
    names = []
    for name in settings:
        if name in added:
            with suppress(BadOption):  # `engine.plan` raises it again
                options = engine.registry.get(name).parse_options(dict(settings[name])).model_dump()
                names += [name] if options == default[name] else []
    return names


def in_effect(engine: Engine, settings: Settings, has_document: bool) -> Settings:
    """The settings for a question with or without a document."""
    return settings if has_document else without(settings, document_plugins(engine, settings))


def without(settings: Settings, names: list[str]) -> Settings:
    return {name: options for name, options in settings.items() if name not in names}


def load(engine: Engine, settings: Settings) -> Loaded:
    """Load the weights of settings that are in effect. If they do not fit, leave the document plugins out."""
    plan, names = engine.plan(settings), document_plugins(engine, settings)
    if names and not engine.is_loaded(plan):
        try:
            engine.lane_of(plan)
        except ModelTooLarge as error:
            return Loaded(engine.plan(without(settings, names)), {name: str(error) for name in names})
    return Loaded(plan, {})


def default_note(engine: Engine) -> str:
    """A line about the document plugins of an engine whose default plan is the document plan; empty without such plugins."""
    context = engine.loader.build_context
    names = [
        plugin.name
        for plugin in engine.default_plan.plugins
        if plugin.is_default_for_documents(context) and plugin.options == plugin.Options()
    ]
    return note_text(engine, names, "--plugins") if names else ""


def note_text(engine: Engine, names: list[str], switch: str) -> str:
    """A line that says which plugins answer, and how to turn them off. switch: the option or command that takes `-name`."""
    verb = "answers" if len(names) == 1 else "answer"
    off = ",".join(f"-{name}" for name in names)
    return f"{described(engine, names)} {verb} questions about a document; {switch} {off} turns this off"


def described(engine: Engine, names: list[str]) -> str:
    """Plugins with the options that are names: `lora (adapter documents)`."""
    pieces = []
    for name in names:
        options = engine.document_plan.settings[name].items()
        texts = [f"{option} {value}" for option, value in options if isinstance(value, str) and value]
        pieces.append(f"{name} ({', '.join(texts)})" if texts else name)
    return ", ".join(pieces)
