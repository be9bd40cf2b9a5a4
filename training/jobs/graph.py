"""The graph of a run: which jobs there are, and which wait for which.

Functions of values: nothing is read, so the same choices and plans give the same graph anywhere.
Where cases are shared out over machines there is a job of ``preprocess`` a share; a fold is a job,
which trains and then segments the fold's validation cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.model.plans import Configuration, Plans
from training.fit.configuration import GivenSettings, TrainingConfig
from training.jobs.choices import SELECTED, Choices, Scope
from training.jobs.job import ANY, Job, Need
from training.planning.memory import training_bytes
from training.planning.recipes import RECIPES

# Memory of the host: a process with its libraries, and a batch in the making per voxel and channel:
# what was read around the patch, its warped copy, the target and the copy in the queue.
_PROCESS_BYTES, _GPU_PROCESS_BYTES = 1_000_000_000, 3_000_000_000
_BYTES_PER_VOXEL = 24


@dataclass(frozen=True, slots=True)
class Machines:
    """What the graph has to know of the place that its jobs run on.

    Attributes:
        gpus: Whether there are GPUs to train on.
        shares: How many jobs share the cases of a dataset to preprocess.
        cores: Cores of each of these; 0 for all of the one machine.
        processes: How many train a fold together, as far as the batch has a sample for each.
    """

    gpus: bool = False
    shares: int = 1
    cores: int = 0
    processes: int = 1


ONE_MACHINE = Machines()


def opening(choices: Choices) -> tuple[Job, ...]:
    """The jobs up to the plans, on which the others depend."""
    workspace = _workspace(choices)
    groups = () if choices.groups is None else ("--groups", str(choices.groups))
    labels = ("--labels", ",".join(choices.labels)) if choices.labels else ()
    convert = Job("convert", (str(choices.dataset), *workspace, *labels, *groups))
    verify = Job("verify", (*workspace, "--note"), after=(convert.name,))
    plan = Job("plan", (*workspace, *_planning(choices)), after=(verify.name,))
    return convert, verify, plan


def closing(scope: Scope, machines: Machines = ONE_MACHINE) -> tuple[Job, ...]:
    """The jobs that follow the plans, in an order in which they can be done one by one."""
    stored = [job for name in scope.trained for job in _preprocess(scope, name, machines)]
    trained: list[Job] = []
    for name in scope.trained:
        first = scope.plans.configuration(name).previous_stage
        # the segmentations of a first stage go to the store of the second, which has to be there
        wanted = {name, first, *scope.second_stages(name)}
        after = [job.name for job in stored if job.target in wanted]
        after += [job.name for job in trained if job.target == first]
        trained += [
            training_job(
                scope.choices.workspace,
                name,
                fold,
                ("--recipe", scope.choices.recipe) if scope.choices.recipe else (),
                scope.choices.settings,
                need=_need_of_training(
                    scope.plans, scope.plans.configuration(name), scope.config, machines
                ),
                after=after,
            )
            for fold in scope.folds_of(name)
        ]
    return (*stored, *trained, *_conclusion(scope, trained))


def training_job(
    workspace: Path,
    configuration: str,
    fold: str,
    more: Sequence[str],
    settings: GivenSettings,
    *,
    need: Need = ANY,
    after: Sequence[str] = (),
) -> Job:
    """The job that trains and validates one fold.

    Args:
        workspace: The workspace.
        configuration: Such as ``3d_fullres``.
        fold: The fold's number.
        more: Further flags.
        settings: The settings that were given.
        need: What it takes.
        after: The names of the jobs that it waits for.
    """
    words = (configuration, "--workspace", str(workspace), "--fold", fold, *more)
    return Job(
        "train", (*words, *settings.flags()), configuration, fold, after=tuple(after), need=need
    )


def _conclusion(scope: Scope, trained: Sequence[Job]) -> list[Job]:
    """What follows the trainings: comparison, choice, bundles and page, or a bundle for each."""
    if not scope.compared:
        jobs = []
        for name in scope.bundles:
            members = scope.plans.with_first_stages((name,))
            jobs.append(_export(scope, name, [j.name for j in trained if j.target in members]))
        return jobs
    names = (*_workspace(scope.choices), "--configurations", ",".join(scope.compared))
    scored = Job("cross-validate", names, after=tuple(job.name for job in trained))
    chosen = Job("select", names, after=(scored.name,))
    page = Job("report", (str(scope.choices.workspace),), after=(chosen.name,))
    return [scored, chosen, _export(scope, SELECTED, [chosen.name]), page]


def _preprocess(scope: Scope, name: str, machines: Machines) -> list[Job]:
    words: tuple[str, ...] = (name, *_workspace(scope.choices))
    if machines.cores:
        words += ("--workers", str(machines.cores))
    need = Need(cores=max(1, machines.cores))
    if machines.shares == 1:
        return [Job("preprocess", words, name, after=("plan",), need=need)]
    return [
        Job(
            "preprocess",
            (*words, "--share", f"{number}/{machines.shares}"),
            name,
            f"{number} of {machines.shares}",
            after=("plan",),
            need=need,
        )
        for number in range(1, machines.shares + 1)
    ]


def _export(scope: Scope, target: str, after: Sequence[str]) -> Job:
    choices = scope.choices
    words = _workspace(choices)
    if target != SELECTED:
        words += ("--configuration", target)
    words += ("--out", str(choices.bundle_folder(target)))
    words += ("--folds", ",".join(scope.chosen_folds))
    if threads := choices.settings.training.get("threads"):
        words += ("--threads", str(threads))
    return Job("export", words, target, after=tuple(after))


def _workspace(choices: Choices) -> tuple[str, ...]:
    return ("--workspace", str(choices.workspace))


def _planning(choices: Choices) -> list[str]:
    """What the user chose in place of the planner."""
    words: list[str] = []
    if choices.recipe in RECIPES:  # the others are the trainer's alone
        words += ["--recipe", choices.recipe]
    if choices.architecture is not None:
        words += ["--architecture", choices.architecture]
    for name, value in choices.overrides.items():
        flags = {"yes": f"--{name}", "no": f"--no-{name}"}
        words.append(flags.get(value, f"--{name}={value}"))
    return words


def _need_of_training(
    plans: Plans, configuration: Configuration, config: TrainingConfig, machines: Machines
) -> Need:
    gpus = int(config.device == "cuda" or (config.device == "auto" and machines.gpus))
    voxels = math.prod(configuration.patch) * plans.input_channels(configuration)
    processes = min(machines.processes, configuration.batch)
    samples = math.ceil(configuration.batch / processes)
    batches = (config.workers + config.prefetch) * samples
    memory = batches * voxels * _BYTES_PER_VOXEL + config.workers * _PROCESS_BYTES
    if gpus:
        memory += _GPU_PROCESS_BYTES
    else:
        memory += training_bytes(plans, configuration, processes) + _PROCESS_BYTES
    return Need(gpus, config.workers + max(1, config.threads), memory, processes)
