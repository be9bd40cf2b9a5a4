"""The rival's half of ``parity.py``: trains tiny networks and predicts with nnunetv2's own code.

Reads one request, a JSON file, and runs in the rival's environment.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.update({f"nnUNet_{kind}": "/nonexistent" for kind in ("raw", "preprocessed", "results")})

with contextlib.redirect_stdout(sys.stderr):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import (
        determine_num_input_channels,
    )
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

PATCHES = 2  # a training step


def train(model: dict[str, Any], cases: list[dict[str, str]], fold: int) -> None:
    """Write a model folder's fold with a network of so many steps of Adam."""
    folder = Path(model["folder"])
    dataset = json.loads((folder / "dataset.json").read_text())
    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    configuration = plans.get_configuration(model["configuration"])
    labels = plans.get_label_manager(dataset)
    prepared = [
        configuration.preprocessor_class(verbose=False).run_case(
            [case["image"]], case["label"], plans, configuration, dataset
        )[:2]
        for case in cases
    ]
    torch.manual_seed(fold)
    random = np.random.default_rng(fold)
    network = nnUNetTrainer.build_network_architecture(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, dataset),
        labels.num_segmentation_heads,
        enable_deep_supervision=False,
    )
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(model["steps"]):
        images, targets = zip(
            *(draw(*prepared[random.integers(len(prepared))], configuration.patch_size, random)
              for _ in range(PATCHES)),
            strict=True,
        )  # fmt: skip
        x, target = torch.stack(images), torch.stack(targets)
        if configuration.previous_stage_name is not None:
            known = torch.stack([target == label for label in labels.foreground_labels], 1).float()
            x = torch.cat((x, known * (torch.rand(PATCHES, 1, 1, 1, 1) < 0.5)), 1)
        loss = loss_of(network(x), target, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    say(f"trained {model['name']} fold {fold}: loss {loss.item():.3f}")
    (folder / f"fold_{fold}").mkdir(exist_ok=True)
    torch.save(
        {
            "network_weights": network.state_dict(),
            "optimizer_state": optimiser.state_dict(),
            "grad_scaler_state": None,
            "logging": {"ema_fg_dice": [np.float64(0)]},
            "_best_ema": np.float64(0),
            "current_epoch": 1,
            "init_args": {"configuration": model["configuration"], "fold": fold},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": tuple(range(len(configuration.patch_size))),
        },
        folder / f"fold_{fold}" / "checkpoint_final.pth",
    )


def draw(
    image: np.ndarray, labels: np.ndarray, patch: list[int], random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a patch somewhere, and its labels; of a 2D network a slice's."""
    size = [1] * (3 - len(patch)) + list(patch)
    missing = [max(0, wanted - there) for wanted, there in zip(size, labels.shape[1:], strict=True)]
    around = [(0, 0), *((m // 2, m - m // 2) for m in missing)]
    image, labels = np.pad(image, around), np.pad(labels, around)
    starts = [
        random.integers(there - s + 1) for there, s in zip(labels.shape[1:], size, strict=True)
    ]
    where = tuple(slice(a, a + s) for a, s in zip(starts, size, strict=True))
    x = torch.from_numpy(np.ascontiguousarray(image[(slice(None), *where)], np.float32))
    y = torch.from_numpy(np.maximum(labels[(0, *where)], 0).astype(np.int64))
    return (x, y) if len(patch) == 3 else (x[:, 0], y[0])


def loss_of(logits: torch.Tensor, target: torch.Tensor, labels: Any) -> torch.Tensor:
    """The cross-entropy; of regions one for each."""
    if not labels.has_regions:
        return torch.nn.functional.cross_entropy(logits, target)
    inside = [
        torch.isin(target, torch.tensor(np.atleast_1d(region)))
        for region in labels.foreground_regions
    ]
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.stack(inside, 1).float()
    )


@contextlib.contextmanager
def fp32_accumulators() -> Iterator[None]:
    """Patch nnunetv2: its sums over tiles and its weights of voxels are halves."""
    name = "_internal_predict_sliding_window_return_logits"
    method, gaussian = getattr(nnUNetPredictor, name), predict_from_raw_data.compute_gaussian
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count("dtype=torch.half") == 2, "nnunetv2 has changed"
    patched = source.replace("dtype=torch.half", "dtype=torch.float32")
    for before, after in zip(source.splitlines(), patched.splitlines(), strict=True):
        if before != after:
            say(f"patched: {before.strip()}  ->  {after.strip()}")
    say("patched: compute_gaussian(...)  ->  compute_gaussian(..., dtype=torch.float32)")
    names: dict[str, Any] = {}
    exec(compile(patched, "patched", "exec"), vars(predict_from_raw_data), names)
    in_fp32 = functools.partial(gaussian, dtype=torch.float32)
    in_fp32.cache_clear = gaussian.cache_clear  # type: ignore[attr-defined]
    setattr(nnUNetPredictor, name, names[name])
    predict_from_raw_data.compute_gaussian = in_fp32
    yield
    setattr(nnUNetPredictor, name, method)
    predict_from_raw_data.compute_gaussian = gaussian


def predict(model: dict[str, Any], image: str, previous: str | None) -> tuple[Any, Any]:
    """Predict labels ``(z, y, x)`` and probabilities ``(K, z, y, x)`` in the file's grid.

    Args:
        model: The model, with its ``folder``.
        image: The file of the image.
        previous: The file with the first stage's labels, for a cascade's second.
    """
    with contextlib.redirect_stdout(sys.stderr):
        predictor = nnUNetPredictor(
            perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(model["folder"], None)
        voxels, properties = SimpleITKIO().read_images([image])
        first = None if previous is None else np.load(previous)[None].astype(np.float32)
        return predictor.predict_single_npy_array(voxels, properties, first, None, True)


def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Train what there is to train, and predict every case."""
    for model in request["models"]:
        for fold in range(model["folds"]):
            train(model, request["cases"], fold)
        if model["again"] is not None:
            save_again(model)
    rows = []
    with fp32_accumulators():
        for model in request["models"]:
            for case in request["cases"]:
                out = f"{model['out']}_{case['name']}"
                labels, probabilities = predict(model, case["image"], previous_of(model, case))
                np.save(f"{out}_labels.npy", labels)
                np.save(f"{out}_probabilities.npy", probabilities)
                say(f"predicted {case['name']} by {model['name']}")
    for model in request["models"]:
        if model["again"] is not None:  # how far it is from itself is known already
            continue
        case = request["cases"][0]
        out = f"{model['out']}_{case['name']}"
        labels, probabilities = predict(model, case["image"], previous_of(model, case))
        change = np.abs(probabilities - np.load(f"{out}_probabilities.npy")).max()
        differing = int((labels != np.load(f"{out}_labels.npy")).sum())
        rows.append({"model": model["name"], "largest": float(change), "labels": differing})
    return rows


def save_again(model: dict[str, Any]) -> None:
    """Load a model folder by nnunetv2, and write what it has loaded as a folder of its own."""
    folder, again = Path(model["folder"]), Path(model["again"])
    folds = sorted(path.name[5:] for path in folder.glob("fold_*"))
    with contextlib.redirect_stdout(sys.stderr):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
    again.mkdir(parents=True)
    (again / "plans.json").write_text(json.dumps(predictor.plans_manager.plans))
    (again / "dataset.json").write_text(json.dumps(predictor.dataset_json))
    for fold, weights in zip(folds, predictor.list_of_parameters, strict=True):
        predictor.network.load_state_dict(weights)
        (again / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": predictor.network.state_dict(),
                "trainer_name": predictor.trainer_name,
                "init_args": {"configuration": model["configuration"], "fold": fold},
                "inference_allowed_mirroring_axes": predictor.allowed_mirroring_axes,
            },
            again / f"fold_{fold}" / "checkpoint_final.pth",
        )


def previous_of(model: dict[str, Any], case: dict[str, str]) -> str | None:
    """The file with the first stage's labels of a case, in a cascade."""
    return model["previous"] and f"{model['previous']}_{case['name']}_labels.npy"


def say(text: str) -> None:
    """Print one line at once."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Answer the request on the command line."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(request["answer"]).write_text(json.dumps(answer(request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
