"""A side of a comparison in a process of its own: `python -m pitlane.ui.bench.child`.

Two libraries in one process share its threads and its memory, and each slows the other down. So the parent process starts a child
per side and tells it when to measure a block: a JSON line on the child's stdin, and a JSON line as the answer. The first request
has the settings of the side; its answer describes the side. A child ends when its stdin is closed, also when the parent is gone.
First it reserves standard output for the answers; output of libraries goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from pitlane.storage.errors import PitlaneError
from pitlane.ui.bench.speed import Blocks, EngineSide, Side, TransformersSide

if TYPE_CHECKING:
    from pitlane.ui.session import EngineOptions

GRACE = 3.0  # seconds from the end of its stdin until a child is killed


class Child:
    """A side that a child process measures. Raises PitlaneError if the child cannot build the side, or ends early.

    facts: the answer to the first request.
    """

    def __init__(self, name: str, request: dict[str, Any]) -> None:
        self.name, self.blocks = name, Blocks()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pitlane.ui.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # do not import modules from the working folder
        )
        try:
            self.facts = self._ask(request)
        except BaseException:
            self.close()
            raise

    def measure(self, token_ids: list[int], num_steps: int) -> Blocks:
        return Blocks(**self._ask({"token_ids": token_ids, "num_steps": num_steps}))

    def close(self) -> None:
        """Let the child end; kill it if it does not."""
        stdin, stdout = _pipes(self.process)
        with suppress(OSError):  # the child is gone
            stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = _pipes(self.process)
        with suppress(OSError):  # the child is gone: it gives no answer
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line.endswith("\n"):
            code = self.process.wait()
            raise PitlaneError(f"the process that measures {self.name} ended with status {code}; its output says why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PitlaneError(answer["error"])
        return answer


@contextmanager
def children(options: EngineOptions, peer: str | None) -> Iterator[dict[str, Child]]:
    """The engine with these options, and another library with a model of the same shape, dtype, device and threads, by name."""
    with ExitStack() as stack:
        engine = Child("pitlane", {"engine": asdict(options)})
        stack.callback(engine.close)
        sides = {"pitlane": engine}
        if peer is not None:
            sides[peer] = Child(peer, {"peer": engine.facts["peer"]})
            stack.callback(sides[peer].close)
        yield sides


def _pipes(process: subprocess.Popen[str]) -> tuple[Any, Any]:
    assert process.stdin and process.stdout, "the child is started with pipes"
    return process.stdin, process.stdout


# ---- in the child


class PeerShape(NamedTuple):
    """The model whose shape another library takes: its folder, or the name of a random preset."""

    folder: Path | None
    name: str


def main() -> int:
    """Build a side, then measure a block per request until stdin ends."""
    output = _claimed_stdout()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles the signal, and closes the pipe
    with ExitStack() as stack:
        side: Side | None = None
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if side is None:
                    side, answer = _built(request, stack)
                else:
                    answer = asdict(side.measure(**request))
            except PitlaneError as error:
                answer = {"error": str(error)}
            output.write(json.dumps(answer) + "\n")
            output.flush()
    return 0


def _built(request: dict[str, Any], stack: ExitStack) -> tuple[Side, dict[str, Any]]:
    return _built_engine(request["engine"], stack) if "engine" in request else _built_peer(request["peer"])


def _built_engine(options: dict[str, Any], stack: ExitStack) -> tuple[Side, dict[str, Any]]:
    from pitlane.ui.bench.machine import head
    from pitlane.ui.session import EngineOptions

    options["plugin_options"] = tuple(options["plugin_options"])
    engine = stack.enter_context(EngineOptions(**options).build())
    source, facts = engine.loader.source, head(engine)
    peer = {
        "folder": None if source.folder is None else str(source.folder),
        "name": source.name,
        "dtype": facts["dtype"],
        "device": facts["device"],
        "threads": facts["machine"]["threads"],
    }
    return EngineSide(engine), {"head": facts, "vocab_size": engine.loader.vocab_size, "peer": peer}


def _built_peer(peer: dict[str, Any]) -> tuple[Side, dict[str, Any]]:
    import torch

    torch.set_num_threads(peer["threads"])
    shape = PeerShape(None if peer["folder"] is None else Path(peer["folder"]), peer["name"])
    return TransformersSide(shape, getattr(torch, peer["dtype"]), torch.device(peer["device"])), {}


def _claimed_stdout() -> TextIO:
    """Return standard output, for the answers alone; later prints go to stderr."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return output


if __name__ == "__main__":
    sys.exit(main())
