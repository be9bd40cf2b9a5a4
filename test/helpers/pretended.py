"""Cases of a few voxels, and networks that only pretend, for what the program does around them."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np

from ichseg.app import pipeline
from ichseg.app.cases import find_cases
from ichseg.app.one_case import Options
from ichseg.engine import machine
from ichseg.errors import InputError
from ichseg.predict import components, memory
from ichseg.predict.components import Segmentation
from ichseg.scan import volume
from ichseg.scan.volume import Volume


class Pretended:
    """Marks what lies above 50 HU; keeps an account of its calls and of the cases in its hands."""

    model = SimpleNamespace(expects_hu=False)
    engine = SimpleNamespace(
        name="none", kind="none", precision="float32", device_bytes=lambda: None
    )

    def __init__(self):
        self.calls, self.alive, self.most_alive = [], set(), 0
        self.lock = threading.Lock()
        self.budgets = []

    def note(self, stage, name):
        with self.lock:
            self.calls.append(f"{stage} {name}")
            self.alive.add(name)
            self.most_alive = max(self.most_alive, len(self.alive))

    def load_ahead(self, preset):
        pass

    def program_bytes(self):
        return 1000

    def plan(self, scan, preset):
        return scan

    def need(self, plan, **_):
        return memory.Need(opening=10, predicting=20, writing=30, network=5)

    def prepare(self, scan):
        name = int(scan.voxels.max())
        self.note("prepare", name)
        if name == 666:
            raise InputError("an ugly one")
        if name == 667:
            raise MemoryError
        if name == 668:
            raise ZeroDivisionError("our fault")
        return SimpleNamespace(scan=scan, name=name, parts=[])

    def predict(self, prepared, progress, budget_s, need):
        self.note("predict", prepared.name)
        self.budgets.append(budget_s)
        self.during_predict(prepared.name)
        self.note("predicted", prepared.name)
        return prepared

    def during_predict(self, name):
        pass

    def finish(self, prepared, **_):
        self.note("finish", prepared.name)
        self.during_finish(prepared.name)
        mask = prepared.scan.with_voxels((prepared.scan.voxels > 50).astype(np.uint8))
        self.note("finished", prepared.name)
        self.alive.discard(prepared.name)
        return Segmentation(
            mask=mask,
            volume_ml=float(mask.voxels.sum() * mask.voxel_ml),
            ran={"tiles": 1, "tiles_skipped": 0},
            seconds={"total": 0.1, "compile": 0.0},
            disagreement=0.25,
            warnings=("odd",),
            lesions=components.lesions(mask.voxels, prepared.scan),
        )

    def during_finish(self, name):
        pass


def add(place, name, lesions=((0, 1, 1), (2, 4, 4))):
    voxels = np.zeros((3, 6, 6), np.int16)
    for where in lesions:
        voxels[where] = name
    volume.write(Volume(voxels, (5.0, 1.0, 1.0)), place / "input" / f"{name}.mha")


def run(place, ensemble, **options):
    job = find_cases(place / "input", place / "output", input_slug="a", output_slug="b")
    chosen = Options(place / "output", "fast", made_from={"preset": "fast"}, **options)
    return pipeline.run(job, pipeline.alone(ensemble), chosen)


def entries(place):
    return json.loads((place / "output" / "results.json").read_text())


def predicted_by_resume(place):
    """What a run with ``resume`` had to predict."""
    ensemble = Pretended()
    run(place, ensemble, resume=True)
    return [call for call in ensemble.calls if call.startswith("predict ")]


def with_pictures(place, **options):
    ensemble = Pretended()
    ensemble.model = SimpleNamespace(expects_hu=False, name="m", version="1")
    ensemble.engine = SimpleNamespace(name="none", kind="none", precision="float32")
    return run(place, ensemble, pictures=True, **options)


def limit_memory(monkeypatch):
    """What the memory may become: a list of one, None for anything. A case opened takes 10."""
    limit = [None]
    monkeypatch.setattr(machine, "memory_limit", lambda: limit[0])
    monkeypatch.setattr(volume, "stored_shape", lambda _: (1, 1, 1))
    return limit


def make_place(folder):
    """A folder with the input of five cases."""
    for name in range(101, 106):
        add(folder, name)
    return folder
