"""What lies in an input folder: scans, what only looks like one, and the rest with the reason.

Also by what a scan is known again, so that ``--resume`` leaves it alone.

Imports nothing heavy: a wrong input folder is refused before an engine is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ichseg.errors import InputError
from ichseg.files import SCAN_SUFFIXES, suffix_of
from ichseg.scan.dicom import files
from ichseg.wording import counted

if TYPE_CHECKING:
    from ichseg.scan.dicom.studies import Study

# Volumes in formats that are not read; each is a scan that somebody expects a mask of.
OTHER_SUFFIXES = (".nhdr", ".hdr", ".mgz", ".mgh", ".mnc", ".tif", ".tiff")
_DEEPEST = 16  # folders in folders that are looked into
_PIECE, _PIECES = 4096, 16  # bytes of a scan's file that are looked at, and how many such pieces
_GOLDEN = 0.6180339887498949  # its multiples lie between each other: no piece after piece of air


class Stamp(TypedDict):
    """By what a scan is known again: bytes on disk, latest date of its files in ns, and content.

    Two scans that were unpacked from an archive may have one date, and all of one grid one size:
    the digest of some pieces of their files tells them apart.
    """

    bytes: int
    modified_ns: int
    pieces: str


@dataclass(frozen=True, slots=True)
class Search:
    """How a folder is looked into.

    Attributes:
        root: The input folder, out of which nothing may lead.
        output: The output folder, which may lie there, too, with an earlier run's DICOM-SEG.
        suffixes: How the names of scans end.
        follow_links: Whether links may lead out of the input folder.
        recursive: Whether volumes in folders of it are scans, too.
    """

    root: Path
    output: Path
    suffixes: tuple[str, ...] = SCAN_SUFFIXES
    follow_links: bool = False
    recursive: bool = False


@dataclass(slots=True)
class Contents:
    """What lies in a folder.

    Attributes:
        volumes: Files of one scan each.
        studies: Scans of DICOM slices, each with the folder that it was found in.
        refused: What looks like a scan, with the reason why it cannot be one.
        passed_over: The names of the rest, with the reason.
    """

    volumes: list[Path] = field(default_factory=list)
    studies: list[tuple[Path, Study]] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)


def look_into(folder: Path, search: Search) -> Contents:
    """Tell apart what lies in a folder, and where that is asked for, in those below.

    Raises:
        OSError: Something cannot be read.
    """
    found = Contents()
    _look_into(folder, search, found, above=(folder.resolve(),))
    return found


def _look_into(folder: Path, search: Search, found: Contents, above: tuple[Path, ...]) -> None:
    """Add what lies in a folder; ``above`` are the folders that the way led through."""
    may_be_dicom: list[Path] = []
    voxels = _voxel_files(folder)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            if is_named(path, *search.suffixes, *OTHER_SUFFIXES):
                found.passed_over.append((_name(path, search), "hidden"))
        elif why := leads_out(path, search):
            found.refused.append((path, why))
        elif path.resolve() == search.output.resolve():
            continue
        elif path.is_dir():
            if _is_looked_into(path, search):
                _look_further(path, search, found, above)
            else:
                may_be_dicom.append(path)
        elif is_named(path, *search.suffixes, *OTHER_SUFFIXES):
            _add_named(path, search, found)
        elif path.is_file() and files.is_dicom(path):
            may_be_dicom.append(path)
        elif path not in voxels:
            found.passed_over.append((_name(path, search), "no scan by its name or content"))
    if not may_be_dicom:
        return
    from ichseg.scan.dicom.studies import find_studies  # loads numpy and ITK

    dicom = find_studies(folder, may_be_dicom, follow_links=search.follow_links)
    found.studies += [(folder, study) for study in dicom.studies]
    found.refused += dicom.faults
    found.passed_over += [(_name(path, search), what) for path, what in dicom.others]
    for path in may_be_dicom:
        if path.is_dir():
            is_case = any(study.folder.is_relative_to(path) for study in dicom.studies)
            with contextlib.suppress(InputError):  # which will be said when its case is read
                _look_into_other(path, search, found, is_case=is_case)


def _voxel_files(folder: Path) -> set[Path]:
    """The files that hold voxels of the ``.mhd`` in a folder, by their headers."""
    detached = [path for path in folder.iterdir() if is_named(path, ".mhd") and path.is_file()]
    if not detached:
        return set()
    from ichseg.scan import headers  # loads numpy

    found = (headers.voxels_beside(path) for path in detached)
    return {path for path in found if path is not None}


def _look_further(path: Path, search: Search, found: Contents, above: tuple[Path, ...]) -> None:
    """Add what lies in a folder of the folder, unless the way there has no end."""
    if path.resolve() in above:
        found.passed_over.append((f"{_name(path, search)}/", "a link to a folder above"))
    elif len(above) == _DEEPEST:
        found.refused.append((path, f"more than {_DEEPEST} folders deep"))
    else:
        _look_into(path, search, found, (*above, path.resolve()))


def _add_named(path: Path, search: Search, found: Contents) -> None:
    """Add what has the name of a volume's file."""
    if not path.is_file():
        what = "neither a file nor a folder" if path.exists() else "a link to nothing"
        found.refused.append((path, f"{what}, expected a scan"))
    elif is_named(path, *search.suffixes):
        found.volumes.append(path)
    else:
        suffixes = ", ".join(search.suffixes)
        found.refused.append((path, f"not read, expected {suffixes} or DICOM"))


