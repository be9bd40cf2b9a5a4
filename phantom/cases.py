"""One synthetic scan and its mask: a phantom with bleeds, or bleeds drawn into a real scan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.errors import InputError
from phantom import bleeds, scanner
from phantom.anatomy import Anatomy, enlarge
from phantom.background import Background, paint
from phantom.findings import subdurals
from phantom.findings.choose import (
    NOTHING,
    Findings,
    add_findings,
    draw_findings,
    with_hydrocephalus,
)
from phantom.head import (
    BEND_NODES,
    BEND_STEP_MM,
    CHANNELS,
    Head,
    atlas_position,
    lowest_mm,
    make_head,
    sample,
)
from phantom.person import HeadParameters, draw_head

SMALLEST_ML, LARGEST_ML = 0.2, 155.0
_KIND_CHANCE = (0.34, 0.18, 0.18, 0.12, 0.18)  # in the order of bleeds.KINDS
_COMPANIONS = {
    "intraparenchymal": ("intraventricular", "subarachnoid", "intraparenchymal"),
    "intraventricular": ("intraparenchymal", "subarachnoid"),
    "subdural": ("subarachnoid", "intraparenchymal", "subdural"),
    "epidural": ("intraparenchymal", "subdural"),
    "subarachnoid": ("intraventricular", "intraparenchymal", "subdural"),
}
_FINDINGS_STREAM = 1  # findings have random numbers of their own: they move no other draw
_DRAWN = [CHANNELS.index(name) for name in ("outside_hu", "inside", "brain_hu")]
_TRIES = 6  # a real scan may show no ventricles, or be too small for what was drawn
_COARSE_MM = (2.5, 1.9)  # slice and in-plane step of the grid that bleeds are drawn on


@dataclass(frozen=True, slots=True)
class SynthesisConfig:
    """What the user of ``synthesize`` chose."""

    cases: int
    """How many scans to make."""
    seed: int
    """Two runs with the same seed make the same scans, case by case."""
    negatives: float = 0.1
    """Fraction of scans without a bleed."""
    balanced: bool = False
    """One kind a case, the five in turn, instead of drawing kinds and companions by their
    frequency."""
    backgrounds: tuple[Background, ...] = ()
    """Real scans to draw the bleeds into, in turn, instead of phantoms."""
    shrink: int = 1
    """Divides the in-plane matrix; above 1 for tests."""
    findings: bool = False
    """Whether phantoms also show what ``phantom.findings`` draws; without, they stay as they were,
    byte for byte."""
    name: str = "ICH"
    """What phantoms are called before their number."""

    @property
    def draws_into_dataset(self) -> bool:
        """Whether the bleeds go into a dataset of real scans, whose cases keep their names."""
        return any(background.label is not None for background in self.backgrounds)


@dataclass(frozen=True)
class Case:
    """One synthetic scan.

    Attributes:
        voxels: HU, ``(z, y, x)``.
        mask: 1 where there is blood, of the same shape; a real scan's own labels are kept.
        spacing_mm: Voxel size ``(z, y, x)``.
        lesions: Kind and wanted volume in mL of each bleed.
        volumes_ml: Labelled volume of each kind.
        findings: What else there is to see, see ``phantom.findings``.
    """

    voxels: npt.NDArray[np.int16]
    mask: npt.NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    lesions: tuple[tuple[str, float], ...]
    volumes_ml: dict[str, float]
    findings: Findings = NOTHING


def make_case(config: SynthesisConfig, index: int) -> Case:
    """One scan, a function of the configuration and the case's number only."""
    rng = np.random.default_rng([config.seed, index])
    lesions = draw_lesions(config, index, rng)
    if config.backgrounds:
        return _make_on_background(config, index, lesions, rng)
    head_parameters = draw_head(rng)
    scan = scanner.draw_scan(head_parameters, rng, shrink=config.shrink)
    if not config.findings:
        return make_phantom(head_parameters, scan, lesions, rng)
    apart = np.random.default_rng([config.seed, index, _FINDINGS_STREAM])
    return make_phantom(
        head_parameters, scan, lesions, rng, draw_findings(lesions, apart), findings_rng=apart
    )


