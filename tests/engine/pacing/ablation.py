"""What every constant and rule of pacing gains: python -m tests.engine.pacing.ablation [--seeds N] [PATTERN]

Serves all scenarios with a copy of engine/pacing/ in which a constant has another value or a rule is off, and compares the time
with that of the code as it is. Prints the change of time in percent (positive: the change makes it slower), as the mean over the
drafters that lose, that win and that do both, and the scenarios that change most. Changes within about 0.1 are chance.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from tests.engine.pacing.scenarios import LOSERS, MIXED, SCENARIOS, WINNERS

ROOM = Path(__file__).resolve().parents[3] / "engine" / "pacing"
MODULES = ("clock", "budget", "belief", "governor", "pacing")
SOURCES = {name: (ROOM / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
Change = tuple[str, str]  # a text of the source, and the text in its place

def constant(name: str, *values: Any) -> dict[str, list[Change]]:
    return {f"{name} = {value}": [(rf"(?m)^{name} = [^#\n]*", f"{name} = {value}  ")] for value in values}


def rule(name: str, *changes: Change) -> dict[str, list[Change]]:
    return {name: [(re.escape(old), new.replace("\\", r"\\")) for old, new in changes]}
VARIANTS = {
    **constant("LONGEST", 8, 32, 1000), **constant("LEAST", 0.0001, 0.1), **constant("LEAN", 0.0, 5.0, 20.0),
    **constant("PRIOR_RATE, PRIOR_STEPS", "0.5, 2.0", "0.9, 2.0", "0.75, 1.0", "0.75, 4.0"),
    **constant("DECAY, LANE_DECAY", "0.8, 0.98", "0.95, 0.98", "0.9, 0.9", "0.9, 0.95", "0.9, 0.995"),
    **constant("TRIAL_STEPS", 1, 3, 12), **constant("FIRST_PAUSE", 8, 16, 64, 128), **constant("CREDIT", 0.75, 1.5, 6.0, 1000.0),
    **constant("FIRST_SIZE", 4, 16), **constant("PROBE_STEPS", 2, 4), **constant("TRIAL_SIZE", 1, 2, 8, 64), **constant("STANDS", 0, 8, 32),
    **constant("LONGEST_PAUSE", 32, 256, 512, 10**9), **constant("MARGIN", -1.0, 0.0, 0.1), **constant("CREDIT_PER_STEP", 0.0001, 0.005, 0.02, 1.0),
    **constant("FORGET", 0.05, 0.1, 0.4, 1.0), **constant("MOST_CHANGE", 1.0, 1.5, 4.0, 1e9), **constant("RECENT", 16, 32, 128, 10**6),
    **constant("SLOWDOWN", 1.4, 2.5), **constant("MIN_TOKENS", 1, 16), **constant("LOWEST, HIGHEST", "0.0, 1e9", "0.85, 1.1", "0.5, 1.5"),
    **rule("maxlen 1", ("maxlen=9", "maxlen=1")), **rule("maxlen 3", ("maxlen=9", "maxlen=3")), **rule("maxlen 27", ("maxlen=9", "maxlen=27")),
    **rule("clock maxlen 1", ("maxlen=15", "maxlen=1")), **rule("clock maxlen 5", ("maxlen=15", "maxlen=5")), 
    **rule("prompt tokens 1", ("num_prompt_tokens >= 32","num_prompt_tokens >= 1")),
    **rule("no ceiling", ("min(self.seen(int(size)), self._ceiling(size))", "self.seen(int(size))")),
    **rule("no pace", ("change = self.pace / self._paces.get(num_tokens, self.pace)", "change = 1.0")),
    **rule("no size bound", ("return self.longest + 1 if self.is_longest else 2 * self.longest", "return 64")),
    **rule("no doubling sizes", ("return self.longest + 1 if self.is_longest else 2 * self.longest", "return self.longest + 1 if self.is_longest else 64")),
    **rule("2x sizes only", ("return self.longest + 1 if self.is_longest else 2 * self.longest", "return 2 * self.longest")),
    **rule("not inherited", ("Outlook(record.belief.inherited(), record.steps_left or PROBE_STEPS)", "Outlook()")),
    **rule("belief not inherited", ("Outlook(record.belief.inherited(), record.steps_left or PROBE_STEPS)", "Outlook(Belief(), record.steps_left or PROBE_STEPS)")),
    **rule("trial not inherited", ("Outlook(record.belief.inherited(), record.steps_left or PROBE_STEPS)", "Outlook(record.belief.inherited(), TRIAL_STEPS)"), ("import CREDIT, ","import CREDIT, TRIAL_STEPS, ")),
    **rule("pause keeps belief", ("            outlook.belief = outlook.belief.inherited()\n", "")),
    **rule("pause not reset", ("            if not part.outlook.steps_left:\n                part.outlook.pause = FIRST_PAUSE\n", "")),
    **rule("pause reset at once", ("            if not part.outlook.steps_left:\n                part.outlook.pause = FIRST_PAUSE\n", "            part.outlook.pause = FIRST_PAUSE\n")),
    **rule("reading counts", ("elif not reading:", "else:"), ("elif self.clock.by_tokens:  # reading", "if False:  # reading")),
    **rule("reading is free", ("elif self.clock.by_tokens:  # reading", "elif False:  # reading")),
    **rule("not behind after a pause", ("outlook.reason, outlook.steps_left, outlook.is_behind = None, PROBE_STEPS, True", "outlook.reason, outlook.steps_left = None, PROBE_STEPS")),
    **rule("any first", ("return ready[0] if ready else able[record.turn % len(able)]", "return able[record.turn % len(able)]")),
    **rule("always the first", ("return ready[0] if ready else able[record.turn % len(able)]", "return able[0]")),
    **rule("is_chain trial first", ("TRIAL_SIZE if is_chain else FIRST_SIZE", "FIRST_SIZE")),
    **rule("rows are free", ("for seconds in (self.draft_seconds, self.row_seconds) if seconds", "for seconds in (self.draft_seconds,) if seconds")),
    **rule("no overheads", ("max(plain, median(record.overheads or [0.0]))", "plain")),
    **rule("no overhead at all", ("return median(self.overheads) if self.overheads else 0.0", "return 0.0"), ("max(plain, median(record.overheads or [0.0]))", "plain")),
    **rule("searches are free", ("cost <= CREDIT_PER_STEP or", "True or")),
    **rule("searches not charged", ("record.spend(self._search_cost(record))", "pass")),
    **rule("first search counts", ("if len(self.search_seconds) > 1 else 0.0", "if self.search_seconds else 0.0")),
    **rule("trial cost unpaid", ("if credit >= min(cost, CREDIT):", "if True:")),
    **rule("no common purse", ("                    credit -= cost\n", "")),
    **rule("losses not charged", ("        self.steps_left = max(0, self.steps_left - 1)\n        self.spend(lost)", "        self.steps_left = max(0, self.steps_left - 1)")),
    **rule("0.999", ("min(0.999,", "min(0.9999,")),
}
del VARIANTS["LONGEST = 8"]

def load(changes: list[Change]) -> Any:
    """The class `Pacing` of a copy of the code with changes."""
    originals = {name: sys.modules[f"pitlane.engine.pacing.{name}"] for name in MODULES}
    number = 0
    try:
        for name in MODULES:
            text = SOURCES[name]
            for old, new in changes:
                text, count = re.subn(old, new, text)
                number += count
            module = sys.modules[f"pitlane.engine.pacing.{name}"] = ModuleType(f"pitlane.engine.pacing.{name}")
            exec(compile(text, f"{name}.py", "exec"), module.__dict__)
        assert number >= len(changes), f"the source has no {changes}"
        return sys.modules["pitlane.engine.pacing.pacing"].Pacing
    finally:
        for name, module in originals.items():
            sys.modules[f"pitlane.engine.pacing.{name}"] = module


def times(changes: list[Change], num_seeds: int) -> dict[str, float]:
    """Seconds per token of every scenario."""
    pacing = load(changes)
    return {name: scenario.seconds(partial(pacing, 512), num_seeds) for name, scenario in SCENARIOS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        base = pool.submit(times, [], options.seeds)
        results = {name: pool.submit(times, changes, options.seeds) for name, changes in VARIANTS.items() if re.search(options.pattern, name)}
        print(f"{'change':36} {'lose':>7} {'win':>7} {'both':>7}   largest changes")
        for name, result in results.items():
            change = {s: 100 * (value / base.result()[s] - 1) for s, value in result.result().items()}
            means = [fmean(change[s] for s in group) for group in (LOSERS, WINNERS, MIXED)]
            largest = sorted(change, key=lambda s: -abs(change[s]))[:4]
            print(f"{name:36} {' '.join(f'{mean:7.2f}' for mean in means)}   {'; '.join(f'{s} {change[s]:+.1f}' for s in largest)}", flush=True)


if __name__ == "__main__":
    main()
