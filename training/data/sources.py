"""Which content the files of the cases have: what was made from other content is made again.

A digest follows from the content alone. ``WORKSPACE/sources.json`` remembers the digest of each
file beside its size, the times at which its content and its place in the file system last changed,
and that place, so that only files which look changed are read again; it may be deleted at any time.
Size and time of the content alone would not do: those of two files that were unpacked together may
be the same, and then it went unseen that they were exchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import OutputError, PlansError
from ichseg.files import replacing, sha256
from ichseg.model import strict_json
from training.data.dataset import Case, Dataset
from training.data.workspace import sources_file

SCHEMA_VERSION = 2
_READERS = 4  # files hashed at a time; hashing leaves Python's lock to others


@dataclass(frozen=True, slots=True)
class _Known:
    """A file whose content has been read.

    Attributes:
        file: Its path, relative to the workspace where it lies inside.
        bytes: Its size.
        modified_ns: When it was last changed, in nanoseconds.
        moved_ns: When it was last changed, renamed or linked, in nanoseconds.
        inode: Its number in the file system.
        digest: SHA-256 of its content.
    """

    file: str
    bytes: int
    modified_ns: int
    moved_ns: int
    inode: int
    digest: str


@dataclass(frozen=True, slots=True)
class _KnownFiles:
    """The layout of sources.json."""

    schema_version: int
    files: tuple[_Known, ...]

    def __post_init__(self) -> None:
        strict_json.check_schema("sources", self.schema_version, SCHEMA_VERSION)


def digest_cases(
    workspace: Path, cases: Iterable[Case], *, remember: bool = True
) -> dict[str, str]:
    """A digest of the content of each case's files: its images in order, and its label.

    Args:
        workspace: Whose ``sources.json`` saves reading files that have not changed.
        cases: The cases, with distinct names.
        remember: Write to ``sources.json`` what had to be read.

    Returns:
        The digest by name of the case; an empty one where a file is missing or cannot be read.
    """
    wanted = {case.name: case.files for case in cases}
    before = _load(workspace)
    now = _look(workspace, sorted({path for files in wanted.values() for path in files}), before)
    if remember and any(before.get(path) != known for path, known in now.items()):
        _save(workspace, before | now)
    return {
        name: _combine([now[path].digest for path in files])
        if all(path in now for path in files)
        else ""
        for name, files in wanted.items()
    }


def digest_sources(workspace: Path, dataset: Dataset, *, remember: bool = True) -> str:
    """One digest of the names of the labelled cases and of the content of all their files."""
    digests = digest_cases(workspace, dataset.labelled, remember=remember)
    return _combine([f"{name} {digests[name]}" for name in sorted(digests)])


def _look(workspace: Path, paths: list[Path], before: dict[Path, _Known]) -> dict[Path, _Known]:
    """What is known of each file now; files that cannot be read are left out."""

    def look(path: Path) -> _Known | None:
        try:
            found = path.stat()
            shown = path.relative_to(workspace) if path.is_relative_to(workspace) else path
            times = (found.st_mtime_ns, found.st_ctime_ns)
            now = _Known(str(shown), found.st_size, *times, found.st_ino % (1 << 63), digest="")
            known = before.get(path)
            if known and dataclasses.replace(known, digest="") == now:
                return known
            return dataclasses.replace(now, digest=sha256(path))
        except OSError:  # whoever needs it will say so
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip(paths, pool.map(look, paths), strict=True))
    return {path: known for path, known in found.items() if known is not None}


def _combine(digests: list[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _load(workspace: Path) -> dict[Path, _Known]:
    try:
        known = strict_json.load(_KnownFiles, sources_file(workspace))
    except PlansError:  # none yet, or not of this version: all files are read
        return {}
    return {workspace / one.file: one for one in known.files}


def _save(workspace: Path, known: dict[Path, _Known]) -> None:
    files = tuple(sorted(known.values(), key=lambda one: one.file))
    with contextlib.suppress(OutputError), replacing(sources_file(workspace)) as temporary:
        content = strict_json.dumps(_KnownFiles(SCHEMA_VERSION, files))
        temporary.write_text(content, encoding="utf-8")


def corrected_since(seen: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The cases whose files are others than those that a network was trained on, by their names.

    Args:
        seen: The digests that were noted then; empty for a case where that is not known.
        now: The digests of the files as they are.
    """
    return sorted(name for name, was in seen.items() if was and now.get(name, was) != was)
