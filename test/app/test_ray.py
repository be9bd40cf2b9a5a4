"""Scans over real nodes of a Ray cluster: masks and results as from one process, whatever dies."""

import importlib.util
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import ray_nodes
from helpers.cluster_runs import make_scans, masks, outcomes, segment

from ichseg import cluster
from ichseg.app import main as program
from ichseg.app.crew import actors
from ichseg.app.crew.actors import Share, share_of
from ichseg.app.crew.worker import MOST_STARTS
from ichseg.cluster import Node
from ichseg.errors import DeviceError

SCANS = 200


def node(cores, gpus=0):
    return Node("id", "name", cores, gpus, 0)


@pytest.mark.parametrize(
    ("nodes", "device", "cores", "share", "count"),
    [
        ([node(16), node(10)], "auto", None, Share(4, 0), 6),
        ([node(16), node(3)], "cpu", None, Share(3, 0), 6),
        ([node(16), node(3)], "torch-cpu", 8, Share(8, 0), 2),
        ([node(16, 2), node(8, 8), node(64)], "auto", None, Share(1, 1), 10),
        ([node(16, 2), node(64)], "cuda", 6, Share(6, 1), 2),
        ([node(16, 2), node(64)], "cpu", 16, Share(16, 0), 5),
    ],
)
def test_each_worker_has_its_share_of_the_nodes(nodes, device, cores, share, count):
    assert share_of(nodes, device, cores) == share
    assert share.count(nodes) == count


@pytest.mark.parametrize(
    ("nodes", "device", "cores", "message"),
    [
        ([node(16)], "cuda", None, "no node of the cluster has a GPU"),
        ([], "auto", None, "no node of the cluster has a core"),
        ([node(2), node(4)], "cpu", 8, "--ray-cpus 8: no node has so many; the largest has 4"),
        ([node(2, 1), node(64)], "cuda", 8, "the largest has 2"),
    ],
)
def test_nodes_that_have_no_room_are_refused(nodes, device, cores, message):
    with pytest.raises(DeviceError, match=message):
        share_of(nodes, device, cores)


class MadeUp:
    """As much of Ray as a driver uses; ``answer`` stands for what a call to an actor comes to."""

    cloudpickle = SimpleNamespace(register_pickle_by_value=lambda _: None)

    def __init__(self, answer):
        self.begun, self.killed, self.get = 0, 0, lambda _: answer()

    def remote(self, **_):
        return lambda _: SimpleNamespace(remote=self.begin)

    def begin(self):
        self.begun += 1
        return SimpleNamespace(look=SimpleNamespace(remote=lambda *_: None))

    def kill(self, _):
        self.killed += 1


def test_workers_begin_where_nodes_come(monkeypatch):
    ended = threading.Event()
    ray = MadeUp(ended.wait)
    crew = actors._Crew(ray, None, Share(2, 0), {})
    crew.grow(1)
    monkeypatch.setattr(cluster, "nodes", lambda _: [node(4), node(3)])
    crew.look_after()
    assert ray.begun == 1
    monkeypatch.setattr(actors, "_COUNT_S", 0.0)
    crew.look_after()
    assert ray.begun == 3
    crew.look_after()
    assert ray.begun == 3
    ended.set()


def test_where_no_worker_can_begin_the_run_ends():
    ray = MadeUp(lambda: "cannot write to out (Permission denied)")
    crew = actors._Crew(ray, None, Share(1, 0), {})
    crew.grow(2)
    while crew.desk.collect().failure is None:
        crew.look_after()
    assert ray.begun == ray.killed == 2 * MOST_STARTS


@pytest.fixture
def expected(tmp_path):
    """What a node has to see: a folder that it may write to, and two files."""
    (tmp_path / "scan").write_bytes(b"1234")
    (tmp_path / "slices").mkdir()
    with cluster.probe(tmp_path / "out", [tmp_path / "scan", tmp_path / "slices"]) as expected:
        yield expected | {"patience_s": 0.0}
    assert list((tmp_path / "out").iterdir()) == []


def test_a_node_that_sees_the_same_is_taken(expected):
    assert cluster.look(expected)[0] == ""
    assert abs(cluster.look(expected)[1] - time.time()) < 60


