"""Write the table of every plugin into compare.md: python docs/every_plugin.py compare.json bench.json.

compare.json: from `pitlane compare --all --json`. bench.json: from `pitlane bench plugins --json`, over the same question, document
and length. Both measure the plan that is on by default, and this plan with one plugin more or one less. Exits with 1 if the ranges
of a plan's two speed-ups do not meet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pitlane.ui.bench.report import answer_text, ratio_text

TARGET = Path(__file__).with_name("compare.md")
BEGIN, END = "<!-- every plugin: begin -->", "<!-- every plugin: end -->"
HEAD = "| plan | class | answer | speed, `compare` | speed, `bench plugins` | agree |\n|---|---|---|---|---|---|"
ROUNDING = 0.005  # both ranges are printed with two digits


def agree(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two ranges meet."""
    return bool(max(left["low"], right["low"]) <= min(left["high"], right["high"]) + ROUNDING)


def table(report: dict[str, Any], bench: dict[str, Any]) -> tuple[str, list[str]]:
    """The table as Markdown, and the plans that do not agree."""
    speeds = {row["plugins"]: row["speed"] for row in bench["sets"]}
    lines, apart = [HEAD], []
    for plan in report["plans"][1:]:
        label, speed, other = plan["label"], plan["speed"], speeds.get(plan["label"])
        verdict = "-"
        if speed and other:
            verdict = "yes" if agree(speed, other) else "no"
            apart += [] if verdict == "yes" else [label]
        shown = (other and ratio_text(other)) or "-"
        lines.append(
            f"| `{label}` | {plan['difference']} | {answer_text(plan)} | {ratio_text(speed)} | {shown} | {verdict} |"
        )
    first = report["plans"][0]
    machine = report["machine"]
    lines.append(
        f"\n{report['model']}, {report['dtype']}, {machine['cpu']}, {machine['threads']} threads, {report['repeats']} laps, "
        f"answers of {first['completion_tokens']} tokens; "
        f"the default plan: {first['tokens_per_second']['median']:.0f} tokens a second."
    )
    return "\n".join([*lines, *(f"- {note}" for note in report["notes"])]), apart


def main(compare_file: str, bench_file: str) -> int:
    report, bench = (json.loads(Path(name).read_text(encoding="utf-8")) for name in (compare_file, bench_file))
    text, apart = table(report, bench)
    before, _, rest = TARGET.read_text(encoding="utf-8").partition(BEGIN)
    TARGET.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"{len(report['plans']) - 1} plans; apart: {', '.join(apart) or 'none'}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
