"""A folder of cases through an ensemble, in three stages that overlap.

While the networks run on a case, in the caller's thread, a second thread reads and prepares the
next one and a third restores and writes the one before, see ``overlap``. Here no processes are
started and no memory is shared; where several ensembles run side by side, see ``crew``, each of
them does its share of the cases in this way.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ichseg.app import results
from ichseg.app.cases import InputCase, Job
from ichseg.app.console import say
from ichseg.app.one_case import (
    Opened,
    Options,
    Task,
    files_beside,
    open_case,
    optional,
    predict_case,
    write_case,
)
from ichseg.app.results import CaseResult, Record, refuse_cases
from ichseg.app.start import loading_libraries
from ichseg.engine.engine import Engine
from ichseg.errors import InputError, OutputError
from ichseg.files import remove_if_there, remove_unfinished
from ichseg.model.bundle import Model
from ichseg.overlap import overlapping
from ichseg.predict import memory
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.memory import Need
from ichseg.report import CASES_FOLDER, PAGE_FILE, REPORT_FOLDER
from ichseg.wording import counted


@dataclass(frozen=True, slots=True)
class Facts:
    """What runs the networks.

    Attributes:
        kind: Such as ``openvino``, see ``Engine``.
        precision: Such as ``float32``.
        name: Both for people, with the device.
    """

    kind: str
    precision: str
    name: str

    @property
    def made_from(self) -> dict[str, str]:
        """What a mask depends on."""
        return {"engine": self.kind, "precision": self.precision}


Finish = Callable[[Task, CaseResult], None]


@dataclass(frozen=True, slots=True)
class Means:
    """What segments the cases of a run.

    Attributes:
        model: The bundle's description.
        facts: What runs its networks.
        segment: Segments tasks with options, and calls its third argument with each task and its
            result, one at a time.
    """

    model: Model
    facts: Facts
    segment: Callable[[Sequence[Task], Options, Finish], None]


def alone(ensemble: Ensemble) -> Means:
    """One ensemble in this process."""

    def segment(tasks: Sequence[Task], options: Options, finish: Finish) -> None:
        segment_cases(tasks, ensemble, options, finish, len(tasks))

    return Means(ensemble.model, facts_of(ensemble.engine), segment)


def facts_of(engine: Engine) -> Facts:
    """What is to be known of an engine."""
    return Facts(engine.kind, engine.precision, engine.name)


def run(job: Job, means: Means, options: Options) -> Sequence[CaseResult]:
    """Segment every case that is not finished; one bad scan does not stop the others.

    Each result is on disk as soon as it is there, so that an interruption loses the cases under way
    and no others. What ends the run early leaves no half-written file.

    Returns:
        A result for each case of the job, in its order.

    Raises:
        OutputError: ``results.json`` cannot be written, or is something else's.
        WeightsError: The bundle cannot be run.
        DeviceError: The device cannot be used.
    """
    options = dataclasses.replace(options, made_from=options.made_from | means.facts.made_from)
    tasks = _tasks(job, options.output)
    _remove_unfinished(job, options)
    record = Record(options.output, job.cases, on_disk=not job.challenge)
    if options.resume:
        record.ended.update(_finished(tasks, options))
        verb = "is" if len(tasks) == 1 else "are"
        say(f"{len(record.ended)} of {counted(len(tasks), 'case')} {verb} finished already")
    waiting = [task for task in tasks if task.case not in record.ended]
    _begin(record, job, waiting, options)

    def finish(task: Task, result: CaseResult) -> None:
        if result.error:
            beside = files_beside(task.case, options.output, options.extras)
            for earlier in (task.case.output, *beside):
                remove_if_there(earlier)  # it would be taken for this run's
            say(f"{task.name}: failed: {result.error}")
        record.add(task.case, result)

    waiting = [task for task in waiting if task.case not in record.ended]
    try:
        means.segment(waiting, options, finish)
    except BaseException:
        with contextlib.suppress(OutputError):  # what ends the run is what has to be said
            if record.ended:
                record.save()
        raise
    _remove_unfinished(job, options)  # of workers that were killed
    record.keep_what_is_there()
    if options.pictures:
        _write_page(record, means, options)
    record.save()
    return record.in_order()


def refuse_all(job: Job, options: Options) -> Sequence[CaseResult]:
    """Do what ``run`` does for a job whose cases are all refused, without a network.

    Raises:
        OutputError: ``results.json`` cannot be written, or is something else's.
    """
    record = Record(options.output, job.cases, on_disk=not job.challenge)
    _begin(record, job, _tasks(job, options.output), options)
    record.save()
    return record.in_order()


def _begin(record: Record, job: Job, waiting: Sequence[Task], options: Options) -> None:
    """Remove what would be taken for this run's, and record the cases that are refused.

    Raises:
        OutputError: ``results.json`` is something else's, or cannot be written.
    """
    _remove_earlier(waiting, options, on_platform=job.platform or job.challenge)
    record.begin(keep_others=not job.platform)
    refuse_cases(job, record)


def _tasks(job: Job, output: Path) -> list[Task]:
    count = len(job.cases)
    return [Task(case, f"[{i}/{count}] {case.name}", output) for i, case in enumerate(job.cases, 1)]


def _remove_unfinished(job: Job, options: Options) -> None:
    """Remove what killed runs have left half-written; what cannot be removed does no harm."""
    pages = options.output / REPORT_FOLDER
    for folder in {
        options.output,
        pages,
        pages / CASES_FOLDER,
        *(c.output.parent for c in job.cases),
    }:
        with contextlib.suppress(OSError):
            remove_unfinished(folder)


def _remove_earlier(tasks: Sequence[Task], options: Options, *, on_platform: bool) -> None:
    """Remove what an earlier run has made beside masks that this one will replace.

    It would be taken for this run's. What that run did not list as its own is left alone, but for
    what this one is about to make.

    Raises:
        OutputError: ``results.json`` is something else's, which is replaced on a platform alone.
    """
    try:
        earlier = results.read_results(options.output)
    except OutputError:
        if not on_platform:
            raise
        earlier = {}
    made = {result.image: result.report.get("made_from") for result in earlier.values()}
    for task in tasks:
        before = made.get(task.case.name)
        if not isinstance(before, dict):
            before = {}
        _say_replaced(task, before.get("pieces"))
        if before.get("pictures"):  # the page shows this case
            remove_if_there(options.output / REPORT_FOLDER / PAGE_FILE)
        for extras in (before, options.extras):
            for path in files_beside(task.case, options.output, extras):
                remove_if_there(path)


def _say_replaced(task: Task, pieces: object) -> None:
    """Say where a mask goes that was made from other voxels: of another patient, it may be.

    Args:
        task: The case that will replace it.
        pieces: By what the scan of the earlier mask is known, see ``contents.Stamp``.
    """
    with contextlib.suppress(InputError):  # which will be said when it is read
        if pieces and task.case.output.is_file() and pieces != task.stamp["pieces"]:
            say(
                f"{task.name}: warning: another scan of this name was segmented before; its mask "
                f"{task.case.output} and its results are replaced"
            )


def _finished(tasks: Sequence[Task], options: Options) -> dict[InputCase, CaseResult]:
    """The cases whose earlier results are what this run would make."""
    earlier = results.read_results(options.output)
    found = {}
    for task in tasks:
        case = task.case
        result = earlier.get((case.name, str(case.output.relative_to(options.output))))
        if result is not None and not case.refusal:
            with contextlib.suppress(InputError):  # which will be said when it is read
                made = task.made_from(options)
                whole = all(path.is_file() for path in _asked_for(case, result, options))
                if whole and results.is_finished(result, case.output, made):
                    found[case] = result
    return found


def _asked_for(case: InputCase, result: CaseResult, options: Options) -> list[Path]:
    """The files beside a mask that an earlier result lists and that are asked for now."""
    found = list(files_beside(case, options.output, {"pictures": options.pictures}))
    listed = [what for what in ("probabilities", "dicom_seg") if what in result.report]
    found += [options.output / str(result.report[w]) for w in listed if options.extras[w]]
    return found


def segment_cases(
    tasks: Iterable[Task],
    ensemble: Ensemble,
    options: Options,
    finish: Finish,
    count: int = 0,
) -> None:
    """Open, predict and write cases, each stage in a thread of its own, as far as memory allows.

    Args:
        tasks: The cases, in their order; each is asked for when the one before it is begun.
        ensemble: The networks.
        options: What the user chose.
        finish: Called in the thread that writes, with one case and its result after the other.
        count: How many cases share what is left of a time budget.
    """
    with loading_libraries():
        import SimpleITK  # noqa: F401  # what it takes is the program's own, and no case's

    base = ensemble.program_bytes()
    cases_left = iter(range(count, 0, -1))

    def load_ahead() -> None:
        if options.deadline is None:  # else loading a network is timed where it runs
            ensemble.load_ahead(options.preset)

    for _ in overlapping(
        tasks,
        open_one=lambda task: open_case(task, task, ensemble, options, base),
        run=lambda task, case: predict_case(
            task, case, ensemble, options.deadline, next(cases_left, 1)
        ),
        finish=lambda task, case: finish(task, write_case(task, case, ensemble, options)),
        weigh=lambda case: case.need if isinstance(case, Opened) else None,
        beside=lambda need: need is None or memory.gpu_holds_two(need, ensemble.engine),
        meanwhile=load_ahead,
        may_open=lambda following, task, need, behind: _may_open(
            following, task, need, behind, base
        ),
    ):
        pass


def _may_open(
    following: Task, task: Task, need: Need | None, behind: Need | None, base: int
) -> bool:
    """Whether the next case may be opened while the networks run on this one."""
    following_size = None
    with contextlib.suppress(InputError):  # which will be said when it is read
        following_size = following.stamp["bytes"]
    size = task.stamp["bytes"] if need is not None else None
    return memory.may_open(need, behind, base, file_bytes=size, next_bytes=following_size)


def _write_page(record: Record, means: Means, options: Options) -> None:
    """The page of all cases; if it fails, every case has a warning, and nothing else is lost."""
    from ichseg.report import inference_page

    model, ended = means.model, record.in_order()
    warnings: list[str] = []
    with optional("no page of all scans", warnings):
        page = inference_page.write(
            options.output / REPORT_FOLDER,
            [inference_page.Entry(result.image, result.error, result.report) for result in ended],
            title=f"Segmentation of {counted(len(ended), 'scan')}",
            subtitle=f"{model.name} {model.version}, preset {options.preset}, {means.facts.name}",
        )
        say(f"a page to open in a browser: {page}")
    for warning in warnings:
        say(f"warning: {warning}")
        record.warn(warning)