def draw_lesions(
    config: SynthesisConfig, index: int, rng: np.random.Generator
) -> tuple[tuple[str, float], ...]:
    """Kind and volume of each bleed; volumes log-uniform, kinds by frequency or in turn."""
    if rng.random() < config.negatives:
        return ()
    total = float(np.exp(rng.uniform(np.log(SMALLEST_ML), np.log(LARGEST_ML))))
    if config.balanced:
        kind = bleeds.KINDS[index % len(bleeds.KINDS)]
        largest = bleeds.LARGEST_ML[kind]
        return ((kind, float(np.exp(rng.uniform(np.log(SMALLEST_ML), np.log(largest))))),)
    kind = str(rng.choice(bleeds.KINDS, p=_KIND_CHANCE))
    lesions = [(kind, total)]
    while len(lesions) < 4 and rng.random() < 0.33 and total > 0.6:
        share = float(rng.uniform(0.08, 0.5)) * lesions[0][1]
        if share < SMALLEST_ML:
            break
        lesions[0] = (kind, lesions[0][1] - share)
        lesions.append((str(rng.choice(_COMPANIONS[kind])), share))
    return tuple((name, min(volume, bleeds.LARGEST_ML[name])) for name, volume in lesions)


def make_phantom(
    head_parameters: HeadParameters,
    scan: scanner.ScanParameters,
    lesions: tuple[tuple[str, float], ...],
    rng: np.random.Generator,
    findings: Findings | None = None,
    *,
    findings_rng: np.random.Generator | None = None,
) -> Case:
    """Scan a phantom with the given bleeds, and with findings if there are any.

    Args:
        head_parameters: The person.
        scan: The scanner and its protocol.
        lesions: Kind and wanted volume in mL of each bleed.
        rng: Draws everything but the findings.
        findings: What else there is to see.
        findings_rng: Draws the findings; needed where there are any.
    """
    shown, apart = findings or NOTHING, findings_rng or rng
    if any(kind == "intraventricular" and volume > 6 for kind, volume in lesions):
        growth = float(head_parameters.ventricle_growth_mm + rng.uniform(1.5, 3.5))
        head_parameters = dataclasses.replace(head_parameters, ventricle_growth_mm=growth)
    head = make_head(with_hydrocephalus(head_parameters, shown, apart), rng)
    if shown.names:
        head = add_findings(head, shown, apart)
    if shown.mouth:
        scan = scanner.reach_down(scan, lowest_mm(head_parameters) - float(apart.uniform(10, 50)))
    anatomy = coarse_anatomy(head, scan)
    drawn: list[bleeds.Bleed] = []
    for kind, volume in lesions:
        if kind == "subdural" and shown.acute_on_chronic:
            drawn += subdurals.acute_on_chronic(anatomy, volume, apart)
        elif kind == "subdural" and shown.tentorial:
            drawn.append(subdurals.tentorial(anatomy, _coarse_position(head, scan), volume, apart))
        else:
            drawn.append(bleeds.draw_bleed(anatomy, kind=kind, volume_ml=volume, rng=rng))
    push = mass_effect(anatomy, drawn, scan, rng)
    fine, blood = _draw(head, scan, drawn, push)
    voxels = scanner.acquire(fine, scan, rng)
    thick = blood.reshape(scan.shape[0], scan.parts, *blood.shape[1:]).mean(axis=1)
    case = _finish(voxels, enlarge(thick, scan.shape), scan.spacing_mm, lesions, drawn)
    return dataclasses.replace(case, findings=shown)


