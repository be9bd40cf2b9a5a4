"""A folder of cases through one ensemble, in three stages that overlap.

While the networks run on a case, in the caller's thread, a second thread reads and prepares the
next one and a third restores and writes the one before. Never is more than one case prepared ahead
or one waiting to be written; no processes are started and no memory is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from ichseg.app import results as result
from ichseg.app.cases import InputCase, Job
from ichseg.app.console import Progress, say
from ichseg.app.results import CaseResult
from ichseg.errors import BudgetError, DeviceError, IchsegError, InputError, WeightsError
from ichseg.files import remove_unfinished, stem_of
from ichseg.predict import components, memory, prepare
from ichseg.predict.components import Lesion
from ichseg.predict.ensemble import Ensemble, Predicted, Prepared, Segmentation
from ichseg.predict.work import PRESETS
from ichseg.scan import plausibility, reader, volume
from ichseg.scan.dicom import straighten
from ichseg.scan.dicom.dicom_seg import Algorithm, seg_path, write_seg
from ichseg.scan.dicom.series import Series
from ichseg.scan.reader import Scan
from ichseg.scan.volume import Volume
from ichseg.wording import byte_size, counted, duration, times

P = ParamSpec("P")
Given = TypeVar("Given")
Made = TypeVar("Made")
REPORT = "report"  # folder of the page
MOST_LESIONS = 100  # in results.json; noise has hundreds of thousands
_LAST_WRITE_S = 3.0  # for what is being written to end; the platform kills 5 s after SIGTERM
_RESERVE_S, _RESERVE_S_PER_VOXEL = 0.5, 2e-8  # of a time budget, for measuring and writing


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose.

    Attributes:
        output: Folder for the masks and ``results.json``.
        preset: See ``work.PRESETS``.
        report: Whether pictures are made.
        resume: Whether cases that are finished are left as they are.
        deadline: Of the whole run, by ``time.monotonic()``; None for no time budget. What is left
            is shared evenly by the cases that are left.
        made_from: What else a result depends on, see ``result.made_from``.
    """

    output: Path
    preset: str
    report: bool = False
    resume: bool = False
    deadline: float | None = None
    made_from: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A case with its name for the log, such as ``[3/20] scan.mha``."""

    case: InputCase
    name: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A case that has been read and prepared."""

    made_from: dict[str, Any]
    scan: Scan
    read_s: float
    need: memory.Need
    on_host: bool
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class Done:
    """A case that the networks have run on."""

    made_from: dict[str, Any]
    scan: Scan
    read_s: float
    predicted: Predicted


