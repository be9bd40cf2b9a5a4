"""Our side of inference.py, in a process of its own.

    PYTHONPATH=. python benchmarks/inference_ours.py predict ARGUMENTS OF process.py
    PYTHONPATH=. python benchmarks/inference_ours.py restore REQUEST.json

Each prints one line of JSON last.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def predict(arguments: list[str]) -> dict[str, float]:
    """Run ``process.py``; the seconds that the network's forward took of it."""
    import process
    from ichseg.engine.engine import Engine, Network
    from ichseg.predict import ensemble

    choose, spent = ensemble.choose_engine, [0.0, 0]

    def chosen(*given: str) -> Engine:
        real = choose(*given)

        def load(*of: Any) -> Network:
            network = real.load(*of)

            def timed(tiles: Any) -> Any:
                batches = network(tiles)
                while True:
                    began = time.perf_counter()
                    scores = next(batches, None)
                    spent[0] += time.perf_counter() - began
                    if scores is None:
                        return
                    spent[1] += len(scores)
                    yield scores

            return timed

        return dataclasses.replace(real, load=load)

    ensemble.choose_engine = chosen
    if process.main(arguments) != 0:
        raise SystemExit("error: process.py has failed")
    return {"forward": spent[0], "passes": spent[1]}


def restore(request: dict[str, Any]) -> dict[str, float]:
    """Restore scores to a mask file."""
    from ichseg.model import plans
    from ichseg.predict.prepare import Placement
    from ichseg.predict.restore import restore
    from ichseg.scan import volume
    from ichseg.scan.orientation import AxisOrder
    from ichseg.scan.volume import Volume

    template = volume.read(Path(request["header"]))
    shape, spacing = tuple(request["shape"]), tuple(request["spacing_mm"])
    grid = tuple(request["grid_shape"])
    placement = Placement(
        axes=AxisOrder((0, 1, 2), (False, False, False)),
        full_shape=shape,
        box=((0, shape[0]), (0, shape[1]), (0, shape[2])),
        spacing_mm=spacing,
        grid_shape=grid,
        grid_spacing_mm=tuple(request["grid_mm"]),
    )
    planned = plans.load(Path(request["ours"]))
    scores = np.load(request["scores"])
    began = time.perf_counter()
    labels = restore([(scores, placement)], planned)
    mask = Volume(labels, spacing, nifti_header=template.nifti_header)
    volume.write(mask, Path(request["output"] + ".nii.gz"))
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    """Do what the command line says."""
    step, *arguments = sys.argv[1:] or ["--help"]
    if step in ("-h", "--help"):
        print(__doc__)
        return
    if step == "predict":
        found = predict(arguments)
    else:
        found = restore(json.loads(Path(arguments[0]).read_text()))
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak, too
    peak_kb = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({**found, "peak_mb": peak_kb * 1024 / 1e6}), flush=True)


if __name__ == "__main__":
    main()
