"""One fold of one dataset for both sides: laid out, planned alike, trained, scored alike.

All lies in one folder: ``settings.json``, ``workspace-seed<n>/`` (ours), ``rival/`` (the raw,
preprocessed and results folders of nnunetv2), and ``ours-seed<n>.json`` or ``rival-seed<n>.json``
when a training is done.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ichseg.model import plans
from ichseg.predict.dice import dice_of_masks
from ichseg.scan import volume
from training.data import dataset, splits
from training.scoring.ignored import leave_out

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONFIGURATION = "3d_fullres"
SIDES = ("ours", "rival")


@dataclass(frozen=True, slots=True)
class Settings:
    """What both sides are told; a work folder is of one such object.

    Attributes:
        dataset: The rival's name for it, ``DatasetXXX_Name``.
        batch: The batch in place of what the planners find, or None.
        features: The features in place of what the planners find, or None.
        epochs: How many epochs a training has.
        batches: How many batches an epoch has.
        validation_batches: How many batches are validated after each epoch.
        device: ``cpu`` or ``cuda``.
        precision: The precision of our side; nnunetv2 takes fp32 on the CPU and fp16 autocast on
            CUDA.
        threads: How many threads torch has.
        workers: How many processes make batches while training; 0 makes them in between.
        compile: Whether our side compiles its network; nnunetv2 does on CUDA alone.
    """

    dataset: str
    batch: int | None
    features: tuple[int, ...] | None
    epochs: int
    batches: int
    validation_batches: int
    device: str
    precision: str
    threads: int
    workers: int
    compile: bool = False


@dataclass(frozen=True, slots=True)
class FoldPair:
    """How to call both sides.

    Attributes:
        source: The dataset, in the Decathlon's layout or as a raw folder of nnU-Net v2.
        folder: The folder for all that is made.
        settings: What both sides are told.
        rival_python: The Python of the rival's environment.
    """

    source: Path
    folder: Path
    settings: Settings
    rival_python: Path

    @property
    def settings_file(self) -> Path:
        """The file of settings that the rival's script reads."""
        return self.folder / "settings.json"

    @property
    def rival_store(self) -> Path:
        """The rival's preprocessed dataset, its plans and its splits."""
        return self.folder / "rival" / "nnUNet_preprocessed" / self.settings.dataset

    def workspace(self, seed: int) -> Path:
        """Our workspace of a seed; each has one, so that its training can be resumed."""
        return self.folder / f"workspace-seed{seed}"

    def done(self, side: str, seed: int) -> Path:
        """The file that is kept of a training that has ended."""
        return self.folder / f"{side}-seed{seed}.json"

    def check_settings(self) -> None:
        """See that the folder is new, or of the same settings.

        Raises:
            SystemExit: It is of other settings.
        """
        asked = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        if self.settings_file.exists():
            found = json.loads(self.settings_file.read_text())
            if found != asked:
                raise SystemExit(
                    f"error: {self.settings_file} says {found}, asked for {asked}; take another "
                    "folder"
                )

    def keep_settings(self) -> None:
        """Write them down, for the rival and for the next call."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings_file.write_text(json.dumps(dataclasses.asdict(self.settings)))

    def prepare_ours(self, seed: int) -> None:
        """Convert, plan and preprocess, unless that is done."""
        workspace, settings = self.workspace(seed), self.settings
        marker = workspace / "prepared"
        if marker.exists():
            return
        chosen: list[object] = []
        if settings.batch:
            chosen += ["--batch", settings.batch]
        if settings.features:
            chosen += ["--features", ",".join(map(str, settings.features))]
        shutil.rmtree(workspace, ignore_errors=True)
        self.call_ours("convert", self.source, "--workspace", workspace)
        self.call_ours("plan", "--workspace", workspace, "--recipe", "nnunetv2", *chosen)
        self.call_ours("preprocess", CONFIGURATION, "--workspace", workspace)
        marker.touch()

    def prepare_rival(self) -> None:
        """Lay out nnunetv2's raw folder, plan and preprocess, unless that is done."""
        marker = self.rival_store / "prepared"
        if marker.exists():
            return
        shutil.rmtree(self.folder / "rival", ignore_errors=True)
        self._lay_out_for_rival()
        self.call_rival("prepare", workers=1)  # its planner refuses 0
        marker.touch()

    def check_same(self, seed: int) -> None:
        """See that both sides hold out the same cases and have the same plan.

        Raises:
            SystemExit: They differ.
        """
        self.prepare_ours(seed)
        ours = plans.load(self.workspace(seed) / "plans.json").configuration(CONFIGURATION)
        theirs = json.loads((self.rival_store / "nnUNetPlans.json").read_text())
        rival = theirs["configurations"][CONFIGURATION]
        network = rival["architecture"]["arch_kwargs"]
        _same("patch", list(ours.patch), rival["patch_size"])
        _same("batch", ours.batch, rival["batch_size"])
        _same("spacing", list(ours.spacing_mm), rival["spacing"])
        _same("features", list(ours.architecture.features), network["features_per_stage"])
        _same("Dice over the batch", ours.batch_dice, rival["batch_dice"])
        path = self.rival_store / "splits_final.json"
        if path.exists():  # its first training writes it
            held_out = sorted(json.loads(path.read_text())[0]["val"])
            _same("held-out cases", sorted(self.fold(seed).validation), held_out)

    def fold(self, seed: int) -> splits.Split:
        """The folder of fold 0 in our workspace."""
        workspace = self.workspace(seed)
        names = [case.name for case in dataset.load_dataset(workspace).labelled]
        return splits.find_splits(workspace, names)[0]

    def train(self, side: str, seed: int) -> None:
        """Train and segment the held-out cases, unless that is done; ours resumes."""
        if self.done(side, seed).exists():
            print(f"{side}, seed {seed}: kept from before", flush=True)
            return
        print(f"{side}, seed {seed}: training", flush=True)
        if side == "ours":
            self._train_ours(seed)
        else:
            self.prepare_rival()
            unfinished = self.folder / f"rival-seed{seed}.tmp"
            self.call_rival(
                "train", "--seed", seed, "--out", unfinished,
                workers=self.settings.workers, seed=seed,
            )  # fmt: skip
            unfinished.rename(self.done("rival", seed))

    def _train_ours(self, seed: int) -> None:
        self.prepare_ours(seed)
        self.call_ours("train", *self.our_flags(seed), "--workers", self.settings.workers)
        run = self.workspace(seed) / "runs" / CONFIGURATION / "fold_0"
        with (run / "progress.csv").open() as stream:
            history = list(csv.DictReader(stream))
        kept = {
            "seconds": sum(float(row["seconds"]) for row in history),
            "predictions": str(run / "validation"),
            "train_losses": [float(row["train_loss"]) for row in history],
        }
        self.done("ours", seed).write_text(json.dumps(kept, indent=1))

    def our_flags(self, seed: int, fold: int = 0) -> list[object]:
        """The arguments of ``train``: the recipe, with length and machine of the settings."""
        settings = self.settings
        return [
            CONFIGURATION, "--fold", fold, "--workspace", self.workspace(seed),
            "--recipe", "nnunetv2", "--seed", seed,
            "--epochs", settings.epochs, "--batches-per-epoch", settings.batches,
            "--validation-batches", settings.validation_batches, "--device", settings.device,
            "--precision", settings.precision, "--memory-format", "channels_last",
            "--threads", settings.threads, *(["--compile"] if settings.compile else []),
        ]  # fmt: skip

    def scores(self, side: str, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The Dice of the held-out cases, ``(cases, labels or regions)``; NaN where undefined."""
        kept = json.loads(self.done(side, seed).read_text())
        data = dataset.load_dataset(self.workspace(seed))
        cases = {case.name: case for case in data.labelled}
        foreground = plans.load(self.workspace(seed) / "plans.json").foreground
        found = []
        for name in self.fold(seed).validation:
            predicted = volume.read(Path(kept["predictions"]) / f"{name}.nii.gz").voxels
            reference = volume.read(cases[name].label or Path()).voxels
            predicted, reference = leave_out(predicted, reference, data.ignore_label)
            found.append(
                [dice_of_masks(each.mask(predicted), each.mask(reference)) for each in foreground]
            )
        return np.array(found)

    def call_ours(self, *arguments: object) -> None:
        """Run a command of ours to its end."""
        command = [sys.executable, "-m", "training", *map(str, arguments)]
        subprocess.run(command, cwd=ROOT, check=True, env=self.our_environment())

    def call_rival(self, *arguments: object, workers: int, seed: int | None = None) -> None:
        """Run a step of the rival's script to its end; what it prints goes to a file."""
        path = self.folder / f"rival-{'prepare' if seed is None else f'seed{seed}'}.log"
        with path.open("w") as stream:
            failed = subprocess.run(
                self.rival_command(*arguments), stdout=stream, stderr=subprocess.STDOUT,
                env=self.rival_environment(seed, workers), check=False,
            ).returncode  # fmt: skip
        if failed:
            raise SystemExit(f"error: the rival failed, see {path}")

    def rival_command(self, step: str, *arguments: object) -> list[str]:
        """The command line of a step of the rival's script."""
        script, settings = HERE / "hippocampus_rival.py", self.settings_file
        return [*map(str, (self.rival_python, script, step, settings, *arguments))]

    def rival_environment(self, seed: int | None, workers: int) -> dict[str, str]:
        """The variables by which nnunetv2 is told of its folders and of the machine.

        Args:
            seed: The seed that names the folder for results, or None where there is none.
            workers: Processes that make batches; 0 makes them in between.
        """
        found = self._environment({k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        for name in ("raw", "preprocessed"):
            found[f"nnUNet_{name}"] = str(self.folder / "rival" / f"nnUNet_{name}")
        results = "results" if seed is None else f"results-seed{seed}"
        found["nnUNet_results"] = str(self.folder / "rival" / results)
        found["nnUNet_n_proc_DA"] = str(workers)
        found["nnUNet_def_n_proc"] = "1"
        if self.settings.device == "cpu":
            found["nnUNet_compile"] = "f"
        return found

    def our_environment(self) -> dict[str, str]:
        """The variables of our commands."""
        return self._environment(os.environ)

    def _environment(self, base: Mapping[str, str]) -> dict[str, str]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return {**base, **{name: str(self.settings.threads) for name in names}}

    def _lay_out_for_rival(self) -> None:
        """Copy the dataset to nnunetv2's raw folder."""
        raw = self.folder / "rival" / "nnUNet_raw" / self.settings.dataset
        described = json.loads((self.source / "dataset.json").read_text())
        if "file_ending" in described:  # the rival's own layout
            shutil.copytree(self.source, raw)
            return
        for name in ("imagesTr", "labelsTr"):
            (raw / name).mkdir(parents=True)
        images = sorted((self.source / "imagesTr").glob("[!.]*.nii.gz"))
        for image in images:
            case = image.name.removesuffix(".nii.gz")
            shutil.copyfile(image, raw / "imagesTr" / f"{case}_0000.nii.gz")
            shutil.copyfile(self.source / "labelsTr" / image.name, raw / "labelsTr" / image.name)
        rewritten = {
            "channel_names": described["modality"],
            "labels": {name: int(value) for value, name in described["labels"].items()},
            "numTraining": len(images),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(rewritten))


def mean_dice(scores: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The mean over cases, shape ``(seeds, labels)``, of one array ``(cases, labels)`` a seed."""
    return np.array([np.nanmean(found, axis=0) for found in scores])


def _same(what: str, ours: object, rival: object) -> None:
    if ours != rival:
        raise SystemExit(f"error: {what}: ours {ours}, the rival's {rival}; expected the same")
