"""A run of trainings over real nodes of a Ray cluster: what is made, whatever dies."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ray_nodes
from helpers.cluster_runs import made, start, train
from helpers.datasets import write_msd
from helpers.tiny_runs import write_tiny_task

from ichseg.cluster import Node
from ichseg.errors import DeviceError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data.workspace import LATEST_CHECKPOINT, preprocessed_folder
from training.jobs.command import Ending
from training.jobs.graph import Machines
from training.jobs.job import Job, Need
from training.jobs.places import cluster as places
from training.jobs.places.cluster import machines_of, room_for

EPOCHS = 300
# Seconds of training on a fast machine, too, of which a stop over the cluster takes three.
LONG = ("--epochs", "200", "--batches-per-epoch", "20", "--stop-patience", "10000")


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
        (Need(1, 2, 10, 5), Need(1, 2, 10, 1)),  # as many processes as there are GPUs
        (Need(0, 4, 10, 9), Need(0, 4, 10, 5)),  # four and one, by their cores
        (Need(0, 1, 20, 9), Need(0, 1, 20, 5)),  # three and two, by their memory
    ],
)
def test_a_job_asks_for_no_more_than_a_node_has(need, room):
    assert room_for(need, [node(16, 0, 70), node(4, 1, 50)]) == room


def test_a_gpu_that_no_node_has_is_told():
    with pytest.raises(DeviceError, match="no node of the cluster has 1 GPU"):
        room_for(Need(gpus=1), [node(16)])


def test_a_process_that_fails_before_it_meets_the_others_ends_the_job(monkeypatch, tmp_path):
    """The first waits for it and says no more."""
    monkeypatch.setattr(places, "_LEAVE_S", 0.0)
    silent, asked = object(), []

    class Actor:
        def __init__(self, answer):
            self.meeting = SimpleNamespace(remote=lambda: ("10.0.0.1", 29500))
            self.begin = SimpleNamespace(remote=lambda *given: asked.append(given[-1]) or "a node")
            self.hear = SimpleNamespace(remote=lambda: answer)

    actors = [Actor(silent), Actor((("no such file",), (1, "no such file")))]
    ray = SimpleNamespace(
        cloudpickle=SimpleNamespace(register_pickle_by_value=lambda _: None),
        get=lambda given: given,
        wait=lambda given, timeout: ([each for each in given if each is not silent], []),
    )
    told = []
    place = places.Cluster(
        ray, tmp_path, {}, lambda _, where: told.append(where), lambda _, line: told.append(line)
    )
    assert place._follow(actors, Job("train", ())) == Ending(1, "no such file")
    assert told == ["a node, a node", "process 1: no such file"]
    assert [each["RANK"] for each in asked] == ["0", "1"]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"], e["WORLD_SIZE"]) for e in asked} == {
        ("10.0.0.1", "29500", "2")
    }


@pytest.fixture
def nodes():
    """A head and two other nodes, with a core each."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with ray_nodes.started(3) as nodes:
        yield nodes


@pytest.fixture
def begin():
    """Begins a run of two folds in a workspace."""

    def begin(dataset, workspace, *more):
        names = sorted(p.name.removesuffix(".nii.gz") for p in (dataset / "imagesTr").iterdir())
        halves = names[:2], names[2:]
        folds = [
            {"train": halves[1 - fold], "validation": validation}
            for fold, validation in enumerate(halves)
        ]
        workspace.mkdir(exist_ok=True)
        splits = {"schema_version": 1, "folds": folds}
        (workspace / "splits.json").write_text(json.dumps(splits))
        return train(dataset, workspace, "--epochs", str(EPOCHS), *more)

    return begin


@pytest.fixture
def tiny(tmp_path):
    """A dataset of five cases."""
    return write_tiny_task(tmp_path / "Task01_Tiny")


@pytest.fixture
def larger(tmp_path):
    """A dataset of 18 cases, each of which takes some tenths of a second to preprocess."""
    folder = tmp_path / "Task02_Larger"
    names = [f"case_{number:02d}" for number in range(18)]
    write_msd(folder, names)
    rng = np.random.default_rng(7)
    for name in names:
        reference = np.zeros((30, 150, 150), np.uint8)
        reference[5:20, 40:90, 50:100] = 1
        voxels = (rng.normal(35, 3, reference.shape) + 35 * reference).astype(np.int16)
        image = Volume(voxels, (4.0, 0.8, 0.8))
        volume.write(image, folder / "imagesTr" / f"{name}.nii.gz")
        volume.write(image.with_voxels(reference), folder / "labelsTr" / f"{name}.nii.gz")
    return folder


def until(run, word):
    """What a run says up to a line with a word, and that line."""
    said = ""
    while True:
        line = run.stdout.readline()
        assert line, said
        said += line
        if word in line:
            return said


def commands(nodes, name):
    """The jobs that a node has begun, each as its words."""
    found = []
    for pid in nodes.processes(name):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                for child in path.read_text().split():
                    words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                    if "training" in words:
                        found.append(words[words.index("training") + 1 :])
    return found


