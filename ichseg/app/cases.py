"""Finds the cases in an input folder, in every layout, and names their outputs.

Nothing outside the input folder is taken: neither through a path that ``inputs.json`` names nor
through a link. Imports nothing heavy: a wrong input folder is refused before torch is loaded.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ichseg.errors import InputError, OutputError
from ichseg.files import SCAN_SUFFIXES, UNFINISHED, stem_of, suffix_of
from ichseg.scan.dicom.studies import find_studies

INPUTS_FILE = "inputs.json"
_INPUTS_LIMIT = 16 << 20  # bytes; the platform's are a few thousand


@dataclass(frozen=True, slots=True)
class InputCase:
    """One scan to segment.

    Attributes:
        name: For the log, the file name, or that of the folder.
        image: The scan's file, or the folder of its DICOM slices.
        output: Where its mask goes.
        study: The UID of its study where slices of another one lie in the same folder.
    """

    name: str
    image: Path
    output: Path
    study: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """All cases of a run.

    Attributes:
        cases: In the order of their names.
        platform: The folder has Grand Challenge's layout: masks and ``results.json``, no pictures.
        challenge: INSTANCE 2022's batch: masks of 0 and 1, and no other file beside them.
    """

    cases: tuple[InputCase, ...]
    platform: bool
    challenge: bool = False


def find_cases(folder: Path, output: Path, *, input_slug: str, output_slug: str) -> Job:
    """Recognise the layout of an input folder.

    In this order: ``inputs.json`` (one image socket, or the one named ``input_slug``),
    ``images/<slug>/*.mha`` (likewise), else what lies directly in the folder: volumes, folders of
    DICOM slices, or slices themselves; of DICOM each study is a case. On the platform layouts
    masks go to ``images/<output_slug>/``; in a flat folder they keep the input's file name, and
    those of DICOM get their folder's name and ``_straight``, since their grid may be another than
    the slices'.

    Raises:
        InputError: There is no case, more than one socket could be meant, or a path leads out of
            the folder.
    """
    if not re.fullmatch(r"[-\w]+", output_slug, re.ASCII):
        raise InputError(
            f"output slug {_quoted(output_slug)}, expected letters, digits, - and _ only"
        )
    with _readable(folder):
        return _recognise(folder, output, input_slug, output_slug)


def _recognise(folder: Path, output: Path, input_slug: str, output_slug: str) -> Job:
    masks = output / "images" / output_slug
    if (folder / INPUTS_FILE).is_file():
        path = _inside(folder / INPUTS_FILE, folder)
        socket = _choose(_sockets(path), input_slug, path)
        return Job(_platform_cases(_relative(socket, folder, path), masks, folder), platform=True)
    if (folder / "images").is_dir():
        slugs = {
            path.name: f"images/{path.name}"
            for path in sorted(_inside(folder / "images", folder).iterdir())
            if path.is_dir()
        }
        socket = _choose(slugs, input_slug, folder / "images")
        return Job(_platform_cases(folder / socket, masks, folder), platform=True)
    cases = [InputCase(path.name, path, output / path.name) for path in _volumes(folder, folder)]
    cases += [
        InputCase(study.name, study.folder, output / f"{study.name}_straight.mha", study.uid)
        for study in find_studies(folder, _entries(folder, output))
    ]
    if not cases:
        raise InputError(
            f"{folder}: found no scan, expected {', '.join(SCAN_SUFFIXES)} files, DICOM slices "
            "or a Grand Challenge layout"
        )
    for mask, count in Counter(case.output for case in cases).items():
        if count > 1:
            raise InputError(f"{folder}: {count} scans whose masks would be {mask.name}")
    return Job(tuple(sorted(cases, key=lambda case: case.name)), platform=False)


def _entries(folder: Path, output: Path) -> list[Path]:
    """What lies in the input folder and may be DICOM.

    The output folder may lie there, too, with an earlier run's DICOM-SEG.
    """
    return [
        _inside(path, folder)
        for path in sorted(_inside(folder, folder).iterdir())
        if not path.name.startswith(".")
        if path.is_dir() or (path.is_file() and not suffix_of(path))
        if path.resolve() != output.resolve()
    ]


def find_challenge_cases(folder: Path, predict: Path) -> Job:
    """INSTANCE 2022's batch: every ``.nii.gz`` of a folder, the same name out.

    Raises:
        InputError: There is no case, or a link leads out of the folder.
    """
    with _readable(folder):
        images = _volumes(folder, folder, suffixes=(".nii.gz",))
    if not images:
        raise InputError(f"{folder}: found no scan, expected .nii.gz files")
    return Job(
        tuple(InputCase(path.name, path, predict / path.name) for path in images),
        platform=False,
        challenge=True,
    )


def check_output(job: Job, output: Path) -> None:
    """Refuse an output folder that cannot be written, or where masks would replace scans.

    Raises:
        OutputError: It is such a folder.
    """
    for case in job.cases:
        # a scan that has gone since it was listed is its case's fault, and said there
        if case.output.exists() and case.image.exists() and case.output.samefile(case.image):
            raise OutputError(f"{case.image}: its mask would replace it; name another --output")
    probe = output / f"{UNFINISHED}probe"
    try:
        output.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:  # also when a signal comes in between
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot write results there ({error.strerror})") from error


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Refuse an input folder that is not there, or of which something cannot be read."""
    try:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected the scans to segment")
        yield
    except OSError as error:
        place = str(error.filename or folder)[:200]
        raise InputError(f"{place}: cannot read ({error.strerror or error})") from error


def _sockets(path: Path) -> dict[str, Any]:
    """Image sockets of ``inputs.json``: slug to relative path, which is not checked yet."""
    try:
        size = path.stat().st_size
        if size > _INPUTS_LIMIT:
            raise InputError(f"{path}: {size} bytes, expected at most {_INPUTS_LIMIT}")
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            entry["interface"]["slug"]: entry["interface"]["relative_path"]
            for entry in entries
            if entry.get("image") or entry["interface"].get("super_kind", "").lower() == "image"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not the platform's list of inputs ({_quoted(error)})") from error


def _choose(sockets: dict[str, Any], wanted: str, where: Path) -> Any:
    if wanted in sockets:
        return sockets[wanted]
    if len(sockets) == 1:
        return next(iter(sockets.values()))
    found = ", ".join(sorted(map(str, sockets)))[:200] or "none"
    raise InputError(
        f"{where}: image sockets are {found}; expected exactly one, or one named {wanted} "
        "(see --input-slug)"
    )


def _relative(named: Any, folder: Path, where: Path) -> Path:
    """The folder that ``inputs.json`` names, which must be one below the input folder."""
    plain = isinstance(named, str) and named and "\0" not in named
    if not plain or PurePosixPath(named).is_absolute() or ".." in PurePosixPath(named).parts:
        raise InputError(
            f"{where}: relative_path is {_quoted(named)}, expected a path inside {folder}"
        )
    return folder / str(named)


def _platform_cases(socket: Path, masks: Path, folder: Path) -> tuple[InputCase, ...]:
    images = _volumes(socket, folder)
    if not images:
        raise InputError(f"{socket}: found no scan, expected one of {', '.join(SCAN_SUFFIXES)}")
    cases = tuple(InputCase(path.name, path, masks / f"{stem_of(path)}.mha") for path in images)
    for output, count in Counter(case.output for case in cases).items():
        if count > 1:
            raise InputError(
                f"{socket}: {count} scans named {output.stem}, expected one, "
                f"since their masks would all be {output.name}"
            )
    return cases


def _volumes(folder: Path, root: Path, suffixes: tuple[str, ...] = SCAN_SUFFIXES) -> list[Path]:
    """The volumes that lie in a folder, none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        _inside(path, root)
        for path in _inside(folder, root).iterdir()
        if path.name.lower().endswith(suffixes) and not path.name.startswith(".") and path.is_file()
    )


def _inside(path: Path, folder: Path) -> Path:
    """The path itself, refused where a link leads out of the input folder.

    The input folder may be a link, and links may point to places inside it.
    """
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except RuntimeError as error:  # links in a circle
        raise InputError(f"{str(path)[:200]}: cannot be followed ({_quoted(error)})") from error
    if not inside:
        raise InputError(
            f"{path}: a link that leads out of {folder}; expected the file itself (cp -L makes one)"
        )
    return path


def _quoted(value: object) -> str:
    """As Python writes it, which keeps to one line; not more of it than a line holds."""
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
