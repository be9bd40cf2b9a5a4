"""The program, from its arguments to its exit status: one run, or a server of many."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ichseg import __version__, completion
from ichseg.app import results, weights
from ichseg.app.arguments import MOUNTED_INPUT, make_parser, parse_arguments, usage
from ichseg.app.cases import (
    Job,
    check_output,
    find_cases,
    find_challenge_cases,
    say_passed_over,
)
from ichseg.app.console import end_with, fail, say, say_traceback
from ichseg.app.follow_up import arguments as follow_up_arguments
from ichseg.app.results import CaseResult
from ichseg.app.start import (
    Stopped,
    ensure_streams,
    loading_libraries,
    refuse_too_little_memory,
    stopped_by_signals,
    tame_libraries,
)
from ichseg.errors import DeviceError, IchsegError, WeightsError
from ichseg.files import remove_if_there
from ichseg.model.folder import MODEL_FILE
from ichseg.report import PAGE_FILE, REPORT_FOLDER
from ichseg.wording import counted

if TYPE_CHECKING:  # engines take long to import: --help and an input without scans do without
    from ichseg.app.one_case import Options
    from ichseg.app.pipeline import Means
    from ichseg.predict.ensemble import Ensemble

BEGAN = time.monotonic()  # --time-budget counts from here


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0 if every case was segmented.
    """
    completion.answer(_parser_to_complete_by)
    ensure_streams()
    # at its end the interpreter looks through all objects, of which libraries have very many
    atexit.register(gc.freeze)
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [follow_up_arguments.NAME]:
        return compare_scans(follow_up_arguments.parse(argv[1:]))
    arguments = parse_arguments(argv)
    if not argv and arguments.api == "exec" and not MOUNTED_INPUT.exists():
        for line in usage().splitlines():  # no container, but somebody who tries what this is
            say(line)
        fail(f"no --input is given, and there is no {MOUNTED_INPUT}")
        return 2
    tame_libraries()
    try:
        with stopped_by_signals():
            if arguments.api == "invoke" and arguments.predict_dir is None:
                return serve(arguments)
            return run_job(arguments, lambda: load(arguments), BEGAN)
    except Stopped as stop:
        end_with(
            f"stopped by {stop} before all cases were done; --resume does those that are left, "
            "--time-budget keeps within a limit",
            128 + stop.number,
        )


def _parser_to_complete_by(words: Sequence[str]) -> tuple[argparse.ArgumentParser, int]:
    """For the shell: the parser of the one command that has a name, or of all the rest."""
    if words[:1] == [follow_up_arguments.NAME]:
        return follow_up_arguments.make_parser(), 1
    parser = make_parser()
    if not words:
        parser.add_argument("command", nargs="?", choices=[follow_up_arguments.NAME])
    return parser, 0


def compare_scans(arguments: argparse.Namespace) -> int:
    """Compare two scans of a patient."""
    tame_libraries()

    def work() -> int:
        refuse_too_little_memory()
        from ichseg.app.follow_up import compare

        return compare.run(arguments)

    try:
        with stopped_by_signals():
            return _in_words(str(arguments.output), work)
    except Stopped as stop:
        end_with(f"stopped by {stop} before the scans were compared", 128 + stop.number)


def serve(arguments: argparse.Namespace) -> int:
    """Load the networks once, then run a job for each POST, until a signal asks for the end."""
    try:
        from ichseg.app import server
    except ModuleNotFoundError as error:
        return fail(
            f"--api invoke needs the package {error.name}, which is not installed: "
            "pip install fastapi uvicorn"
        )

    written: set[Path] = set()

    def run(ensemble: Ensemble) -> int:
        for earlier in written:  # an earlier job's, and not to be taken for this one's
            remove_if_there(earlier)
        written.clear()
        return run_job(arguments, lambda: ensemble, time.monotonic(), written)

    def work() -> int:
        refuse_too_little_memory()
        with results.claimed(arguments.output):
            server.serve(lambda: load(arguments), run)
        return 0

    return _in_words("the server", work)


def run_job(
    arguments: argparse.Namespace,
    loaded: Callable[[], Ensemble],
    began: float,
    written: set[Path] | None = None,
) -> int:
    """Find the job's cases and segment them.

    Args:
        arguments: The command line.
        loaded: Gives the ensemble; asked once the cases are found, as loading takes long.
        began: What the time budget counts from, by ``time.monotonic()``.
        written: Gets the files that the job will write, for a server to remove them later.

    Returns:
        The exit status; unless it is 0, the last line on stderr says why.

    Raises:
        DeviceError: The device is lost, in a server, for which no other job can succeed.
    """

    def work() -> int:
        refuse_too_little_memory()
        described = weights.describe(weights.choose(arguments.weights))
        if arguments.predict_dir is not None:
            job = find_challenge_cases(
                arguments.input, arguments.predict_dir, follow_links=arguments.follow_links
            )
        else:
            job = find_cases(
                arguments.input,
                arguments.output,
                input_slug=arguments.input_slug or described.input_slug,
                output_slug=arguments.output_slug or described.output_slug,
                follow_links=arguments.follow_links,
                recursive=arguments.recursive,
            )
        check_output(job, arguments.output)
        say_passed_over(job)
        with contextlib.ExitStack() as claimed:
            if written is not None:  # a server has claimed the folder
                written.update(_will_write(arguments, job))
            elif not job.challenge:
                claimed.enter_context(results.claimed(arguments.output))
            return segment(arguments, job, loaded, described.sha256, began)

    return _in_words(str(arguments.input), work, raised=() if written is None else (DeviceError,))


