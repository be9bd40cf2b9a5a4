"""From a volume in the scanner's grid to a network's: axes, crop, resampling, normalisation.

The axes and the crop are the same for all configurations of a plan, and are found once a case.
``restore`` is the way back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg import ndimage
from ichseg.engine.arrays import FloatArray
from ichseg.errors import InputError
from ichseg.model.plans import Configuration, Normalisation, Plans
from ichseg.predict import resample
from ichseg.predict.crop import crop_box
from ichseg.scan.orientation import Array, AxisOrder, Box, orient_axes
from ichseg.scan.volume import Volume

_FLOOD_SHARE, _FLOOD_STEPS = 0.02, 50  # of the voxels at a time, and voxels deep: 0.1 s at most


@dataclass(frozen=True, slots=True)
class Crop:
    """The part of a case that networks see; all in the plan's axis order.

    Attributes:
        axes: How the volume's axes became the plan's.
        full_shape: The whole volume's size in voxels.
        box: Where the part lies in the volume, ``(start, stop)`` per axis.
        spacing_mm: The volume's voxel size.
    """

    axes: AxisOrder
    full_shape: tuple[int, int, int]
    box: Box
    spacing_mm: tuple[float, float, float]

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The part as an index into the volume in the plan's axis order."""
        z, y, x = (slice(*bounds) for bounds in self.box)
        return z, y, x

    @property
    def crop_shape(self) -> tuple[int, int, int]:
        """The part's size in voxels of the volume."""
        z, y, x = (stop - start for start, stop in self.box)
        return z, y, x


@dataclass(frozen=True, slots=True)
class Placement(Crop):
    """A crop in the grid of a network.

    Attributes:
        grid_shape: The crop's size in voxels after resampling.
        grid_spacing_mm: The voxel size of that grid.
    """

    grid_shape: tuple[int, int, int]
    grid_spacing_mm: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class PreparedCase:
    """What a network sees of a case.

    Attributes:
        data: Normalised intensities in the network's grid, float32 ``(C, Z, Y, X)``.
        placement: Where that grid lies in the case's volume.
    """

    data: FloatArray
    placement: Placement


def prepare(channels: Sequence[Volume], plans: Plans, configuration: Configuration) -> PreparedCase:
    """Bring a case's volumes (one per channel) into the network's grid and intensities.

    Raises:
        InputError: The number of channels or their geometry is not as planned.
    """
    placement = place(channels, plans, configuration)
    return PreparedCase(to_grid(channels, plans, placement), placement)


def to_grid(channels: Sequence[Volume], plans: Plans, placement: Placement) -> FloatArray:
    """A case's volumes in the network's grid and intensities, float32 ``(C, Z, Y, X)``.

    Beside the result no copy of a volume is made, but one in float32 where a z-score is taken
    before the volume is resampled.

    Args:
        channels: The case's volumes, one per channel.
        plans: How to resample and to normalise.
        placement: Where the case lies in the grid, see ``place``.
    """
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
            separate_axis=_separate_axis(placement, plans, "label"),
        ).view(np.bool_)
    separate_axis = _separate_axis(placement, plans, "image")
    data = np.empty((len(channels), *placement.grid_shape), np.float32)
    for image, scheme, result in zip(cropped, plans.normalisations, data, strict=True):
        convert = None
        if normalise_first and scheme.scheme == "ct":  # voxel by voxel, so a slab at a time
            convert = functools.partial(_normalised, scheme=scheme)
        elif normalise_first:
            image = normalise(image.astype(np.float32), scheme, outside)
        order = plans.resampling.image_order
        resample.resize(image, result, order=order, separate_axis=separate_axis, convert=convert)
        if not normalise_first:
            normalise(result, scheme, outside)
    return data


def place(channels: Sequence[Volume], plans: Plans, configuration: Configuration) -> Placement:
    """Where a case will lie in one configuration's grid.

    Raises:
        InputError: The number of channels or their geometry is not as planned.
    """
    return place_crop(find_crop(channels, plans), configuration)


