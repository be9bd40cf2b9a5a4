"""Files as every room needs them: names of scans, writing whole or not at all, checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ichseg.errors import OutputError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
WRITTEN_SUFFIXES = (".mha", *NIFTI_SUFFIXES, ".nrrd")  # of masks
SCAN_SUFFIXES = (*WRITTEN_SUFFIXES, ".mhd")
UNFINISHED = ".writing-"  # how the names of temporary files begin
_under_way: set[Path] = set()  # temporary files that this process is writing


def suffix_of(path: Path) -> str:
    """The suffix of a scan's file name, lower case, ``.nii.gz`` as one; else an empty string."""
    name = path.name.lower()
    return next((suffix for suffix in SCAN_SUFFIXES if name.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """The file name without a scan's suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def is_named_as_scan(path: Path) -> bool:
    """Whether a file is not hidden and its name ends as that of a scan; it is not looked at."""
    return bool(suffix_of(path)) and not path.name.startswith(".")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path, *, suffix: str = "", durable: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives an empty temporary file in the same folder, which takes the place of ``path`` when the
    block ends well and is removed when it does not.

    Args:
        path: The file to write; folders above it are made.
        suffix: What the temporary name ends in, for libraries that go by it.
        durable: Whether the file must have reached the disk before it takes the place of ``path``,
            so that one of the two is whole even after a loss of power.

    Raises:
        OutputError: The folder cannot be created or written, or the block raised an ``OSError``.
    """
    temporary: Path | None = None
    handle = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _new_file(path.parent, suffix)
        _under_way.add(temporary)
        yield temporary
        temporary.chmod(0o644)
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise OutputError(f"{path}: cannot write ({reason})") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            _under_way.discard(temporary)
            os.close(handle)


def remove_if_there(path: Path) -> None:
    """Remove a file, if there is one; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder to write in, and those above it, where they are missing.

    Raises:
        OutputError: It cannot be made, or a file has its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: no folder to write in ({_why_not(folder, error)})") from error


def require_writable(folder: Path) -> None:
    """Make a folder where it is missing, and try whether a file can be written to it.

    Raises:
        OutputError: None can.
    """
    probe = folder / f"{UNFINISHED}probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:  # also when a signal comes in between
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = _why_not(folder, error)
        raise OutputError(f"{folder}: cannot write results there ({reason})") from error


def _why_not(folder: Path, error: OSError) -> str:
    """Why nothing can be written to a folder: what is in its place, or what the system says."""
    with contextlib.suppress(OSError):  # what cannot be looked at, either
        for place in (folder, *folder.parents):
            if place.is_file():
                return f"{place} is a file, expected a folder"
            if place.is_symlink() and not place.exists():
                return f"{place} is a link to nothing, expected a folder"
    return error.strerror or str(error)


@contextlib.contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside a folder, for several files that belong together.

    Raises:
        OSError: It cannot be made.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as name:
        handle = os.open(name, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                lock(handle)
            yield Path(name)
        finally:
            os.close(handle)


def lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed, however this process ends.

    Returns:
        Whether it is locked now; False where another process has locked it.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def abandon_unfinished() -> None:
    """Remove what other threads of this process are writing, before it ends without them.

    Files of another process in the same folder stay: it may still be at work.
    """
    for unfinished in list(_under_way):
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run has left half-written in a folder.

    What a process that is alive is writing there is locked, and stays.

    Raises:
        OSError: Something cannot be removed.
    """
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        try:
            handle = os.open(unfinished, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except (FileNotFoundError, PermissionError):
            continue  # finished just now, or somebody else's, who may be at work
        try:
            if not _has_owner(handle):
                if unfinished.is_dir():
                    shutil.rmtree(unfinished)
                else:
                    unfinished.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _has_owner(handle: int) -> bool:
    """Whether a living process has locked what is open here; not known without locks, so no."""
    try:
        return not lock(handle)
    except OSError:
        return False


def _new_file(folder: Path, suffix: str) -> tuple[int, Path]:
    """A temporary file that is open and locked, so that nobody takes it for a killed run's."""
    while True:
        handle, name = tempfile.mkstemp(dir=folder, prefix=UNFINISHED, suffix=suffix)
        with contextlib.suppress(OSError):  # a file system without locks
            lock(handle)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # it was taken for one before it was locked
