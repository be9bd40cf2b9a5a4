"""What is done to one case: it is opened, the networks run on it, its mask is written.

Each of the three is a stage of ``pipeline``: what goes wrong in it becomes the case's result, and
only what concerns every case is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from ichseg.app import case_report, contents, results
from ichseg.app.cases import InputCase, probability_paths
from ichseg.app.console import Progress, say, say_traceback
from ichseg.app.contents import Stamp
from ichseg.app.results import CaseResult
from ichseg.engine import machine
from ichseg.errors import BudgetError, DeviceError, IchsegError, WeightsError
from ichseg.predict import memory
from ichseg.predict.components import Segmentation
from ichseg.predict.ensemble import Ensemble, Kept, Predicted, Prepared
from ichseg.report import CASES_FOLDER, REPORT_FOLDER
from ichseg.scan import reader, volume
from ichseg.scan.dicom import straighten
from ichseg.scan.dicom.dicom_seg import Algorithm, seg_path, write_seg
from ichseg.scan.dicom.series import Series
from ichseg.scan.reader import Scan
from ichseg.wording import byte_size, counted, duration

P = ParamSpec("P")
Given = TypeVar("Given")
Made = TypeVar("Made")
_RESERVE_S, _RESERVE_S_PER_VOXEL = 0.5, 2e-8  # of a time budget, for measuring and writing


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose.

    Attributes:
        output: The folder for the masks and ``results.json``.
        preset: How much of the ensemble runs, one of ``presets.PRESETS``.
        threshold: The probability above which a voxel is foreground; None for the likeliest label.
        probabilities: How those of each label are written: ``uint8``, ``float16``, ``nnunet`` or
            not at all.
        pictures: Whether pictures and the page are made.
        dicom_seg: Whether masks of DICOM slices are written as DICOM-SEG, too.
        resume: Whether cases that are finished are left as they are.
        deadline: When the whole run has to end, by ``time.monotonic()``; None for no time budget.
            What is left is shared evenly by the cases that are left.
        made_from: What a result depends on beside the scan, see ``results.is_finished``.
    """

    output: Path
    preset: str
    threshold: float | None = None
    probabilities: str | None = None
    pictures: bool = False
    dicom_seg: bool = True
    resume: bool = False
    deadline: float | None = None
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def extras(self) -> dict[str, Any]:
        """What is made of a case beside its mask, see ``files_beside``."""
        return {
            "dicom_seg": self.dicom_seg,
            "probabilities": self.probabilities or False,
            "pictures": self.pictures,
        }


@dataclass(frozen=True)
class Task:
    """A case of a run.

    Attributes:
        case: The scan, and where its mask goes.
        name: What the log calls it, such as ``[3/20] scan.mha``.
        output: The folder of the run's results.
    """

    case: InputCase
    name: str
    output: Path | None = None

    @functools.cached_property
    def stamp(self) -> Stamp:
        """Size, date and digest of the scan, looked up once; it may have thousands of files.

        Raises:
            InputError: The scan cannot be looked at.
        """
        return contents.stamp_of(
            self.case.image, follow_links=self.case.follow_links, output=self.output
        )

    def made_from(self, options: Options) -> dict[str, Any]:
        """What the case's result depends on.

        Raises:
            InputError: The scan cannot be looked at.
        """
        made = self.stamp | options.made_from | {"threshold": options.threshold} | options.extras
        if not self.case.image.is_dir():
            del made["dicom_seg"]
        return made


@dataclass(frozen=True, slots=True)
class Opened:
    """A case that has been read and prepared.

    Attributes:
        scan: What was read.
        read_s: The seconds that reading took.
        need: The memory that the case takes.
        prepared: The volume in the grids of the networks.
    """

    scan: Scan
    read_s: float
    need: memory.Need
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class Done:
    """A case that the networks have run on.

    Attributes:
        scan: What was read.
        read_s: The seconds that reading took.
        predicted: The scores.
    """

    scan: Scan
    read_s: float
    predicted: Predicted


