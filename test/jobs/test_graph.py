"""The graph of a run, worked out by hand."""

import dataclasses
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import CONFIGURATION, PLANS

from ichseg.errors import PlansError
from training.fit.configuration import GivenSettings
from training.jobs import graph
from training.jobs.choices import Choices, Scope
from training.jobs.graph import Machines

LOW = dataclasses.replace(CONFIGURATION, name="3d_lowres")
SECOND = dataclasses.replace(CONFIGURATION, name="3d_cascade_fullres", previous_stage="3d_lowres")
CASCADE = dataclasses.replace(PLANS, configurations=(CONFIGURATION, LOW, SECOND))
CHOICES = Choices(
    dataset=Path("data/Task01_Tiny"),
    workspace=Path("ws"),
    configurations=("3d_fullres",),
    folds=None,
    out=None,
    groups=None,
    recipe=None,
    architecture=None,
    overrides={},
    settings=GivenSettings({}, {}),
)


def scope(planned=PLANS, all_folds=3, **changes):
    choices = dataclasses.replace(CHOICES, **changes)
    return Scope(choices, planned, tuple(map(str, range(all_folds))))


def waits(jobs):
    return {job.name: set(job.after) for job in jobs}


def test_up_to_the_plans_one_follows_the_other():
    jobs = graph.opening(
        dataclasses.replace(
            CHOICES,
            groups=Path("groups.csv"),
            labels=("background", "blood"),
            recipe="nnunetv2",
            architecture="resenc_m",
            overrides={"ct-clip": "-20,90", "deep-supervision": "no"},
        )
    )
    assert waits(jobs) == {"convert": set(), "verify": {"convert"}, "plan": {"verify"}}
    assert [job.words for job in jobs] == [
        (
            "data/Task01_Tiny", "--workspace", "ws", "--labels", "background,blood",
            "--groups", "groups.csv",
        ),
        ("--workspace", "ws", "--note"),
        (
            "--workspace", "ws", "--recipe", "nnunetv2", "--architecture", "resenc_m",
            "--ct-clip=-20,90", "--no-deep-supervision",
        ),
    ]  # fmt: skip


def test_all_folds_are_trained_before_they_are_compared():
    folds = {"train 3d_fullres 0", "train 3d_fullres 1", "train 3d_fullres 2"}
    assert waits(graph.closing(scope())) == {
        "preprocess 3d_fullres": {"plan"},
        **{name: {"preprocess 3d_fullres"} for name in folds},
        "cross-validate": folds,
        "select": {"cross-validate"},
        "export selected": {"select"},
        "report": {"select"},
    }


def test_some_folds_are_exported_without_a_comparison():
    settings = GivenSettings({"threads": 2}, {})
    some = scope(all_folds=5, folds=("1", "3"), settings=settings)
    jobs = graph.closing(some)
    assert waits(jobs) == {
        "preprocess 3d_fullres": {"plan"},
        "train 3d_fullres 1": {"preprocess 3d_fullres"},
        "train 3d_fullres 3": {"preprocess 3d_fullres"},
        "export 3d_fullres": {"train 3d_fullres 1", "train 3d_fullres 3"},
    }
    assert jobs[-1].words == (
        "--workspace", "ws", "--configuration", "3d_fullres", "--out", "ws/bundles/3d_fullres",
        "--folds", "1,3", "--threads", "2",
    )  # fmt: skip


def test_a_second_stage_waits_for_all_folds_of_the_first():
    jobs = graph.closing(scope(CASCADE, all_folds=2, configurations=("3d_cascade_fullres",)))
    found = waits(jobs)
    stored = {"preprocess 3d_lowres", "preprocess 3d_cascade_fullres"}
    first = {"train 3d_lowres 0", "train 3d_lowres 1"}
    for name in first:  # its segmentations go to the second stage's store
        assert found[name] == stored
    for fold in "01":
        assert found[f"train 3d_cascade_fullres {fold}"] == stored | first
    assert found["cross-validate"] == first | {
        "train 3d_cascade_fullres 0", "train 3d_cascade_fullres 1",
    }  # fmt: skip
    (compared,) = (job for job in jobs if job.command == "select")
    assert compared.words[-1] == "3d_cascade_fullres"


