"""``training run`` on a tiny task, its jobs in this process, one at a time."""

from __future__ import annotations

import argparse
import shlex

import numpy as np
from helpers.datasets import write_msd

from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.jobs import run
from training.jobs.board import Board
from training.jobs.choices import choices_from
from training.jobs.command import Ending

ALL_FOLDS = shlex.split(
    "--spacing 5,1,1 --patch 4,16,16 --batch 2 --features 4,8 --no-deep-supervision --epochs 1 "
    "--batches-per-epoch 2 --validation-batches 1 --threads 1 --workers 0 --no-validation-mirrors "
    "--device cpu"
)
TINY = [*ALL_FOLDS, "--folds", "0,1"]
NAMES = tuple(f"case_{number}" for number in range(5))


def write_tiny_task(folder):
    """A task with a bright box in every case."""
    write_msd(folder, NAMES)
    rng = np.random.default_rng(3)
    for number, name in enumerate(NAMES):
        reference = np.zeros((6, 24, 24), np.uint8)
        reference[1:4, 4 + number : 14, 6:16] = 1
        voxels = (rng.normal(35, 3, reference.shape) + 35 * reference).astype(np.int16)
        image = Volume(voxels, (5.0, 1.0, 1.0))
        volume.write(image, folder / "imagesTr" / f"{name}.nii.gz")
        volume.write(image.with_voxels(reference), folder / "labelsTr" / f"{name}.nii.gz")
    return folder


def arguments(dataset, workspace, *more, settings=TINY):
    """What the command line of a run says."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    run.add_arguments(parser)
    line = [str(dataset), "--workspace", str(workspace), *settings, *more]
    return choices_from(parser.parse_args(line))


class Here:
    """Runs jobs in this process, one at a time."""

    def __init__(self, execute):
        self.execute, self.given = execute, []

    def submit(self, job):
        self.given.append(job)

    def wait(self):
        job = self.given.pop(0)
        status = self.execute((job.command, *job.words))
        return [(job, Ending(status, "failed" if status else ""))]

    def stop(self):
        self.given.clear()


def run_here(choices, execute):
    """Whether all jobs were done, each by ``execute``, which gets its words."""
    return run.run(choices, Here(execute), Board())


def stages(lines):
    """The commands of lines of words."""
    return [words[0] for words in lines]