def stage(
    function: Callable[Concatenate[Task, Given, P], Made],
) -> Callable[Concatenate[Task, Given | CaseResult, P], Made | CaseResult]:
    """Make what goes wrong in a stage the case's result, which passes through the later stages.

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
            allowed = machine.memory_limit()
            most = f"; {allowed.by} allows {byte_size(allowed.total)}" if allowed else ""
            reason = f"{task.case.image}: out of memory{most}"
        except Exception as error:  # a fault of ours; the other cases may well succeed
            say_traceback()
            reason = f"{task.case.image}: {type(error).__name__}: {error}"
        return CaseResult(task.case.name, None, reason, {})

    return guarded


@stage
def open_case(task: Task, _: Task, ensemble: Ensemble, options: Options, base: int) -> Opened:
    """Read and prepare a case; what the memory cannot hold is refused.

    Args:
        task: The case.
        ensemble: Whose grids it is prepared for.
        options: What the user chose.
        base: Bytes that the program takes without any case.
    """
    began = time.perf_counter()
    image, stamp = task.case.image, task.stamp
    scan = reader.read_scan(
        image,
        lambda voxels: memory.refuse_beyond_memory(image, base + 2 * voxels, "voxels"),
        task.case.study,
        follow_links=task.case.follow_links,
    )
    if scan.series is not None:
        say(f"{task.name}: {scan.series.words}")
    if ensemble.model.expects_hu:
        scan = reader.in_hu(scan, image)
    read_s = time.perf_counter() - began
    plan = ensemble.plan(scan, options.preset)
    need = ensemble.need(
        plan,
        file_bytes=stamp["bytes"],
        singly=options.deadline is not None,
        probabilities=_kept(options),
    )
    if options.pictures:
        need = _with_pictures(need, scan, ensemble)
    allowed = memory.refuse_beyond_memory(image, base + need.alone, scan.grid)
    say(
        f"{task.name}: {scan.grid}, about {byte_size(base + need.alone)} of memory"
        + (f", {byte_size(allowed.total)} allowed by {allowed.by}" if allowed else "")
        + (f"; {byte_size(need.device)} of the GPU's" if need.device else "")
        + (", which does not hold the scores: they stay on the host" if need.on_host else "")
    )
    prepared = ensemble.prepare(plan)
    return Opened(scan, read_s, need, prepared)


def _with_pictures(need: memory.Need, scan: Scan, ensemble: Ensemble) -> memory.Need:
    """What a case needs whose pictures are made once its scores are given up."""
    from ichseg.report import case_files  # loads Pillow

    kept = scan.voxels.nbytes + 2 * scan.voxels.size  # the mask, and the foreground's probability
    drawing = kept + case_files.memory_bytes(scan, is_ct=ensemble.model.expects_hu)
    return dataclasses.replace(need, writing=max(need.writing, drawing))


@stage
def predict_case(
    task: Task, opened: Opened, ensemble: Ensemble, deadline: float | None, cases_left: int
) -> Done:
    """Run the networks on a case, in its share of the time that is left.

    Args:
        task: The case.
        opened: From ``open_case``.
        ensemble: The networks.
        deadline: When the whole run has to end, by ``time.monotonic()``; None for whenever.
        cases_left: How many share the time, this one among them.
    """
    budget_s = None
    if deadline is not None:
        reserve_s = _RESERVE_S + _RESERVE_S_PER_VOXEL * opened.scan.voxels.size
        left_s = deadline - time.monotonic()
        budget_s = left_s / cases_left - reserve_s
        if budget_s <= 0:
            raise BudgetError(
                f"{duration(max(left_s, 0))} of the time budget are left for "
                f"{counted(cases_left, 'case')}, of which measuring and writing "
                f"alone take {duration(reserve_s)} each"
            )
    predicted = ensemble.predict(opened.prepared, Progress(budget_s), budget_s, opened.need)
    return Done(opened.scan, opened.read_s, predicted)


@stage
def write_case(task: Task, done: Done, ensemble: Ensemble, options: Options) -> CaseResult:
    """Restore what the networks found to the scan's grid, measure it and write it.

    Once the mask is written no failure takes it away: that of a picture, or of anything else that
    is made of the mask, is a warning.

    Args:
        task: The case.
        done: From ``predict_case``; its scores are given up.
        ensemble: The networks that ran.
        options: What the user chose.
    """
    case = task.case
    segmentation = ensemble.finish(
        done.predicted, probabilities=_kept(options), threshold=options.threshold
    )
    done.predicted.parts.clear()  # the scores' memory is of use to others
    began = time.perf_counter()
    made, written = task.made_from(options), dict[str, Path]()
    made |= {"probabilities": False, "pictures": False}  # until they are there
    volume.write(segmentation.mask, case.output)
    warnings: list[str] = []
    if done.scan.series is not None:
        made["dicom_seg"] = False
        with optional("not measured on the slices, and no DICOM-SEG", warnings):
            labels = straighten.onto_slices(
                done.scan.series.stack, segmentation.mask.voxels.astype(np.uint8, copy=False)
            )
            volume_ml = straighten.volume_ml(done.scan.series.stack, labels)
            segmentation = dataclasses.replace(segmentation, volume_ml=volume_ml)
            if options.dicom_seg:
                with optional("no DICOM-SEG", warnings):
                    why_not = _write_seg(labels, done.scan.series, ensemble, case.output)
                    made["dicom_seg"] = True  # or there can be none
                    if why_not is None:
                        written["dicom_seg"] = seg_path(case.output)
                    else:
                        warnings.append(why_not)
    if options.probabilities is not None:
        with optional("no probabilities", warnings):
            written["probabilities"] = _write_probabilities(
                segmentation, ensemble, options.probabilities, case
            )
            made["probabilities"] = options.probabilities
        segmentation = dataclasses.replace(segmentation, probabilities=None)  # their memory
    if options.pictures:
        with optional("no pictures", warnings):
            _write_pictures(case, done.scan, segmentation, ensemble, options.output)
            made["pictures"] = True
    write_s = time.perf_counter() - began
    facts = case_report.facts(segmentation, done.scan.warnings, warnings)
    facts["seconds"] |= {"read": round(done.read_s, 3), "write": round(write_s, 3)}
    facts |= {"made_from": made, "mask_sha256": results.digest_of(case.output)}
    facts |= {what: str(path.relative_to(options.output)) for what, path in written.items()}
    for warning in facts["warnings"]:
        say(f"{task.name}: warning: {warning}")
    say(f"{task.name}: {case_report.summary(facts)} -> {case.output}")
    return CaseResult(case.name, str(case.output.relative_to(options.output)), "", facts)


@contextlib.contextmanager
def optional(what: str, warnings: list[str]) -> Iterator[None]:
    """Turn the failure of a step that no mask depends on into a warning."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (IchsegError, MemoryError)):
            say_traceback()
        reason = str(error).strip() or type(error).__name__
        warnings.append(f"{what} ({reason.splitlines()[0][:200]})")


