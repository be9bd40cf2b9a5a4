"""The rival's side of benchmarks that train; runs in the rival's environment.

    python hippocampus_rival.py prepare SETTINGS.json
    python hippocampus_rival.py train SETTINGS.json --seed 0 --out DONE.json
    python hippocampus_rival.py blocks SETTINGS.json

nnunetv2's own planner, preprocessor, trainer and predictor, with the settings' batch and features
put into the plan and their length into the trainer. ``blocks`` reads a number of iterations a line,
and answers each with one line of JSON. The folders are nnunetv2's own environment variables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

PROCESSES = 2  # that plan and preprocess
WARM_UP = 3  # iterations that are not timed


def main() -> None:
    """Do the one of three steps that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("prepare", "train", "blocks"))
    parser.add_argument("settings", type=Path, help="those of fold_pair.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = json.loads(args.settings.read_text())
    torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train sets it
    if args.step == "prepare":
        prepare(settings)
        return
    seed_all(args.seed)
    trainer = make_trainer(settings)
    if args.step == "train":
        args.out.write_text(json.dumps(train(trainer), indent=1))
    else:
        serve_blocks(trainer)


def prepare(settings: dict[str, Any]) -> None:
    """Plan, put the settings into the plan, preprocess."""
    number = int(settings["dataset"][len("Dataset") :][:3])
    extract_fingerprint_dataset(number, num_processes=PROCESSES)
    plan_experiment_dataset(number)
    path = preprocessed(settings) / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    if settings["batch"]:
        configuration["batch_size"] = settings["batch"]
    if settings["features"]:
        architecture = configuration["architecture"]["arch_kwargs"]
        stages = architecture["n_stages"]
        if len(settings["features"]) != stages:
            raise SystemExit(f"error: {settings['features']}: the plan has {stages} levels")
        architecture["features_per_stage"] = settings["features"]
    path.write_text(json.dumps(plans, indent=1))
    preprocess_dataset(number, configurations=("3d_fullres",), num_processes=(PROCESSES,))


def preprocessed(settings: dict[str, Any]) -> Path:
    """The folder where nnunetv2 keeps the prepared dataset."""
    return Path(os.environ["nnUNet_preprocessed"]) / settings["dataset"]  # noqa: SIM112


def seed_all(seed: int) -> None:
    """Seed the three generators that nnunetv2 draws from; it seeds none itself."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def make_trainer(settings: dict[str, Any]) -> nnUNetTrainer:
    """Make the trainer of fold 0; its schedule ends with the length given."""
    plans = json.loads((preprocessed(settings) / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    dataset = json.loads((preprocessed(settings) / "dataset.json").read_text())
    trainer = nnUNetTrainer(
        plans, "3d_fullres", 0, dataset, device=torch.device(settings["device"])
    )
    trainer.num_epochs = settings["epochs"]
    trainer.num_iterations_per_epoch = settings["batches"]
    trainer.num_val_iterations_per_epoch = settings["validation_batches"]
    return trainer


def train(trainer: nnUNetTrainer) -> dict[str, Any]:
    """Train to the end, and predict the held-out cases."""
    began = time.perf_counter()
    trainer.run_training()
    seconds = time.perf_counter() - began
    trainer.perform_actual_validation()
    logged = trainer.logger.local_logger.my_fantastic_logging
    return {
        "seconds": seconds,
        "predictions": str(Path(trainer.output_folder) / "validation"),
        "train_losses": [float(value) for value in logged["train_losses"]],
        "pseudo_dice": np.array(logged["dice_per_class_or_region"], dtype=float).tolist(),
    }


def serve_blocks(trainer: nnUNetTrainer) -> None:
    """Train on as many iterations as each line says; answer with seconds and data wait."""
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    for _ in range(WARM_UP):
        trainer.train_step(next(trainer.dataloader_train))
    _answer({"ready": True})
    for line in sys.stdin:
        synchronise(trainer.device)
        waited, cpu, began = 0.0, time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            asked = time.perf_counter()
            batch = next(trainer.dataloader_train)
            waited += time.perf_counter() - asked
            trainer.train_step(batch)
        synchronise(trainer.device)
        seconds = time.perf_counter() - began
        _answer({"seconds": seconds, "wait": waited, "cpu": time.process_time() - cpu})


def synchronise(device: torch.device) -> None:
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # only answers go there
        main()
