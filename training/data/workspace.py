"""Where everything in a workspace lies: the one home of the names of its files and folders.

::

    WORKSPACE/
      dataset.json groups.csv sources.json verified.json fingerprint.json plans.json splits.json
      selection.json
      raw/images/  raw/labels/
      preprocessed/<configuration>/<case>...
      runs/<configuration>/fold_<fold>/       config.json, checkpoints, progress, validation/ ...
      evaluation/<configuration>/  bundles/<name>/  report/
      jobs/<job>/                             output.log

Functions that take a ``run_folder`` name what lies in the folder of one fold.
"""

from __future__ import annotations

from pathlib import Path

from ichseg.report import REPORT_FOLDER

DATASET_FILE = "dataset.json"
GROUPS_FILE = "groups.csv"
SOURCES_FILE = "sources.json"
VERIFIED_FILE = "verified.json"
FINGERPRINT_FILE = "fingerprint.json"
PLANS_FILE = "plans.json"
SPLITS_FILE = "splits.json"
SELECTION_FILE = "selection.json"

# The folder of one fold's run.
ALL_FOLD = "all"  # the name of the fold that trains on every case
CONFIG_FILE = "config.json"
LATEST_CHECKPOINT, BEST_CHECKPOINT = "checkpoint_latest.pt", "checkpoint_best.pt"
PROGRESS_TABLE, PROGRESS_PICTURE, TRAIN_LOG = "progress.csv", "progress.png", "train.log"
VALIDATION_FILE = "validation.json"
HARD_EXAMPLES_TABLE = "hard_examples.csv"
CLAIM_FILE = ".claim.json"  # who is at work in a folder

_FOLD = "fold_"
_RAW, _PREPROCESSED, _RUNS, _EVALUATION = "raw", "preprocessed", "runs", "evaluation"


def validation_part(rank: int | str) -> str:
    """What another process than the leading one calls its part of ``validation.json``."""
    return f"validation.part{rank}.json"


def dataset_file(workspace: Path) -> Path:
    """The list of cases, which ``convert`` writes."""
    return workspace / DATASET_FILE


def groups_file(workspace: Path) -> Path:
    """The table of cases that stay together in a fold; it need not exist."""
    return workspace / GROUPS_FILE


def sources_file(workspace: Path) -> Path:
    """What is remembered of the content of the cases' files."""
    return workspace / SOURCES_FILE


def verified_file(workspace: Path) -> Path:
    """The note that ``verify`` found no error."""
    return workspace / VERIFIED_FILE


def fingerprint_file(workspace: Path) -> Path:
    """What the dataset looks like, as ``fingerprint`` measures it."""
    return workspace / FINGERPRINT_FILE


def plans_file(workspace: Path) -> Path:
    """What ``plan`` decided."""
    return workspace / PLANS_FILE


def splits_file(workspace: Path) -> Path:
    """The folds of the cross-validation."""
    return workspace / SPLITS_FILE


def selection_file(workspace: Path) -> Path:
    """What ``select`` chose."""
    return workspace / SELECTION_FILE


def raw_images_folder(workspace: Path) -> Path:
    """The images of all cases, one file a channel."""
    return workspace / _RAW / "images"


def raw_labels_folder(workspace: Path) -> Path:
    """The reference segmentations of all cases."""
    return workspace / _RAW / "labels"


def preprocessed_root(workspace: Path) -> Path:
    """The folder that holds the preprocessed cases of all configurations."""
    return workspace / _PREPROCESSED


def preprocessed_folder(workspace: Path, configuration: str) -> Path:
    """The preprocessed cases of one configuration."""
    return preprocessed_root(workspace) / configuration


def runs_root(workspace: Path) -> Path:
    """The folder that holds the runs of all configurations."""
    return workspace / _RUNS


def runs_folder(workspace: Path, configuration: str) -> Path:
    """The runs of one configuration's folds."""
    return runs_root(workspace) / configuration


def run_folder(workspace: Path, configuration: str, fold: str) -> Path:
    """The run of one fold, ``0``, ``1``, ... or ``ALL_FOLD``."""
    return runs_folder(workspace, configuration) / f"{_FOLD}{fold}"


def run_folders(workspace: Path, configuration: str) -> tuple[Path, ...]:
    """The folders of all folds of a configuration that have a run, sorted by name."""
    return tuple(sorted(runs_folder(workspace, configuration).glob(f"{_FOLD}*")))


def trained_runs(workspace: Path) -> tuple[Path, ...]:
    """The folders of all runs, of any configuration, that have weights already; sorted."""
    names = (LATEST_CHECKPOINT, BEST_CHECKPOINT)
    return tuple(
        folder
        for folder in sorted(runs_root(workspace).glob(f"*/{_FOLD}*"))
        if any((folder / name).exists() for name in names)
    )


def fold_of(run_folder: Path) -> str:
    """The fold that a run's folder belongs to."""
    return run_folder.name.removeprefix(_FOLD)


def hard_examples_file(run_folder: Path) -> Path:
    """Where a fold's network erred on its training cases, as ``hard-examples`` found."""
    return run_folder / HARD_EXAMPLES_TABLE


def masks_folder(run_folder: Path) -> Path:
    """The masks of a fold's validation cases."""
    return run_folder / "validation"


def mask_file(run_folder: Path, case: str) -> Path:
    """The mask of one validation case."""
    return masks_folder(run_folder) / f"{case}.nii.gz"


def probabilities_folder(run_folder: Path) -> Path:
    """The probabilities of a fold's validation cases, by which ``select`` judges pairs."""
    return run_folder / "probabilities"


def probabilities_file(run_folder: Path, case: str) -> Path:
    """The probabilities of one validation case."""
    return probabilities_folder(run_folder) / f"{case}.npz"


def evaluation_root(workspace: Path) -> Path:
    """The folder that holds the evaluations of all configurations."""
    return workspace / _EVALUATION


def evaluation_folder(workspace: Path, configuration: str) -> Path:
    """The cross-validation's scores of one configuration."""
    return evaluation_root(workspace) / configuration


def bundles_folder(workspace: Path) -> Path:
    """The folder in which ``run`` puts the weights bundles, one folder each."""
    return workspace / "bundles"


def report_folder(workspace: Path) -> Path:
    """The page of the cross-validation."""
    return workspace / REPORT_FOLDER


def jobs_root(workspace: Path) -> Path:
    """The folder that holds a folder for each job of ``run``."""
    return workspace / "jobs"


def job_log(workspace: Path, job: str) -> Path:
    """All that a job has said, such as ``train 3d_fullres 0``, each line with its time."""
    return jobs_root(workspace) / job.replace(" ", "_") / "output.log"
