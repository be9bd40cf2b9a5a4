"""Finds the cases in an input folder, in every layout, and names their outputs.

Nothing is passed over in silence: what looks like a scan and cannot be taken for one is a case that
has failed already, and everything else is named with the reason. Nothing outside the input folder
is taken, through a path that ``inputs.json`` names or, unless the user asks for that, through a
link. Imports nothing heavy, as ``contents``, which tells apart what lies in a folder.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ichseg.app import grand_challenge
from ichseg.app.console import say
from ichseg.app.contents import OTHER_SUFFIXES, Contents, Search, is_named, leads_out, look_into
from ichseg.errors import InputError, OutputError
from ichseg.files import SCAN_SUFFIXES, require_writable, stem_of, suffix_of
from ichseg.model.folder import check_slug
from ichseg.scan.dicom import files

if TYPE_CHECKING:
    from ichseg.scan.dicom.studies import Study

_MOST_NAMES, _MOST_REASONS = 5, 20  # that are said of what is passed over


@dataclass(frozen=True, slots=True)
class InputCase:
    """One scan to segment.

    Attributes:
        name: What the log calls it: its file or folder, with the folders in the input above it.
        image: The scan's file, or the folder of its DICOM slices.
        output: The file of its mask.
        refusal: Why it cannot be segmented though it looks like a scan; empty if that is tried.
        picture: The file name of its overlay picture, another one for each case.
        probabilities: What the names of the files with its probabilities begin with, likewise.
        study: The UID of its study where slices of another one lie in the same folder.
        follow_links: Whether links among its slices may lead elsewhere.
    """

    name: str
    image: Path
    output: Path
    refusal: str = ""
    picture: str = ""
    probabilities: str = ""
    study: str = ""
    follow_links: bool = False


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


def find_cases(
    folder: Path,
    output: Path,
    *,
    input_slug: str,
    output_slug: str,
    follow_links: bool = False,
    recursive: bool = False,
) -> Job:
    """Recognise the layout of an input folder; a single file is a case, too.

    In this order: ``inputs.json`` (one image socket, or the one named ``input_slug``),
    ``images/<slug>/`` (likewise), else what lies directly in the folder: volumes, folders of DICOM
    slices, or slices themselves; of DICOM each study is a case. On the platform's layouts masks go
    to ``images/<output_slug>/``; in a flat folder they keep the input's file name, and those of
    DICOM get their folder's name and ``_straight``, since their grid may be another than the
    slices'. That of an ``.mhd``, whose voxels lie in a second file, is an ``.mha``.

    Args:
        folder: The input folder, or a file.
        output: The folder for masks; it may lie in the input folder.
        input_slug: The platform's socket of the scan, if there are several.
        output_slug: The platform's socket of the mask.
        follow_links: Whether links may lead out of the input folder.
        recursive: Whether volumes in folders of a flat folder are cases, too; their masks lie in
            folders of the same names.

    Raises:
        InputError: There is no case, or more than one socket could be meant.
    """
    try:
        check_slug(output_slug)
    except ValueError as error:
        raise InputError(f"--output-slug: {error}") from error
    if folder.is_file():
        return _job(folder, [_single(folder, output)], ())
    search = Search(folder, output, follow_links=follow_links, recursive=recursive)
    with _readable(folder):
        if grand_challenge.is_platform_layout(folder):
            return _platform_job(search, output / "images" / output_slug, input_slug)
        found = look_into(folder, search)
        cases = [_volume_case(path, search) for path in found.volumes]
        cases += [_study_case(home, study, search) for home, study in found.studies]
        cases += [_volume_case(path, search, why) for path, why in found.refused]
        return _job(folder, cases, found.passed_over)


def _single(file: Path, output: Path) -> InputCase:
    """The case of a file that was named.

    Raises:
        InputError: It is none of a scan.
    """
    if is_named(file, *SCAN_SUFFIXES):
        return InputCase(file.name, file, output / mask_name(file), follow_links=True)
    what = "not named as a scan"
    if files.is_dicom(file):
        what = "one DICOM file, of which a scan has many"
    raise InputError(
        f"{file}: {what}, expected {', '.join(SCAN_SUFFIXES)}, or a folder of scans or of slices"
    )


def mask_name(scan: Path) -> str:
    """The name of a scan's mask: its own, or for a header of voxels elsewhere that of one file."""
    return f"{stem_of(scan)}.mha" if suffix_of(scan) == ".mhd" else scan.name


def _volume_case(path: Path, search: Search, refusal: str = "") -> InputCase:
    """The case of a file, with the place of its mask in the output folder."""
    inside = path.relative_to(search.root)
    mask = search.output / inside.parent / mask_name(path)
    return InputCase(inside.as_posix(), path, mask, refusal, follow_links=search.follow_links)


def _study_case(home: Path, study: Study, search: Search) -> InputCase:
    """The case of a study that was found in a folder."""
    inside = home.relative_to(search.root)
    return InputCase(
        (inside / study.name).as_posix(),
        study.folder,
        search.output / inside / f"{study.name}_straight.mha",
        study=study.uid,
        follow_links=search.follow_links,
    )


