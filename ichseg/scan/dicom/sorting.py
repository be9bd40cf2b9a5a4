"""The files of a folder sorted: slices of a CT, and what else there is, in words.

One object that is damaged, or of another kind, does not spoil the slices beside it: it is left out
and named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ichseg.errors import InputError
from ichseg.scan.dicom import elements, files
from ichseg.scan.dicom.elements import CT_IMAGE, DicomFile
from ichseg.scan.dicom.stacking import refuse_without_frame
from ichseg.wording import counted

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
_LEGACY_ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.2"  # slices that were put into one file later
_MOST_NAMED = 3  # of the files that are unreadable


@dataclass(slots=True)
class Sorted:
    """What the files of a folder are.

    Attributes:
        slices: The slices of CT series, localisers not among them.
        others: Files of what else is known, by what they are in words.
        faults: Files that cannot be read or are no slice, and links that are no file, with the
            reason.
    """

    slices: list[DicomFile] = field(default_factory=list)
    others: dict[str, list[DicomFile]] = field(default_factory=lambda: defaultdict(list))
    faults: list[tuple[Path, str]] = field(default_factory=list)

    def words(self) -> str:
        """Everything but the slices, for a reader of the result; empty if there is nothing."""
        known = [f"{counted(len(of), 'file')} {what}" for what, of in sorted(self.others.items())]
        if self.faults:
            named = ", ".join(f"{path.name} ({why})" for path, why in self.faults[:_MOST_NAMED])
            more = len(self.faults) - _MOST_NAMED
            entries = counted(len(self.faults), "entry", "entries")
            known.append(
                f"{entries} that cannot be read as a slice: {named}"
                + (f" and {more} more" if more > 0 else "")
            )
        return ", ".join(known)


def sort_folder(folder: Path, study: str = "", *, follow_links: bool = False) -> Sorted:
    """Read the headers of all files in a folder and in those below.

    Args:
        folder: Where to look.
        study: The UID of the only study that counts; empty for all.
        follow_links: See ``files.walk``.

    Raises:
        InputError: There are too many files, or a folder cannot be read.
    """
    listing = files.walk(folder, follow_links=follow_links)
    found = sort_files(listing.files, study)
    found.faults += listing.passed_over + listing.no_files
    return found


def sort_files(paths: Iterable[Path], study: str = "") -> Sorted:
    """Read the headers of these files, see ``sort_folder``."""
    found = Sorted()
    for path in paths:
        try:
            _sort(path, found, study)
        except InputError as error:
            found.faults.append((path, str(error).removeprefix(f"{path}: ")))
    return found


def _sort(path: Path, found: Sorted, study: str) -> None:
    """Put one file where it belongs.

    Raises:
        InputError: It cannot be read, or calls itself a slice and is none.
    """
    if not files.has_mark(path):
        if path.suffix.lower() in (".dcm", ".ima"):
            raise InputError(f"{path}: not a DICOM file, expected DICM at byte 128")
        if files.is_packed(path):
            raise InputError(f"{path}: a packed file, expected the slice itself")
        return
    file = elements.read_elements(path)
    if study and file.text("StudyInstanceUID") != study:
        return
    kind, modality = file.text("SOPClassUID"), file.text("Modality")
    if kind in (ENHANCED_CT, _LEGACY_ENHANCED_CT):
        raise file.fault("an Enhanced CT image, many slices in one file; expected a file a slice")
    if not kind and not file.pixels_at:  # a medium's directory
        return
    if kind != CT_IMAGE or modality != "CT":
        what = f"of modality {modality[:16]}" if modality else "without an image"
        found.others[what].append(file)
    elif "LOCALIZER" in file.text("ImageType").upper():
        found.others["of a localiser"].append(file)
    elif file.integer("NumberOfFrames") not in (None, 1):
        raise file.fault("many slices in one file; expected a file a slice")
    else:
        refuse_without_frame(file)
        found.slices.append(file)
