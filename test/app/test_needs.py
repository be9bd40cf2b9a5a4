"""The memory that a scan takes, held against what is allowed."""

import numpy as np
import pytest
from conftest import make_bundle

from ichseg.app import needs
from ichseg.engine import machine
from ichseg.engine.machine import MemoryLimit
from ichseg.predict.ensemble import Ensemble
from ichseg.scan.volume import Volume


@pytest.mark.parametrize(("share", "kept"), [(2.1, True), (1.9, False)])
def test_all_networks_stay_where_that_leaves_half_of_the_memory(tmp_path, monkeypatch, share, kept):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    plan = ensemble.plan(Volume(np.zeros((12, 40, 40), np.int16), (5.0, 1.0, 1.0)), "balanced")
    limit = [None]
    monkeypatch.setattr(machine, "memory_limit", lambda: limit[0])
    every, _ = needs.of_scan(plan, 1000, ensemble, singly=False)
    assert every.keeps_networks
    limit[0] = MemoryLimit(int(share * every.alone), "a test")
    found, _ = needs.of_scan(plan, 1000, ensemble, singly=False)
    assert found.keeps_networks == kept
    assert (found.network == every.network) == kept
    assert found.network < every.network or kept