def _is_looked_into(folder: Path, search: Search) -> bool:
    """Whether volumes in a folder are scans: it has no slices in itself, or volumes beside them."""
    if not search.recursive or is_named(folder, *search.suffixes, *OTHER_SUFFIXES):
        return False
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if any(is_named(path, *search.suffixes, *OTHER_SUFFIXES) for path in entries):
        return True
    return not any(
        path.is_file() and (files.is_dicom(path) or files.is_packed(path)) for path in entries
    )


def _look_into_other(path: Path, search: Search, found: Contents, *, is_case: bool) -> None:
    """Say why a folder in the input is no case of its own, or what a case has beside its slices."""
    listing = files.walk(path, follow_links=search.follow_links)
    scans = sum(is_named(file, *SCAN_SUFFIXES, *OTHER_SUFFIXES) for file in listing.files)
    name = _name(path, search)
    if is_case or any(files.is_dicom(file) for file in listing.files):
        if scans:
            reason = f"holds {counted(scans, 'scan')} beside slices, expected directly in the input"
            found.passed_over.append((f"{name}/", reason))
    elif is_named(path, *SCAN_SUFFIXES, *OTHER_SUFFIXES):
        found.refused.append((path, "a folder, expected a file"))
    elif listing.passed_over and not listing.files:
        found.refused.append((path, f"holds {listing.passed_over[0][1]}, and no file"))
    elif packed := sum(files.is_packed(file) for file in listing.files):
        what = counted(packed, "packed DICOM slice")
        found.refused.append((path, f"holds {what}, expected the slices themselves"))
    elif scans:
        found.passed_over.append(
            (
                f"{name}/",
                f"holds {counted(scans, 'scan')}, expected directly in the input; --recursive "
                "looks into folders",
            )
        )
    else:
        found.passed_over.append((f"{name}/", "a folder without a scan"))


def is_named(path: Path, *suffixes: str) -> bool:
    """Whether a file's name ends so."""
    return path.name.lower().endswith(suffixes)


def leads_out(path: Path, search: Search) -> str:
    """Why a path is not taken: a link leads out of the input folder, or in a circle.

    The input folder may be a link itself, and links may point to places inside it. Empty if all is
    well.
    """
    try:
        inside = path.resolve().is_relative_to(search.root.resolve())
    except RuntimeError:
        return "a link that leads in a circle, expected the file itself"
    if inside or search.follow_links:
        return ""
    return (
        f"a link that leads out of {search.root}; expected the file itself (cp -L makes one), or "
        "--follow-links"
    )


def _name(path: Path, search: Search) -> str:
    """The path in the input folder."""
    return path.relative_to(search.root).as_posix()


def stamp_of(image: Path, *, follow_links: bool = False, output: Path | None = None) -> Stamp:
    """Size and date of a scan, and a digest of some pieces of its files.

    Not a checksum of it all, so that going on with a folder of a thousand takes no time; a scan
    that has been copied since is segmented again.

    Args:
        image: A file, or a folder of slices.
        follow_links: See ``files.walk``.
        output: The folder of the results, which may lie among the slices and does not count.

    Raises:
        InputError: The scan cannot be looked at.
    """
    try:
        paths = [image]
        if image.is_dir():
            paths = files.walk(image, follow_links=follow_links).files
            if output is not None and image.resolve() in output.resolve().parents:
                own = image / output.resolve().relative_to(image.resolve())
                paths = [path for path in paths if not path.is_relative_to(own)]
        elif suffix_of(image) == ".mhd":
            from ichseg.scan import headers  # loads numpy

            voxels = headers.voxels_beside(image)
            paths += [voxels] if voxels is not None else []
        paths.sort()
        stats = [path.stat() for path in paths]
        digest = hashlib.sha256()
        for path, found in zip(paths, stats, strict=True):
            if stat.S_ISREG(found.st_mode):  # whoever opens a pipe waits
                for piece in _pieces_of(path, found.st_size, max(2, _PIECES // len(paths))):
                    digest.update(piece)
    except OSError as error:
        raise InputError(f"{image}: cannot read ({error.strerror})") from error
    return Stamp(
        bytes=sum(found.st_size for found in stats),
        modified_ns=max((found.st_mtime_ns for found in stats), default=0),
        pieces=digest.hexdigest(),
    )


def _pieces_of(path: Path, size: int, count: int) -> Iterator[bytes]:
    """The beginning of a file, and pieces all over it."""
    with path.open("rb") as stream:
        for number in range(count):
            stream.seek(int(number * _GOLDEN % 1 * max(size - _PIECE, 0)))
            yield stream.read(_PIECE)
