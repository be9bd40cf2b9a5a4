"""A run of trainings over real nodes of a Ray cluster: what is made, whatever dies."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from helpers import ray_nodes
from helpers.cluster_runs import made, train
from helpers.tiny_runs import write_tiny_task

from ichseg.cluster import Node
from ichseg.errors import DeviceError
from training.jobs.graph import Machines
from training.jobs.job import Need
from training.jobs.places.cluster import machines_of, room_for

EPOCHS = 300
HALVES = ["case_0", "case_1"], ["case_2", "case_3", "case_4"]


def node(cores, gpus=0, memory=0):
    return Node("id", "name", cores, gpus, memory)


def test_each_node_has_a_share_of_the_cases():
    assert machines_of([node(16), node(4, 1)]) == Machines(gpus=True, shares=2, cores=4)
    assert machines_of([node(8)]) == Machines(gpus=False, shares=1, cores=8)


@pytest.mark.parametrize(
    ("need", "room"),
    [
        (Need(1, 2, 10), Need(1, 2, 10)),
        (Need(1, 9, 99), Need(1, 4, 50)),  # the node with a GPU has no more
        (Need(0, 9, 99), Need(0, 9, 70)),
        (Need(0, 99, 99), Need(0, 16, 70)),
    ],
)
def test_a_job_asks_for_no_more_than_a_node_has(need, room):
    assert room_for(need, [node(16, 0, 70), node(4, 1, 50)]) == room


def test_a_gpu_that_no_node_has_is_told():
    with pytest.raises(DeviceError, match="no node of the cluster has 1 GPU"):
        room_for(Need(gpus=1), [node(16)])


@pytest.fixture
def nodes():
    """A head and two other nodes, with a core each."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with ray_nodes.started(3) as nodes:
        yield nodes


@pytest.fixture
def begin(tmp_path):
    """Begins a run of two folds in a workspace."""
    dataset = write_tiny_task(tmp_path / "Task01_Tiny")
    folds = [
        {"train": HALVES[1 - fold], "validation": validation}
        for fold, validation in enumerate(HALVES)
    ]

    def begin(workspace, *more):
        workspace.mkdir(exist_ok=True)
        splits = {"schema_version": 1, "folds": folds}
        (workspace / "splits.json").write_text(json.dumps(splits))
        return train(dataset, workspace, "--epochs", str(EPOCHS), *more)

    return begin


def until(run, word):
    """What a run says up to a line with a word, and that line."""
    said = ""
    while True:
        line = run.stdout.readline()
        assert line, said
        said += line
        if word in line:
            return said


def node_that_trains(nodes, names):
    """Which of the nodes has begun a training."""
    for name in names:
        for pid in nodes.processes(name):
            children = Path(f"/proc/{pid}/task").glob("*/children")
            for child in (each for path in children for each in path.read_text().split()):
                if b"\0train\0" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return name
    raise AssertionError("no node trains")


def test_what_is_made_is_what_one_machine_makes(nodes, begin, tmp_path):
    """Stopped in mid-training, then its driver killed, then a node."""
    workspace = tmp_path / "ray"

    run = begin(workspace, "--ray", nodes.address)
    said = until(run, "train 3d_fullres 0: epoch 2/")
    assert "preprocess 3d_fullres 3 of 3" in said
    os.kill(run.pid, signal.SIGTERM)
    said += run.communicate(timeout=600)[0]
    assert run.returncode == os.EX_TEMPFAIL, said
    assert said.splitlines()[-1] == "stopped by SIGTERM; the same command goes on from here"
    assert "SIGTERM: ending after this step with a checkpoint" in said

    run = begin(workspace, "--ray", nodes.address)
    until(run, "train 3d_fullres 0: epoch ")
    run.kill()
    run.communicate(timeout=600)

    run = begin(workspace, "--ray", nodes.address)
    said = until(run, "train 3d_fullres 0: epoch ") + until(run, "train 3d_fullres 1: epoch ")
    nodes.kill(node_that_trains(nodes, ("node1", "node2")))
    said += run.communicate(timeout=600)[0]
    assert run.returncode == 0, said
    assert said.count("its process or its node is gone; the job is begun anew") == 1
    assert "epoch 1/" not in said  # from its checkpoint

    alone = begin(tmp_path / "alone")
    said = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, said
    assert {"plans.json", "selection.json"} < set(made(workspace))
    assert made(workspace) == made(tmp_path / "alone")
