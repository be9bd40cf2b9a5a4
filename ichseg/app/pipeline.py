"""A folder of cases through one ensemble, in three stages that overlap.

While the networks run on a case, in the caller's thread, a second thread reads and prepares the
next one and a third restores and writes the one before. Never is more than one case prepared ahead
or one waiting to be written; no processes are started and no memory is shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ichseg.app import needs, results
from ichseg.app.cases import InputCase, Job
from ichseg.app.console import say
from ichseg.app.one_case import (
    REPORT,
    Done,
    Opened,
    Options,
    Task,
    open_case,
    optional,
    predict_case,
    write_case,
)
from ichseg.app.results import CaseResult, Record, refuse_cases
from ichseg.engine import machine
from ichseg.errors import InputError, OutputError
from ichseg.files import abandon_unfinished
from ichseg.predict.ensemble import Ensemble
from ichseg.scan.dicom.dicom_seg import seg_path
from ichseg.wording import counted

_LAST_WRITE_S = 3.0  # for what is being written to end; the platform kills 5 s after SIGTERM


def run(job: Job, ensemble: Ensemble, options: Options) -> list[CaseResult]:
    """Segment every case that is not finished; one bad scan does not stop the others.

    Each result is on disk as soon as it is there, so that an interruption loses the cases under way
    and no others. What ends the run early leaves no half-written file.

    Returns:
        A result for each case of the job, in its order.

    Raises:
        OutputError: ``results.json`` cannot be written, or with ``resume`` not be read.
        WeightsError: The bundle cannot be run.
        DeviceError: The device cannot be used.
    """
    tasks = _tasks(job)
    record = Record(options.output, job.cases, on_disk=not job.challenge)
    if options.resume:
        record.ended |= _finished(tasks, options)
        say(f"{len(record.ended)} of {counted(len(tasks), 'case')} are finished already")
    record.begin()
    refuse_cases(job, record)

    def finish(task: Task, case: Done | CaseResult) -> None:
        result = write_case(task, case, ensemble, options)
        if result.error:
            for earlier in (task.case.output, seg_path(task.case.output)):
                earlier.unlink(missing_ok=True)  # it would be taken for this run's
            say(f"{task.name}: failed: {result.error}")
        record.add(task.case, result)

    waiting = [task for task in tasks if task.case not in record.ended]
    try:
        _overlapping(waiting, ensemble, options, finish)
    except BaseException:
        with contextlib.suppress(OutputError):  # what ends the run is what has to be said
            if record.ended:
                record.save()
        raise
    record.keep_what_is_there()
    if options.pictures:
        _write_page(record, ensemble, options)
    record.save()
    return record.in_order()


def _tasks(job: Job) -> list[Task]:
    count = len(job.cases)
    return [Task(case, f"[{i}/{count}] {case.name}") for i, case in enumerate(job.cases, 1)]


def _finished(tasks: Sequence[Task], options: Options) -> dict[InputCase, CaseResult]:
    """The cases whose earlier results are what this run would make."""
    earlier = results.read_results(options.output)
    found = {}
    for task in tasks:
        case = task.case
        result = earlier.get((case.name, str(case.output.relative_to(options.output))))
        if result is not None and not case.refusal:
            with contextlib.suppress(InputError):  # which will be said when it is read
                if results.is_finished(result, case.output, task.made_from(options)):
                    found[case] = result
    return found


def _overlapping(
    tasks: Sequence[Task],
    ensemble: Ensemble,
    options: Options,
    finish: Callable[[Task, Done | CaseResult], None],
) -> None:
    """Open, predict and finish cases, each in a thread of its own, as far as memory allows.

    Args:
        tasks: The cases, in their order.
        ensemble: The networks.
        options: What the user chose.
        finish: Called in the thread that writes, for one case after the other.
    """
    base = machine.resident_bytes()
    with _two_threads() as (reader, writer):
        ahead: list[Future[Opened | CaseResult]] = []
        behind: list[Future[None]] = []
        written = 0  # bytes that the case behind takes
        for position, task in enumerate(tasks):
            if not ahead:
                ahead.append(reader.submit(open_case, task, task, ensemble, options, base))
            case = ahead.pop().result()
            for following in tasks[position + 1 : position + 2]:
                if _may_open(following, task, case, base + written):
                    ahead.append(
                        reader.submit(open_case, following, following, ensemble, options, base)
                    )
            if behind and (not ahead or not _beside_another(case, ensemble)):
                behind.pop().result()  # lest it take what this one needs
            written = case.need.writing if isinstance(case, Opened) else 0
            done = predict_case(task, case, ensemble, options.deadline, len(tasks) - position)
            del case  # its memory goes before the next one is waited for
            if behind:
                behind.pop().result()
            behind.append(writer.submit(finish, task, done))
            del done
        if behind:
            behind.pop().result()


def _may_open(following: Task, task: Task, case: Opened | CaseResult, base: int) -> bool:
    """Whether the next case may be opened while the networks run on this one.

    The next one's files say how large it is beside this one.
    """
    if isinstance(case, CaseResult):
        return True
    factor = 1.0
    with contextlib.suppress(InputError):  # which will be said when it is read
        factor = following.stamp["bytes"] / max(task.stamp["bytes"], 1)
    return needs.both_fit(case.need, factor, base)


def _beside_another(case: Opened | CaseResult, ensemble: Ensemble) -> bool:
    """Whether a GPU holds this case while the scores of the one before are still on it."""
    return isinstance(case, CaseResult) or needs.gpu_holds_two(case.need, ensemble)


def _write_page(record: Record, ensemble: Ensemble, options: Options) -> None:
    """The page of all cases; if it fails, every case has a warning, and nothing else is lost."""
    from ichseg.report import inference_page

    model, ended = ensemble.model, record.in_order()
    warnings: list[str] = []
    with optional("no page of all scans", warnings):
        page = inference_page.write(
            options.output / REPORT,
            [inference_page.Entry(result.image, result.error, result.report) for result in ended],
            title=f"Segmentation of {counted(len(ended), 'scan')}",
            subtitle=f"{model.name} {model.version}, preset {options.preset}, "
            f"{ensemble.engine.name}",
        )
        say(f"a page to open in a browser: {page}")
    for warning in warnings:
        say(f"warning: {warning}")
        record.warn(warning)


@contextlib.contextmanager
def _two_threads() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """For reading and for writing; if the block is left early, with nothing half-written."""
    reader, writer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "writer")
    try:
        yield reader, writer
    except BaseException as error:
        wait([writer.submit(lambda: None)], _LAST_WRITE_S)  # so long for what it is at
        abandon_unfinished()
        if isinstance(error, Exception):  # no signal: time enough, and its reason is the last line
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
        raise
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=False, cancel_futures=True)
