"""Datasets and fingerprints written by hand, and plans for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ichseg.model.plans import Plans
from training.data.dataset import Case, Dataset
from training.planning.explain import Reasons
from training.planning.fingerprint import Fingerprint, Intensities
from training.planning.overrides import Overrides
from training.planning.planner import decide

HEAD = Intensities(1000, 55.0, 12.0, -20.0, 15.0, 56.0, 90.0, 130.0)


def dataset_of(count: int, channels: Sequence[str] = ("CT",), labels: int = 2) -> Dataset:
    cases = tuple(Case(f"c{i:03d}", (Path("x"),) * len(channels), Path("y")) for i in range(count))
    names = ("background", "bleed", "oedema", "scar")[:labels]
    return Dataset("Heads", tuple(channels), names, cases)


def fingerprint_of(
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    relative_size: float = 1.0,
    intensities: tuple[Intensities, ...] = (HEAD,),
) -> Fingerprint:
    return Fingerprint(
        schema_version=1,
        names=tuple(f"c{i:03d}" for i in range(len(shapes))),
        spacings_mm=tuple(tuple(spacing) for spacing in spacings),  # type: ignore[misc]
        shapes=tuple(tuple(shape) for shape in shapes),  # type: ignore[misc]
        relative_size=relative_size,
        intensities=intensities,
    )


def plan(fingerprint: Fingerprint, dataset: Dataset, **choices: object) -> Plans:
    return decide(fingerprint, dataset, **choices)[0]  # type: ignore[arg-type]


def decide_alike(
    voxel_mm: Sequence[float],
    shape: Sequence[int],
    *,
    cases: int = 100,
    recipe: str = "msd2018",
    architecture: str = "plain",
    **overrides: object,
) -> tuple[Plans, Reasons]:
    """For CT whose cases are all alike."""
    return decide(
        fingerprint_of([voxel_mm] * cases, [shape] * cases),
        dataset_of(cases),
        recipe=recipe,
        architecture=architecture,
        overrides=Overrides(**overrides),  # type: ignore[arg-type]
    )


def plan_heads(slices: int = 29, in_plane: float = 0.45, **choices: object) -> Plans:
    """100 cases of 512 x 512, 5 mm, as INSTANCE's."""
    return decide_alike((5.0, in_plane, in_plane), (slices, 512, 512), **choices)[0]  # type: ignore[arg-type]
