"""What every constant and rule of pacing gains: python -m tests.engine.pacing.ablation [--seeds N] [PATTERN]

Serves all scenarios with a copy of engine/pacing/ in which a constant has another value or a rule is off, and compares the time of
a token with that of the code as it is. Prints the change in percent (positive: slower), as means over the drafters that do not
help, that help and that do both, and the three scenarios that change most. Chance moves the means by about 0.3, and the scenarios
"turns good", "half right, small gain" and "alternates" by 10. PATTERN selects changes by name. All take 4 minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
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
CONSTANTS = {
    "MAX_DRAFT": ("32", "1000"),
    "MIN_CHANCE": ("1e-9", "0.1"),
    "LANE_WEIGHT": ("0.0", "5.0", "20.0"),
    "PRIOR_RATE, PRIOR_STEPS": ("0.5, 2.0", "0.9, 2.0", "0.75, 1.0", "0.75, 4.0"),
    "DECAY, LANE_DECAY": ("0.8, 0.98", "0.95, 0.98", "0.9, 0.9", "0.9, 0.995"),
    "CREDIT": ("1.5", "6.0", "1000.0"),
    "CREDIT_PER_STEP": ("0.0001", "0.005", "0.02", "1.0"),
    "TRIAL_SIZE": ("4", "16"),
    "PAUSE": ("32", "128", "1024"),
    "REPEAT": ("0", "8", "32"),
    "MARGIN": ("0.0", "0.1"),
    "NEW_WEIGHT": ("0.1", "0.4", "1.0"),
    "RECENT": ("16", "10**9"),
    "MAX_JUMP": ("1.5", "4.0", "1e9"),
    "SLOWDOWN": ("1.4", "2.5"),
    "MIN_TOKENS": ("1", "16"),
    "LOWEST, HIGHEST": ("0.0, 1e9", "0.85, 1.1"),
}
OUTLOOK = "Outlook(record.belief.inherited())"
RULES: dict[str, list[Change]] = {
    "any length may come": [("return self.longest + 1 if self.gives_less else 2 * self.longest", "return MAX_DRAFT")],
    "twice the longest may come": [
        ("return self.longest + 1 if self.gives_less else 2 * self.longest", "return 2 * self.longest")
    ],
    "medians of 1": [("maxlen=9", "maxlen=1")],
    "medians of 3": [("maxlen=9", "maxlen=3")],
    "clock medians of 1": [("maxlen=15", "maxlen=1")],
    "a new sequence knows nothing": [(OUTLOOK, "Outlook()")],
    "a pause keeps the belief": [("            outlook.belief = outlook.belief.inherited()\n", "")],
    "no trial after a pause": [("outlook.reason, outlook.has_trial = None, True", "outlook.reason = None")],
    "trials are free": [("if credit >= min(cost, CREDIT):", "if True:")],
    "a purse for each sequence": [("                    credit -= cost\n", "")],
    "losses are free": [("        self.spend(num_lost)\n", "        pass\n")],
    "searches are free": [("cost <= CREDIT_PER_STEP or", "True or")],
    "the first search counts": [("if len(self.search_seconds) > 1 else 0.0", "if self.search_seconds else 0.0")],
    "reading a prompt is free": [("elif self.clock.by_tokens:  # the drafter", "elif False:  # the drafter")],
    "reading a prompt is drafting": [
        ("elif not has_read:", "else:"),
        ("elif self.clock.by_tokens:  # the", "if False:  #"),
    ],
    "first trial of any sequence": [("index = read[0] if read else allowed", "index = allowed")],
    "rows are free": [("in (self.draft_seconds, self.row_seconds) if", "in (self.draft_seconds,) if")],
    "time besides drafts is free": [("max(plain, median(record.overheads or [0.0]))", "plain")],
    "time besides forwards is free": [
        ("return median(self.overheads) if self.overheads else 0.0", "return 0.0"),
        ("max(plain, median(record.overheads or [0.0]))", "plain"),
    ],
    "all drafters are asked at once": [("                    self.governor.add(drafting)\n", "")],
    "the pace is constant": [(" * self.pace / self._paces.get(num_tokens, self.pace)", "")],
    "larger sizes are no bound": [("min(self.measured(int(size)), self._ceiling(size))", "self.measured(int(size))")],
}


def variants() -> dict[str, list[Change]]:
    """Changes by name, as regular expressions of the source and texts in their place."""
    changes = {
        f"{name} = {value}": [(rf"(?m)^{name} = [^#\n]*", f"{name} = {value}  ")]
        for name, values in CONSTANTS.items()
        for value in values
    }
    return changes | {
        name: [(re.escape(old), new.replace("\\", r"\\")) for old, new in rule] for name, rule in RULES.items()
    }


def load(changes: list[Change]) -> Any:
    """The class `Pacing` of a copy of the code with changes."""
    names = {name: f"pitlane.engine.pacing.{name}" for name in MODULES}
    originals = {name: sys.modules[name] for name in names.values()}
    num_changed = 0
    try:
        for name, full_name in names.items():
            text = SOURCES[name]
            for old, new in changes:
                text, count = re.subn(old, new, text)
                num_changed += count
            module = sys.modules[full_name] = ModuleType(full_name)
            exec(compile(text, f"{name}.py", "exec"), module.__dict__)
        assert num_changed >= len(changes), f"the source has no {changes}"
        return sys.modules[names["pacing"]].__dict__["Pacing"]
    finally:
        sys.modules.update(originals)


def times(changes: list[Change], num_seeds: int, is_calibrated: bool = True) -> dict[str, float]:
    """Plain steps per token of every scenario."""
    pacing = load(changes)
    seconds = {}
    for name, scenario in SCENARIOS.items():
        scenario = replace(scenario, is_calibrated=scenario.is_calibrated and is_calibrated)
        seconds[name] = scenario.seconds(partial(pacing, 512), num_seeds)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        base = pool.submit(times, [], options.seeds)
        selected = {name: changes for name, changes in variants().items() if re.search(options.pattern, name)}
        results = {name: pool.submit(times, changes, options.seeds) for name, changes in selected.items()}
        if re.search(options.pattern, "CALIBRATED = ()"):
            results["CALIBRATED = ()"] = pool.submit(times, [], options.seeds, False)
        print(f"{'change':34} {'lose':>7} {'win':>7} {'both':>7}   largest changes")
        for name, result in results.items():
            change = {key: 100 * (value / base.result()[key] - 1) for key, value in result.result().items()}
            means = " ".join(f"{fmean(change[key] for key in group):7.2f}" for group in (LOSERS, WINNERS, MIXED))
            largest = sorted(change, key=lambda key: -abs(change[key]))[:3]
            print(f"{name:34} {means}   {'; '.join(f'{key} {change[key]:+.1f}' for key in largest)}", flush=True)


if __name__ == "__main__":
    main()
