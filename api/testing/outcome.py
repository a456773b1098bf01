"""The outcome of a check: a finding for every clause of the contract, as a table or as JSON. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

Status: TypeAlias = Literal["passed", "failed", "measured", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One clause of the contract.

    status: `measured`: a figure without a bound, which proves nothing. `skipped`: the clause does not apply, or this machine cannot
    check it. detail: the figures or the reasons.
    """

    clause: str
    status: Status
    detail: str

    @classmethod
    def of(cls, clause: str, is_kept: bool, detail: str) -> Finding:
        """Return the finding of a clause: kept or broken."""
        return cls(clause, "passed" if is_kept else "failed", detail)


@dataclass(frozen=True, slots=True)
class PluginCheck:
    """The outcome of `check_plugin`: the certificate of a plugin on this machine.

    declared: the exactness class under the checked options. num_answers: answers with the plugin.
    num_draft_tokens: draft tokens that the engine verified. overhead_us: microseconds per step in the plugin's hooks, or None
    without a hook that runs in steps. moved: mean share of the next token's probability that moves, compared with the plan
    without the plugin; None if it was not measured. bound: the largest share that passes: the bound of the caller, or that of
    the check for a rounding plugin without a bound; None if no share was compared with a bound.
    """

    name: str
    source: str
    declared: str
    options: dict[str, Any]
    model: str
    dtype: str
    num_tokens: int
    num_answers: int = 0
    num_draft_tokens: int = 0
    overhead_us: float | None = None
    moved: float | None = None
    bound: float | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no clause failed."""
        return not self.broken

    @property
    def proved(self) -> bool:
        """Whether the declared exactness was proved here, and no clause failed."""
        return self.passed and self.status_of("exactness") == "passed"

    @property
    def broken(self) -> list[str]:
        """A line for every clause that failed."""
        return [f"{finding.clause}: {finding.detail}" for finding in self.findings if finding.status == "failed"]

    def status_of(self, clause: str) -> Status | None:
        """The status of a clause; None if the check did not reach it."""
        return next((finding.status for finding in self.findings if finding.clause == clause), None)

    @property
    def verdict(self) -> str:
        """One line for people."""
        if not self.passed:
            return f"{self.name} declares {self.declared}: does not keep its promise"
        proof = "proved" if self.proved else "not proved"
        bound = "" if self.bound is None else f", bound {self.bound:.2g}"
        return f"{self.name} declares {self.declared}: {proof} on this machine ({self.model}, {self.dtype}{bound})"

    def table(self) -> str:
        """The findings as lines of text, with the verdict first."""
        width = max((len(finding.clause) for finding in self.findings), default=0)
        rows = [f"  {f.clause:<{width}}  {f.status:<8}  {f.detail}" for f in self.findings]
        return "\n".join([self.verdict, *rows])

    def to_json(self) -> dict[str, Any]:
        """All fields, with `passed`, `proved` and `broken`."""
        return asdict(self) | {"passed": self.passed, "proved": self.proved, "broken": self.broken}

    def assert_passed(self) -> None:
        """Raise AssertionError with the table if a clause failed."""
        assert self.passed, self.table()

    def assert_proved(self) -> None:
        """Raise AssertionError with the table if a clause failed, or if the exactness was not proved."""
        assert self.proved, self.table()
