"""Changes of stored KV as plain data, and the queue in which they wait.

`Lane.flush` empties the queue before every forward that writes into newly reserved blocks. This order alone keeps KV right when
blocks are freed and reused in the meantime. A new owner of a block writes into it by an operation or by a forward. The operation
stands behind every earlier operation in the queue; the forward runs behind the queue. So an operation finds its source slots as
they were when it was appended, and no operation waits for the release of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("pitlane")


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the KV of `sources` to `targets`, slots of one group; sources are read before any target is written."""

    group: int
    sources: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Load:
    """Write saved KV into slots. tensors: `group.0`, ... [2, L, Hkv, N, D].

    slots, starts: per group. The n slots of a group get the tokens `[start, start + n)` of its tensor.
    """

    slots: list[list[int]]
    tensors: Mapping[str, Tensor]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class Save:
    """Copy the KV of slots of every group into new host tensors, named as in `Load`. key: the number of their receiver."""

    key: int
    slots: list[list[int]]


Operation: TypeAlias = Copy | Load | Save
Saved: TypeAlias = Mapping[int, Mapping[str, "Tensor"]]
Sink: TypeAlias = Callable[[Mapping[str, "Tensor"]], object]


class OperationQueue:
    """The KV operations of one pool that wait, in order, and the receivers of saved KV."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._sinks: dict[int, Sink] = {}
        self._num_saves = 0

    def append(self, operation: Operation) -> None:
        self.operations.append(operation)

    def save(self, slots: list[list[int]], sink: Sink) -> None:
        """Save the KV of slots of every group, and call `sink` with the tensors. After a failure, `sink` may not be called."""
        self._sinks[self._num_saves] = sink
        self.append(Save(self._num_saves, slots))
        self._num_saves += 1

    def take(self) -> list[Operation]:
        """Return the operations, and empty the queue."""
        operations, self.operations = self.operations, []
        return operations

    def clear(self) -> None:
        """Forget all operations and receivers."""
        self.operations, self._sinks = [], {}

    def deliver(self, saved: Saved) -> None:
        """Pass saved tensors to their receivers. A receiver that fails is logged: the answers are whole without it."""
        for key, tensors in saved.items():
            try:
                self._sinks.pop(key)(tensors)
            except (Exception, SystemExit):
                log.exception("saved KV was not taken")
