"""The rival's side of inference.py; runs in the rival's environment.

    python nnunetv2_predict.py draw MODEL CONFIGURATION FOLDS
    python nnunetv2_predict.py predict ARGUMENTS OF nnUNetv2_predict
    python nnunetv2_predict.py restore REQUEST.json

Each prints one line of JSON last.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch


def draw(model: Path, configuration: str, folds: int) -> dict[str, float]:
    """Save networks of the model's plans with weights at random."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(json.loads((model / "plans.json").read_text()))
    chosen = plans.get_configuration(configuration)
    for fold in range(folds):
        torch.manual_seed(fold)
        network = nnUNetTrainer.build_network_architecture(plans, chosen, 1, 2, False)
        (model / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": network.state_dict(),
                "init_args": {"configuration": configuration, "fold": fold},
                "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": tuple(range(len(chosen.patch_size))),
            },
            model / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return {}


def predict(arguments: list[str]) -> dict[str, float]:
    """Run ``nnUNetv2_predict``; the seconds that the network's forward took of it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    forward, spent = PlainConvUNet.forward, [0.0, 0]

    def timed(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        result = forward(self, x)
        spent[0] += time.perf_counter() - began
        spent[1] += len(x)
        return result

    PlainConvUNet.forward = timed
    sys.argv = ["nnUNetv2_predict", *arguments]
    predict_entry_point()
    return {"forward": spent[0], "passes": spent[1]}


def restore(request: dict[str, object]) -> dict[str, float]:
    """Restore logits to a mask file, as nnunetv2's export does."""
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    plans = PlansManager(request["plans"])
    configuration = plans.get_configuration("3d_fullres")
    configuration.configuration["spacing"] = request["grid_mm"]
    shape, spacing = request["shape"], request["spacing_mm"]
    direction = tuple(np.eye(3).ravel())
    properties = {
        "sitk_stuff": {"spacing": spacing[::-1], "origin": (0.0,) * 3, "direction": direction},
        "spacing": spacing,
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[0, size] for size in shape],
    }  # fmt: skip
    logits = torch.from_numpy(np.load(request["scores"]))
    began = time.perf_counter()
    export_prediction_from_logits(
        logits, properties, configuration, plans, request["dataset"], request["output"]
    )
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    """Do what the command line says."""
    step, *arguments = sys.argv[1:] or ["--help"]
    if step in ("-h", "--help"):
        print(__doc__)
        return
    if step == "draw":
        found = draw(Path(arguments[0]), arguments[1], int(arguments[2]))
    elif step == "predict":
        found = predict(arguments)
    else:
        found = restore(json.loads(Path(arguments[0]).read_text()))
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak, too
    peak_kb = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({**found, "peak_mb": peak_kb * 1024 / 1e6}), flush=True)


if __name__ == "__main__":  # the rival's workers import this file again
    main()
