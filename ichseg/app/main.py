"""The program, from its arguments to its exit status: one run, or a server of many."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ichseg.app import weights
from ichseg.app.arguments import parse_arguments
from ichseg.app.cases import Job, check_output, find_cases, find_challenge_cases
from ichseg.app.console import fail, say
from ichseg.app.signals import Stopped, stopped_by_signals
from ichseg.errors import IchsegError, WeightsError
from ichseg.wording import counted

if TYPE_CHECKING:  # engines take long to import: --help and refusals of input do without
    from ichseg.predict.ensemble import Ensemble

BEGAN = time.monotonic()  # --time-budget counts from here


def main(argv: list[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0 if every case was segmented.
    """
    arguments = parse_arguments(argv)
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
    """Load the networks once, then run a job for each POST, until a signal asks for the end."""
    try:
        from ichseg.app import server
    except ModuleNotFoundError as error:
        return fail(
            f"--api invoke needs the package {error.name}, which is not installed: "
            "pip install 'ichseg[server]'"
        )

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
        described = weights.describe(weights.choose(arguments.weights))
        if arguments.predict_dir is not None:
            job = find_challenge_cases(arguments.input, arguments.predict_dir)
        else:
            job = find_cases(
                arguments.input,
                arguments.output,
                input_slug=arguments.input_slug or described.input_slug,
                output_slug=arguments.output_slug or described.output_slug,
            )
        check_output(job, arguments.output)
        return segment(arguments, job, loaded(), described.sha256, began)
    except IchsegError as error:
        return fail(str(error))
    except MemoryError:
        return fail(f"{arguments.input}: out of memory")
    except OSError as error:  # such as a file where the output folder was
        return fail(f"{error.filename or arguments.output}: {error.strerror or error}")


def load(arguments: argparse.Namespace) -> Ensemble:
    """The networks of the chosen bundle, on the chosen device."""
    from ichseg.predict.ensemble import Ensemble

    return Ensemble.load(weights.choose(arguments.weights), arguments.device)


def segment(
    arguments: argparse.Namespace, job: Job, ensemble: Ensemble, model_sha256: str, began: float
) -> int:
    """Segment every case; one bad scan does not stop the others."""
    from ichseg.app import pipeline, results
    from ichseg.app.one_case import Options

    labels = ensemble.model.plans.labels
    if job.challenge and len(labels) > 2:
        raise WeightsError(
            f"{ensemble.folder}: its masks tell {', '.join(labels[1:])} apart, expected a bundle "
            "of one label, since INSTANCE's masks hold 0 and 1"
        )
    say(f"{ensemble.model.name} {ensemble.model.version}: {ensemble.model.description}")
    say(f"{counted(len(job.cases), 'case')}, preset {arguments.preset}, {ensemble.engine.name}")
    budget_s = arguments.time_budget
    options = Options(
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
    left = results.without_lost(ended, arguments.output)
    if left != ended and not job.challenge:
        results.write_results(left, arguments.output / results.FILE)
    failed = [each.error for each in left if each.error]
    if failed:
        more = [f"{len(failed) - 5} more, see {results.FILE}"] if len(failed) > 6 else []
        reasons = "; ".join([*failed[: 5 if more else None], *more])  # one line, not too long
        return fail(f"{len(failed)} of {len(left)} cases failed: {reasons}")
    return 0
