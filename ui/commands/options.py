"""Options that commands share, and values with units: `32k` tokens, `2GB`.

`engine_options`, or `answer_options`, and `sampling_options` gather their flags into one `EngineOptions` and one `Sampling` for the
command. Only this module declares values and defaults of these flags.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from pitlane.storage.types import whole_text
from pitlane.ui.sampling import CHAT, Sampling
from pitlane.ui.session import EngineOptions

if TYPE_CHECKING:
    IntType = click.ParamType[int]
    TextType = click.ParamType[str]
else:
    IntType = TextType = click.ParamType  # generic from click 8.5 on

MOST = 1 << 62  # largest count: the database and torch have 64 bits
THREADS = click.IntRange(1, 1024)
DTYPES = ["float64", "float32", "bfloat16", "float16"]
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZES |= {f"{unit}i": 1024 ** (power + 1) for power, unit in enumerate("kmgt")}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


class TokenCount(IntType):
    """A number of tokens: 4096, 32k (32 x 1024), 1M."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _NUMBER.fullmatch(str(value).strip())
        unit = {"": 1, "k": 1024, "m": 1024**2}.get(match[2].lower()) if match else None
        if match is None or unit is None or not 1 <= float(match[1]) * unit <= MOST:
            self.fail(f"{value!r} is not a number of tokens; write 4096 or 32k", param, ctx)
        return int(float(match[1]) * unit)


class ByteCount(IntType):
    """A number of bytes: 500MB, 2GB, 2GiB."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _NUMBER.fullmatch(str(value).strip())
        size = _SIZES.get(match[2].lower().removesuffix("b")) if match else None
        if match is None or size is None or not 1 <= float(match[1]) * size <= MOST:
            self.fail(f"{value!r} is not a number of bytes; write 500MB, 2GB or 2GiB", param, ctx)
        return int(float(match[1]) * size)


class Text(TextType):
    """A text for the model, read as UTF-8 whatever the locale."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return whole_text(str(value))


class PluginSet(click.Option):
    """`--plugins`: unlike for other options, an empty value in the environment counts (the bare core)."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return os.environ.get("PITLANE_PLUGINS") if self.name == "plugins" else super().resolve_envvar_value(ctx)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        return self.resolve_envvar_value(ctx)


def _set_offline(ctx: click.Context, param: click.Parameter, value: bool | None) -> None:
    """The engine reads the variable, for draft models too."""
    if value is not None:
        os.environ["PITLANE_OFFLINE"] = "1" if value else "0"


TOKENS, BYTES, TEXT = TokenCount(), ByteCount(), Text()
_PLUGIN_OPTIONS = [
    click.option("--plugins", cls=PluginSet, metavar="SET",
                 help="a,b: exactly these; +a,-b: changes to the default set; '': none."),
    click.option("--option", "-o", "plugin_options", multiple=True, metavar="PLUGIN.KEY=VALUE",
                 help="Set an option of a plugin. Repeatable."),
    click.option("--plugins-dir", type=click.Path(exists=True, file_okay=False), metavar="DIR",
                 help="Also load the plugin files of this folder."),
]  # fmt: skip
offline_option = click.option("--offline/--no-offline", default=None, expose_value=False, callback=_set_offline,
                              help="Fetch no model from a network.")  # fmt: skip
_MODELS = "bundled, smollm2, pip:<distribution>==<version>, a local folder or .gguf file, a Hugging Face id, or random:<preset>."
_MODEL = click.option("--model", "-m", default="bundled", show_default=True, metavar="M", help=_MODELS)
_CHOSEN_MODEL = click.option("--model", "-m", default="bundled", metavar="M",
                             help=f"{_MODELS}  [default: smollm2 if it was fetched, else bundled]")  # fmt: skip
_ENGINE_OPTIONS = [
    offline_option,
    *_PLUGIN_OPTIONS[:2],
    click.option("--dtype", type=click.Choice(DTYPES), help="Of weights and KV.  [default: by the machine]"),
    click.option("--device", metavar="D", help="cpu, cuda or cuda:N.  [default: cuda where there is one]"),
    click.option("--threads", type=THREADS, metavar="N", help="CPU threads."),
    click.option("--context", type=TOKENS, metavar="N", help="Most tokens of prompt and answer, as 4096 or 32k."),
    click.option("--kv-memory", type=BYTES, metavar="BYTES", help="Memory for KV, as 500MB or 2GB."),
    *_PLUGIN_OPTIONS[2:],
]  # fmt: skip


def _sampling_options(is_chat: bool) -> list[Callable[[Any], Any]]:
    """The flags of sampling. is_chat: without documents, the values of the model's maker or of Pitlane are the default."""

    def default(name: str, other: float) -> str:
        return (
            f"  [default: the model's, or {CHAT[name]:g}; {other} over documents]"
            if is_chat
            else f"  [default: {other}]"
        )

    return [
        click.option("--max-tokens", type=int, default=512, show_default=True, metavar="N", help="Longest answer."),
        click.option("--temperature", type=float, metavar="T", help="0 is greedy." + default("temperature", 0)),
        click.option("--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens. 0 is off."),
        click.option("--top-p", type=float, metavar="P",
                     help="Sample within this share of probability." + default("top_p", 1)),
        click.option("--min-p", type=float, metavar="P", help="Least probability, relative to the likeliest."),
        click.option("--repetition-penalty", type=float, metavar="R",
                     help="Make tokens that were there before less likely. 1 is off." + default("repetition_penalty", 1)),
        click.option("--seed", type=int, metavar="S", help="Same seed, same answer.  [default: random, reported]"),
        click.option("--stop", multiple=True, type=TEXT, metavar="TEXT", help="Text that ends the answer. Repeatable."),
    ]  # fmt: skip


_PROMPT_OPTIONS = [
    click.option("--doc", "-d", multiple=True, metavar="FILE",
                 help="A PDF, text or markdown file to answer over, or a stored document's id. Repeatable."),
    click.option("--system", type=TEXT, metavar="TEXT", help="System prompt."),
    click.option("--think/--no-think", "think", default=None, help="Whether a model that can reason does so first."),
]  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, envvar="PITLANE_JSON", help="Print one JSON document.")


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an engine; the command gets `options: EngineOptions`."""
    return _gathering(command, _MODEL)


def answer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `engine_options`, for a command that passes its options to `model_choice.choose`."""
    return _gathering(command, _CHOSEN_MODEL)


def _gathering(command: Callable[..., Any], model: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        names = EngineOptions.__dataclass_fields__
        return command(*args, options=EngineOptions(**{name: values.pop(name) for name in names}), **values)

    return _decorate(gathered, [model, *_ENGINE_OPTIONS])


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of sampling; the command gets `sampling: Sampling`. Without documents, its answers are sampled."""
    return _decorate(_with_sampling(command), _sampling_options(is_chat=True))


def greedy_sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of sampling to a command whose answers are greedy by default."""
    return _decorate(_with_sampling(command), _sampling_options(is_chat=False))


def _with_sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
        given = {name: values.pop(name) for name in names}
        sampling = Sampling({name: value for name, value in given.items() if value is not None})
        return command(*args, sampling=sampling, **values)

    return gathered


def plugin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--plugins`, `--option` and `--plugins-dir`; the command gets them unchanged."""
    return _decorate(command, _PLUGIN_OPTIONS)


def prompt_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--doc`, `--system` and `--think`; the command gets them unchanged."""
    return _decorate(command, _PROMPT_OPTIONS)


def _decorate(command: Callable[..., Any], options: list[Callable[[Any], Any]]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
