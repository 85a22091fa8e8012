"""The table that ends a session of the fault suite: one row for each suite."""

from dataclasses import dataclass, field

from tests.faults.judge import Verdict

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


def table(rows: list[Row]) -> list[str]:
    """The lines of the table."""
    cells = [_COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]

    def line(parts: tuple[str, ...]) -> str:
        first, *others = zip(parts, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(part.rjust(width) for part, width in others)])

    lines = [line(cells[0])]
    for row, parts in zip(rows, cells[1:], strict=True):
        lines.append(line(parts))
        lines += [f"    {note}" for note in row.notes]
    return lines
