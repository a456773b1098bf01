"""The drafts of one drafter in one step: asked for by the governor, made by the drafter, verified by the target."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from pitlane.engine.decode.draft import Draft
from pitlane.engine.plan.plugin import Plugin
from pitlane.engine.sequence import Sequence


@dataclass(slots=True)
class Drafting:
    """The drafts of one drafter in a step. Lists are by sequence. `Governor.ask` makes it, the loop fills it in.

    lengths: known tokens before the step. asked: draft tokens that were asked for. drafts: the drafts that came. seconds: of
    drafting. num_rows, row_seconds: number of rows in which a token was drawn for `after_verify`, and the time of these draws.
    num_accepted: by sequence id, the accepted tokens of every verified draft.
    """

    drafter: Plugin
    seqs: SequenceOf[Sequence]
    lengths: list[int]
    asked: list[int]
    drafts: SequenceOf[Draft | None]
    seconds: float = 0.0
    num_rows: int = 0
    row_seconds: float = 0.0
    num_accepted: dict[int, int] = field(default_factory=dict)
