"""Which files of a folder are masks to score."""

from __future__ import annotations

from pathlib import Path

from ichseg.errors import DatasetError
from ichseg.files import SCAN_SUFFIXES, is_named_as_scan, stem_of, suffix_of
from ichseg.report import CASES_FOLDER, PAGE_FILE


def masks_below(folder: Path) -> list[Path]:
    """Every volume in a folder and its subfolders, in the order of their paths.

    Left out is what ``process.py`` and ``report`` write beside masks: the copies of a page, and the
    probabilities ``CASE_probability.nii.gz`` of a ``CASE`` that is there.

    Raises:
        DatasetError: There is no such folder, or no volume in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    volumes = [path for path in folder.rglob("*") if is_named_as_scan(path) and path.is_file()]
    cases = {path.parent / stem_of(path) for path in volumes}
    found = [
        path
        for path in sorted(volumes, key=str)
        if not _of_a_page(path) and not _is_probability(path, cases)
    ]
    if not found:
        raise DatasetError(f"{folder}: no volumes, expected files {', '.join(SCAN_SUFFIXES)}")
    return found


def masks_by_name(folder: Path) -> dict[str, Path]:
    """The same volumes by their names without suffix.

    Raises:
        DatasetError: There is no such folder, no volume in it, or one name stands twice.
    """
    found: dict[str, Path] = {}
    for path in masks_below(folder):
        if stem_of(path) in found:
            raise DatasetError(f"{path}: the same case as {found[stem_of(path)]}")
        found[stem_of(path)] = path
    return found


def _of_a_page(path: Path) -> bool:
    folder = path.parent
    return folder.name == CASES_FOLDER and (folder.parent / PAGE_FILE).exists()


def _is_probability(path: Path, cases: set[Path]) -> bool:
    case, underscore, ending = stem_of(path).rpartition("_")
    is_one = bool(underscore) and ending == "probability" and suffix_of(path) == ".nii.gz"
    return is_one and path.parent / case in cases
