"""Build ``phantom/atlas/*.npz``, the anatomy that the head phantom is warped from.

Sources, both from the Montreal Neurological Institute, in MNI space at 1 mm, free to use, copy,
modify and distribute (see ``phantom/atlas/README.md``): the single-subject head "Colin 27" (Debian
package mricron-data, ``ch2.nii.gz`` and ``ch2bet.nii.gz``) and the ICBM152 2009a grey and white
matter maps (PyPI package nilearn). MR shows no difference between bone and air, so skull, sinuses
and mastoid cells are told apart here by rules.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

from phantom.head_atlas import (
    AIR,
    ATLAS_ORIGIN_MM,
    BONE,
    FAT,
    FLUID,
    INSIDE,
    MASTOID,
    MUSCLE,
    SINUS,
    SPONGY,
)

_SHAPE = (181, 217, 181)


def main() -> None:
    """Read the two packages' files and write the atlas."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mricron", type=Path, required=True, help="templates folder of mricron-data"
    )
    parser.add_argument("--nilearn", type=Path, required=True, help="nilearn/datasets/data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where to write")
    args = parser.parse_args()
    t1 = _read(args.mricron / "ch2.nii.gz")
    brain = _fill(ndimage.binary_opening(_read(args.mricron / "ch2bet.nii.gz") > 0))
    tissue = label_head(t1, brain)
    inside = tissue == INSIDE
    grey, fluid = brain_fractions(t1, inside)
    ventricles = find_ventricles(fluid, inside)
    average_grey = _read(args.nilearn / "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz") / 255.0
    average_white = _read(args.nilearn / "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz") / 255.0
    average_fluid = np.clip(1.0 - average_grey - average_white, 0, 1) * inside
    average_ventricles = find_ventricles(np.where(average_fluid > 0.35, average_fluid, 0), inside)
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.out / "colin27.npz", brain=_pack(grey, fluid), ventricles=np.packbits(ventricles)
    )
    np.savez_compressed(args.out / "head.npz", tissue=tissue)
    np.savez_compressed(
        args.out / "icbm152.npz",
        brain=_pack(average_grey * inside, average_fluid),
        ventricles=np.packbits(average_ventricles),
    )


