"""Segment intracranial haemorrhage on non-contrast head CT.

Reads a folder of .mha/.nii/.nii.gz scans or Grand Challenge's input layout; writes one mask per
scan and results.json. For research, not for diagnosis.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from ichseg.app.arguments import parse_arguments
from ichseg.app.cases import Job, find_cases, find_challenge_cases
from ichseg.app.console import fail, say
from ichseg.errors import IchsegError, OutputError, WeightsError
from ichseg.files import UNFINISHED
from ichseg.wording import counted

if TYPE_CHECKING:  # engines take long to import: --help and refusals of input do without
    from ichseg.predict.ensemble import Ensemble

BEGAN = time.monotonic()  # --time-budget counts from here
HERE = Path(__file__).resolve().parent
MOUNTED_WEIGHTS = Path("/opt/ml/model")


class Stopped(BaseException):
    """A signal asks for the end; nothing that goes on after a failed case may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status: 0 if every case was segmented."""
    arguments = parse_arguments(argv, str(__doc__))
    # numpy, not loaded yet: beside busy networks more threads wait for each other, up to seconds
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        with stopped_by_signals():
            if arguments.api == "invoke" and arguments.predict_dir is None:
                return serve(arguments)
            return run_job(arguments, lambda: load(arguments), BEGAN)
    except Stopped as stop:
        fail(
            f"stopped by {stop} before all cases were done; --resume does those that are left, "
            "--time-budget keeps within a limit"
        )
        os._exit(128 + stop.number)  # threads may be at work that nobody needs any more


def serve(arguments: argparse.Namespace) -> int:
    """Load once, then run a job for each POST, until a signal asks for the end."""
    from ichseg.app import server

    def run(ensemble: Ensemble) -> int:
        return run_job(arguments, lambda: ensemble, time.monotonic())

    try:
        server.serve(lambda: load(arguments), run)
    except IchsegError as error:
        return fail(str(error))
    except MemoryError:
        return fail("out of memory while the networks were loaded")
    return 0


def run_job(arguments: argparse.Namespace, loaded: Callable[[], Ensemble], began: float) -> int:
    """Find the job's cases and segment them.

    Args:
        arguments: The command line.
        loaded: Gives the ensemble; asked once the cases are found, as loading takes long.
        began: What the time budget counts from, by ``time.monotonic()``.

    Returns:
        The exit status; unless it is 0, the last line on stderr says why.
    """
    try:
        weights = choose_weights(arguments.weights)
        model = read_model(weights)
        if arguments.predict_dir is not None:
            job = find_challenge_cases(arguments.input, arguments.predict_dir)
        else:
            job = find_cases(
                arguments.input,
                arguments.output,
                input_slug=arguments.input_slug or model["input_slug"],
                output_slug=arguments.output_slug or model["output_slug"],
            )
        check_output(job, arguments.output)
        return segment(arguments, job, loaded(), model["sha256"], began)
    except IchsegError as error:
        return fail(str(error))
    except MemoryError:
        return fail(f"{arguments.input}: out of memory")
    except OSError as error:  # such as a file where the output folder was
        return fail(f"{error.filename or arguments.output}: {error.strerror or error}")


def load(arguments: argparse.Namespace) -> Ensemble:
    """The networks, on their device."""
    from ichseg.predict.ensemble import Ensemble

    return Ensemble.load(choose_weights(arguments.weights), arguments.device)


def segment(
    arguments: argparse.Namespace, job: Job, ensemble: Ensemble, model_sha256: str, began: float
) -> int:
    """Segment every case; one bad scan does not stop the others."""
    from ichseg.app import pipeline
    from ichseg.app import results as result

    budget_s = arguments.time_budget
    labels = ensemble.model.plans.labels
    if job.challenge and len(labels) > 2:
        raise WeightsError(
            f"{ensemble.folder}: its masks tell {', '.join(labels[1:])} apart, expected a bundle "
            "of one label, since INSTANCE's masks hold 0 and 1"
        )
    say(f"{ensemble.model.name} {ensemble.model.version}: {ensemble.model.description}")
    say(f"{counted(len(job.cases), 'case')}, preset {arguments.preset}, {ensemble.engine.name}")
    options = pipeline.Options(
        output=arguments.output,
        preset=arguments.preset,
        report=arguments.report,
        resume=arguments.resume,
        deadline=None if budget_s is None else began + budget_s,
        made_from={
            "model_sha256": model_sha256,
            "preset": arguments.preset,
            "time_budget_s": budget_s,
        },
    )
    ended = pipeline.run(job, ensemble, options)
    results = result.without_lost(ended, arguments.output)
    if results != ended and not job.challenge:
        result.write_results(results, arguments.output / "results.json")
    failed = [each.error for each in results if each.error]
    if failed:
        more = [f"{len(failed) - 5} more, see results.json"] if len(failed) > 6 else []
        reasons = "; ".join([*failed[: 5 if more else None], *more])  # one line, not too long
        return fail(f"{len(failed)} of {len(results)} cases failed: {reasons}")
    return 0


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM (a time-out of the platform) and SIGINT (Ctrl-C) raise ``Stopped``, once."""
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop(number: int, _: FrameType | None) -> NoReturn:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # the end is near, and not to be disturbed
        raise Stopped(number)

    before = [signal.signal(each, stop) for each in signals]
    yield
    for each, handler in zip(signals, before, strict=True):
        signal.signal(each, handler)


def choose_weights(given: Path | None) -> Path:
    """The bundle to use: the flag's, else the platform's mount, else the one beside this file."""
    if given is not None:
        return given
    return MOUNTED_WEIGHTS if (MOUNTED_WEIGHTS / "model.json").is_file() else HERE / "weights"


def read_model(weights: Path) -> dict[str, Any]:
    """Input and output slug of the bundle, and its sha256, without torch; loading checks the rest.

    The description holds the checksums of all networks, so its own stands for the whole bundle.
    """
    path = weights / "model.json"
    try:
        content = path.read_bytes()
        model = json.loads(content)
        return {
            "input_slug": model["input_slug"],
            "output_slug": model["output_slug"],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot read ({error.strerror}), expected a weights bundle in {weights}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: not the description of a weights bundle ({error!r})"
        ) from error


def check_output(job: Job, output: Path) -> None:
    """Refuse an output folder that cannot be written, or where masks would replace scans."""
    for case in job.cases:
        # a scan that has gone since it was listed is its case's fault, and said there
        if case.output.exists() and case.image.exists() and case.output.samefile(case.image):
            raise OutputError(f"{case.image}: its mask would replace it; name another --output")
    probe = output / f"{UNFINISHED}probe"
    try:
        output.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:  # also when a signal comes in between
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot write results there ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
