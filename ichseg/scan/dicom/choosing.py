"""Which of several series is the head CT that the networks know: plain, soft, axial, whole.

One criterion after the other leaves out what another series is better at; where none is, all stay.
What a header does not say is measured on a few slices.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError
from ichseg.scan.dicom import pixels
from ichseg.scan.dicom.decompress import Decoder
from ichseg.scan.dicom.stacking import Candidate

Planes = list[npt.NDArray[np.int16]]
Look = Callable[[], Planes]
_AXIAL = math.cos(math.radians(45))
_HEAD = re.compile(
    r"HEAD|BRAIN|SKULL|CRANI|NEURO|SINUS|ORBIT|FACE|SCHAEDEL"
    r"|SCH[AÄ]DEL|\bKOPF|\bT[EÊ]TE\b|CR[AÂÁ]NE|CABEZA|\bTESTA\b|CEREB"  # as some scanners write
    r"|(?<![A-Z])(INNER|INTERNAL|MIDDLE)?EARS?(?![A-Z])"  # and neither heart nor forearm
)
_HEAD_MM2 = (8_000, 45_000)  # the cross-section of a head; a chest has 60,000 and more
_BONE_SHARE = (0.04, 0.45)  # of that cross-section
_WHOLE_HEAD_MM = 160.0
_SAME_COVER = 0.9
_USUAL_STEP_MM = 5.0  # of what the networks have learned on
_SHARP_HU = 20.0  # the noise of a soft kernel stays below, in 1 mm slices, too
_NO_AGENT = re.compile(r"(NO|NONE|N|NATIVE?|WITHOUT|0)\b", re.IGNORECASE)
_SAYS_CONTRAST = re.compile(
    r"CTA|ANGIO|PERF|CTP|CONTRAST|\bCE\b|\bKM\b|\+ ?C\b|\bC\+", re.IGNORECASE
)
_SAYS_PLAIN = re.compile(
    r"\bNON|\bW/?O\b|\bNO\b|WITHOUT|OHNE|SANS|\bPRE\b|NATIV|PLAIN", re.IGNORECASE
)
_SHARP_NAME = re.compile(r"BONE|EDGE|LUNG|SHARP|INNER|ULTRA|^(D|E|L|Y[A-Z]?)$", re.IGNORECASE)
_SOFT_NAME = re.compile(r"SOFT|STAND|STND|SMOOTH|BRAIN|^(U?[ABC]|E[BC])$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choice:
    """The series that is taken.

    Attributes:
        taken: Its slices.
        others: The series that are left out, each with what the taken one is better at.
    """

    taken: Candidate
    others: tuple[tuple[Candidate, str], ...]


def choose(candidates: Sequence[Candidate], decode: Decoder) -> Choice:
    """Choose by these criteria, in this order.

    A head, by the header or by what the slices show; without contrast agent; a soft kernel; axial;
    taken, not computed from others; the whole head, or as much of it as any, within a tenth;
    slices about 5 mm apart; the lowest number.

    Args:
        candidates: One at least.
        decode: Made by ``decompress.decoder``, for what has to be measured.
    """

    @functools.cache
    def seen(i: int) -> Planes:
        return _some_slices(candidates[i], decode)

    def steps(i: int) -> float:
        return abs(math.log2(float(np.median(candidates[i].stack.steps_mm)) / _USUAL_STEP_MM))

    criteria: tuple[tuple[str, Callable[[int], bool]], ...] = (
        ("no head", lambda i: _is_head(candidates[i], lambda: seen(i))),
        ("with contrast agent", lambda i: is_plain(candidates[i])),
        ("of a sharp kernel", lambda i: _is_soft(candidates[i], lambda: seen(i))),
        ("not axial", lambda i: is_axial(candidates[i])),
        ("computed from others", lambda i: not _is_derived(candidates[i])),
    )
    left = list(range(len(candidates)))
    reasons: dict[int, str] = {}

    def keep(kept: list[int], why: str) -> None:
        if kept:
            reasons.update(dict.fromkeys(set(left) - set(kept), why))
            left[:] = kept

    for why, fits in criteria:
        if len(left) > 1:
            keep([i for i in left if fits(i)], why)
    best_cover = max(_cover(candidates[i]) for i in left)
    keep([i for i in left if _cover(candidates[i]) >= _SAME_COVER * best_cover], "covering less")
    nearest = min(steps(i) for i in left)
    keep([i for i in left if steps(i) <= nearest + 0.1], "of slices less like 5 mm")
    first = min(left, key=lambda i: _number(candidates[i]))
    keep([first], "of a higher number")
    others = tuple((candidates[i], reasons[i]) for i in sorted(reasons))
    return Choice(candidates[first], others)


def is_axial(candidate: Candidate) -> bool:
    """Whether the slices' normal is within 45 degrees of the patient's length."""
    return bool(abs(candidate.stack.axes[0, 0]) > _AXIAL)


def is_plain(candidate: Candidate) -> bool:
    """Whether no contrast agent is spoken of."""
    first = candidate.files[0]
    agent, described = first.text("ContrastBolusAgent"), first.text("SeriesDescription")
    if agent and not _NO_AGENT.match(agent):
        return False
    return not _SAYS_CONTRAST.search(described) or bool(_SAYS_PLAIN.search(described))


def says_head(candidate: Candidate) -> bool | None:
    """Whether the header says a head; None if it does not say."""
    part = candidate.files[0].text("BodyPartExamined").upper()
    return bool(_HEAD.search(part)) if part else None


def _is_head(candidate: Candidate, look: Look) -> bool:
    """Whether the header says so, or else a cross-section has a head's size and bone."""
    said = says_head(candidate)
    if said is not None:
        return said
    pixel_mm2 = math.prod(candidate.stack.spacing_mm)
    for plane in look():
        inside = plane > -200
        area = float(inside.sum()) * pixel_mm2
        bone = float((plane > 300).sum()) * pixel_mm2 / max(area, 1.0)
        if _HEAD_MM2[0] <= area <= _HEAD_MM2[1] and _BONE_SHARE[0] <= bone <= _BONE_SHARE[1]:
            return True
    return False