def run(job: Job, ensemble: Ensemble, options: Options) -> list[CaseResult]:
    """Segment every case that is not finished; one bad scan does not stop the others.

    ``results.json`` is written anew after each case, so that an interruption loses the cases under
    way and no others. What ends the run early leaves no half-written file.

    Returns:
        A result for each case of the job, in its order.

    Raises:
        OutputError: ``results.json`` cannot be written, or with ``resume`` not be read.
        WeightsError: The bundle cannot be run.
        DeviceError: The device cannot be used.
    """
    cases = job.cases
    tasks = [Task(case, f"[{i}/{len(cases)}] {case.name}") for i, case in enumerate(cases, 1)]
    results: dict[Path, CaseResult] = {}  # by mask
    if options.resume:
        results = _finished(job, options)
        say(f"{len(results)} of {len(cases)} cases are finished already")
    recorded = options.output / "results.json"
    if not job.challenge and recorded.exists():  # it names masks that this run will replace
        result.write_results([results[c.output] for c in cases if c.output in results], recorded)
    waiting = [task for task in tasks if task.case.output not in results]
    pictures = options.report and not (job.platform or job.challenge)

    def keep(task: Task, case: Done | CaseResult) -> None:
        ended = _write(task, case, ensemble, options.output, pictures)
        results[task.case.output] = ended
        if ended.error:
            for earlier in (task.case.output, seg_path(task.case.output)):
                earlier.unlink(missing_ok=True)  # it would be taken for this run's
            say(f"{task.name}: failed: {ended.error}")
        if not job.challenge:
            in_order = [results[case.output] for case in cases if case.output in results]
            result.write_results(in_order, options.output / "results.json")

    base = memory.resident()
    with _two_threads({options.output, *(c.output.parent for c in cases)}) as (reader, writer):
        ahead: list[Future[Opened | CaseResult]] = []
        last: list[Future[None]] = []
        behind = 0  # bytes that the one that is being written needs
        for position, task in enumerate(waiting):
            if not ahead:
                ahead.append(reader.submit(_open, task, task, ensemble, options, base))
            case = ahead.pop().result()
            for following in waiting[position + 1 : position + 2]:
                if _both_fit(case, following.case, base + behind):
                    ahead.append(
                        reader.submit(_open, following, following, ensemble, options, base)
                    )
            if last and not ahead:
                last.pop().result()  # lest it take what this one needs
            behind = case.need.writing if isinstance(case, Opened) else 0
            done = _predict(task, case, ensemble, options.deadline, len(waiting) - position)
            del case
            if last:
                last.pop().result()
            last.append(writer.submit(keep, task, done))
            del done
        if last:
            last.pop().result()
    ended = [results[case.output] for case in cases]
    if pictures:
        from ichseg.report import report

        model = ensemble.model
        page = report.write_index(
            options.output / REPORT,
            ended,
            title=f"Segmentation of {counted(len(ended), 'scan')}",
            subtitle=f"{model.name} {model.version}, preset {options.preset}, "
            f"{ensemble.engine.name}",
        )
        say(f"a page to open in a browser: {page}")
    return ended


def _finished(job: Job, options: Options) -> dict[Path, CaseResult]:
    """By their masks, the cases whose earlier results are what this run would make."""
    earlier = result.read_results(options.output / "results.json")
    found = {}
    for case in job.cases:
        with contextlib.suppress(InputError):  # which will be said when it is read
            made = result.made_from(case.image, **options.made_from)
            ended = result.finished(case, options.output, earlier, made)
            if ended is not None:
                found[case.output] = ended
    return found


def _stage(
    function: Callable[Concatenate[Task, Given, P], Made],
) -> Callable[Concatenate[Task, Given | CaseResult, P], Made | CaseResult]:
    """What goes wrong in a stage is the case's result, and passes through the later stages.

    Only what concerns every case is raised.
    """

    @functools.wraps(function)
    def guarded(
        task: Task, given: Given | CaseResult, /, *args: P.args, **kwargs: P.kwargs
    ) -> Made | CaseResult:
        if isinstance(given, CaseResult):
            return given
        try:
            return function(task, given, *args, **kwargs)
        except (WeightsError, DeviceError):
            raise
        except IchsegError as error:
            reason = str(error)
            if str(task.case.image) not in reason:
                reason = f"{task.case.image}: {reason}"
        except MemoryError:
            allowed = memory.limit()
            most = f"; {allowed.by} allows {byte_size(allowed.total)}" if allowed else ""
            reason = f"{task.case.image}: out of memory{most}"
        except Exception as error:  # a fault of ours; the other cases may well succeed
            say(traceback.format_exc().rstrip())
            reason = f"{task.case.image}: {type(error).__name__}: {error}"
        return CaseResult(task.case.name, None, reason, {})

    return guarded


@_stage
def _open(task: Task, _: Task, ensemble: Ensemble, options: Options, base: int) -> Opened:
    """Read and prepare; what the memory cannot hold is refused."""
    began = time.perf_counter()
    image = task.case.image
    made_from = result.made_from(image, **options.made_from)
    scan = reader.read_scan(
        image, lambda voxels: _refuse_beyond_memory(image, base + 2 * voxels, "voxels")
    )
    if scan.series is not None:
        say(f"{task.name}: {scan.series.words}")
    if ensemble.model.expects_hu:
        checked, more = plausibility.check(scan.volume, image)
        scan = dataclasses.replace(scan, volume=checked, warnings=scan.warnings + more)
    read_s = time.perf_counter() - began
    need, on_host = _need(scan.volume, made_from["bytes"], ensemble, options)
    allowed = _refuse_beyond_memory(image, base + need.alone, _size(scan.volume))
    say(
        f"{task.name}: {_size(scan.volume)}, about {byte_size(base + need.alone)} of memory"
        + (f", {byte_size(allowed.total)} allowed by {allowed.by}" if allowed else "")
        + (f"; {byte_size(need.device)} of the GPU's" if need.device else "")
        + (", which does not hold the scores: they stay on the host" if on_host else "")
    )
    prepared = ensemble.prepare(scan.volume, options.preset)
    return Opened(made_from, scan, read_s, need, on_host, prepared)


