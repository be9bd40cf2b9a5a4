"""Which files of a folder are DICOM."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ichseg.errors import InputError
from ichseg.wording import counted

MOST_FILES = 20_000  # in one case
MARK_AT, MARK = 128, b"DICM"
_FIRST_GROUPS = (b"\2\0", b"\x08\0")  # which a DICOM file without the preamble begins with
_PACKED = re.compile(r"\.(dcm|ima)\.(gz|bz2|xz|zst|zip)", re.IGNORECASE)
_DEEPEST = 8  # folders in folders


@dataclass(slots=True)
class Listing:
    """What lies in a folder and in those below it.

    Attributes:
        files: The files, folder by folder, by name.
        passed_over: Links that lead out and folders too deep, with the reason in words.
        no_files: What else is neither a file nor a folder that was looked into, likewise.
    """

    files: list[Path] = field(default_factory=list)
    passed_over: list[tuple[Path, str]] = field(default_factory=list)
    no_files: list[tuple[Path, str]] = field(default_factory=list)


def is_packed(path: Path) -> bool:
    """Whether a file has the name of a compressed slice, which is not read."""
    return bool(_PACKED.fullmatch("".join(path.suffixes[-2:])))


def is_dicom(path: Path) -> bool:
    """Whether a file can be read and has DICOM's mark, see ``has_mark``."""
    try:
        return has_mark(path)
    except InputError:
        return False


def has_mark(path: Path) -> bool:
    """Whether a file has DICOM's mark.

    Raises:
        InputError: It cannot be read, or is the beginning of a slice, or empty under such a name,
            or begins as a DICOM file does after the preamble: it is not read, but could be a slice.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            start = stream.read(MARK_AT + 4)
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror or error})") from error
    named_as_slice = not path.suffix or path.suffix[1:].isdecimal()  # IM0001, or a UID
    if named_as_slice and len(start) < MARK_AT + 4 and not start.strip(b"\0"):
        raise InputError(f"{path}: cut off, {counted(len(start), 'byte')}")
    has_it = start[MARK_AT:] == MARK
    if named_as_slice and not has_it and start[:2] in _FIRST_GROUPS:
        raise InputError(f"{path}: DICOM without a preamble, expected DICM at byte 128")
    return has_it


def walk(folder: Path, *, follow_links: bool = False) -> Listing:
    """The files in a folder and in those below; hidden ones are left out.

    Args:
        folder: Where to look.
        follow_links: Whether links are followed wherever they lead; otherwise those to folders are
            not, and those to files only where they stay within the folder.

    Raises:
        InputError: There are too many files, or a folder cannot be read.
    """
    home = folder.resolve()
    found = Listing()
    waiting = [(folder, 0)]
    seen = {home}
    count = 0
    while waiting:
        here, depth = waiting.pop(0)
        try:
            with os.scandir(here) as entries:
                in_order = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{here}: cannot read ({error.strerror or error})") from error
        count += len(in_order)
        if count > MOST_FILES:
            raise InputError(f"{folder}: more than {MOST_FILES} files, expected those of one scan")
        for entry in in_order:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=follow_links):
                if follow_links and path.resolve() in seen:
                    continue  # a link to what has been listed, or to a folder above
                seen.add(path.resolve() if follow_links else path)
                if depth == _DEEPEST:
                    found.passed_over.append((path, f"more than {_DEEPEST} folders deep"))
                else:
                    waiting.append((path, depth + 1))
            elif entry.is_file():
                outside = entry.is_symlink() and not follow_links
                if outside and not path.resolve().is_relative_to(home):
                    found.passed_over.append((path, f"a link that leads out of {folder}"))
                else:
                    found.files.append(path)
            elif entry.is_dir():
                found.no_files.append((path, "a link to a folder"))
            else:
                link = entry.is_symlink()
                what = "a link to nothing" if link else "neither a file nor a folder"
                found.no_files.append((path, what))
    return found