def _is_soft(candidate: Candidate, look: Look) -> bool:
    """Whether the kernel is known to be soft, or tissue has little noise."""
    name = candidate.files[0].text("ConvolutionKernel").split("\\")[0].strip()
    if siemens := re.match(r"[A-Z]{1,2}(\d\d)", name, re.IGNORECASE):
        if name[:2].upper() == "FC":  # Toshiba's, Canon's
            return int(siemens[1]) // 10 not in (3, 5, 8)
        return int(siemens[1]) < 50
    if _SHARP_NAME.search(name):
        return False
    if _SOFT_NAME.search(name):
        return True
    steps: list[npt.NDArray[np.int32]] = []
    for plane in look():
        right, left = plane[:, 1:].astype(np.int32), plane[:, :-1].astype(np.int32)
        tissue = (right > -100) & (right < 200) & (left > -100) & (left < 200)
        steps.append((right - left)[tissue])
    differences = np.concatenate([np.empty(0, np.int32), *steps])
    if not differences.size:
        return True
    noise = 1.4826 * float(np.median(abs(differences))) / math.sqrt(2)
    return noise <= _SHARP_HU


def _is_derived(candidate: Candidate) -> bool:
    return "DERIVED" in candidate.files[0].text("ImageType").upper()


def _cover(candidate: Candidate) -> float:
    return min(candidate.extent_mm, _WHOLE_HEAD_MM)


def _number(candidate: Candidate) -> tuple[int, str, int, str]:
    """The series' number and UID, the acquisition's number, the frame's UID; no number is last."""
    first = candidate.files[0]
    series, acquisition = (
        int(text) if text.isdecimal() else 1 << 60
        for text in (first.text("SeriesNumber"), first.text("AcquisitionNumber"))
    )
    frame = first.text("FrameOfReferenceUID")
    return series, first.text("SeriesInstanceUID"), acquisition, frame


def _some_slices(candidate: Candidate, decode: Decoder) -> Planes:
    """Three slices in HU, from the middle on upwards; none that cannot be read."""
    found = []
    for share in (0.4, 0.55, 0.7):
        try:
            file = candidate.files[int(share * len(candidate.files))]
            found.append(pixels.hounsfield(file, decode))
        except InputError:  # which will be said if this series is taken
            continue
    return found