def _refuse_beyond_memory(image: Path, needed: int, what: str) -> memory.Limit | None:
    """What is allowed, and is enough."""
    allowed = memory.limit()
    if allowed is not None and needed > allowed.total:
        raise InputError(
            f"{image}: its {what} need at least {byte_size(needed)} of memory, "
            f"{allowed.by} allows {byte_size(allowed.total)}"
        )
    return allowed


def _need(
    scan: Volume, file_bytes: int, ensemble: Ensemble, options: Options
) -> tuple[memory.Need, bool]:
    """Bytes that this scan takes with this ensemble; and whether its scores stay on the host."""
    model, chosen = ensemble.model, PRESETS[options.preset]
    parts = []
    for name in model.in_order:
        configuration = model.plans.configuration(name)
        members = model.members_of(name)[: chosen.folds]
        singly = options.deadline is not None and chosen.mirror
        parts.append(
            memory.Part(
                configuration=configuration,
                placement=prepare.place([scan], model.plans, configuration),
                weights=memory.weights_bytes(ensemble.folder / members[0].file),
                sums=2 if singly or len(members) > 1 else 1,
                networks=len(members),
            )
        )
    estimate = functools.partial(
        memory.estimate,
        ensemble.engine.kind,
        model.plans,
        parts,
        file_bytes=file_bytes,
        scan_bytes=scan.voxels.nbytes,
    )
    need, free = estimate(), ensemble.engine.free_bytes()
    if free is None or need.device <= free:
        return need, False
    return estimate(on_host=True), True


def _both_fit(case: Opened | CaseResult, following: InputCase, base: int) -> bool:
    """Whether the next case may be opened while the networks run on this one.

    The next one's file says how large it is beside this one.
    """
    allowed = memory.limit()
    if isinstance(case, CaseResult) or allowed is None:
        return True
    factor = 1.0
    with contextlib.suppress(InputError):  # which will be said when it is read
        factor = result.made_from(following.image)["bytes"] / max(case.made_from["bytes"], 1)
    need = case.need
    return base + need.network + need.predicting + factor * need.opening <= allowed.total


def _size(scan: Volume) -> str:
    """For people, in this project's order."""
    return f"{times(scan.voxels.shape)} voxels of {times(scan.spacing_mm, digits=3)} mm"


@_stage
def _predict(
    task: Task, opened: Opened, ensemble: Ensemble, deadline: float | None, cases_left: int
) -> Done:
    """Run the networks, in the share of the time that is left."""
    budget_s = None
    if deadline is not None:
        reserve_s = _RESERVE_S + _RESERVE_S_PER_VOXEL * opened.scan.volume.voxels.size
        left_s = deadline - time.monotonic()
        budget_s = left_s / cases_left - reserve_s
        if budget_s <= 0:
            raise BudgetError(
                f"{duration(max(left_s, 0))} of the time budget are left for "
                f"{counted(cases_left, 'case')}, of which measuring and writing "
                f"alone take {duration(reserve_s)} each"
            )
    predicted = ensemble.predict(
        opened.prepared, Progress(budget_s), budget_s, on_host=opened.on_host
    )
    return Done(opened.made_from, opened.scan, opened.read_s, predicted)


