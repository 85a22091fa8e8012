"""The table that ends a session of the fault suite: one row for each suite."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.faults.judge import Verdict

REPORTED_AS = "fault suite"
"""The property of a test's report that holds its row, as a run in several processes hands it on."""

_COLUMNS = (
    "suite",
    "accepted",
    "answered",
    "lost",
    "twice",
    "text lost",
    "doubled",
    "misordered",
    "taken over",
    "calls",
    "refused",
    "p99 pause",
    "longest",
    "leftovers",
)


@dataclass
class Row:
    """One suite's figures. `notes` stand below its row; what was not looked at is shown as a dash."""

    suite: str
    seed: int
    verdict: Verdict | None = None
    leftovers: int | None = None
    notes: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """The row's cells, as many as there are columns."""
        leftovers = "-" if self.leftovers is None else str(self.leftovers)
        if (verdict := self.verdict) is None:
            return (self.suite, *["-"] * (len(_COLUMNS) - 2), leftovers)
        counts = (
            verdict.accepted,
            verdict.answered,
            verdict.lost,
            verdict.answered_twice,
            verdict.lost_text,
            verdict.doubled_text,
            verdict.misordered_text,
            verdict.taken_over,
            verdict.calls,
            verdict.refused_calls,
        )
        pauses = (f"{verdict.p99_pause:.2f} s", f"{verdict.longest_pause:.2f} s")
        return (self.suite, *map(str, counts), *pauses, leftovers)

    def told(self) -> dict[str, Any]:
        """The row in plain types."""
        return {"seed": self.seed, "cells": self.cells(), "notes": self.notes}


def section(reports: Iterable[object]) -> tuple[str, list[str]] | None:
    """The title and the lines of the table for what these reports carry; None if that is nothing."""
    told = [
        value for report in reports for name, value in getattr(report, "user_properties", ()) if name == REPORTED_AS
    ]
    return (f"faults (SEED={told[0]['seed']})", _table(told)) if told else None


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [_COLUMNS, *(row["cells"] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]

    def line(parts: Iterable[str]) -> str:
        first, *others = zip(parts, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(part.rjust(width) for part, width in others)])

    lines = [line(_COLUMNS)]
    for row in rows:
        lines.append(line(row["cells"]))
        lines += [f"    {note}" for note in row["notes"]]
    return lines