def find_crop(channels: Sequence[Volume], plans: Plans) -> Crop:
    """Turn a case's axes into the plan's order and find the part of it that networks see.

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
    full_z, full_y, full_x = stack[0].shape
    z, y, x = (first.spacing_mm[axis] for axis in axes.permutation)
    box = crop_box(stack, (z, y, x), plans.crop)
    return Crop(axes, (full_z, full_y, full_x), box, (z, y, x))


def place_crop(crop: Crop, configuration: Configuration) -> Placement:
    """Where a case's crop will lie in a configuration's grid."""
    target = configuration.spacing_mm
    if configuration.architecture.dimensions == 2:  # its slices stay as they are
        target = (crop.spacing_mm[0], *target[1:])
    return Placement(
        axes=crop.axes,
        full_shape=crop.full_shape,
        box=crop.box,
        spacing_mm=crop.spacing_mm,
        grid_shape=resample.resampled_shape(crop.crop_shape, crop.spacing_mm, target),
        grid_spacing_mm=target,
    )


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
        placement: Where the case lies in the grid, see ``place``.
        plans: Say how labels are resampled.
        outside: Voxels from ``outside_nonzero``, whose background becomes -1.

    Returns:
        Labels, int8 ``(Z, Y, X)``.
    """
    labels = placement.axes.apply(label.voxels)[placement.slices].astype(np.int8)
    if outside is not None:
        labels[outside & (labels == 0)] = -1
    return resample.resize_labels(
        labels,
        placement.grid_shape,
        order=plans.resampling.label_order,
        separate_axis=_separate_axis(placement, plans, "label"),
    ).astype(np.int8, copy=False)


def normalise(
    values: FloatArray, scheme: Normalisation, outside: npt.NDArray[np.bool_] | None = None
) -> FloatArray:
    """Normalise one channel ``(Z, Y, X)`` in place, and return it.

    Args:
        values: The channel's intensities.
        scheme: The normalisation.
        outside: Voxels that a masked z-score leaves out and sets to 0, unless they are all.
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


def _outside(stack: Sequence[Array]) -> npt.NDArray[np.bool_] | None:
    """Where all channels are zero and connected through such voxels, by faces, to the border.

    None if that is nowhere.
    """
    zero: npt.NDArray[np.bool_] = np.equal(stack[0], 0)
    for channel in stack[1:]:
        zero &= np.equal(channel, 0)
    if not any(np.moveaxis(zero, axis, 0)[[0, -1]].any() for axis in range(3)):
        return None  # every zero lies in a hole, which is filled
    near = _flooded(zero)
    if near is not None:
        return near
    pieces, count = ndimage.label(zero)  # quicker than to fill the holes of all else
    reaches_border = np.zeros(count + 1, np.bool_)
    for axis in range(3):
        reaches_border[np.moveaxis(pieces, axis, 0)[[0, -1]]] = True
    reaches_border[0] = False  # what is not zero
    zero[zero] = reaches_border[pieces[zero]]
    return zero


def _flooded(zero: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    """What a flood from the border reaches; None if that is much, or far from it.

    In most CT it is not: there zeros are noise, which touches the first and the last slice.
    """
    most = zero.size * _FLOOD_SHARE
    faces = (np.moveaxis(zero, axis, 0)[[0, -1]] for axis in range(3))
    if sum(np.count_nonzero(face) for face in faces) > most:
        return None
    padded = np.pad(zero, 1)  # so that no step leads around an edge
    border = np.zeros_like(padded)
    for axis in range(3):
        np.moveaxis(border, axis, 0)[[1, -2]] = True
    open_to, found = padded.ravel(), np.zeros(padded.size, np.bool_)
    steps = [stride * sign for stride in padded.strides for sign in (-1, 1)]  # a byte a voxel
    front = np.flatnonzero(open_to & border.ravel())
    for _ in range(_FLOOD_STEPS):
        found[front] = True
        around = np.concatenate([front + step for step in steps])
        front = np.unique(around[open_to[around] & ~found[around]])
        if not front.size:
            return found.reshape(padded.shape)[1:-1, 1:-1, 1:-1]
        if front.size > most:
            break
    return None


def _separate_axis(placement: Placement, plans: Plans, kind: str) -> int | None:
    if kind not in plans.resampling.separate_z:
        return None
    return resample.coarse_axis(
        placement.spacing_mm, placement.grid_spacing_mm, plans.resampling.anisotropy
    )
