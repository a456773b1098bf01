"""Checks that a plugin leaves nothing behind: no sequence, no KV block, no thread, no instance."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass, field

from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.sequence import Sequence
from pitlane.testing.outcome import Finding
from pitlane.testing.runs import Run


def check_sequences(run: Run) -> Finding:
    """Abort a request. Afterwards no block may be lost, and no sequence of a finished request may be alive."""
    engine = run.engine
    with engine.submit(*run.requests[0], plan=run.plan) as stream:
        next(iter(stream))
    engine.worker.call(lambda: None).result()
    lost = [group for lane in engine.lanes.all for group in lane.pool.groups_with_lost_blocks]
    gc.collect()
    leaked = [item for item in gc.get_objects() if type(item) is Sequence and item.plan is run.plan]
    faults = [f"KV blocks of groups {lost} are lost"] if lost else []
    faults += [f"{len(leaked)} sequences of finished requests are still held"] if leaked else []
    status = "failed" if faults else "passed"
    return Finding("state of requests", status, "; ".join(faults) or "freed, also of an abort")


@dataclass(slots=True)
class Watch:
    """Watches the instances of a plugin. Make it before the engine, so that it knows the threads that ran before."""

    threads: set[threading.Thread] = field(default_factory=lambda: set(threading.enumerate()))
    instances: list[weakref.ref[Plugin]] = field(default_factory=list)
    num_closed: int = 0

    def add(self, instance: Plugin) -> None:
        """Count the calls of `close` of an instance."""
        close = instance.close

        def counted() -> None:
            self.num_closed += 1
            close()

        instance.close = counted  # type: ignore[method-assign]
        self.instances.append(weakref.ref(instance))

    def check(self) -> Finding:
        """Check that all instances are closed and freed, and that no new thread runs. Call it after the engine has closed."""
        gc.collect()
        new = set(threading.enumerate()) - self.threads
        for thread in new:
            thread.join(1.0)
        running = [thread.name for thread in new if thread.is_alive()]
        faults = [f"threads still run: {', '.join(running)}"] if running else []
        if self.num_closed != len(self.instances):
            faults.append(f"close() was called {self.num_closed} times for {len(self.instances)} instances")
        if any(instance() is not None for instance in self.instances):
            faults.append("the instance is still held after the engine has closed")
        return Finding("instance", "failed" if faults else "passed", "; ".join(faults) or "closed and freed")
