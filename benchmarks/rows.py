"""What a benchmark prints: a table for people, and last one line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


class LeftOutError(Exception):
    """A part of a benchmark cannot be done here, for want of a library or of data."""


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; ``row`` says what is measured, ``bar`` what ``ratio`` has to reach.

    Attributes:
        row: What is measured.
        ours: Our figure, in ``unit``.
        rival: The rival's figure, in ``unit``; None where there is no rival.
        unit: The unit of both figures.
        ratio: The ratio of both figures, or None; see ``faster`` and ``smaller``.
        bar: What the ratio has to reach, or None for a row that only informs.
        ok: Whether the bar is met; None without a bar.
    """

    row: str
    ours: float
    rival: float | None
    unit: str
    ratio: float | None
    bar: float | None
    ok: bool | None


def faster(row: str, ours: float, rival: float, unit: str, bar: float) -> Row:
    """A row that says how many times faster ours is; the bar is the least."""
    ratio = rival / ours
    return Row(row, ours, rival, unit, ratio, bar, ratio >= bar)


def smaller(row: str, ours: float, rival: float, unit: str, bar: float | None) -> Row:
    """A row that says what fraction of the rival's ours is; the bar is the most."""
    ratio = ours / rival
    return Row(row, ours, rival, unit, ratio, bar, None if bar is None else ratio <= bar)


def at_most(row: str, ours: float, unit: str, bar: float) -> Row:
    """A row with a figure of ours alone, which the bar limits."""
    return Row(row, ours, None, unit, None, bar, ours <= bar)


def informs(row: str, ours: float, unit: str) -> Row:
    """A row with a figure of ours alone, and no bar."""
    return Row(row, float(ours), None, unit, None, None, None)


def keep(row: Row, path: Path) -> None:
    """Add a row to a file, one line of JSON each, so that it outlives whatever comes next."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def load(path: Path) -> list[Row]:
    """The rows of such a file; none if it is not there."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def report(benchmark: str, rows: Sequence[Row]) -> int:
    """Print all rows; 0 when every bar is met, else 1."""
    width = max(len(row.row) for row in rows)
    print(f"{'':{width}}  {'ours':>10}  {'rival':>10}  unit   {'ratio':>8}  {'bar':>6}")
    for row in rows:
        cells = (_figure(row.ours), _figure(row.rival), _figure(row.ratio), _figure(row.bar))
        verdict = "" if row.ok is None else ("ok" if row.ok else "MISSED")
        print(
            f"{row.row:{width}}  {cells[0]:>10}  {cells[1]:>10}  {row.unit:5}  "
            f"{cells[2]:>8}  {cells[3]:>6}  {verdict}".rstrip()
        )
    rounded = [
        {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in asdict(row).items()}
        for row in rows
    ]
    print(json.dumps({"benchmark": benchmark, "rows": rounded}), flush=True)
    return 0 if all(row.ok is not False for row in rows) else 1


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