def _will_write(arguments: argparse.Namespace, job: Job) -> Iterator[Path]:
    """The files that a job may write."""
    from ichseg.app.one_case import files_beside

    extras = {
        "dicom_seg": True,
        "probabilities": arguments.probabilities,
        "pictures": arguments.report,
    }
    for case in job.cases:
        yield case.output
        yield from files_beside(case, arguments.output, extras)
    yield from (arguments.output / name for name in results.FILES)
    yield arguments.output / REPORT_FOLDER / PAGE_FILE


def _in_words(what: str, work: Callable[[], int], raised: tuple[type[Exception], ...] = ()) -> int:
    """Do the work; whatever goes wrong is said in one line, and the exit status says that.

    Args:
        what: Is at stake, for errors that do not say so themselves.
        work: Gives the exit status.
        raised: What is not said here, but raised.
    """
    try:
        return work()
    except raised:
        raise
    except IchsegError as error:
        return fail(str(error))
    except MemoryError:
        return fail(f"{what}: out of memory")
    except ImportError as error:  # such as a library that finds no room in memory
        return fail(f"a library cannot be loaded: {' '.join(str(error).split())[:300]}")
    except OSError as error:  # such as a file where the output folder was
        return fail(f"{error.filename or what}: {error.strerror or error}")
    except Exception as error:
        say_traceback()
        return fail(f"{what}: {type(error).__name__}: {error}")


def load(arguments: argparse.Namespace) -> Ensemble:
    """The networks of the chosen bundle, on the chosen device."""
    from ichseg.predict.ensemble import Ensemble

    return Ensemble.load(weights.choose(arguments.weights), arguments.device, arguments.precision)


def segment(
    arguments: argparse.Namespace,
    job: Job,
    loaded: Callable[[], Ensemble],
    model_sha256: str,
    began: float,
) -> int:
    """Segment every case; one bad scan does not stop the others.

    Args:
        arguments: The command line.
        job: The cases.
        loaded: Gives the ensemble; not asked where every case is refused.
        model_sha256: What the ensemble is known by.
        began: What the time budget counts from, by ``time.monotonic()``.

    Returns:
        The exit status; unless it is 0, the last line on stderr says why.
    """
    with loading_libraries():
        from ichseg.app import pipeline
        from ichseg.app.one_case import Options
        from ichseg.scan.dicom import dicom_seg

    budget_s = arguments.time_budget
    alone = not (job.platform or job.challenge)  # where no other file may lie beside the masks
    for asked, what in (
        (arguments.probabilities, "no probabilities are written"),
        (arguments.report, "no pictures and no page are made"),
    ):
        if asked and not alone:
            say(f"{what}: on the platform no other file may lie beside the masks")
    if alone and any(case.image.is_dir() for case in job.cases) and not dicom_seg.is_possible():
        say(f"warning: {dicom_seg.NOT_INSTALLED}")
    options = Options(
        output=arguments.output,
        preset=arguments.preset,
        threshold=arguments.threshold,
        probabilities=arguments.probabilities if alone else None,
        pictures=arguments.report and alone,
        dicom_seg=alone and dicom_seg.is_possible(),
        resume=arguments.resume,
        deadline=None if budget_s is None else began + budget_s,
        made_from={
            "version": __version__,
            "model_sha256": model_sha256,
            "preset": arguments.preset,
            "time_budget_s": budget_s,
        },
    )
    if all(case.refusal for case in job.cases):
        return _status(pipeline.refuse_all(job, options))
    with _means(arguments, job, loaded, options) as means:
        model = means.model
        labels = model.plans.labels
        if job.challenge and len(labels) > 2:
            raise WeightsError(
                f"{weights.choose(arguments.weights)}: its masks tell {', '.join(labels[1:])} "
                "apart, expected a bundle of one label, since INSTANCE's masks hold 0 and 1"
            )
        licence = f", licence {model.licence}" if model.licence else ""
        say(f"{model.name} {model.version}{licence}: {model.description}")
        say(f"{counted(len(job.cases), 'case')}, preset {options.preset}, {means.facts.name}")
        ended = pipeline.run(job, means, options)
    return _status(ended)


@contextlib.contextmanager
def _means(
    arguments: argparse.Namespace, job: Job, loaded: Callable[[], Ensemble], options: Options
) -> Iterator[Means]:
    """What segments the cases: this process, others with a GPU each, or those of a cluster."""
    from ichseg.app import pipeline

    if arguments.gpus is None and arguments.ray is None:
        yield pipeline.alone(loaded())
        return
    from ichseg.app.crew import spread
    from ichseg.app.crew.worker import Setting
    from ichseg.engine import gpus

    folder = weights.choose(arguments.weights)
    if arguments.ray is not None:
        folder = folder.absolute()  # nodes are elsewhere
        setting = Setting(folder, arguments.device, arguments.precision, options)
        scan = next(case.image for case in job.cases if not case.refusal)
        seen = (folder / MODEL_FILE, scan)
        with spread.over_ray(setting, arguments.ray, arguments.ray_cpus, seen) as means:
            yield means
        return
    setting = Setting(folder, "cuda", arguments.precision, options)
    with spread.over_gpus(setting, gpus.find(arguments.gpus)) as means:
        yield means


def _status(ended: Sequence[CaseResult]) -> int:
    """The exit status of a run; unless it is 0, its last line says what has failed."""
    failed = [each.error for each in ended if each.error]
    if failed:
        more = [f"{len(failed) - 5} more, see {results.FILE}"] if len(failed) > 6 else []
        reasons = "; ".join([*failed[: 5 if more else None], *more])  # one line, not too long
        return fail(f"{len(failed)} of {counted(len(ended), 'case')} failed: {reasons}")
    return 0
