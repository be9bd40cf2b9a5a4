"""From scores in the networks' grids back to labels in the volume's own grid.

What is resampled are margins: by how much the score of each label exceeds that of the background.
Interpolation is linear, so they decide as well which score is the largest, and there is one fewer;
a region's margin is its score itself. Slab by slab they are decided at once, so that no array of
classes times volume ever exists. Between the stages of a cascade the way leads from one network's
grid to another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ichseg.engine.arrays import FloatArray, Grid, as_float, module_of, on_host, slabs
from ichseg.errors import InputError
from ichseg.model.bundle import Model
from ichseg.model.plans import Plans
from ichseg.predict import resample
from ichseg.predict.prepare import Placement, outside_nonzero, prepare_labels
from ichseg.predict.resample import coarse_axis
from ichseg.scan.volume import Volume

Steps = npt.NDArray[np.uint8] | npt.NDArray[np.float16]
_SLAB_VOXELS = 2_000_000  # of each label, restored at once


def restore(
    parts: Sequence[tuple[Grid, Placement]],
    plans: Plans,
    *,
    average: str = "probabilities",
    foreground: npt.NDArray[np.uint8] | None = None,
    probabilities: Steps | None = None,
    threshold: float | None = None,
    slab_voxels: int = _SLAB_VOXELS,
) -> npt.NDArray[np.uint8]:
    """Labels in the volume's own grid and axis order from scores in the networks' grids.

    Works in slabs of slices and takes the best label of each at once, so no array of classes times
    volume ever exists.

    Args:
        parts: Scores ``(K, Z, Y, X)`` with their placement, one for each configuration of an
            ensemble; their mean decides, the lower label on a tie.
        plans: Say how scores are resampled.
        average: The scores are ``probabilities`` or ``logits``. With several configurations the
            probabilities are averaged in either case (V2's ensembling).
        foreground: Zeros in the shape of the volume that ``prepare`` was given, to be filled with
            the probability that a voxel is anything but background, in steps of 1/255.
        probabilities: Zeros ``(labels, z, y, x)``, likewise, to be filled with the probability of
            each label but the background, or of each region: uint8 in steps of 1/255, or float16.
        threshold: A voxel is foreground where the probability of that is above this, and then has
            its likeliest label; a region is there where its own is. None for the likeliest of all
            labels, which for one label is that with a threshold of a half.
        slab_voxels: The number of output voxels of each class that are computed at once.

    Returns:
        Labels, uint8, in the shape of the volume that ``prepare`` was given.
    """
    placement = parts[0][1]
    outline = np.broadcast_to(np.uint8(), placement.full_shape)
    labels = np.zeros(placement.axes.undo(outline).shape, np.uint8)

    def crop(whole: Any) -> Any:
        """The case's part of an array in the volume's grid: a view, which is written through."""
        return placement.axes.apply(whole)[placement.slices]

    wanted = _Wanted(
        foreground=None if foreground is None else crop(foreground),
        probabilities=[crop(label) for label in (() if probabilities is None else probabilities)],
        threshold=threshold,
    )
    convert = average == "logits" and len(parts) > 1
    logits = average == "logits" and not convert
    own = crop(labels)
    for rows in slabs(own.shape, slab_voxels):
        total = _summed(parts, own.shape, rows, placement.spacing_mm, plans, convert)
        found = _decide(total, len(parts), rows, plans.regions, wanted, logits=logits)
        own[rows] = on_host(found)
    return labels


def check_threshold(threshold: float | None) -> None:
    """Refuse what is no threshold of probabilities; to be asked before the networks run.

    Raises:
        InputError: It is neither None nor a number from 0.01 to 0.99.
    """
    if threshold is not None and not (
        isinstance(threshold, int | float | np.floating) and 0.01 <= threshold <= 0.99
    ):
        raise InputError(f"threshold {threshold!r}, expected a number from 0.01 to 0.99")


def regrid(
    scores: Grid, placement: Placement, wanted: Placement, plans: Plans
) -> npt.NDArray[np.int8]:
    """Labels in another configuration's grid, from scores: what a cascade's second stage is given.

    Args:
        scores: Scores ``(K, Z, Y, X)`` in the first stage's grid.
        placement: Where the case lies in that grid.
        wanted: Where the case lies in the second stage's grid.
        plans: Say how scores are resampled.

    Returns:
        Labels, int8, of the shape ``wanted.grid_shape``.
    """
    shape, spacing_mm = wanted.grid_shape, wanted.grid_spacing_mm
    labels = np.empty(shape, np.int8)
    for rows in slabs(shape, _SLAB_VOXELS):
        total = _summed([(scores, placement)], shape, rows, spacing_mm, plans)
        labels[rows] = on_host(_likeliest(total, plans.regions))
    return labels


def previous_channels(
    model: Model, volume: Volume, scores: Grid, placement: Placement, wanted: Placement
) -> FloatArray:
    """What the first stage found, as input channels of the second, ``(labels, Z, Y, X)``.

    Args:
        model: Says how the one reaches the other, see ``Model.cascade``.
        volume: The case.
        scores: The first stage's scores ``(K, Z, Y, X)``.
        placement: Where these lie in the volume.
        wanted: Where the second stage's grid lies.
    """
    plans = model.plans
    if model.cascade == "scores":
        labels = regrid(scores, placement, wanted, plans)
    else:
        decided = restore([(scores, placement)], plans, average=model.average)
        outside = outside_nonzero([volume], wanted)
        labels = prepare_labels(volume.with_voxels(decided), wanted, plans, outside)
    return one_hot(labels, len(plans.labels) - 1)


def one_hot(previous: npt.NDArray[np.int8], classes: int) -> FloatArray:
    """The first stage's labels as the input channels of the second, ``(classes, Z, Y, X)``.

    Args:
        previous: Labels ``(Z, Y, X)`` in the second stage's grid.
        classes: Foreground labels are 1 to ``classes``.
    """
    return np.stack([previous == label for label in range(1, classes + 1)]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked for beside labels; arrays are of the case's part of the volume, to be filled.

    Attributes:
        foreground: Gets the probability of all labels but the background.
        probabilities: Get that of each label but the background, or of each region.
        threshold: See ``restore``.
    """

    foreground: npt.NDArray[np.uint8] | None
    probabilities: Sequence[Steps]
    threshold: float | None


def _summed(
    parts: Sequence[tuple[Grid, Placement]],
    shape: Sequence[int],
    rows: slice,
    spacing_mm: tuple[float, float, float],
    plans: Plans,
    convert: bool = False,
) -> Grid:
    """The sum of all parts' margins in a slab of a grid of this shape and spacing.

    With ``convert`` the scores are logits and are added up as probabilities.
    """
    rules, regions = plans.resampling, bool(plans.regions)
    total: Grid | None = None
    for scores, own in parts:
        separate_axis = None
        if "score" in rules.separate_z:
            separate_axis = coarse_axis(own.grid_spacing_mm, spacing_mm, rules.anisotropy)
        slab = resize_margins(
            scores,
            shape,
            rows,
            order=rules.score_order,
            separate_axis=separate_axis,
            regions=regions,
        )
        if convert:
            slab = _of_probabilities(slab, regions=regions)
        total = slab if total is None else total + slab
    assert total is not None
    return total


def _decide(
    total: Grid, count: int, rows: slice, regions: Sequence[int], wanted: _Wanted, *, logits: bool
) -> Any:
    """The labels of a slab, and in its rows what is wanted beside.

    All is decided where the scores are: of a GPU's memory come bytes, and not floats.

    Args:
        total: The sum of ``count`` parts' margins.
        count: How many these are.
        rows: The slab.
        regions: The labels of regions, if there are any.
        wanted: What is asked for.
        logits: Whether the sums are logits, and not probabilities.
    """
    threshold = wanted.threshold
    if wanted.foreground is None and not wanted.probabilities and threshold is None:
        return _likeliest(total, regions)
    mean: Any = total / count
    probability = _foreground_probability(mean, regions=bool(regions), logits=logits)
    if wanted.foreground is not None:
        wanted.foreground[rows] = on_host(_in_steps(probability))
    if wanted.probabilities or (regions and threshold is not None):
        each = _label_probabilities(mean, regions=bool(regions), logits=logits)
    for label, kept in enumerate(wanted.probabilities):
        own = _in_steps(each[label]) if kept.dtype == np.uint8 else each[label].clip(0, 1)
        kept[rows] = on_host(own)
    if threshold is None:
        return _likeliest(total, regions)
    if regions:
        return _last_region(each - threshold, regions)
    xp = module_of(total)
    return xp.asarray(total.argmax(0) + 1, dtype=xp.uint8) * (probability > threshold)


def _likeliest(margins: Grid, regions: Sequence[int]) -> Any:
    """The label of each voxel, from margins of labels or of regions."""
    return _last_region(margins, regions) if regions else _largest(margins)


def resize_margins(
    scores: Grid,
    shape: Sequence[int],
    rows: slice,
    *,
    order: int,
    separate_axis: int | None,
    regions: bool = False,
) -> Grid:
    """Margins from scores, resized: one slab of the first axis.

    Args:
        scores: Scores ``(K, Z, Y, X)``, a numpy array or a tensor on any device.
        shape: Full output size ``(z, y, x)``.
        rows: The output positions of the first axis to compute.
        order: Spline order, 0, 1 or 3. Nothing is clipped.
        separate_axis: The separate-z axis, which is resized with order 0; or None.
        regions: Whether the scores are of regions.

    Returns:
        ``(K - 1, len(rows), y, x)``, or of regions ``(K, len(rows), y, x)``; float32.
    """
    rows = slice(rows.start, min(rows.stop, shape[0]))
    order_z = 0 if separate_axis == 0 else order
    if isinstance(scores, np.ndarray) and order == 1 and separate_axis in (None, 0):
        return _linear_margins(scores, shape, rows, order_z=order_z, regions=regions)
    source = resample.source_slices(scores.shape[1], shape[0], order_z, rows)
    band = as_float(scores[:, source])
    margins = band if regions else band[1:] - band[:1]
    size = scores.shape[1:]
    if order != 1 or separate_axis in (1, 2):
        return resample.resize_band(
            margins, source, size, shape, rows, order=order, separate_axis=separate_axis
        )
    if size[0] != shape[0]:
        margins = resample.resize_axis(margins, 1, size[0], shape[0], order_z, rows, source.start)
    from torch.nn.functional import interpolate  # loaded already, or there were no tensor

    assert not isinstance(margins, np.ndarray)
    return interpolate(margins, tuple(shape[1:]), mode="bilinear")  # faster than two matrices


def _linear_margins(
    scores: FloatArray,
    shape: Sequence[int],
    rows: slice,
    *,
    order_z: int,
    regions: bool,
) -> FloatArray:
    """``resize_margins`` of order 1 in numpy: image by image, which stays in the cache."""
    depth, height, width = scores.shape[1:]
    low_z, high_z, share_z = resample.neighbours(depth, shape[0])
    if order_z == 0 or depth == shape[0]:
        low_z = high_z = resample.nearest_indices(depth, shape[0])
    low_y, high_y, share_y = resample.neighbours(height, shape[1])
    low_x, high_x, share_x = resample.neighbours(width, shape[2])
    share_y, share_x = share_y.astype(np.float32)[:, None], share_x.astype(np.float32)
    result = np.empty((len(scores) - (not regions), rows.stop - rows.start, *shape[1:]), np.float32)
    for label, margins in enumerate(result, start=not regions):
        for z, out in zip(range(rows.start, rows.stop), margins, strict=True):
            image = _margin(scores, label, low_z[z], regions)
            if high_z[z] != low_z[z]:
                _blend(image, _margin(scores, label, high_z[z], regions), np.float32(share_z[z]))
            if width != shape[2]:
                image, right = image.take(low_x, 1), image.take(high_x, 1)
                _blend(image, right, share_x)
            if height == shape[1]:
                out[...] = image
            else:
                image.take(low_y, 0, out=out, mode="clip")  # another mode makes a copy first
                _blend(out, image.take(high_y, 0), share_y)
    return result


def _margin(scores: FloatArray, label: int, z: int, regions: bool) -> FloatArray:
    """One slice of what ``resize_margins`` resizes, to be overwritten."""
    margin: FloatArray = scores[label, z]
    return margin.copy() if regions else margin - scores[0, z]


def _blend(low: FloatArray, high: FloatArray, share: Any) -> None:
    """Move ``low`` towards ``high`` by this share of the way; both are overwritten."""
    high -= low
    high *= share
    low += high


def _of_probabilities(margins: Grid, regions: bool) -> Grid:
    """Margins of probabilities from margins of logits, both ``(K, ...)``.

    Those of labels are over label 0, those of regions over a half.
    """
    xp = module_of(margins)
    if regions:
        halves: Grid = xp.tanh(margins / 2)
        return halves
    shares, background = _shares(margins)
    probabilities: Grid = (shares - background) / (shares.sum(0) + background)
    return probabilities


def _shares(margins: Grid) -> tuple[Any, Any]:
    """What softmax divides by its sum, of margins of logits: of each label, and of label 0."""
    xp = module_of(margins)
    shift = xp.clip(xp.amax(margins, 0), 0, None)
    return xp.exp(margins - shift), xp.exp(-shift)


def _in_steps(probability: Grid) -> Any:
    """Probabilities in steps of 1/255."""
    xp = module_of(probability)
    return xp.asarray(xp.clip(xp.round(probability * 255), 0, 255), dtype=xp.uint8)


def _label_probabilities(margins: Grid, *, regions: bool, logits: bool) -> Any:
    """The probability of each label but the background, or of each region, ``(K, ...)``."""
    xp = module_of(margins)
    if regions:
        return (xp.tanh(margins / 2) if logits else margins) * 0.5 + 0.5
    if logits:
        shares, background = _shares(margins)
        return shares / (shares.sum(0) + background)
    # what each exceeds the background's by, and that all sum to 1
    return margins + (1 - margins.sum(0)) / (len(margins) + 1)


def _foreground_probability(margins: Grid, *, regions: bool, logits: bool) -> Any:
    """The probability of anything but background, from margins ``(K, ...)``.

    With several labels the margins of probabilities over that of the background, and the sum of 1,
    give it exactly. Regions may overlap: that of the likeliest counts.
    """
    xp = module_of(margins)
    if regions:
        best = xp.amax(margins, 0)
        return (xp.tanh(best / 2) if logits else best) * 0.5 + 0.5
    if logits:
        shares, background = _shares(margins)
        others = shares.sum(0)
        return others / (others + background)
    return (margins.sum(0) + len(margins)) / (len(margins) + 1)


def _largest(margins: Grid) -> Any:
    """The label with the largest margin, and 0 if none has a positive one; the lower on a tie."""
    xp = module_of(margins)
    labels = (margins[0] > 0).view(xp.uint8)
    best = xp.clip(margins[0], 0, None) if len(margins) > 1 else margins[0]
    for label, margin in enumerate(margins[1:], start=2):  # far faster than argmax
        labels = xp.where(margin > best, label, labels)
        best = xp.maximum(best, margin)
    return labels


def _last_region(margins: Grid, regions: Sequence[int]) -> Any:
    """The label of the last region whose margin is positive, and 0 if none is."""
    xp = module_of(margins)
    labels = xp.zeros_like(margins[0], dtype=xp.uint8)
    for region, label in zip(margins, regions, strict=True):
        labels = xp.where(region > 0, label, labels)
    return labels