@_stage
def _write(task: Task, done: Done, ensemble: Ensemble, output: Path, pictures: bool) -> CaseResult:
    """Restore, measure, write."""
    case, scan = task.case, done.scan.volume
    segmentation = ensemble.finish(done.predicted)
    done.predicted.parts.clear()  # the scores' memory is of use to others
    began = time.perf_counter()
    found = components.lesions(segmentation.mask.voxels.astype(np.uint8, copy=False), scan)
    volume.write(segmentation.mask, case.output)
    if done.scan.series is not None:
        segmentation = _onto_slices(segmentation, done.scan.series, ensemble, case.output)
    if pictures:
        from ichseg.report import report

        mask, is_ct = segmentation.mask, ensemble.model.expects_hu
        overlay = output / f"{stem_of(case.image)}.png"
        report.write_overlay(scan, mask, overlay, is_ct=is_ct)
        report.write_case(output / REPORT, case.name, scan, {"prediction": mask}, is_ct=is_ct)
    write_s = time.perf_counter() - began
    facts = _facts(segmentation, found, done)
    facts["seconds"] |= {"read": round(done.read_s, 3), "write": round(write_s, 3)}
    facts |= {"made_from": done.made_from, "mask_sha256": result.digest_of(case.output)}
    for warning in facts["warnings"]:
        say(f"{task.name}: warning: {warning}")
    say(f"{task.name}: {_summary(facts, len(found))} -> {case.output}")
    return CaseResult(case.name, str(case.output.relative_to(output)), "", facts)


def _onto_slices(
    segmentation: Segmentation, series: Series, ensemble: Ensemble, mask: Path
) -> Segmentation:
    """Measured on the slices as they were taken, and written as DICOM-SEG if that can be."""
    labels = straighten.onto_slices(
        series.stack, segmentation.mask.voxels.astype(np.uint8, copy=False)
    )
    model = ensemble.model
    algorithm = Algorithm(model.name, str(model.version), model.plans.labels[1:])
    warning = write_seg(labels, series, seg_path(mask), algorithm)
    return dataclasses.replace(
        segmentation,
        volume_ml=straighten.volume_ml(series.stack, labels),
        warnings=segmentation.warnings + ((warning,) if warning else ()),
    )


def _facts(segmentation: Segmentation, found: tuple[Lesion, ...], done: Done) -> dict[str, Any]:
    """The ``report`` of ``results.json``."""
    warnings = [*done.scan.warnings, *segmentation.warnings]
    if len(found) > MOST_LESIONS:
        warnings.append(f"{len(found)} lesions, the {MOST_LESIONS} largest are listed")
    doubt = segmentation.doubt
    return {
        "volume_ml": round(segmentation.volume_ml, 3),
        "lesions": [_rounded(dataclasses.asdict(lesion)) for lesion in found[:MOST_LESIONS]],
        "doubt": None if doubt is None else round(doubt, 4),
        "warnings": warnings,
        "ran": segmentation.ran,
        "seconds": dict(segmentation.seconds),
    }


def _rounded(value: Any) -> Any:
    """Numbers to a thousandth, through dictionaries and tuples."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return round(value, 3)


def _summary(facts: dict[str, Any], lesions: int) -> str:
    ran, took = facts["ran"], facts["seconds"]
    units = ""
    if "units" in ran:
        units = f"{ran['units']} of {ran['units_planned']} networks x mirrorings ran in time; "
    return (
        f"{facts['volume_ml']:.2f} mL in {counted(lesions, 'lesion')}, "
        f"{took['total']:.1f} s, of it {took['compile']:.1f} s for compiling; "
        f"{units}{ran['tiles_skipped']} of {ran['tiles']} tiles skipped as air"
    )


@contextlib.contextmanager
def _two_threads(folders: set[Path]) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """For reading and for writing; if the block is left early, with nothing half-written.

    Args:
        folders: Where temporary files of ``files.replacing`` may be left.
    """
    reader, writer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "writer")
    try:
        yield reader, writer
    except BaseException as error:
        wait([writer.submit(lambda: None)], _LAST_WRITE_S)  # so long for what it is at
        for folder in folders:
            remove_unfinished(folder)
        if isinstance(error, Exception):  # no signal: time enough, and its reason is the last line
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
        raise
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=False, cancel_futures=True)
