"""``synthesize --check``: are the phantoms' densities, noise and bone those of a real scan?

Both sides go through the same estimators, so what these get wrong they get wrong alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.errors import DatasetError
from ichseg.scan.volume import Volume, read
from phantom import cases
from phantom.anatomy import enlarge, estimate_anatomy

Array = npt.NDArray[np.float32]

PHANTOMS = 6
_HISTOGRAM_HU = np.arange(-10, 71, 1.0)


@dataclass(frozen=True, slots=True)
class Appearance:
    """What is measured on a scan; all in HU but the correlation length."""

    white_hu: float
    grey_hu: float
    fluid_hu: float
    noise_hu: float
    correlation_mm: float
    skull_hu: float


_ROWS = (  # field, name, how far ours may be off, relative or in HU
    ("white_hu", "white matter, HU", 3.0, False),
    ("grey_hu", "grey matter, HU", 3.0, False),
    ("fluid_hu", "CSF, HU", 3.0, False),
    ("noise_hu", "noise deviation, HU", 0.25, True),
    ("correlation_mm", "noise correlation, mm", 0.25, True),
    ("skull_hu", "skull, HU", 0.15, True),
)


def check(scan_path: Path, *, seed: int, picture: Path | None = None) -> int:
    """Print ours, the scan's and their difference for each row; 1 when a row is off, else 0.

    Args:
        scan_path: A head CT without a bleed.
        seed: Seed of the phantoms, whose mean is compared.
        picture: Where the histograms go; ``synthesize-check.png`` here if not given.

    Raises:
        DatasetError: No head is found in the scan.
    """
    scan = read(scan_path)
    try:
        theirs, their_histogram = measure(scan)
    except ValueError as error:
        raise DatasetError(f"{scan_path}: {error}") from error
    config = cases.SynthesisConfig(PHANTOMS, seed, negatives=1.0)
    ours, histograms = [], []
    for index in range(PHANTOMS):
        case = cases.make_case(config, index)
        appearance, histogram = measure(Volume(case.voxels, case.spacing_mm))
        ours.append(appearance)
        histograms.append(histogram)
    table, good = compare(ours, theirs)
    print(table)  # noqa: T201 - the command's output
    path = picture or Path("synthesize-check.png")
    draw(histograms, their_histogram, path)
    print(f"brain-HU histograms: {path}")  # noqa: T201
    return 0 if good else 1


def compare(ours: list[Appearance], theirs: Appearance) -> tuple[str, bool]:
    """The table, and whether every row is within its bound."""
    lines = [f"{'':24}{'ours':>9}{'spread':>9}{'scan':>9}{'off':>9}  bound  ok"]
    all_good = True
    for name, title, bound, relative in _ROWS:
        values = np.array([getattr(one, name) for one in ours])
        target = getattr(theirs, name)
        off = (np.nanmean(values) - target) / target if relative else np.nanmean(values) - target
        good = bool(abs(off) <= bound)
        all_good &= good
        shown, limit = (
            (f"{off:+9.0%}", f"{bound:5.0%}") if relative else (f"{off:+9.2f}", f"{bound:5.1f}")
        )
        lines.append(
            f"{title:24}{np.nanmean(values):9.2f}{np.nanstd(values):9.2f}{target:9.2f}{shown}"
            f"  {limit}  {'yes' if good else 'NO'}"
        )
    return "\n".join(lines), all_good


def measure(scan: Volume) -> tuple[Appearance, Array]:
    """Appearance of a scan above the skull base, and its brain's histogram."""
    hu = scan.voxels.astype(np.float32)
    anatomy = estimate_anatomy(hu, scan.spacing_mm)
    depth = enlarge(anatomy.depth_mm(), hu.shape)
    area = (depth > 4).sum(axis=(1, 2))
    widest = int(np.argmax(area))
    slices = [z for z in range(widest, len(hu)) if area[z] > 0.45 * area[widest]]
    hu, brain = hu[slices], depth[slices] > 4
    sigma = 1.0 / scan.spacing_mm[1]
    smooth = ndimage.gaussian_filter(hu, (0, sigma, sigma))
    ventricles = enlarge(anatomy.ventricles, scan.voxels.shape)[slices] > 0.9  # type: ignore[arg-type]
    white, grey, fluid = tissue_means(smooth[brain], ventricles[brain])
    noise, correlation = noise_of(hu, brain, scan.spacing_mm[1])
    skull = hu[(hu > 300) & ~ndimage.binary_dilation(brain, iterations=2)]
    values = hu[brain]
    histogram = np.histogram(values, _HISTOGRAM_HU, density=True)[0].astype(np.float32)
    return Appearance(white, grey, fluid, noise, correlation, float(np.mean(skull))), histogram


def tissue_means(smooth: Array, ventricles: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """White, grey and fluid HU of a smoothed brain.

    On thick slices grey and white melt into one peak that no mixture takes apart reliably. So white
    is the mean of the darkest third of the tissue, 15 to 50 HU, grey that of the brightest third,
    fluid the ventricles' median.
    """
    tissue = np.sort(smooth[(smooth > 15) & (smooth < 50)])
    third = tissue.size // 3
    fluid = smooth[ventricles]
    return (
        float(tissue[:third].mean()),
        float(tissue[-third:].mean()),
        float(np.median(fluid)) if fluid.size else float("nan"),
    )


def noise_of(hu: Array, brain: npt.NDArray[np.bool_], pixel_mm: float) -> tuple[float, float]:
    """Deviation of the noise, and the width in mm at which its correlation has fallen to one half.

    Noise is what a 2 mm Gaussian leaves over, in the half of the brain that is flattest at that
    scale.
    """
    sigma = 2.0 / pixel_mm
    low = ndimage.gaussian_filter(hu, (0, sigma, sigma))
    steep = np.hypot(*(ndimage.gaussian_filter1d(low, 1.0, axis=a, order=1) for a in (1, 2)))
    flat = brain & (steep < np.median(steep[brain]))
    noise = np.where(flat, hu - low, 0)
    deviation = np.sqrt(
        np.median([(n[f] ** 2).mean() for n, f in zip(noise, flat, strict=True) if f.any()])
    )
    widths = []
    for axis in (1, 2):
        correlation = []
        for lag in range(1, 12):
            pairs = np.take(flat, range(lag, flat.shape[axis]), axis) & np.take(
                flat, range(flat.shape[axis] - lag), axis
            )
            product = np.take(noise, range(lag, flat.shape[axis]), axis) * np.take(
                noise, range(flat.shape[axis] - lag), axis
            )
            correlation.append(float(product[pairs].mean()) / float((noise[flat] ** 2).mean()))
        widths.append(
            2 * pixel_mm * float(np.interp(-0.5, -np.array([1.0, *correlation[:4]]), np.arange(5)))
        )
    return float(deviation), float(np.mean(widths))


def draw(ours: list[Array], theirs: Array, path: Path) -> None:
    """Brain-HU histograms: each phantom, their mean, and the scan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    centres = (_HISTOGRAM_HU[1:] + _HISTOGRAM_HU[:-1]) / 2
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for histogram in ours:
        axes.plot(centres, histogram, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(centres, np.mean(ours, axis=0), color="tab:blue", label="phantoms, mean")
    axes.plot(centres, theirs, color="black", label="scan")
    axes.set(xlabel="HU", ylabel="share of brain voxels per HU")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
