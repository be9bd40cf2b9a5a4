"""Which findings a head has, and the head with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from phantom.findings import inside, mouth, outside
from phantom.head import CHANNELS, Head
from phantom.person import HeadParameters

_OUTSIDE, _WITHIN = CHANNELS.index("outside_hu"), CHANNELS.index("brain_hu")


@dataclass(frozen=True, slots=True)
class Findings:
    """What a head shows beside bleeds, or how its bleeds lie."""

    hydrocephalus: bool = False
    """Ventricles are wide, sulci narrow and white matter around the ventricles pale."""
    acute_on_chronic: bool = False
    """Subdural bleeds are fresh blood in an old, dark collection."""
    tentorial: bool = False
    """Subdural bleeds lie in a layer along the tentorium."""
    calcified_dura: bool = False
    """Plates in the falx and under the inner table."""
    scalp_haematoma: bool = False
    """Blood between skull and skin, which is no intracranial bleed."""
    fracture: bool = False
    """A line through the vault."""
    surgery: bool = False
    """A burr hole with a drain, or a flap of bone with plates."""
    clip: bool = False
    """A clip or coil at the skull's base, with its streaks."""
    contrast: bool = False
    """Arteries and sinuses are bright with contrast medium."""
    dense_veins: bool = False
    """Sinuses and deep veins are wide and full of dense blood."""
    mouth: bool = False
    """The scan goes on below the skull's base, to tongue and jaw."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of those that are there."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name))


NOTHING = Findings()


def draw_findings(lesions: Sequence[tuple[str, float]], rng: np.random.Generator) -> Findings:
    """Draw findings, each by its frequency among heads with these bleeds."""
    kinds = [kind for kind, _ in lesions]
    subdural_ml = max((volume for kind, volume in lesions if kind == "subdural"), default=0.0)
    in_ventricles_ml = sum(volume for kind, volume in lesions if kind == "intraventricular")
    after_trauma = "subdural" in kinds or "epidural" in kinds
    chances = {
        "hydrocephalus": 0.6 if in_ventricles_ml > 3 else 0.05,
        "acute_on_chronic": 0.4 if subdural_ml > 1 else 0.0,
        "tentorial": 0.3 if 0 < subdural_ml < 20 else 0.0,
        "calcified_dura": 0.25,
        "scalp_haematoma": 0.4 if after_trauma else 0.2,
        "fracture": 0.3 if after_trauma else 0.1,
        "surgery": 0.1,
        "clip": 0.05,
        "contrast": 0.1,
        "dense_veins": 0.35,
        "mouth": 0.5,
    }
    drawn = {name: bool(rng.random() < chance) for name, chance in chances.items()}
    drawn["tentorial"] &= not drawn["acute_on_chronic"]
    return Findings(**drawn)


def with_hydrocephalus(
    parameters: HeadParameters, findings: Findings, rng: np.random.Generator
) -> HeadParameters:
    """The person with wide ventricles under pressure, if that is among the findings."""
    if not findings.hydrocephalus:
        return parameters
    return dataclasses.replace(
        parameters,
        ventricle_growth_mm=max(parameters.ventricle_growth_mm, 1.0) + float(rng.uniform(2.5, 5.0)),
        fluid_exponent=max(parameters.fluid_exponent, 1.0) * float(rng.uniform(1.2, 1.8)),
        pallor_hu=parameters.pallor_hu + float(rng.uniform(2.0, 6.0)),
    )


def add_findings(head: Head, findings: Findings, rng: np.random.Generator) -> Head:
    """The head with those findings that are no bleeds drawn into its maps."""
    maps = head.maps.numpy().copy()
    outer, within = maps[0, _OUTSIDE], maps[0, _WITHIN]  # views: drawn into in place
    if findings.contrast:
        inside.add_contrast(within, rng)
    if findings.dense_veins:
        inside.add_dense_veins(within, rng)
    if findings.calcified_dura:
        inside.add_calcified_dura(within, rng)
    if findings.scalp_haematoma:
        outside.add_scalp_haematoma(outer, head.parameters.fat_hu, rng)
    if findings.fracture:
        outside.add_fracture(outer, rng)
    if findings.surgery:
        if rng.random() < 0.5:
            outside.add_flap(outer, rng)
        else:
            inside.add_drain(outer, within, rng)
    if findings.clip:
        inside.add_clip(within, rng)
    if findings.mouth:
        below = np.repeat(maps[:, :, :1], mouth.DEPTH_MM, axis=2)
        below[0, _OUTSIDE] = mouth.draw_below(outer, head.parameters, rng)
        maps = np.concatenate([below, maps], axis=2)
    return dataclasses.replace(head, maps=torch.from_numpy(maps))
