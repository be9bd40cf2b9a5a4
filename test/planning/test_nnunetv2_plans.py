"""The planner against nnunetv2's own planners, number by number.

``nnunetv2_plans.json`` holds what these print; ``benchmarks/nnunetv2_plans.py`` makes it and says
how.
"""

import json
from pathlib import Path

import pytest
from helpers.planning import HEAD, dataset_of, fingerprint_of, plan

from training.planning.overrides import Overrides

TASKS = json.loads((Path(__file__).parents[1] / "helpers" / "nnunetv2_plans.json").read_text())[
    "tasks"
]
ARCHITECTURES = {
    "ExperimentPlanner": "plain",
    "nnUNetPlannerResEncM": "resenc_m",
    "nnUNetPlannerResEncL": "resenc_l",
    "nnUNetPlannerResEncXL": "resenc_xl",
}


def plan_task(task, architecture):
    cases, channels = task["cases"], task["channels"]
    spacings, shapes = (
        values if len(values) == cases else values * cases
        for values in (task["spacings_mm"], task["shapes"])
    )
    return plan(
        fingerprint_of(spacings, shapes, intensities=(HEAD,) * len(channels)),
        dataset_of(cases, channels, task["labels"]),
        recipe="nnunetv2",
        architecture=architecture,
        overrides=Overrides(),
    )


@pytest.mark.parametrize("planner", ARCHITECTURES)
@pytest.mark.parametrize("name", TASKS)
def test_nnunetv2_decides_the_same(name, planner):
    expected = TASKS[name]["planners"][planner]
    plans = plan_task(TASKS[name], ARCHITECTURES[planner])
    assert list(plans.transpose) == expected["transpose"]
    assert {c.name for c in plans.configurations} == set(expected["configurations"])
    for ours in plans.configurations:
        theirs = expected["configurations"][ours.name]
        axes = len(theirs["spacing_mm"])
        network = ours.architecture
        # spacings to the last bit: the low resolution's are products of many factors 1.03
        found = {
            "spacing_mm": ours.spacing_mm[-axes:],
            "median_shape": ours.median_shape[-axes:],
            "patch": ours.patch,
            "batch": ours.batch,
            "batch_dice": ours.batch_dice,
            "previous_stage": ours.previous_stage,
            "network": "ResidualEncoderUNet" if network.block == "residual" else "PlainConvUNet",
            "features": network.features,
            "strides": network.strides,
            "kernels": network.kernels,
            "encoder": network.encoder_convs,
            "decoder": network.decoder_convs,
        }
        # a median of two cases may end in .5, and our plans hold whole voxels
        theirs = theirs | {"median_shape": [round(size) for size in theirs["median_shape"]]}
        assert json.loads(json.dumps(found)) == theirs


def test_the_tasks_reach_every_rule():
    """A fixture that lost its cascade or its transpose would let the test above pass idly."""
    plain = {name: task["planners"]["ExperimentPlanner"] for name, task in TASKS.items()}
    cascades = {name for name, found in plain.items() if "3d_lowres" in found["configurations"]}
    assert cascades == {"isotropic_ct", "anisotropic_ct"}
    large = TASKS["anisotropic_ct"]["planners"]["nnUNetPlannerResEncL"]["configurations"]
    assert "3d_lowres" not in large  # searched for and dropped
    assert plain["coarse_second_axis"]["transpose"] == [1, 0, 2]
    assert len({tuple(s) for s in TASKS["mixed"]["spacings_mm"]}) > 50
    assert plain["few_cases"]["configurations"]["2d"]["batch"] == 6
    assert TASKS["hippocampus"]["cases"] == 203