def label_head(t1: npt.NDArray[np.float32], brain: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """One of the labels of ``head_atlas`` for each voxel of the T1-weighted head ``(z, y, x)``."""
    z, y, x = (ATLAS_ORIGIN_MM[axis] + np.indices(_SHAPE, sparse=True)[axis] for axis in range(3))
    smooth = ndimage.gaussian_filter(t1, 0.7)
    head = np.stack([_fill(ndimage.binary_closing(s, iterations=4)) for s in smooth > 14])
    head = ndimage.binary_opening(head, iterations=2)
    inside = find_inside(smooth, brain)
    to_inside = ndimage.distance_transform_edt(~inside)
    to_skin = ndimage.distance_transform_edt(head)

    tissue = np.where(smooth > 92, FAT, MUSCLE).astype(np.uint8)
    dark = smooth < 50
    vault = (to_inside < 4.5) | (dark & (to_inside < 11))
    tissue[vault & (to_skin > 3.0)] = BONE
    deep_dark = ndimage.binary_opening(smooth < 42) & (to_skin > 5.0)
    tissue[deep_dark] = BONE
    # marrow: bright between dark tables; the clivus, the petrous tips and the diploe
    middle = (to_inside > 1.8) & (to_inside < 5.5) & (tissue == BONE) & (z > -15)
    tissue[middle] = SPONGY
    # air-filled: very dark, away from the skin, in the face's middle; mastoid cells are a mixture
    void = ndimage.binary_opening(smooth < 12.5, iterations=1) & (to_skin > 4.0)
    face = (np.abs(x) < 38) & (y < -5)
    tissue[void & face & (to_inside > 1.5)] = SINUS
    mastoid = (
        (smooth < 16)
        & (np.abs(x) > 38)
        & (y > 0)
        & (y < 60)
        & (z < -20)
        & (to_inside > 2.0)
        & (to_skin > 5.0)
    )
    tissue[ndimage.binary_opening(mastoid)] = MASTOID
    # each air space has a wall of bone
    wall = ndimage.binary_dilation(tissue == SINUS) & (tissue != SINUS) & (to_skin > 3.0)
    tissue[wall] = BONE
    for side in (-1, 1):
        near = (z + 34) ** 2 + (y + 57) ** 2 + (x - side * 33) ** 2 < 18**2
        globe = ndimage.binary_opening(near & (smooth > 18) & (smooth < 60), iterations=3)
        globe = ndimage.binary_dilation(globe, iterations=3) & near & (to_skin > 1.0)
        tissue[ndimage.binary_dilation(globe)] = MUSCLE
        tissue[globe] = FLUID
    tissue[~head] = AIR
    # at the surface partial volume with air makes fat look like muscle
    shallow = head & (to_skin <= 4.0) & (tissue == MUSCLE)
    tissue[shallow & (smooth > 30)] = FAT
    tissue[head & (to_skin <= 1.2)] = MUSCLE
    tissue[inside] = INSIDE
    return tissue


def find_inside(
    smooth: npt.NDArray[np.float32], brain: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Within the dura: the brain, closed over its sulci, grown through fluid to the inner table."""
    core = ndimage.binary_closing(np.pad(brain, 8), iterations=7)[8:-8, 8:-8, 8:-8]
    # below the pituitary a wide closing would swallow the petrous bones and the clivus
    low = 57  # z = -14 mm
    core[:low] = (ndimage.binary_closing(np.pad(brain, 3), iterations=2)[3:-3, 3:-3, 3:-3])[:low]
    distance = ndimage.distance_transform_edt(~core)
    near = distance < 4.0
    near[:low] = distance[:low] < 1.2
    fluid = near & (smooth > 27)
    inside = core | ndimage.binary_opening(fluid | core, iterations=2)
    inside = ndimage.gaussian_filter(inside.astype(np.float32), 1.2) > 0.5
    labels, _ = ndimage.label(inside)
    return labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1


def brain_fractions(
    t1: npt.NDArray[np.float32], inside: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Grey matter and fluid fractions from T1 brightness: about fluid 38, grey 84, white 112."""
    fluid = np.clip((76 - t1) / (76 - 42), 0, 1) * inside
    white = np.clip((t1 - 86) / (108 - 86), 0, 1) * inside
    # between white matter and ventricle partial volume passes through grey: take it out again
    ventricle = ndimage.binary_opening((t1 < 50) & inside, iterations=2)
    rim = ndimage.binary_dilation(ventricle, iterations=2) & (fluid < 1)
    deep = ndimage.gaussian_filter(white, 3.0) > 0.45
    grey = np.clip(1 - fluid - white, 0, 1) * inside
    grey = np.where(rim & deep, grey * 0.2, grey)
    return grey.astype(np.float32), fluid.astype(np.float32)


def find_ventricles(
    fluid: npt.NDArray[np.float32], inside: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Lateral, third and fourth ventricles: fluid deep inside, in boxes that hold no cistern."""
    z, y, x = (ATLAS_ORIGIN_MM[axis] + np.indices(_SHAPE, sparse=True)[axis] for axis in range(3))
    # boxes in MNI mm (LPS) that hold ventricles and no cistern
    lateral = (
        (np.abs(x) < 36)
        & (y > -38)
        & (y < 55)
        & (z > -2)
        & (z < 32)
        & ~((np.abs(x) < 9) & (y > 25))
    )
    lateral &= ~((np.abs(x) < 4) & (y > 20)) & ~((np.abs(x) > 22) & (y < 12))
    horns = (np.abs(x) > 20) & (np.abs(x) < 42) & (y > 5) & (y < 40) & (z > -22) & (z <= 0)
    occipital = (np.abs(x) > 12) & (np.abs(x) < 34) & (y > 45) & (y < 85) & (z > -4) & (z < 18)
    third = (np.abs(x) < 5) & (y > -8) & (y < 26) & (z > -14) & (z < 10)
    fourth = (np.abs(x) < 11) & (y > 32) & (y < 56) & (z > -48) & (z < -18)
    depth = ndimage.distance_transform_edt(inside)
    zone = lateral | horns | occipital | third | fourth
    wet = (fluid > 0.5) & zone & (depth > 18)
    wet = ndimage.binary_closing(ndimage.binary_opening(wet) | (wet & third), iterations=1)
    labels, count = ndimage.label(wet)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = np.flatnonzero(sizes >= 150)
    return np.isin(labels, keep[keep > 0])


def _pack(grey: npt.NDArray[np.float32], fluid: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Two fractions in sixteen steps each: fluid in the high half of the byte, grey in the low."""
    fluid16 = np.round(np.clip(fluid, 0, 1) * 15).astype(np.uint8)
    grey16 = np.minimum(np.round(np.clip(grey, 0, 1) * 15).astype(np.uint8), 15 - fluid16)
    return ((fluid16 << 4) | grey16).astype(np.uint8)


def _read(path: Path) -> npt.NDArray[np.float32]:
    """A template on the common grid, LPS order, zero outside its own field."""
    image = sitk.ReadImage(str(path), sitk.sitkFloat32)
    grid = sitk.Image(*_SHAPE[::-1], sitk.sitkFloat32)
    grid.SetOrigin(ATLAS_ORIGIN_MM[::-1].tolist())
    return sitk.GetArrayFromImage(
        sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0)
    )


def _fill(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return ndimage.binary_fill_holes(mask)


if __name__ == "__main__":
    main()
