"""Quality of plans on a text: perplexity, KL divergence from a first plan, and how often both have the same likeliest token.

The text is cut into windows; a window is a request of its own, so its first tokens have little context. `AllRows` is a plugin of no
registry: it makes the forward of a plan return the logits of every token of a prompt. So plans are measured by the forwards that
serve requests. The log-probabilities of the first plan lie in a temporary file, 4 bytes per token and entry of the vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pitlane import BadOption, Document, Forward, Output, Plugin, RunnerContext, SamplingParams, hookimpl, load_document
from pitlane.ui.plugin_text import parse_settings

if TYPE_CHECKING:
    from torch import Tensor

    from pitlane import Batch, Engine, Plan

DECODED = 32  # tokens that measure the speed of a plan
ANSWER = 64  # tokens of an answer to a question, at most
DEFAULT_METHODS = (
    "int8",
    "int4",
    "int4:group_size=64,symmetric=true",
    "int4:group_size=64,symmetric=true+awq",
    "gptq:group_size=64",
    "mixed:bits=5",
)


@dataclass(frozen=True, slots=True)
class Quality:
    """A method's measures. moved: share of probability that moves, mean over tokens. kl: of the first plan from this, in nats.

    top1: share of tokens where both plans have the same likeliest token. weight_bytes: of the loaded weights. tokens_per_second: of
    one request that decodes. prepare_seconds: to open the plan, the making of a recipe included. questions_right: of the document
    questions; None: none were asked.
    """

    method: str
    perplexity: float
    kl: float
    moved: float
    top1: float
    weight_bytes: int
    tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    prepare_seconds: float
    num_tokens: int
    questions_right: int | None
    exactness: str
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Question(NamedTuple):
    """A question about a document. answers: a reply is right if it holds one of them."""

    document: Document
    text: str
    answers: tuple[str, ...]

    def is_answered(self, reply: str) -> bool:
        words = " ".join(reply.casefold().split())
        return any(" ".join(answer.casefold().split()) in words for answer in self.answers)


def read_questions(path: Path) -> list[Question]:
    """Read a JSON list of {"question", "answer"}, and optionally "accept" (more answers) and "document" (a file beside PATH).

    Without "document", the question is about the sample PDF. Raises BadOption.
    """
    shape = 'a JSON list of {"question": ..., "answer": ...}, with "document": a file, and "accept": more answers'
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        given = [(line.get("document"), line["question"], (line["answer"], *line.get("accept", ()))) for line in lines]
        if not given or not all(
            isinstance(text, str) for _, question, answers in given for text in (question, *answers)
        ):
            raise TypeError("a question or an answer is no text, or the list is empty")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadOption(f"{path} holds no questions ({type(error).__name__}: {error}); it must be {shape}") from None
    sample = Path(str(files("pitlane.storage.bundled") / "sample.pdf"))
    places = {name: path.parent / name if name else sample for name, _, _ in given}
    documents = {name: load_document(str(place)) for name, place in places.items()}
    return [Question(documents[name], question, answers) for name, question, answers in given]


class AllRows(Plugin):
    """Keeps the logits of every token of a prompt, while `is_on`."""

    name, exactness = "eval_rows", "identical"
    stage = 1 << 20  # around all other forwards

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False
        self.pieces: list[Tensor] = []

    @hookimpl
    def build_runner(self, forward: Forward, context: RunnerContext) -> Forward:
        def all_rows(batch: Batch) -> Output:
            if not self.is_on or batch.num_tokens == 0:
                return forward(batch)
            output = forward(replace(batch, logit_rows=torch.arange(batch.num_tokens)))
            self.pieces.append(output.logits.float().cpu())
            return Output(output.logits[batch.logit_rows.to(output.logits.device)], output.saved)

        return all_rows


def method_settings(engine: Engine, method: str) -> dict[str, Any]:
    """Settings of the default plan with the plugins of a method: `int4:group_size=64,symmetric=true+awq`."""
    names, options = [], []
    for part in method.split("+"):
        name, _, values = part.strip().partition(":")
        if not name:
            raise BadOption(f"method {method!r} is not of the form plugin:key=value,key=value+plugin")
        names.append(f"+{name}")
        options += [f"{name}.{value.strip()}" for value in values.split(",") if value.strip()]
    settings, _ = parse_settings(",".join(names), options, engine.default_plan.settings, engine.registry)
    return {name: dict(values) for name, values in settings.items()}


def check_method(engine: Engine, method: str) -> None:
    """Raises BadOption for a method without a plugin that rounds weights or KV, and for a method with a drafter."""
    names = [part.strip().partition(":")[0] for part in method.split("+")]
    plugins = [engine.registry.get(name) for name in names]
    methods = sorted(entry.name for entry in engine.registry if entry.plugin and _rounds(entry.plugin))
    drafters = [plugin.name for plugin in plugins if plugin.role == "drafter"]
    if drafters or not any(map(_rounds, plugins)):
        reason = f"{drafters[0]} only drafts tokens" if drafters else "no plugin in it rounds weights or KV"
        raise BadOption(f"{method!r} is no method of quantization: {reason}; methods: {', '.join(methods)}")


def _rounds(plugin: type[Plugin]) -> bool:
    hooks = ("transform_weights", "build_linear", "build_embedding", "build_kv_store")
    return plugin.exactness in ("approximate", "rounding") and any(hasattr(plugin, hook) for hook in hooks)


def measure(
    engine: Engine,
    ids: list[int],
    methods: Sequence[str],
    window: int,
    advance: Callable[[int, int], None],
    questions: Sequence[Question] = (),
) -> list[Quality]:
    """Measure the default plan, then every method, on the tokens `ids` in windows, and on questions."""
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    windows = [list(part) for part in windows if len(part) > 1]
    plans = {"none": engine.default_plan.settings} | {method: method_settings(engine, method) for method in methods}
    total, results, rows = len(plans) * len(windows), [], AllRows()
    with tempfile.TemporaryDirectory(prefix="pitlane-eval-") as folder:
        for number, (method, settings) in enumerate(plans.items()):
            report = _Measured(engine, rows, number, method, settings, Path(folder))
            for index, part in enumerate(windows):
                report.read(index, part)
                advance(number * len(windows) + index + 1, total)
            results.append(report.result(report.right(questions) if questions else None))
    return results


class _Measured:
    """One plan on all windows. rows: shared by all plans, because equal plans share a lane. number: 0 for the first plan."""

    def __init__(
        self, engine: Engine, rows: AllRows, number: int, method: str, settings: dict[str, Any], folder: Path
    ) -> None:
        from time import perf_counter

        self.engine, self.rows, self.number, self.method, self.folder = engine, rows, number, method, folder
        self.is_first = number == 0
        plan = engine.plan(settings)
        if plan.drafter is not None:
            plan = engine.plan({name: values for name, values in settings.items() if name != plan.drafter.name})
        self.base = plan
        self.plan: Plan = engine.planner.extended(plan, self.rows)
        began = perf_counter()
        engine.lane_of(self.plan)
        self.prepare_seconds = perf_counter() - began
        self.loss = self.kl = self.moved = 0.0
        self.agreeing = self.num_tokens = 0
        self.prefill: list[float] = []

    def read(self, index: int, ids: list[int]) -> None:
        """Compare the distributions behind the tokens of a window with those of the first plan."""
        self.rows.is_on, self.rows.pieces = True, []
        result = self.engine.generate(
            ids, SamplingParams(max_tokens=1), plan=self.plan, salt=f"eval {self.number} {index}"
        )
        self.rows.is_on = False
        table = torch.cat(self.rows.pieces)[: len(ids) - 1].log_softmax(-1)
        self.rows.pieces = []
        assert len(table) == len(ids) - 1, "every token of the window has a row"
        if result.stats["prefill_ms"]:
            self.prefill.append(len(ids) / result.stats["prefill_ms"] * 1000)
        self.loss -= float(table.gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
        self.num_tokens += len(table)
        file = self.folder / f"{index}.pt"
        if self.is_first:
            _save(table, file)
            self.agreeing += len(table)
            return
        first = _load(file, table.shape)
        probabilities = first.exp()
        self.kl += float((probabilities * (first - table)).sum(1, dtype=torch.float64).sum())
        self.moved += float((probabilities - table.exp()).abs().sum(1, dtype=torch.float64).sum() / 2)
        self.agreeing += int((first.argmax(1) == table.argmax(1)).sum())

    def right(self, questions: Sequence[Question]) -> int:
        """Ask the questions, and count the right answers."""
        tokenizer, sampling = self.engine.tokenizer, SamplingParams(max_tokens=ANSWER)
        prompts = [tokenizer.render_chat([{"role": "user", "content": q.text}], [q.document]) for q in questions]
        replies = self.engine.generate(prompts, sampling, plan=self.plan, salt=f"eval {self.number} questions")
        return sum(question.is_answered(reply.text) for question, reply in zip(questions, replies, strict=True))

    def result(self, questions_right: int | None) -> Quality:
        count = self.num_tokens
        sampling = SamplingParams(max_tokens=DECODED, ignore_eos=True)
        stats = self.engine.generate([1] * 16, sampling, plan=self.plan, salt=f"eval {self.number} speed").stats
        return Quality(
            self.method,
            exp(min(700.0, self.loss / count)),
            max(0.0, self.kl / count),
            self.moved / count,
            self.agreeing / count,
            stats["weight_bytes"],
            stats["tokens_per_second"],
            sorted(self.prefill)[len(self.prefill) // 2] if self.prefill else None,
            round(self.prepare_seconds, 2),
            count,
            questions_right,
            self.base.exactness,
            self.base.settings,
        )


def _save(table: Tensor, file: Path) -> None:
    table.contiguous().numpy().tofile(file)


def _load(file: Path, shape: torch.Size) -> Tensor:
    return torch.from_file(str(file), shared=False, size=shape.numel(), dtype=torch.float32).view(shape)


def plot(results: Sequence[Quality], path: Path, title: str) -> None:
    """Two panels: perplexity over the bytes of the weights, and over the speed of decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for panel, label, places in (
        (panels[0], "weights, MB", [result.weight_bytes / 1e6 for result in results]),
        (panels[1], "decode, tokens per second", [result.tokens_per_second or 0 for result in results]),
    ):
        for result, place in zip(results, places, strict=True):
            panel.scatter(place, result.perplexity, s=30)
            panel.annotate(
                result.method, (place, result.perplexity), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity")
    panels[0].set_yscale("log")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
