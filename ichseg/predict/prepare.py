"""From a volume in the scanner's grid to the network's grid and back.

Forth: bring the axes into the plan's order, crop, resample, normalise. Back,
``restore``: resample the scores slab by slab, take the best label at once, paste into the crop,
undo the axes. Between the stages of a cascade, ``regrid``: from one network's grid to another's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ichseg.engine.arrays import FloatArray, Grid, as_kind_of, on_host
from ichseg.errors import InputError
from ichseg.model.plans import Configuration, Normalisation, Plans
from ichseg.predict import resample
from ichseg.predict.crop import crop_box
from ichseg.scan.orientation import Array, AxisOrder, Box, orient_axes
from ichseg.scan.volume import Volume

_SLAB_VOXELS = 2_000_000  # of each label, restored at once


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prepared case lies in its volume; all in the plan's axis order.

    Attributes:
        axes: How the volume's axes became the plan's.
        full_shape: The whole volume's size.
        box: Crop, ``(start, stop)`` per axis.
        spacing_mm: The volume's voxel size.
        grid_shape: Size after resampling the crop.
        grid_spacing_mm: Voxel size of that grid.
    """

    axes: AxisOrder
    full_shape: tuple[int, int, int]
    box: Box
    spacing_mm: tuple[float, float, float]
    grid_shape: tuple[int, int, int]
    grid_spacing_mm: tuple[float, float, float]

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The crop as an index."""
        z, y, x = (slice(*bounds) for bounds in self.box)
        return z, y, x

    @property
    def crop_shape(self) -> tuple[int, int, int]:
        """Size of the crop before resampling."""
        z, y, x = (stop - start for start, stop in self.box)
        return z, y, x


@dataclass(frozen=True, slots=True)
class PreparedCase:
    """What the network sees: ``data`` float32 ``(C, Z, Y, X)``, and how to get back."""

    data: FloatArray
    placement: Placement


def plan_axes(volume: Volume, plans: Plans) -> AxisOrder:
    """The change of axes that the plan asks for: its orientation, then its transpose."""
    axes = AxisOrder((0, 1, 2), (False, False, False))
    if plans.orientation != "as_stored":
        axes = orient_axes(volume)
    if plans.orientation == "RAS":
        z, y, x = axes.flips
        axes = AxisOrder(axes.permutation, (z, not y, not x))
    a, b, c = plans.transpose
    p, f = axes.permutation, axes.flips
    return AxisOrder((p[a], p[b], p[c]), (f[a], f[b], f[c]))


def place(channels: Sequence[Volume], plans: Plans, configuration: Configuration) -> Placement:
    """Where the case will lie in the configuration's grid.

    Raises:
        InputError: The number of channels or their geometry is not as planned.
    """
    if len(channels) != len(plans.channels):
        raise InputError(
            f"{len(channels)} channels given, expected {len(plans.channels)}: {plans.channels}"
        )
    first = channels[0]
    if any(c.voxels.shape != first.voxels.shape for c in channels):
        raise InputError(f"channels differ in shape: {[c.voxels.shape for c in channels]}")
    axes = plan_axes(first, plans)
    stack = [axes.apply(channel.voxels) for channel in channels]
    spacing = tuple(first.spacing_mm[axis] for axis in axes.permutation)
    box = crop_box(stack, spacing, plans.crop)
    target = configuration.spacing_mm
    if configuration.architecture.dimensions == 2:
        target = (spacing[0], *target[1:])
    z, y, x = stack[0].shape
    return Placement(
        axes=axes,
        full_shape=(z, y, x),
        box=box,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        grid_shape=resample.resampled_shape([b - a for a, b in box], spacing, target),
        grid_spacing_mm=target,
    )


def prepare(channels: Sequence[Volume], plans: Plans, configuration: Configuration) -> PreparedCase:
    """Bring a case's volumes (one per channel) into the network's grid and intensities.

    Beside the result no copy of a volume is made, but one in float32 where a z-score is taken
    before the volume is resampled.

    Raises:
        InputError: The number of channels or their geometry is not as planned.
    """
    placement = place(channels, plans, configuration)
    cropped = [placement.axes.apply(channel.voxels)[placement.slices] for channel in channels]
    outside = None
    if any(normalisation.masked for normalisation in plans.normalisations):
        outside = _outside(cropped)
    resampled = placement.grid_shape != placement.crop_shape
    normalise_first = plans.normalise_first and resampled  # else the order changes nothing
    if outside is not None and resampled and not normalise_first:
        outside = resample.resize_labels(
            outside.view(np.uint8),
            placement.grid_shape,
            order=plans.resampling.label_order,
            apart=_apart(placement, plans, "label"),
        ).view(np.bool_)
    apart = _apart(placement, plans, "image")
    data = np.empty((len(channels), *placement.grid_shape), np.float32)
    for image, scheme, result in zip(cropped, plans.normalisations, data, strict=True):
        convert = None
        if normalise_first and scheme.scheme == "ct":  # voxel by voxel, so a slab at a time
            convert = functools.partial(_normalised, scheme=scheme)
        elif normalise_first:
            image = normalise(image.astype(np.float32), scheme, outside)
        order = plans.resampling.image_order
        resample.resize(image, result, order=order, apart=apart, convert=convert)
        if not normalise_first:
            normalise(result, scheme, outside)
    return PreparedCase(data, placement)


def outside_nonzero(
    channels: Sequence[Volume], placement: Placement
) -> npt.NDArray[np.bool_] | None:
    """Voxels of the crop outside the filled nonzero region, in the plan's axis order.

    None if there are none.
    """
    return _outside([placement.axes.apply(c.voxels)[placement.slices] for c in channels])


def prepare_labels(
    label: Volume, placement: Placement, plans: Plans, outside: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int8]:
    """Bring a label map into the same grid as its case.

    Args:
        label: Labels in the case's own grid.
        placement: From ``place`` or ``prepare``.
        plans: For the interpolation order.
        outside: From ``outside_nonzero``; background there becomes -1.

    Returns:
        int8 ``(Z, Y, X)``.
    """
    labels = placement.axes.apply(label.voxels)[placement.slices].astype(np.int8)
    if outside is not None:
        labels[outside & (labels == 0)] = -1
    return resample.resize_labels(
        labels,
        placement.grid_shape,
        order=plans.resampling.label_order,
        apart=_apart(placement, plans, "label"),
    ).astype(np.int8, copy=False)


def normalise(
    values: FloatArray, scheme: Normalisation, outside: npt.NDArray[np.bool_] | None = None
) -> FloatArray:
    """Normalise one channel ``(Z, Y, X)`` in place, and return it.

    Args:
        values: Intensities.
        scheme: What to do.
        outside: A masked z-score leaves these voxels out and sets them to 0; unless they are all.
    """
    if scheme.scheme == "none":
        return values
    if scheme.scheme == "ct":
        np.clip(values, scheme.clip_low, scheme.clip_high, out=values)
        values -= scheme.mean
        values /= max(scheme.deviation, 1e-8)
        return values
    masked = scheme.masked and outside is not None
    counted = ~outside if masked and outside is not None and not outside.all() else None
    values -= values.mean(dtype=np.float64, where=True if counted is None else counted)
    squares = (  # slice by slice, lest a float64 copy of the volume be made
        float(np.square(part if counted is None else part[counted[z]], dtype=np.float64).sum())
        for z, part in enumerate(values)
    )
    count = values.size if counted is None else int(counted.sum())
    values /= max(math.sqrt(sum(squares) / count), 1e-8)
    if masked:
        values[outside] = 0
    return values


def _normalised(values: FloatArray, scheme: Normalisation) -> FloatArray:
    return normalise(values.copy(), scheme)


def restore(
    parts: Sequence[tuple[Grid, Placement]],
    plans: Plans,
    *,
    average: str = "probabilities",
    slab_voxels: int = _SLAB_VOXELS,
) -> npt.NDArray[np.uint8]:
    """Labels in the volume's own grid and axis order from scores in the networks' grids.

    Works in slabs of slices and takes the best label of each at once, so no array of classes times
    volume ever exists.

    Args:
        parts: Scores ``(K, Z, Y, X)`` with their placement, one for each configuration of an
            ensemble; their mean decides, the lower label on a tie.
        plans: For the interpolation order.
        average: What the scores are, ``probabilities`` or ``logits``. Of several configurations
            the probabilities are averaged in either case (V2's ensembling).
        slab_voxels: Output voxels per class computed at once.

    Returns:
        uint8, shape of the volume that ``prepare`` was given.
    """
    placement = parts[0][1]
    outline = np.broadcast_to(np.uint8(), placement.full_shape)
    labels = np.zeros(placement.axes.undo(outline).shape, np.uint8)
    convert = average == "logits" and len(parts) > 1
    crop = placement.axes.apply(labels)[placement.slices]  # a view, which is written through
    _decide(parts, crop, placement.spacing_mm, plans, slab_voxels, convert=convert)
    return labels


def regrid(
    scores: Grid, placement: Placement, wanted: Placement, plans: Plans
) -> npt.NDArray[np.int8]:
    """Labels in another configuration's grid, from scores: what a cascade's second stage is given.

    Args:
        scores: ``(K, Z, Y, X)`` in the first stage's grid.
        placement: Of the case in that grid.
        wanted: Of the same case in the second stage's grid.
        plans: For the interpolation order.

    Returns:
        int8, of the shape ``wanted.grid_shape``.
    """
    labels = np.empty(wanted.grid_shape, np.uint8)
    _decide([(scores, placement)], labels, wanted.grid_spacing_mm, plans, _SLAB_VOXELS)
    return labels.astype(np.int8)


def one_hot(previous: npt.NDArray[np.int8], classes: int) -> FloatArray:
    """The first stage's labels as the input channels of the second: ``(classes, Z, Y, X)``.

    Args:
        previous: ``(Z, Y, X)`` in the second stage's grid.
        classes: Foreground labels are 1 to ``classes``.
    """
    return np.stack([previous == label for label in range(1, classes + 1)]).astype(np.float32)


def _decide(
    parts: Sequence[tuple[Grid, Placement]],
    labels: npt.NDArray[np.uint8],
    spacing_mm: tuple[float, float, float],
    plans: Plans,
    slab_voxels: int,
    *,
    convert: bool = False,
) -> None:
    """Fill the crop's labels, in the grid of this spacing, slab by slab.

    With ``convert`` the scores are logits and are averaged as probabilities.
    """
    step = max(1, slab_voxels // (labels.shape[1] * labels.shape[2]))
    for start in range(0, labels.shape[0], step):
        rows = slice(start, min(start + step, labels.shape[0]))
        leads: Grid | None = None
        for scores, own in parts:
            apart = None
            if "score" in plans.resampling.separate_z:
                apart = resample.coarse_axis(
                    own.grid_spacing_mm, spacing_mm, plans.resampling.anisotropy
                )
            slab = resample.resize_leads(
                scores,
                labels.shape,
                rows,
                order=plans.resampling.score_order,
                apart=apart,
                regions=bool(plans.regions),
            )
            if convert:
                slab = _of_probabilities(slab, bool(plans.regions))
            leads = slab if leads is None else leads + slab
        assert leads is not None
        if plans.regions:
            labels[rows] = _written(on_host(leads), plans.regions)
        else:
            labels[rows] = _largest(on_host(leads))


def _of_probabilities(leads: Grid, regions: bool) -> Grid:
    """Leads ``(K, ...)`` of probabilities from leads of logits: over label 0, or over a half."""
    if not isinstance(leads, np.ndarray):
        return as_kind_of(leads, on_host(_of_probabilities(on_host(leads), regions)))
    if regions:
        halves: FloatArray = np.tanh(leads / 2)
        return halves
    shift = np.maximum(leads.max(0), 0)
    shares = np.exp(leads - shift)
    background = np.exp(-shift)
    probabilities: FloatArray = (shares - background) / (shares.sum(0) + background)
    return probabilities


def _largest(leads: FloatArray) -> npt.NDArray[np.uint8]:
    """The label with the largest lead over label 0, and 0 if none has one; the lower on a tie."""
    labels: npt.NDArray[np.uint8] = (leads[0] > 0).view(np.uint8)
    best = np.maximum(leads[0], 0) if len(leads) > 1 else leads[0]
    for label, lead in enumerate(leads[1:], start=2):  # far faster than argmax
        np.copyto(labels, label, where=lead > best, casting="unsafe")
        np.maximum(best, lead, out=best)
    return labels


def _written(leads: FloatArray, regions: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The label of the last region whose lead over the background is positive, and 0 if none is."""
    labels = np.zeros(leads.shape[1:], np.uint8)
    for region, label in zip(leads, regions, strict=True):
        np.copyto(labels, label, where=region > 0, casting="unsafe")
    return labels


def _outside(stack: Sequence[Array]) -> npt.NDArray[np.bool_] | None:
    """Where all channels are zero and connected through such voxels, by faces, to the border.

    None if that is nowhere.
    """
    zero: npt.NDArray[np.bool_] = np.equal(stack[0], 0)
    for channel in stack[1:]:
        zero &= np.equal(channel, 0)
    if not any(np.moveaxis(zero, axis, 0)[[0, -1]].any() for axis in range(3)):
        return None  # every zero lies in a hole, which is filled
    outside: npt.NDArray[np.bool_] = ~ndimage.binary_fill_holes(~zero)
    return outside


def _apart(placement: Placement, plans: Plans, kind: str) -> int | None:
    if kind not in plans.resampling.separate_z:
        return None
    return resample.coarse_axis(
        placement.spacing_mm, placement.grid_spacing_mm, plans.resampling.anisotropy
    )