def node_that_trains(nodes, names):
    """Which of the nodes has begun a training."""
    return next(name for name in names if any(c[0] == "train" for c in commands(nodes, name)))


def node_in_mid_share(nodes, names, workspace):
    """Wait until a node has stored some of the cases of its share, but not all of them.

    Returns:
        Its name, and its share such as ``2/3``.
    """
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s:
        for name in names:
            for words in commands(nodes, name):
                if words[0] == "preprocess":
                    share = words[words.index("--share") + 1]
                    number, count = map(int, share.split("/"))
                    store = preprocessed_folder(workspace, "3d_fullres")
                    there = [(store / f"case_{n:02d}.json").exists() for n in range(18)]
                    if 0 < sum(there[number - 1 :: count]) < 18 // count - 1:
                        return name, share
        time.sleep(0.02)
    raise AssertionError("no node was seen in the middle of its share")


def test_a_node_that_is_killed_while_it_preprocesses_costs_no_case(nodes, begin, larger, tmp_path):
    workspace = tmp_path / "ray"
    run = begin(larger, workspace, "--ray", nodes.address)
    said = until(run, "== preprocess 3d_fullres 3 of 3:")
    name, share = node_in_mid_share(nodes, ("node1", "node2"), workspace)
    nodes.kill(name)
    job = f"preprocess 3d_fullres {share.replace('/', ' of ')}"
    said += until(run, f"{job}: its process or its node is gone; the job is begun anew")
    said += until(run, "train 3d_fullres 0: epoch ")
    assert re.search(rf"{job}: [1-4] of 6 cases are finished already", said), said
    os.kill(run.pid, signal.SIGTERM)
    run.communicate(timeout=600)

    alone = begin(larger, tmp_path / "alone")
    until(alone, "epoch 1/")
    os.kill(alone.pid, signal.SIGTERM)
    alone.communicate(timeout=600)
    found = made(workspace)
    assert sum(path.endswith(".data.b2nd") for path in found) == 18
    assert found == made(tmp_path / "alone")


def test_what_is_made_is_what_one_machine_makes(nodes, begin, tiny, tmp_path):
    """Stopped in mid-training, then its driver killed, then a node."""
    workspace = tmp_path / "ray"

    run = begin(tiny, workspace, *LONG, "--ray", nodes.address)
    said = until(run, "train 3d_fullres 0: epoch 2/")
    assert "preprocess 3d_fullres 3 of 3" in said
    os.kill(run.pid, signal.SIGTERM)
    said += run.communicate(timeout=600)[0]
    assert run.returncode == os.EX_TEMPFAIL, said
    assert said.splitlines()[-1] == "stopped by SIGTERM; the same command goes on from here"
    assert "SIGTERM: ending after this step with a checkpoint" in said

    run = begin(tiny, workspace, *LONG, "--ray", nodes.address)
    until(run, "train 3d_fullres 0: epoch ")
    run.kill()
    run.communicate(timeout=600)

    run = begin(tiny, workspace, *LONG, "--ray", nodes.address)
    said = until(run, "train 3d_fullres 0: epoch ") + until(run, "train 3d_fullres 1: epoch ")
    nodes.kill(node_that_trains(nodes, ("node1", "node2")))
    said += run.communicate(timeout=600)[0]
    assert run.returncode == 0, said
    assert said.count("its process or its node is gone; the job is begun anew") == 1
    assert "epoch 1/" not in said  # from its checkpoint

    alone = begin(tiny, tmp_path / "alone", *LONG)
    said = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, said
    assert {"plans.json", "selection.json"} < set(made(workspace))
    assert made(workspace) == made(tmp_path / "alone")


def test_a_fold_on_several_nodes_is_what_torchrun_makes(nodes, begin, tiny, tmp_path):
    """Two processes on two nodes, one of which is killed in mid-training."""
    workspace = tmp_path / "ray"
    line = ("--folds", "0", "--epochs", "30", "--ray", nodes.address, "--processes", "2")
    run = begin(tiny, workspace, *line)
    said = until(run, "== train 3d_fullres 0:")
    words = shlex.split(run.stdout.readline())[1:]
    said += until(run, "epoch 2/30")
    assert ", 2 processes" in said
    both = [n for n in ("head", "node1", "node2") if "train" in [c[0] for c in commands(nodes, n)]]
    assert len(both) == 2
    nodes.kill(both[1])
    said += run.communicate(timeout=600)[0]
    assert run.returncode == 0, said
    assert said.count("its process or its node is gone; the job is begun anew") == 1
    assert said.count("epoch 30/30") == 1

    trained = workspace / "runs"
    trained.rename(tmp_path / "by_ray")
    torchrun = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words)
    said = torchrun.communicate(timeout=600)[0]
    assert torchrun.returncode == 0, said
    fold = Path("3d_fullres", "fold_0", LATEST_CHECKPOINT)
    found, expected = (
        torch.load(folder / fold, weights_only=True)["network"]
        for folder in (tmp_path / "by_ray", trained)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