def _draw(
    head: Head,
    scan: scanner.ScanParameters,
    drawn: list[bleeds.Bleed],
    push: npt.NDArray[np.float32] | None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The head with its bleeds on the fine grid: HU, and the fraction of blood."""
    shape = scanner.fine_shape(scan)
    axes = scanner.grid_axes_mm(scan, shape)
    fine = np.full(shape, scanner.AIR_HU, np.float32)
    blood = np.zeros(shape, np.float32)
    voxel_ml = float(np.prod(scan.spacing_mm)) * np.prod(scan.shape) / np.prod(shape) / 1000
    rows, columns = (_span(axis, half) for axis, half in zip(axes[1:], (118.0, 92.0), strict=True))
    at = atlas_position(head, (axes[0], axes[1][rows], axes[2][columns]), push)
    outside_hu, inside, brain_hu = sample(head.maps[:, _DRAWN], at).numpy()
    step_mm = tuple(float(axis[1] - axis[0]) for axis in axes)
    total = np.zeros_like(brain_hu)
    room = np.zeros(shape, bool)
    room[:, rows, columns] = (
        ndimage.minimum_filter(inside, (scan.parts, 3, 3)) > 0.9
    )  # clear of the skull's blur
    for bleed in drawn:
        fraction = bleeds.rasterise(bleed, shape, voxel_ml, room=room)[:, rows, columns]
        if bleed.oedema_mm:
            brain_hu -= bleeds.oedema(bleed, fraction, step_mm)  # type: ignore[arg-type]
        blood_hu = enlarge(bleed.hu, shape)[:, rows, columns]
        brain_hu += fraction * (blood_hu - brain_hu)
        if bleed.labelled:
            total = np.maximum(total, fraction)
    fine[:, rows, columns] = outside_hu + inside * (brain_hu - outside_hu)
    blood[:, rows, columns] = total * np.clip((inside - 0.85) * 10, 0, 1)
    skin = np.flatnonzero((fine[: shape[0] // 2, :, columns] > -300).any(axis=(0, 2)))
    back = float(axes[1][skin[-1]]) if skin.size else 100.0
    return scanner.add_headrest(fine, scan, back), blood


def _finish(
    voxels: npt.NDArray[np.int16],
    blood: npt.NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    lesions: tuple[tuple[str, float], ...],
    drawn: list[bleeds.Bleed],
) -> Case:
    """Cut the label, off skull and air, and account for its volume by kind."""
    image_ml = float(np.prod(spacing_mm)) / 1000
    if drawn:
        blood = np.where(bleeds.cannot_be_blood(voxels, spacing_mm), 0, blood)
    wanted: dict[str, float] = {}
    for kind, volume in lesions:
        wanted[kind] = wanted.get(kind, 0.0) + volume
    if not drawn:
        return Case(voxels, np.zeros(voxels.shape, np.uint8), spacing_mm, lesions, {})
    reached = min(sum(wanted.values()), float(blood.sum()) * image_ml)
    mask = bleeds.label(blood, image_ml, reached)
    scale = mask.sum() * image_ml / max(sum(wanted.values()), 1e-9)
    return Case(
        voxels, mask, spacing_mm, lesions, {kind: volume * scale for kind, volume in wanted.items()}
    )


def coarse_anatomy(head: Head, scan: scanner.ScanParameters) -> Anatomy:
    """The head on the grid that bleeds are drawn on."""
    shape, extent = _coarse_shape(scan)
    at = atlas_position(head, scanner.grid_axes_mm(scan, shape))
    maps = dict(zip(CHANNELS, sample(head.maps, at).numpy(), strict=True))
    side = -1 if head.parameters.mirrored else 1
    middle = at[..., 2].numpy() * np.float32(head.parameters.scale[2] * side)
    return Anatomy(
        spacing_mm=tuple(e / n for e, n in zip(extent, shape, strict=True)),  # type: ignore[arg-type]
        inside=maps["inside"] > 0.5,
        fluid=maps["fluid"] * maps["inside"],
        ventricles=maps["ventricles"],
        middle_mm=middle,
    )


def _coarse_shape(scan: scanner.ScanParameters) -> tuple[tuple[int, int, int], list[float]]:
    """Shape of the grid that bleeds are drawn on, and the scan's extent in mm, ``(z, y, x)``."""
    extent = [n * s for n, s in zip(scan.shape, scan.spacing_mm, strict=True)]
    shape = (
        scan.shape[0] * max(round(scan.spacing_mm[0] / _COARSE_MM[0]), 1),
        round(extent[1] / _COARSE_MM[1]),
        round(extent[2] / _COARSE_MM[1]),
    )
    return shape, extent


def _coarse_position(head: Head, scan: scanner.ScanParameters) -> npt.NDArray[np.float32]:
    """Where each voxel of the grid that bleeds are drawn on lies in the atlas, in mm."""
    shape, _ = _coarse_shape(scan)
    position: npt.NDArray[np.float32] = atlas_position(
        head, scanner.grid_axes_mm(scan, shape)
    ).numpy()
    return position


def mass_effect(
    anatomy: Anatomy,
    drawn: list[bleeds.Bleed],
    scan: scanner.ScanParameters,
    rng: np.random.Generator,
) -> npt.NDArray[np.float32] | None:
    """Brain pushed away from large bleeds, on the nodes of ``Head.bend_mm``; None for none."""
    pushing = [
        b
        for b in drawn
        if b.kind in ("intraparenchymal", "subdural", "epidural") and b.volume_ml > 2
    ]
    if not pushing:
        return None
    solid = np.maximum.reduce([(b.field > 0).astype(np.float32) for b in pushing])
    volume = sum(b.volume_ml for b in pushing)
    spread = 8.0 + 0.7 * bleeds.radius_mm(volume)
    potential = ndimage.gaussian_filter(
        solid, [spread / s for s in anatomy.spacing_mm], truncate=2.5
    )
    # tissue seen at p came from p + slope: towards the bleed
    slope = np.stack(np.gradient(potential, *anatomy.spacing_mm))
    most = min(0.55 * bleeds.radius_mm(volume), 13.0) * rng.uniform(0.4, 1.0)
    slope *= most / max(float(np.sqrt((slope**2).sum(0)).max()), 1e-9)
    slope *= np.clip((anatomy.depth_mm() - 1.0) / 12.0, 0, 1)
    axes = scanner.grid_axes_mm(scan, anatomy.inside.shape)  # type: ignore[arg-type]
    nodes = (np.arange(BEND_NODES) - (BEND_NODES - 1) / 2) * BEND_STEP_MM
    index = np.meshgrid(
        *((nodes - axis[0]) / (axis[1] - axis[0]) for axis in axes), indexing="ij"
    )  # node -> coarse voxel
    moved = [ndimage.map_coordinates(part, index, order=1, mode="constant") for part in slope]
    return np.stack(moved).astype(np.float32)


def _make_on_background(
    config: SynthesisConfig,
    index: int,
    lesions: tuple[tuple[str, float], ...],
    rng: np.random.Generator,
) -> Case:
    """Draw the bleeds into a real scan; others where it has no room for those that were drawn."""
    background = config.backgrounds[index % len(config.backgrounds)]
    for _ in range(_TRIES - 1):
        try:
            painted = paint(background, lesions, rng)
            break
        except InputError:
            lesions = draw_lesions(config, int(rng.integers(len(bleeds.KINDS))), rng)
    else:
        painted = paint(background, lesions, rng)
    return Case(painted.voxels, painted.labels, painted.spacing_mm, lesions, painted.volumes_ml)


def _span(axis: npt.NDArray[np.float32], half_mm: float) -> slice:
    """The part of an axis where a head can be."""
    within = np.flatnonzero(np.abs(axis) < half_mm)
    return slice(int(within[0]), int(within[-1]) + 1)
