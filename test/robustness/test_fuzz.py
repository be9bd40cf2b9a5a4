"""A few hundred mutated files; `make fuzz` reads more."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
from conftest import make_bundle
from robustness import fuzz, fuzz_corpus, fuzz_scans
from robustness.fuzz import Ending
from robustness.fuzz_corpus import Mutant

from ichseg.scan.reader import Scan


def test_every_mutant_is_read_or_refused_in_one_clear_line(tmp_path):
    (tmp_path / "bundle").mkdir()
    make_bundle(tmp_path / "bundle", folds=1)
    mutants = [
        fuzz_corpus.make(tmp_path / "mutants", kind, number, 7, tmp_path / "bundle")
        for kind in fuzz_corpus.KINDS
        for number in range(45 // fuzz_corpus.FEWER.get(kind, 1))
    ]
    endings = fuzz.run(mutants)
    assert [e for e in endings if e.bad] == []
    assert len(endings) == len(mutants)
    assert {e.how for e in endings} == {"read", "refused"}
    for kind in fuzz_corpus.KINDS:  # or the mutants would be all alike
        assert len({e.words for e in endings if e.kind == kind}) > 3


def test_what_must_not_be_is_seen(tmp_path, monkeypatch):
    """A reader that dies, one that hangs, one that opens another file, one that raises."""
    monkeypatch.setattr(fuzz, "SLOWEST_S", 20.0)  # a busy machine starts a worker in some
    spoiled = (
        "import sys; sys.path[:0] = [{root!r}, {here!r}]; import os, time;"
        "from robustness import fuzz;"
        "from ichseg.scan import reader;"
        "ways = dict(die=os.abort, hang=lambda: time.sleep(600),"
        " leak=lambda: open('/etc/hostname'), throw=lambda: [][0]);"
        "reader.read_scan = lambda path: ways[path.name](); fuzz.work()"
    )
    code = spoiled.format(root=str(fuzz.ROOT), here=str(fuzz.TESTS))
    monkeypatch.setattr(fuzz, "_CODE", code)
    names = ("die", "hang", "leak", "throw")
    endings = fuzz.run([Mutant(name, "mha", tmp_path / name) for name in names])
    assert [e.how for e in endings] == [
        "died (-6)", "slow", "opened another file", "raised IndexError",
    ]  # fmt: skip
    assert all(e.bad for e in endings)
    assert not Ending("x", "mha", "refused").bad
    assert "| mha | 0 | 0 | 1 | 1 | 1 | 1 |" in fuzz.table(endings)


def test_a_scan_that_is_wrong_in_silence_is_seen(tmp_path):
    rng = random.Random(1)
    for make, key in ((fuzz_scans.tricked, "hu"), (fuzz_scans.framed, "spacing_mm")):
        path = make(tmp_path, rng)
        truth = dict(np.load(tmp_path / fuzz_scans.TRUTH))
        scan = Scan(np.zeros((24, 80, 80), np.int16), fuzz_scans.SPACING_MM)
        if key == "hu":
            scan.voxels[tuple(truth["at"].T)] = 35
            assert fuzz_scans.is_wrong(path, scan) == ""
            raised = dataclasses.replace(scan, voxels=scan.voxels + 1000)
            assert "HU from the truth" in fuzz_scans.is_wrong(path, raised)
        else:
            np.savez(tmp_path / fuzz_scans.TRUTH, **(truth | {"scode": 1}))
            assert fuzz_scans.is_wrong(path, scan) == ""
            small = dataclasses.replace(scan, spacing_mm=(6.0, 2.2, 1.1))
            assert fuzz_scans.is_wrong(path, small) == "voxels of another size"
            told = dataclasses.replace(small, warnings=("so it is",))
            assert fuzz_scans.is_wrong(path, told) == ""
