"""Which files of a folder are DICOM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ichseg.errors import InputError

MOST_FILES = 20_000  # in one case
MARK_AT, MARK = 128, b"DICM"
_DEEPEST = 8  # folders in folders


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark. Those without the preamble are not looked for."""
    try:
        with path.open("rb", buffering=0) as stream:
            return stream.read(MARK_AT + 4)[MARK_AT:] == MARK
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether any file in a folder, or in the folders below, has DICOM's mark."""
    return any(is_dicom(path) for path in walk(folder))


def walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below, by name; hidden ones are left out.

    Links to folders are not followed.

    Raises:
        InputError: There are too many, folders are nested too deep, or a link leads out.
    """
    home = folder.resolve()
    waiting = [(folder, 0)]
    count = 0
    while waiting:
        here, depth = waiting.pop(0)
        try:
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{here}: cannot read ({error.strerror or error})") from error
        count += len(entries)
        if count > MOST_FILES:
            raise InputError(f"{folder}: more than {MOST_FILES} files, expected those of one scan")
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = here / entry.name
            if entry.is_dir(follow_symlinks=False):
                if depth == _DEEPEST:
                    raise InputError(f"{path}: more than {_DEEPEST} folders deep in {folder}")
                waiting.append((path, depth + 1))
            elif entry.is_file():
                if entry.is_symlink() and not path.resolve().is_relative_to(home):
                    raise InputError(f"{path}: a link that leads out of {folder}")
                yield path