def test_the_first_stage_is_trained_whole_though_one_fold_of_the_second_is_asked_for():
    jobs = graph.closing(scope(CASCADE, configurations=("3d_cascade_fullres",), folds=("1",)))
    assert [job.name for job in jobs if job.command == "train"] == [
        "train 3d_lowres 0", "train 3d_lowres 1", "train 3d_lowres 2",
        "train 3d_cascade_fullres 1",
    ]  # fmt: skip
    found = waits(jobs)
    assert "train 3d_cascade_fullres 1" not in found["export 3d_lowres"]
    assert found["export 3d_cascade_fullres"] == {
        job.name for job in jobs if job.command == "train"
    }


def test_the_order_is_one_in_which_jobs_can_be_done():
    for names in (("3d_fullres",), ("3d_cascade_fullres", "3d_fullres"), ("3d_lowres",)):
        jobs = graph.closing(scope(CASCADE, configurations=names), Machines(shares=3, cores=2))
        seen = {"plan"}
        for job in jobs:
            assert set(job.after) <= seen, job.name
            seen.add(job.name)
        TopologicalSorter(waits(jobs)).prepare()  # no circles
        assert len(waits(jobs)) == len(jobs)  # names are different
    with pytest.raises(PlansError, match="2d"):
        graph.closing(scope(CASCADE, configurations=("2d",)))


def test_cases_are_shared_out_over_machines():
    jobs = graph.closing(scope(all_folds=2), Machines(shares=2, cores=4))
    shares = [job for job in jobs if job.command == "preprocess"]
    assert [job.name for job in shares] == [
        "preprocess 3d_fullres 1 of 2", "preprocess 3d_fullres 2 of 2",
    ]  # fmt: skip
    assert shares[1].words == (
        "3d_fullres", "--workspace", "ws", "--workers", "4", "--share", "2/2",
    )  # fmt: skip
    assert shares[0].need.cores == 4
    assert waits(jobs)["train 3d_fullres 0"] == {job.name for job in shares}


def test_recipes_and_settings_go_to_whom_they_are_for():
    settings = GivenSettings({"epochs": 7, "validation": False}, {"gamma": (0.8, 1.2)})
    chosen = scope(recipe="compact", settings=settings)
    (planning,) = (job for job in graph.opening(chosen.choices) if job.command == "plan")
    assert planning.words == ("--workspace", "ws")
    training = next(job for job in graph.closing(chosen) if job.command == "train")
    assert training.words == (
        "3d_fullres", "--workspace", "ws", "--fold", "0", "--recipe", "compact",
        "--epochs", "7", "--no-validation", "--gamma", "0.8", "1.2",
    )  # fmt: skip
    names = [job.name for job in graph.closing(chosen)]
    assert names[-1] == "export 3d_fullres"  # what is not validated cannot be compared


@pytest.mark.parametrize(
    ("device", "there", "gpus"),
    [("auto", True, 1), ("auto", False, 0), ("cuda", False, 1), ("cpu", True, 0)],
)
def test_a_training_takes_a_gpu_where_there_is_one(device, there, gpus):
    chosen = scope(settings=GivenSettings({"device": device, "threads": 3, "workers": 2}, {}))
    jobs = graph.closing(chosen, Machines(gpus=there))
    needs = {job.command: job.need for job in jobs}
    assert (needs["train"].gpus, needs["train"].cores) == (gpus, 5)
    assert {needs[command].gpus for command in needs if command != "train"} == {0}


def test_processes_that_train_together_have_a_sample_each():
    """The batch is 2: of two processes each makes one, and a third would have none."""
    chosen = scope(settings=GivenSettings({"device": "cpu", "workers": 0, "prefetch": 2}, {}))
    one, two, three = (
        next(j.need for j in graph.closing(chosen, Machines(processes=n)) if j.command == "train")
        for n in (1, 2, 3)
    )
    assert (one.processes, two.processes) == (1, 2)
    assert three == two
    alone = 1_000_000_000  # of each process, whatever it makes
    assert two.memory_bytes - alone == pytest.approx((one.memory_bytes - alone) / 2, abs=1)