def test_a_node_that_differs_says_how(expected, tmp_path, monkeypatch):
    def said(**changes):
        return cluster.look(expected | changes)[0]

    assert said(version="9.9").endswith(", expected 9.9")
    assert said(token="other") == f"sees another {tmp_path / 'out'}"
    gone = said(place=str(tmp_path / "elsewhere" / ".probe"))
    assert gone.startswith(f"does not see {tmp_path / 'elsewhere'} as this machine does (No such")
    assert said(sizes={str(tmp_path / "none"): 4}).startswith(f"does not see {tmp_path / 'none'}")
    scan = tmp_path / "scan"
    assert said(sizes={str(scan): 5}) == f"sees {scan} with 4 bytes, expected 5"
    assert said(folders=[str(scan)]) == f"does not see {scan}"
    monkeypatch.setitem(sys.modules, "ichseg", None)
    assert said().startswith("cannot import ichseg (")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head", "expected auto, or HOST:PORT such as head:6379"),
        ("ray://head:10001", "expected auto, or HOST:PORT such as head:6379"),
        ("127.0.0.1:1", "nobody answers (Connection refused)"),
    ],
)
def test_a_cluster_that_is_not_there_is_refused_in_a_line(
    tmp_path, capsys, monkeypatch, address, message
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert refused(tmp_path, capsys, address).startswith(f"error: --ray {address}: {message}")


def test_without_ray_a_line_names_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused(tmp_path, capsys, "auto") == (
        "error: --ray needs the package ray, which is not installed: pip install ray"
    )


def refused(folder, capsys, address):
    """The last line of a run."""
    make_scans(folder, 1, (6, 24, 24))
    line = ["--input", str(folder / "in"), "--output", str(folder / "out"), "--weights",
            str(folder / "weights"), "--ray", address]  # fmt: skip
    assert program.main(line) == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more", [["--gpus", "0"], ["--api", "invoke"], ["--time-budget", "5m"]])
def test_flags_that_make_no_sense_are_refused(capsys, more):
    with pytest.raises(SystemExit) as caught:
        program.main(["--ray", "auto", *more])
    assert caught.value.code == 2
    assert " exclude each other" in capsys.readouterr().err


@pytest.fixture(scope="module")
def nodes():
    """A head and two other nodes, with a core each."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with ray_nodes.started(3) as nodes:
        yield nodes


def until(run, word):
    """What a run says up to a line with a word."""
    said = ""
    while word not in said:
        line = run.stdout.readline()
        assert line, said
        said += line
    return said


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Scans, and in ``alone`` what a run without Ray makes of them."""
    folder = tmp_path_factory.mktemp("archive")
    make_scans(folder, SCANS, (6, 24, 24))
    (folder / "in" / "bad.mha").unlink()
    alone = segment(folder, "alone")
    said = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, said
    assert len(masks(folder / "alone")) == SCANS
    return folder


@pytest.mark.parametrize(("killed", "damaged"), [("node2", None), ("node1", "100.mha")])
def test_a_node_that_is_killed_costs_no_case(nodes, archive, killed, damaged):
    expected, ended = masks(archive / "alone"), outcomes(archive / "alone")
    if damaged:
        (archive / "in" / damaged).write_bytes(b"damaged")
        del expected[damaged]
        ended = [(name, name == damaged) for name, _ in ended]
    run = segment(archive, killed, "--ray", nodes.address, "--ray-cpus", "1")
    count = len(nodes)  # the cluster may not have missed yet what a test before has killed
    said = until(run, " nodes, 1 core each")
    said += "".join(until(run, " has loaded the networks") for _ in range(count))
    said += "".join(until(run, " -> ") for _ in range(SCANS // 4))
    nodes.kill(killed)
    said += run.communicate(timeout=300)[0]
    assert run.returncode == (1 if damaged else 0), said
    assert " died (its process or its node is gone)" in said
    assert masks(archive / killed) == expected
    assert outcomes(archive / killed) == ended
    assert sorted(p.name for p in (archive / killed).iterdir() if p.suffix != ".mha") == [
        "results.json"
    ]


def test_a_run_that_is_stopped_goes_on_and_a_damaged_scan_fails_alone(nodes, tmp_path):
    make_scans(tmp_path, 12, (6, 24, 24))
    cluster_run = ("--ray", nodes.address, "--ray-cpus", "1", "--resume")
    run = segment(tmp_path, "ray", *cluster_run)
    until(run, " -> ")
    os.kill(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 128 + signal.SIGTERM, said
    assert said.splitlines()[-1].startswith("error: stopped by SIGTERM before all cases were done")
    there = len(masks(tmp_path / "ray"))
    run = segment(tmp_path, "ray", *cluster_run)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 1, said
    assert f"{there} of 13 cases are finished already" in said or there < 12
    assert " 0 of 13 cases are finished already" not in said
    last = said.splitlines()[-1]
    assert last.startswith("error: 1 of 13 cases failed: ")
    assert "bad.mha" in last
    assert len(masks(tmp_path / "ray")) == 12
    assert [name for name, failed in outcomes(tmp_path / "ray") if failed] == ["bad.mha"]
    assert len(outcomes(tmp_path / "ray")) == 13
