"""Why each number of the plans is what it is, in words and tables: ``plan --explain``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ichseg.model.plans import Normalisation, Plans
from ichseg.wording import times
from training.planning.cascade import LEAST_SAVING, TIMES, Cascade
from training.planning.fingerprint import Fingerprint, Intensities
from training.planning.patch import Fit
from training.planning.recipes import ANISOTROPY
from training.planning.spacing import Target
from training.planning.topology import SMALLEST_EDGE

AXES = ("z", "y", "x")
_ISOTROPIC = (
    "a patch of the same length in mm along all axes, so that the network sees as far in each "
    "direction ({first} voxels), cut to the median case"
)
_STARTS = {"edge": _ISOTROPIC, "volume": _ISOTROPIC, "case": "the median case ({first} voxels)"}
_POOLINGS = {
    "late": (
        f"An axis is halved as often as leaves {SMALLEST_EDGE} voxels or more; axes that can be "
        "halved less often wait for the deepest levels. Kernels span 3 voxels along an axis only "
        "while it is finer than half of the coarsest, and along all axes once none is any more."
    ),
    "spacing": (
        f"At each level those axes are halved whose voxels are less than twice as long as the "
        f"finest, and that have {2 * SMALLEST_EDGE} voxels or more. Kernels span 3 voxels along "
        "the largest group of axes whose voxels are alike by that measure."
    ),
    "spacing_v2": (
        f"At each level those axes are halved that have {2 * SMALLEST_EDGE} voxels or more and "
        "voxels less than twice as long as the finest of these; a single one needs "
        f"{3 * SMALLEST_EDGE}. Kernels span 3 voxels along an axis from the level on where its "
        "voxels are less than twice as long as the finest."
    ),
}


@dataclass(frozen=True, slots=True)
class Reasons:
    """How plans came about.

    Attributes:
        fingerprint: What the data look like.
        target: The voxel size, and what it was decided by.
        flat: The search for the patch of ``2d``; None if there is no such configuration.
        full: The search for the patch of ``3d_fullres``.
        cascade: Whether a stage at low resolution comes first.
    """

    fingerprint: Fingerprint
    target: Target
    flat: Fit | None
    full: Fit
    cascade: Cascade


def explain(plans: Plans, reasons: Reasons) -> str:
    """The whole explanation, several screens of text."""
    cases = len(reasons.fingerprint.names)
    sections = [
        _paragraph(
            f"{plans.dataset}: {cases} cases, {', '.join(plans.channels)}, recipe {plans.recipe}, "
            f"architecture {plans.architecture}.{_regions(plans)} Axes stand in the order z, y, x."
        ),
        _explain_spacing(plans, reasons),
        _explain_intensities(plans, reasons.fingerprint),
        _explain_fit("3d_fullres", plans, reasons.full),
        _explain_cascade(reasons),
    ]
    if reasons.cascade.lowres is not None:
        sections.append(_explain_fit("3d_lowres", plans, reasons.cascade.lowres))
    if reasons.flat is not None:
        sections.append(_explain_fit("2d", plans, reasons.flat))
    if plans.overrides:
        rows = [(o.name, o.automatic or "nothing fits", o.chosen) for o in plans.overrides]
        sections.append(
            "CHOSEN in place of what the planner finds\n"
            + _table(("option", "automatic", "chosen"), rows)
        )
    return "\n".join(sections)


def _regions(plans: Plans) -> str:
    """What is trained for where labels are regions, as a sentence; empty where they are none."""
    if not plans.regions:
        return ""
    found = [f"{each.name} of {' and '.join(map(str, each.labels))}" for each in plans.foreground]
    return f" Trained are regions of labels, which may overlap: {', '.join(found)}."


def _explain_spacing(plans: Plans, reasons: Reasons) -> str:
    target, full = reasons.target, reasons.full
    spacings = np.array(reasons.fingerprint.spacings_mm)
    taken = [full.grid.spacing_mm[plans.transpose.index(axis)] for axis in range(3)]
    rows = [
        (AXES[axis], *(_short(v) for v in (column.min(), np.median(column), column.max(), value)))
        for axis, column, value in zip(range(3), spacings.T, taken, strict=True)
    ]
    thick = AXES[target.coarsest]
    reason = "Along each axis the median of the cases: as many are made finer as coarser."
    if full.grid.recipe.finer_slices:
        ratio = f"{target.thickness:.3g} times as long as the longer of the others"
        if target.finer:
            reason += (
                f" Not along {thick}: its voxels are {ratio} (more than {ANISOTROPY:g}), and the "
                f"median case has so many fewer of them; the 10th percentile, "
                f"{_short(target.spacing_mm[target.coarsest])} mm, lets few cases lose slices."
            )
        else:
            why = "and" if target.thick else f"not more than {ANISOTROPY:g}, and"
            few = "has so many fewer of them" if target.few else "does not have so many fewer"
            reason += (
                f" Along {thick} too: its voxels are {ratio}, {why} the median case {few}; the "
                "rule for thick slices (10th percentile) needs both."
            )
    else:
        reason += " This recipe has no other rule for thick slices."
    if tuple(taken) != tuple(target.spacing_mm):
        reason = f"Chosen; the planner takes {_times(target.spacing_mm)} mm. " + reason
    if plans.transpose != (0, 1, 2):
        order = ", ".join(AXES[axis] for axis in plans.transpose)
        reason += f" From here on the axes stand in the order {order}, the coarsest first."
    return (
        f"VOXEL SIZE {_times(full.grid.spacing_mm)} mm\n"
        + _table(("axis", "smallest", "median", "largest", "taken"), rows)
        + _paragraph(reason)
        + _paragraph(
            f"At that size the median case has {_times(full.grid.shape)} = "
            f"{_count(full.grid.case_voxels)} voxels." + _cut(plans, reasons.fingerprint)
        )
    )


def _cut(plans: Plans, fingerprint: Fingerprint) -> str:
    """How much smaller cases are after a cut to the head."""
    if plans.crop != "head":
        return ""
    kept = np.prod(fingerprint.head_shapes, axis=1) / np.prod(fingerprint.shapes, axis=1)
    return (
        f" Cases are cut to the head, which leaves {100 * kept.min():.0f} to "
        f"{100 * kept.max():.0f} % of their voxels (median {100 * np.median(kept):.0f} %)."
    )


def _explain_intensities(plans: Plans, fingerprint: Fingerprint) -> str:
    lines = [
        _paragraph(f"Channel {channel}: " + _normalisation(plans, normalisation, found))
        for channel, normalisation, found in zip(
            plans.channels, plans.normalisations, fingerprint.intensities, strict=True
        )
    ]
    when = "before" if plans.normalise_first else "after"
    return "INTENSITIES, normalised " + when + " resampling\n" + "".join(lines)


def _normalisation(plans: Plans, normalisation: Normalisation, found: Intensities) -> str:
    if normalisation.scheme == "none":
        return "as they are."
    if normalisation.scheme == "zscore":
        where = "the region that is not zero" if normalisation.masked else "the image"
        return f"each image by itself, less the mean of {where}, over the deviation."
    limits = f"{_short(normalisation.clip_low)} to {_short(normalisation.clip_high)} HU"
    why = "chosen" if _is_chosen("ct-clip", plans) else "their 0.5 and 99.5 percentile"
    return (
        f"clipped to {limits}, less {normalisation.mean:.2f}, over {normalisation.deviation:.2f}. "
        f"These are mean and deviation of all {_count(found.voxels)} foreground voxels; they reach "
        f"from {_short(found.minimum)} to {_short(found.maximum)} HU, the limits are {why}."
    )


def _explain_fit(name: str, plans: Plans, fit: Fit) -> str:
    axes = [AXES[axis] for axis in plans.transpose][-len(fit.patch) :]
    parts = [
        f"{name.upper()} patch {_times(fit.patch)}, batch {fit.batch}\n",
        _paragraph(_search(fit)),
        _attempts(fit, axes),
    ]
    if len(fit.attempts) > 1:
        parts.append(
            _paragraph(
                "Each step shortens the axis that covers most of the median case, the last of "
                "equals, by the least that the network of the smaller patch can pool."
            )
        )
    pooling = _POOLINGS[fit.grid.limits.pooling]
    parts.append(_levels(fit, axes))
    parts.append(_paragraph(f"{pooling} {_features(name, plans, fit)}"))
    parts.append(_paragraph(_batch(name, plans, fit)))
    if len(fit.patch) == 3:
        parts.append(_paragraph(_augmentation(name, plans, fit)))
    return "".join(parts)


def _search(fit: Fit) -> str:
    """Where the search for the patch starts, and the memory that it has to keep to."""
    if fit.first is None:
        return "The patch was chosen."
    recipe, limits = fit.grid.recipe, fit.grid.limits
    start = _STARTS[limits.first_patch].format(first=_times(fit.first))
    return (
        f"Memory: feature maps take most of it. {limits.room} patches have to fit "
        f"{recipe.gpu_memory_gb:g} GB, for which this recipe allows one patch "
        f"{_count(fit.limit)} values in all its feature maps. The search starts with "
        f"{start}, padded to a multiple of what its network pools by."
    )


def _batch(name: str, plans: Plans, fit: Fit) -> str:
    """Why the batch has as many patches, and what Dice is taken over."""
    share = f"{100 * fit.grid.recipe.dataset_share:g} % of the dataset"
    found = (
        f"the memory holds {_short(fit.affordable)} patches, {share} is {fit.covered}; the smaller "
        "counts, but two at least."
    )
    chosen = _is_chosen("batch", plans) and name != "2d"
    batch = f"Batch {fit.batch} was chosen; " if chosen else f"Batch {fit.batch}: "
    over = "the batch as one volume" if plans.configuration(name).batch_dice else "each patch"
    return f"{batch}{found} Dice is taken over {over}."


def _augmentation(name: str, plans: Plans, fit: Fit) -> str:
    """About which axes augmentation turns patches."""
    ratio = max(fit.patch) / fit.patch[0]
    turned = "in-plane only" if plans.configuration(name).dummy_2d else "about all axes"
    return (
        f"Augmentation turns patches {turned}: their longest edge is {_short(ratio)} times the "
        f"first, the limit is {ANISOTROPY:g}."
    )


def _attempts(fit: Fit, axes: Sequence[str]) -> str:
    """The patches that were tried."""
    rows = []
    for attempt in fit.attempts:
        cover = (100 * p / s for p, s in zip(attempt.patch, fit.grid.shape, strict=True))
        pools = (s.bit_length() - 1 for s in attempt.network.total_stride)
        rows.append(
            (
                _times(attempt.patch),
                "" if attempt.shortened is None else axes[attempt.shortened],
                ", ".join(f"{c:.0f}" for c in cover),
                ", ".join(map(str, pools)),
                _count(attempt.elements),
                f"{100 * attempt.elements / fit.limit:.0f} %",
            )
        )
    head = ("patch", "shorter", "% of case", "halvings", "values", "of limit")
    return _table(head, rows)


def _levels(fit: Fit, axes: Sequence[str]) -> str:
    """The levels of the network."""
    size, spacing = list(fit.patch), list(fit.grid.spacing_mm)
    rows = []
    network = fit.network
    for level, stride in enumerate(network.strides):
        size = [a // b for a, b in zip(size, stride, strict=True)]
        spacing = [a * b for a, b in zip(spacing, stride, strict=True)]
        halved = [axis for axis, step in zip(axes, stride, strict=True) if step > 1]
        rows.append(
            (
                str(level),
                " ".join(halved),
                _times(size),
                _times(spacing),
                _times(network.kernels[level]),
                str(network.features[level]),
            )
        )
    return _table(("level", "halved", "voxels", "mm", "kernel", "features"), rows)


def _features(name: str, plans: Plans, fit: Fit) -> str:
    recipe, network = fit.grid.recipe, fit.network
    features = f"{recipe.base_features}, doubled per level up to {fit.grid.limits.most_features}"
    if _is_chosen("features", plans) and name != "2d":
        features = "chosen, and with them the number of levels"
    convs = ", ".join(map(str, network.encoder_convs))
    what = "convolutions" if network.block == "plain" else "residual blocks of two convolutions"
    return (
        f"Features: {features}. The levels of the encoder have {convs} {what}, those of the "
        f"decoder {recipe.decoder_convs}."
    )


def _is_chosen(name: str, plans: Plans) -> bool:
    return any(override.name == name for override in plans.overrides)


def _explain_cascade(reasons: Reasons) -> str:
    cascade, recipe = reasons.cascade, reasons.full.grid.recipe
    fixed = recipe.cascade == "capacity"
    if len(cascade.considered) == 1:
        verdict = f"NO CASCADE: the median case has not more than {TIMES} times a patch's voxels"
    elif cascade.lowres is None:
        verdict = f"NO CASCADE: low resolution would not save a factor {LEAST_SAVING:g} of voxels"
    else:
        verdict = f"CASCADE: the median case has more than {TIMES} times a patch's voxels"
    if fixed:
        rule = (
            f"{_count(cascade.considered[0].capacity)} voxels are what a patch could have on the "
            "GPUs of 2018 at batch 2; they do not grow with the GPU."
        )
    elif reasons.full.first is None:
        rule = "The patch was chosen."
    else:
        rule = "The patch is planned anew at each voxel size."
    parts = [verdict + "\n", _resolutions(cascade), _paragraph(rule)]
    if len(cascade.considered) > 1:
        steps = "Voxel edges are doubled" if fixed else "Voxel edges grow by 3 % at a time"
        match = "as long as they stay no longer than" if fixed else "until within twice of"
        parts.append(
            _paragraph(
                f"{steps} until the case is small enough; first along the fine axes only, {match} "
                "the coarsest."
            )
        )
    if cascade.lowres is not None:
        parts.append(
            _paragraph(
                "A network at that voxel size (3d_lowres) segments the whole case, and a second "
                "(3d_cascade_fullres) gets its segmentation as another input; otherwise it is "
                "3d_fullres. Dice is then taken over the batch at full resolution, since patches "
                "see little of a case and often no foreground."
            )
        )
    return "".join(parts)


def _resolutions(cascade: Cascade) -> str:
    """The voxel sizes that were considered."""
    rows = [
        (
            _times(one.spacing_mm),
            _times(one.shape),
            _count(one.voxels),
            _count(one.capacity),
            f"{one.voxels / one.capacity:.2f}",
        )
        for one in cascade.considered
    ]
    if len(rows) > 8:  # nnunetv2 takes dozens of steps of 3 %
        rows = [*rows[:3], ("...", "...", "...", "...", "..."), *rows[-3:]]
    return _table(("mm", "median case", "voxels", "patch", "times"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, indented."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "".join(
        "  " + "   ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + "\n"
        for line in lines
    )


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ") + "\n"


def _times(sizes: Iterable[float]) -> str:
    return times(sizes, digits=4)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _count(value: float) -> str:
    """A number of voxels or values."""
    return f"{value:,.0f}"
