"""Which studies lie in an input folder: each of them is a case.

Two studies of a patient are two scans, and two patients never one; a medium's directory or a
screenshot beside their folders changes nothing about that.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import InputError
from ichseg.scan.dicom import files, sorting
from ichseg.scan.dicom.elements import DicomFile


@dataclass(frozen=True, slots=True)
class Study:
    """One case.

    Attributes:
        name: What its mask is named after; no other study has it.
        folder: Where its slices lie, in it or in folders below.
        uid: Its UID where slices of another study lie in the same folder, else empty.
    """

    name: str
    folder: Path
    uid: str = ""


@dataclass(frozen=True, slots=True)
class Studies:
    """The cases of an input folder, and the DICOM files that are in no case's folder.

    Attributes:
        studies: The cases.
        faults: Files that cannot be read or are no slice, with the reason.
        others: Files that are something else, with what.
    """

    studies: list[Study]
    faults: list[tuple[Path, str]]
    others: list[tuple[Path, str]]


def find_studies(folder: Path, entries: Sequence[Path], *, follow_links: bool = False) -> Studies:
    """The studies of an input folder.

    A study is named after the entry that holds it, or after the input folder where its slices lie
    in that itself or in several entries. Further studies of the same name have their own folders'
    names appended, or where they share one, a number by date. An entry with DICOM files but no CT
    slice is a case as well, which then says what is there.

    Args:
        folder: The input folder.
        entries: The files and folders in it that may be looked at.
        follow_links: See ``files.walk``.
    """
    by_entry: dict[Path, list[DicomFile]] = {}
    every: list[sorting.Sorted] = []
    others: dict[Path, set[str]] = {}  # entries without slices: the studies of what they hold
    for entry in [path for path in entries if path.is_dir()]:
        try:
            listing = files.walk(entry, follow_links=follow_links)
            marked = [path for path in listing.files if files.is_dicom(path)]
        except InputError:  # which will be said when it is read
            others[entry] = set()
            continue
        found = sorting.sort_files(marked)
        every.append(found)
        if found.slices:
            by_entry[entry] = found.slices
        elif marked:
            others[entry] = {_uid(file) for group in found.others.values() for file in group}
    loose = [path for path in entries if path.is_file() and files.is_dicom(path)]
    every.append(sorting.sort_files(loose))
    by_entry[folder] = every[-1].slices
    slices = _by_study(folder, by_entry)
    beside = [
        [entry for entry, uids in others.items() if _uid(study[0]) in uids - {""}]
        for study in slices
    ]
    studies = _named(folder, slices, beside)
    taken = {entry for of_study in beside for entry in of_study}
    studies += [Study(entry.name, entry) for entry in others if entry not in taken]
    if loose and not studies:
        studies.append(Study(_name_of(folder), folder))
    homes = {study.folder for study in studies}
    return Studies(
        studies,
        [fault for of in every for fault in of.faults if homes.isdisjoint(fault[0].parents)],
        [
            (file.path, f"DICOM {what}")
            for of in every
            for what, files_of in of.others.items()
            for file in files_of
            if homes.isdisjoint(file.path.parents)
        ],
    )


def _by_study(folder: Path, by_entry: dict[Path, list[DicomFile]]) -> list[list[DicomFile]]:
    """The slices of each study.

    What has no study's UID goes by its entry. So does a study of which two entries hold the same
    series: whoever took the patients' names away may have given all of them the same numbers.
    """
    entries_of: dict[tuple[str, str], set[Path]] = defaultdict(set)
    for entry, slices in by_entry.items():
        for file in slices if entry != folder else ():
            entries_of[_uid(file), file.text("SeriesInstanceUID")].add(entry)
    doubtful = {uid for (uid, _), entries in entries_of.items() if len(entries) > 1} | {""}
    studies: dict[object, list[DicomFile]] = defaultdict(list)
    for entry, slices in by_entry.items():
        for file in slices:
            uid = _uid(file)
            studies[(uid, entry) if uid in doubtful else uid].append(file)
    return list(studies.values())


def _named(
    folder: Path, studies: Sequence[list[DicomFile]], beside: Sequence[list[Path]]
) -> list[Study]:
    """Each study with its folder and a name of its own.

    Args:
        folder: The input folder.
        studies: The slices of each study.
        beside: For each study, entries in which other objects of it lie, such as localisers.
    """
    homes = [Path(os.path.commonpath([file.path.parent for file in study])) for study in studies]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, home in enumerate(homes):
        groups[_name_of(folder) if home == folder else home.relative_to(folder).parts[0]].append(i)
    found = []
    for base, group in groups.items():
        group.sort(key=lambda i: _by_date(studies[i]))
        below = ["_".join(homes[i].relative_to(folder).parts) for i in group]
        if len(group) == 1:
            names = [base]
        elif len(set(below)) == len(group) and all(below):
            names = below
        else:
            names = [f"{base}_study{number}" for number in range(1, len(group) + 1)]
        for i, name in zip(group, names, strict=True):
            others = [file.path for j, study in enumerate(studies) if j != i for file in study]
            # the whole entry, where it is this study's alone: what else lies there is named
            entry = Path(folder, *homes[i].relative_to(folder).parts[:1])
            alone = not any(path.is_relative_to(entry) for path in others)
            home = Path(os.path.commonpath([entry if alone else homes[i], *beside[i]]))
            shared = any(path.is_relative_to(home) for path in others)
            found.append(Study(name, home, _uid(studies[i][0]) if shared else ""))
    return found


def _uid(file: DicomFile) -> str:
    return file.text("StudyInstanceUID")


def _by_date(study: list[DicomFile]) -> tuple[str, ...]:
    return tuple(study[0].text(key) for key in ("StudyDate", "StudyTime", "StudyInstanceUID"))


def _name_of(folder: Path) -> str:
    return folder.resolve().name or "scan"
