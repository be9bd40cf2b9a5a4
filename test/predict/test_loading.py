"""When an ensemble loads its networks, and how long they stay."""

import dataclasses
import threading
import weakref

import numpy as np
import pytest
from conftest import make_bundle

from ichseg.engine import machine
from ichseg.errors import WeightsError
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.memory import Need


def counting_loads(ensemble):
    """The ensemble, and a list that gets a 1 for each network that its engine loads."""
    loads, real = [], ensemble.engine

    def load(spec, state):
        loads.append(1)
        return real.load(spec, state)

    return dataclasses.replace(ensemble, engine=dataclasses.replace(real, load=load)), loads


def test_networks_that_are_loaded_ahead_are_those_that_run(tmp_path, scan, monkeypatch):
    make_bundle(tmp_path, folds=3)
    plain = Ensemble.load(tmp_path, "cpu")
    for preset, count in (("balanced", 3), ("fast", 1)):
        ensemble, loads = counting_loads(plain)
        ensemble.load_ahead(preset)
        assert len(loads) == count
        found = ensemble.segment(scan, preset)
        assert len(loads) == count
        np.testing.assert_array_equal(found.mask.voxels, plain.segment(scan, preset).mask.voxels)
    ensemble, loads = counting_loads(plain)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 100_000_000)  # not 16 times as much
    ensemble.load_ahead("balanced")
    assert not loads


def test_two_networks_are_loaded_at_the_same_time(tmp_path, monkeypatch):
    make_bundle(tmp_path, folds=2)
    ensemble, both = Ensemble.load(tmp_path, "cpu"), threading.Barrier(2, timeout=20)
    monkeypatch.setattr(machine, "cpu_threads", lambda: 2)

    def load(spec, state):
        both.wait()  # until the other is being loaded, too
        return state

    engine = dataclasses.replace(ensemble.engine, load=load)
    ensemble = dataclasses.replace(ensemble, engine=engine)
    ensemble.load_ahead("balanced")
    found = ensemble._networks._alive
    assert found.keys() == {member.file for member in ensemble.model.members}


def test_what_was_loaded_ahead_goes_where_networks_may_not_stay(tmp_path, scan):
    make_bundle(tmp_path, folds=3)
    ensemble, loads = counting_loads(Ensemble.load(tmp_path, "cpu"))
    ensemble.load_ahead("balanced")
    alive = ensemble._networks._alive
    assert len(alive) == 3
    prepared = ensemble.prepare(ensemble.plan(scan, "balanced"))
    ensemble.predict(prepared, need=Need(0, 0, 0, 0, keeps_networks=False))
    assert len(alive) == 1
    assert len(loads) == 5  # all but the first again


@pytest.mark.parametrize(("preset", "folds"), [("balanced", 3), ("fast", 1)])
def test_networks_that_stay_are_counted_once(tmp_path, scan, monkeypatch, preset, folds):
    make_bundle(tmp_path, folds=3)
    ensemble = Ensemble.load(tmp_path, "cpu")
    monkeypatch.setattr(machine, "resident_bytes", lambda *_: 10**10)
    before = ensemble.program_bytes()
    need = ensemble.need(ensemble.plan(scan, preset), file_bytes=0, singly=False)
    ensemble.load_ahead(preset)
    assert len(ensemble._networks.loaded()) == folds
    assert ensemble.program_bytes() + need.network == before


def test_a_network_that_cannot_be_loaded_is_an_error_where_it_runs(tmp_path, scan):
    model = make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    (tmp_path / model.members[0].file).write_bytes(b"none")
    ensemble.load_ahead("fast")
    with pytest.raises(WeightsError):
        ensemble.segment(scan, "fast")


def test_with_little_memory_one_network_is_alive_and_folds_are_outermost(
    tmp_path, scan, monkeypatch
):
    monkeypatch.setattr(machine, "memory_limit", lambda: machine.MemoryLimit(10**6, "a test"))
    make_bundle(tmp_path, folds=3)
    ensemble = Ensemble.load(tmp_path, "cpu")
    loads, alive = [], []

    def load(spec, state):
        assert not any(network() is not None for network in alive)
        loaded = ensemble.engine.load(spec, state)
        alive.append(weakref.ref(loaded))
        loads.append(seen[-1] if seen else 0)
        return loaded

    seen = []
    counted = dataclasses.replace(ensemble, engine=dataclasses.replace(ensemble.engine, load=load))
    counted.segment(scan, "full", lambda done, _: seen.append(done))
    assert loads == [0, seen[-1] // 3, 2 * seen[-1] // 3]


def test_one_network_is_compiled_once_for_many_volumes(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    first, second = (ensemble.segment(scan, "fast").seconds["compile"] for _ in range(2))
    assert first > 0.001 > second


@pytest.mark.parametrize(("free", "loaded"), [(10**12, 2), (10**6, 4)])
def test_networks_stay_for_the_next_volume_where_there_is_memory(
    tmp_path, scan, monkeypatch, free, loaded
):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    monkeypatch.setattr(machine, "memory_limit", lambda: machine.MemoryLimit(free, "a test"))
    loads = []

    def load(spec, state):
        loads.append(spec)
        return ensemble.engine.load(spec, state)

    counted = dataclasses.replace(ensemble, engine=dataclasses.replace(ensemble.engine, load=load))
    first, second = (counted.segment(scan, "balanced").mask.voxels for _ in range(2))
    assert len(loads) == loaded
    np.testing.assert_array_equal(first, second)
