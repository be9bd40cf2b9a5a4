"""The page of two scans of a patient: how the bleeds changed, and both scans side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.app.follow_up.growth import DEFINITION, Change, LesionChange
from ichseg.report import page
from ichseg.report.case_files import read_case
from ichseg.report.page import Card, CaseList, Column, Row
from ichseg.scan.register import Alignment

FIRST, SECOND = "before", "after"  # the names of both cases on the page
_COLUMNS = (
    Column("scan", "Scan"),
    Column("volume", "Volume, mL", 2, "of all that was found"),
)


@dataclass(frozen=True, slots=True)
class FollowUp:
    """What is said of two scans of a patient.

    Attributes:
        scans: The names of the first and the second scan.
        change: The volume of all lesions in both.
        lesions: The changes of each lesion, the largest first.
        alignment: How the second scan lies on the first.
        warnings: What a reader of the page should know.
    """

    scans: tuple[str, str]
    change: Change
    lesions: Sequence[LesionChange]
    alignment: Alignment
    warnings: Sequence[str]

    @property
    def expansion(self) -> tuple[str, ...] | None:
        """See ``Change.expansion``; None where one scan ends at a lesion, and nobody can tell."""
        return self.change.expansion if all(each.in_both for each in self.lesions) else None


def write(folder: Path, found: FollowUp) -> Path:
    """Write the page.

    Args:
        folder: The folder that ``write_case`` was given, for the cases ``before`` and ``after``.
        found: What was found.

    Returns:
        The path of the page.

    Raises:
        OutputError: The folder cannot be written.
        PlansError: A file of ``write_case`` has been altered.
    """
    shown = [read_case(folder, name) for name in (FIRST, SECOND)]
    pair = tuple(each.slug for each in shown if each is not None)
    volumes = (found.change.before_ml, found.change.after_ml)
    cases = [
        (name, scan, volume, each)
        for name, scan, volume, each in zip(
            (FIRST, SECOND), found.scans, volumes, shown, strict=True
        )
    ]
    return page.write(
        folder,
        page.environment().get_template("follow_up.html"),
        title="Follow-up of two scans",
        subtitle=f"{found.scans[0]}, then {found.scans[1]}",
        cases=CaseList(
            columns=_COLUMNS,
            rows=[Row(name, {"scan": scan, "volume": ml}) for name, scan, ml, _ in cases],
            cards=[
                Card(name, each, about=(scan, ml), pair=pair if len(pair) == 2 else ())
                for name, scan, ml, each in cases
            ],
            order="The second scan is shown as it lies on the first.",
        ),
        found=found,
        slug=pair[0] if pair else "",
        definition=DEFINITION,
    )