def find_challenge_cases(folder: Path, predict: Path, *, follow_links: bool = False) -> Job:
    """INSTANCE 2022's batch: every ``.nii.gz`` of a folder, the same name out.

    Raises:
        InputError: There is no case.
    """
    suffix = ".nii.gz"
    search = Search(folder, predict, suffixes=(suffix,), follow_links=follow_links)
    with _readable(folder):
        found = look_into(folder, search)
        other = [
            *(study.name for _, study in found.studies),
            *(p.name for p, _ in found.refused if not is_named(p, suffix)),
        ]
        passed_over = [*found.passed_over, *((name, f"not {suffix}") for name in other)]
        cases = [_volume_case(path, search) for path in found.volumes]
        cases += [_volume_case(p, search, why) for p, why in found.refused if is_named(p, suffix)]
        return replace(_job(folder, cases, passed_over, (suffix,)), challenge=True)


def _platform_job(search: Search, masks: Path, input_slug: str) -> Job:
    """The scans of one socket, and what lies beside it."""
    folder = search.root
    for listed in (folder / grand_challenge.INPUTS_FILE, folder / grand_challenge.IMAGES):
        if why := leads_out(listed, search):
            raise InputError(f"{listed}: {why}")
    socket = grand_challenge.socket_folder(folder, input_slug)
    if why := leads_out(socket, search):
        raise InputError(f"{socket}: {why}")
    found = Contents()
    if socket.is_dir():
        found = look_into(socket, replace(search, output=masks, recursive=False))
    cases = [InputCase(p.name, p, masks / f"{stem_of(p)}.mha") for p in found.volumes]
    cases += [
        InputCase(study.name, study.folder, masks / f"{study.name}.mha", study=study.uid)
        for _, study in found.studies
    ]
    cases += [InputCase(p.name, p, masks / f"{stem_of(p)}.mha", why) for p, why in found.refused]
    cases = [replace(case, follow_links=search.follow_links) for case in cases]
    beside = [
        (path.name, f"not in the socket's folder, {socket.relative_to(folder)}")
        for path in sorted(folder.iterdir())
        if is_named(path, *SCAN_SUFFIXES, *OTHER_SUFFIXES)
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
    stems = Counter(_stem(case.name) for case in cases)
    names = {case.name for case in cases}
    beside = Counter(
        path for case in cases for path in probability_paths(case.output, stem_of(case.output))
    )
    in_order = []
    for case in sorted(cases, key=lambda case: case.name):
        refusal, stem = case.refusal, _stem(case.name)
        if masks[case.output] > 1 and not refusal:
            refusal = f"{masks[case.output]} scans whose masks would be {case.output.name}"
        alone = stems[stem] == 1 and (stem == case.name or stem not in names)
        picture = f"{stem if alone else case.name}.png"
        first = stem_of(case.output)
        for path in probability_paths(case.output, first):
            if masks[path] or beside[path] > 1:
                first = case.output.name
        taken = [p for p in probability_paths(case.output, first) if masks[p] or beside[p] > 1]
        if taken and not refusal:
            refusal = f"its probabilities would be {taken[0].name}, the name of another scan's file"
        in_order.append(replace(case, refusal=refusal, picture=picture, probabilities=first))
    return Job(tuple(in_order), platform=False, passed_over=tuple(passed_over))


def probability_paths(mask: Path, first: str) -> tuple[Path, Path, Path]:
    """Where the probabilities of a mask go: as NIfTI, and nnU-Net's two files.

    Args:
        mask: The file of the mask, beside which they lie.
        first: What their names begin with. nnU-Net knows a case without the number of its channel.
    """
    theirs = first.removesuffix("_0000")
    return (
        mask.with_name(f"{first}_probability.nii.gz"),
        mask.with_name(f"{theirs}.npz"),
        mask.with_name(f"{theirs}.pkl"),
    )


def _stem(name: str) -> str:
    """A case's name, with its folders, without the suffix of a scan."""
    return name[: len(name) - len(suffix_of(Path(name)))]


def check_output(job: Job, output: Path) -> None:
    """Refuse an output folder that cannot be written, or where masks would replace scans.

    Those of this job, or others: a volume of another type than a mask's is one.

    Raises:
        OutputError: It is such a folder.
    """
    scans = {case.image.resolve(): case for case in job.cases}
    for case in job.cases:
        lost = scans.get(case.output.resolve())
        if lost is not None:
            whose = "its mask" if lost is case else f"the mask of {case.name}"
            raise OutputError(f"{lost.image}: {whose} would replace it; name another --output")
        if case.output.is_file() and (kind := _kind_of_other(case.output)):
            raise OutputError(
                f"{case.output}: holds {kind}, so it is no mask of this program, which would "
                "replace it; name another --output"
            )
    require_writable(output)


def _kind_of_other(path: Path) -> str:
    """What a volume's voxels are that is no mask of ours; empty of a mask, and of no volume."""
    from ichseg.scan import headers  # loads numpy

    try:
        dtype = headers.read_header(path, suffix_of(path)).dtype
    except (InputError, OSError):
        return ""
    return "" if dtype == "uint8" else str(dtype.newbyteorder("="))


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
            what = "a file, expected a folder of" if folder.exists() else "no such folder, expected"
            raise InputError(f"{folder}: {what} the scans to segment")
        yield
    except OSError as error:
        place = str(error.filename or folder)[:200]
        raise InputError(f"{place}: cannot read ({error.strerror or error})") from error
