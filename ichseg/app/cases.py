"""Finds the cases in an input folder, in every layout, and names their outputs.

Nothing is passed over in silence: what looks like a scan and cannot be taken for one is a case that
has failed already, and everything else is named with the reason. Nothing outside the input folder
is taken: neither through a path that ``inputs.json`` names nor through a link. Imports nothing
heavy: a wrong input folder is refused before an engine is loaded.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ichseg.app import grand_challenge
from ichseg.app.console import say
from ichseg.errors import InputError, OutputError
from ichseg.files import SCAN_SUFFIXES, UNFINISHED, stem_of
from ichseg.scan.dicom import files
from ichseg.wording import counted

if TYPE_CHECKING:
    from ichseg.scan.dicom.studies import Study

# Volumes in formats that are not read; each is a scan that somebody expects a mask of.
OTHER_SUFFIXES = (".nrrd", ".nhdr", ".mhd", ".hdr", ".mgz", ".mgh", ".mnc", ".tif", ".tiff")

_MOST_NAMES, _MOST_REASONS = 5, 20  # that are said of what is passed over


@dataclass(frozen=True, slots=True)
class InputCase:
    """One scan to segment.

    Attributes:
        name: What the log calls it: the name of its file or folder.
        image: The scan's file, or the folder of its DICOM slices.
        output: The file of its mask.
        refusal: Why it cannot be segmented though it looks like a scan; empty if that is tried.
        picture: The file name of its overlay picture, another one for each case.
        study: The UID of its study where slices of another one lie in the same folder.
    """

    name: str
    image: Path
    output: Path
    refusal: str = ""
    picture: str = ""
    study: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """All cases of a run.

    Attributes:
        cases: In the order of their names; those that are refused are among them.
        platform: Whether the folder has Grand Challenge's layout: masks and ``results.json`` are
            written, and nothing else.
        challenge: Whether it is INSTANCE 2022's batch: masks of 0 and 1, and no other file.
        passed_over: What else lies in the folder, each with the reason why it is no case.
    """

    cases: tuple[InputCase, ...]
    platform: bool
    challenge: bool = False
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _Contents:
    """What lies in a folder: scans, what only looks like one, and the rest.

    Attributes:
        volumes: Files of one scan each.
        studies: Scans of DICOM slices.
        refused: What looks like a scan, with the reason why it cannot be one.
        passed_over: The names of the rest, with the reason.
    """

    volumes: list[Path] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)


def find_cases(folder: Path, output: Path, *, input_slug: str, output_slug: str) -> Job:
    """Recognise the layout of an input folder.

    In this order: ``inputs.json`` (one image socket, or the one named ``input_slug``),
    ``images/<slug>/`` (likewise), else what lies directly in the folder: volumes, folders of DICOM
    slices, or slices themselves; of DICOM each study is a case. On the platform's layouts masks go
    to ``images/<output_slug>/``; in a flat folder they keep the input's file name, and those of
    DICOM get their folder's name and ``_straight``, since their grid may be another than the
    slices'.

    Args:
        folder: The input folder.
        output: The folder for masks; it may lie in the input folder.
        input_slug: The platform's socket of the scan, if there are several.
        output_slug: The platform's socket of the mask.

    Raises:
        InputError: There is no case, or more than one socket could be meant.
    """
    if not re.fullmatch(r"[-\w]+", output_slug, re.ASCII):
        raise InputError(
            f"output slug {output_slug[:100]!r}, expected letters, digits, - and _ only"
        )
    with _readable(folder):
        if grand_challenge.is_platform_layout(folder):
            return _platform_job(folder, output / "images" / output_slug, input_slug)
        found = _look_into(folder, folder, output)
        cases = [InputCase(path.name, path, output / path.name) for path in found.volumes]
        cases += [
            InputCase(
                study.name, study.folder, output / f"{study.name}_straight.mha", study=study.uid
            )
            for study in found.studies
        ]
        cases += [InputCase(p.name, p, output / p.name, why) for p, why in found.refused]
        return _job(folder, cases, found.passed_over)


def find_challenge_cases(folder: Path, predict: Path) -> Job:
    """INSTANCE 2022's batch: every ``.nii.gz`` of a folder, the same name out.

    Raises:
        InputError: There is no case.
    """
    suffix = ".nii.gz"
    with _readable(folder):
        found = _look_into(folder, folder, predict, suffixes=(suffix,))
        other = [
            *(study.name for study in found.studies),
            *(p.name for p, _ in found.refused if not _is_named(p, suffix)),
        ]
        passed_over = [*found.passed_over, *((name, f"not {suffix}") for name in other)]
        cases = [InputCase(path.name, path, predict / path.name) for path in found.volumes]
        cases += [
            InputCase(p.name, p, predict / p.name, why)
            for p, why in found.refused
            if _is_named(p, suffix)
        ]
        return replace(_job(folder, cases, passed_over, (suffix,)), challenge=True)


def _platform_job(folder: Path, masks: Path, input_slug: str) -> Job:
    """The scans of one socket, and what lies beside it."""
    for listed in (folder / grand_challenge.INPUTS_FILE, folder / grand_challenge.IMAGES):
        if why := _leads_out(listed, folder):
            raise InputError(f"{listed}: {why}")
    socket = grand_challenge.socket_folder(folder, input_slug)
    if why := _leads_out(socket, folder):
        raise InputError(f"{socket}: {why}")
    found = _look_into(socket, folder, masks) if socket.is_dir() else _Contents()
    cases = [InputCase(p.name, p, masks / f"{stem_of(p)}.mha") for p in found.volumes]
    cases += [
        InputCase(study.name, study.folder, masks / f"{study.name}.mha", study=study.uid)
        for study in found.studies
    ]
    cases += [InputCase(p.name, p, masks / f"{stem_of(p)}.mha", why) for p, why in found.refused]
    beside = [
        (path.name, f"not in the socket's folder, {socket.relative_to(folder)}")
        for path in sorted(folder.iterdir())
        if _is_named(path, *SCAN_SUFFIXES, *OTHER_SUFFIXES)
    ]
    images = folder / grand_challenge.IMAGES
    beside += [
        (f"{images.name}/{path.name}", "of another socket")
        for path in (sorted(images.iterdir()) if images.is_dir() else ())
        if path != socket and path not in socket.parents
    ]
    return replace(_job(socket, cases, [*found.passed_over, *beside]), platform=True)


def _job(
    folder: Path,
    cases: Sequence[InputCase],
    passed_over: Sequence[tuple[str, str]],
    suffixes: tuple[str, ...] = (*SCAN_SUFFIXES, "DICOM slices"),
) -> Job:
    """The job of these cases; those whose masks would be one file are refused.

    Raises:
        InputError: There is no case.
    """
    if not cases:
        named = [f"{name} ({why})" for name, why in passed_over[:3]]
        named += ["others"] if len(passed_over) > 3 else []
        raise InputError(
            f"{folder}: found no scan, expected {', '.join(suffixes)}"
            + (f"; passed over: {', '.join(named)}" if named else "")
        )
    masks = Counter(case.output for case in cases)
    stems = Counter(stem_of(Path(case.name)) for case in cases)
    names = {case.name for case in cases}
    in_order = []
    for case in sorted(cases, key=lambda case: case.name):
        refusal, stem = case.refusal, stem_of(Path(case.name))
        if masks[case.output] > 1 and not refusal:
            refusal = f"{masks[case.output]} scans whose masks would be {case.output.name}"
        alone = stems[stem] == 1 and (stem == case.name or stem not in names)
        picture = f"{stem if alone else case.name}.png"
        in_order.append(replace(case, refusal=refusal, picture=picture))
    return Job(tuple(in_order), platform=False, passed_over=tuple(passed_over))


def _look_into(
    folder: Path, root: Path, output: Path, suffixes: tuple[str, ...] = SCAN_SUFFIXES
) -> _Contents:
    """Tell apart what lies in a folder.

    Args:
        folder: The folder.
        root: The input folder, out of which nothing may lead.
        output: The output folder, which may lie there, too, with an earlier run's DICOM-SEG.
        suffixes: How the names of scans end.
    """
    found = _Contents()
    may_be_dicom: list[Path] = []
    for path in sorted(folder.iterdir()):
        named = _is_named(path, *suffixes, *OTHER_SUFFIXES)
        if path.name.startswith("."):
            if named:
                found.passed_over.append((path.name, "hidden"))
        elif why := _leads_out(path, root):
            found.refused.append((path, why))
        elif path.resolve() == output.resolve():
            continue
        elif path.is_dir():
            may_be_dicom.append(path)
        elif named and not path.is_file():
            what = "neither a file nor a folder" if path.exists() else "a link to nothing"
            found.refused.append((path, f"{what}, expected a scan"))
        elif _is_named(path, *suffixes):
            found.volumes.append(path)
        elif named:
            found.refused.append((path, f"not read, expected {', '.join(suffixes)} or DICOM"))
        elif path.is_file() and files.is_dicom(path):
            may_be_dicom.append(path)
        else:
            found.passed_over.append((path.name, "no scan by its name or content"))
    if may_be_dicom:
        from ichseg.scan.dicom.studies import find_studies  # loads numpy and ITK

        found.studies += find_studies(folder, may_be_dicom)
    for path in may_be_dicom:
        if path.is_dir() and not any(s.folder.is_relative_to(path) for s in found.studies):
            _look_into_other(path, found)
    return found


def _look_into_other(path: Path, found: _Contents) -> None:
    """Say why a folder in the input is no case of its own."""
    listing = files.walk(path)
    scans = sum(_is_named(file, *SCAN_SUFFIXES, *OTHER_SUFFIXES) for file in listing.files)
    if any(files.is_dicom(file) for file in listing.files):
        return  # of a study whose slices lie in several folders
    if _is_named(path, *SCAN_SUFFIXES, *OTHER_SUFFIXES):
        found.refused.append((path, "a folder, expected a file"))
    elif listing.passed_over and not listing.files:
        found.refused.append((path, f"holds {listing.passed_over[0][1]}, and no file"))
    elif scans:
        found.passed_over.append(
            (f"{path.name}/", f"holds {counted(scans, 'scan')}, expected directly in the input")
        )
    else:
        found.passed_over.append((f"{path.name}/", "a folder without a scan"))


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


def say_passed_over(job: Job) -> None:
    """Name what lies in the input and is no case, a line for each reason; not the thousandth."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in job.passed_over:
        by_reason.setdefault(reason, []).append(name)
    for number, (reason, names) in enumerate(by_reason.items()):
        if number == _MOST_REASONS:
            say(f"passed over for {len(by_reason) - number} other reasons: more files and folders")
            break
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        say(f"passed over, {reason}: {', '.join(names[:_MOST_NAMES])}{more}")


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


def _is_named(path: Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)


def _leads_out(path: Path, folder: Path) -> str:
    """Why a path is not taken: a link leads out of the input folder, or in a circle.

    The input folder may be a link itself, and links may point to places inside it. Empty if all is
    well.
    """
    try:
        if path.resolve().is_relative_to(folder.resolve()):
            return ""
    except RuntimeError:
        return "a link that leads in a circle, expected the file itself"
    return f"a link that leads out of {folder}; expected the file itself (cp -L makes one)"