def _write_seg(
    labels: npt.NDArray[np.uint8], series: Series, ensemble: Ensemble, mask: Path
) -> str | None:
    """The mask as DICOM-SEG beside its file; if there can be none of such slices, why."""
    model = ensemble.model
    algorithm = Algorithm(model.name, str(model.version), model.plans.labels[1:])
    return write_seg(labels, series, seg_path(mask), algorithm)


def _kept(options: Options) -> Kept | None:
    """How probabilities of each label are kept until they are written."""
    if options.probabilities is None:
        return None
    return "uint8" if options.probabilities == "uint8" else "float16"


def files_beside(case: InputCase, output: Path, made: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files that were made, or would be, of a case beside its mask.

    Args:
        case: The case.
        output: The run's output folder.
        made: Which, by the names in ``Task.made_from``: ``dicom_seg``, ``probabilities`` and
            ``pictures``.
    """
    found: list[Path] = []
    if made.get("dicom_seg") and case.image.is_dir():
        found.append(seg_path(case.output))
    if made.get("probabilities"):
        found += probability_paths(case.output, case.probabilities)
    if made.get("pictures"):
        from ichseg.report import case_files  # loads Pillow

        found += [output / case.picture, *case_files.files_of(output / REPORT_FOLDER, case.name)]
    return tuple(found)


def _write_probabilities(
    segmentation: Segmentation, ensemble: Ensemble, layout: str, case: InputCase
) -> Path:
    """The probabilities of each label, beside the mask; gives the file."""
    from ichseg.scan import probability_files

    each = segmentation.probabilities
    paths = probability_paths(case.output, case.probabilities)
    for earlier in paths:
        earlier.unlink(missing_ok=True)  # it would be taken for this run's
    assert each is not None
    if layout == "nnunet":
        regions = bool(ensemble.model.plans.regions)
        probability_files.write_nnunet(each, segmentation.mask, paths[1], regions=regions)
        return paths[1]
    probability_files.write_nifti(each, segmentation.mask, paths[0])
    return paths[0]


def _write_pictures(
    case: InputCase, scan: Scan, segmentation: Segmentation, ensemble: Ensemble, output: Path
) -> None:
    """The overlay beside the mask, and what the page shows of the case."""
    from ichseg.report import case_files, pictures

    mask, is_ct = segmentation.mask, ensemble.model.expects_hu
    overlay = output / case.picture
    page = output / REPORT_FOLDER
    for earlier in (overlay, page / CASES_FOLDER / f"{case_files.slug_of(case.name)}.json"):
        earlier.unlink(missing_ok=True)  # lest it be shown if one of these fails
    pictures.write_overlay(scan, mask, overlay, is_ct=is_ct)
    case_files.write_case(page, case.name, scan, {"prediction": mask}, is_ct=is_ct)
