"""The rival's side of benchmarks that time single functions; runs in the rival's environment.

Reads one JSON request a line, does it with nnunetv2's own functions, and answers with one line of
JSON: the seconds that it took. Arrays travel as ``.npy`` files. The other side: ``rivals.Steps``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import blosc2
import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape as convert_logits,
)
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def resample(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Resample a single-channel image to another shape, as nnunetv2's preprocessing does."""
    image = np.load(request["input"])[None]
    began = time.perf_counter()
    found = resample_data_or_seg_to_shape(
        image, request["shape"], request["spacing_mm"], request["target_mm"],
        is_seg=False, order=3, order_z=0, force_separate_z=None,
    )  # fmt: skip
    return time.perf_counter() - began, found[0]


def logits(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Bring logits to labels in the input's grid, as nnunetv2's export does."""
    plans = PlansManager(request["plans"])
    configuration = plans.get_configuration("3d_fullres")
    configuration.configuration["spacing"] = request["spacing_mm"]
    with open(request["dataset"]) as stream:  # noqa: PTH123
        labels = plans.get_label_manager(json.load(stream))
    shape = request["shape"]
    properties = {
        "spacing": request["target_mm"],
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[0, size] for size in shape],
    }
    scores = torch.from_numpy(np.load(request["input"]))
    began = time.perf_counter()
    found = convert_logits(
        scores, plans, configuration, labels, properties, num_threads_torch=request["threads"]
    )
    return time.perf_counter() - began, np.asarray(found)


def stored(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """A preprocessed case: the image, and the labels as one more channel."""
    began = time.perf_counter()
    dataset = nnUNetDatasetBlosc2(request["folder"], [request["case"]])
    data, labels, _, _ = dataset.load_case(request["case"])
    found = np.concatenate((data[:], labels[:].astype(np.float32)))
    return time.perf_counter() - began, found


def lossless(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """The bytes of a stored image as nnunetv2 keeps it, and by zstd with the best filter."""
    began = time.perf_counter()
    image = blosc2.open(f"{request['folder']}/{request['case']}.b2nd")
    sizes = []
    for filtered in (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE):
        packing = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [filtered]}
        packed = blosc2.asarray(image[:], chunks=image.chunks, blocks=image.blocks, cparams=packing)
        sizes.append(packed.schunk.cbytes)
    return time.perf_counter() - began, np.array([image.schunk.cbytes, min(sizes)])


def main() -> None:
    """Answer requests until the input ends."""
    steps = {"resample": resample, "logits": logits, "stored": stored, "lossless": lossless}
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            seconds, result = steps[request["step"]](request)
        if request["output"]:
            np.save(request["output"], result)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
