"""Which files of a folder are masks to score."""

from __future__ import annotations

from pathlib import Path

from ichseg.errors import DatasetError
from ichseg.files import SCAN_SUFFIXES, is_named_as_scan, stem_of, suffix_of


def masks_below(folder: Path) -> list[Path]:
    """Every volume in a folder and its subfolders, in the order of their paths.

    Left out is what ``process.py`` writes beside its masks: the copies of a page, in a folder
    ``report``, and the probabilities ``CASE_probability.nii.gz`` of a ``CASE`` that is there.

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
        if not _of_a_page(path, folder) and not _is_probability(path, cases)
    ]
    if not found:
        raise DatasetError(f"{folder}: no volumes, expected files {', '.join(SCAN_SUFFIXES)}")
    return found


def _of_a_page(path: Path, folder: Path) -> bool:
    parents = path.relative_to(folder).parts[:-1]
    places = [folder.joinpath(*parents[: i + 1]) for i in range(len(parents))]
    return any(place.name == "report" and (place / "index.html").exists() for place in places)


def _is_probability(path: Path, cases: set[Path]) -> bool:
    case, underscore, ending = stem_of(path).rpartition("_")
    is_one = bool(underscore) and ending == "probability" and suffix_of(path) == ".nii.gz"
    return is_one and path.parent / case in cases
