"""Segment intracranial haemorrhage on non-contrast head CT.

Reads a folder of .mha/.nii/.nii.gz scans or Grand Challenge's input layout; writes one mask per
scan and results.json. For research, not for diagnosis.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichseg.cases import InputCase, Job, find_cases
from ichseg.errors import IchsegError, OutputError, WeightsError
from ichseg.result import CaseResult, write_results

if TYPE_CHECKING:  # engines take long to import: --help and refusals of input do without
    from ichseg.predict import Ensemble

HERE = Path(__file__).resolve().parent
MOUNTED_WEIGHTS = Path("/opt/ml/model")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line; every default suits the Grand Challenge platform."""
    parser = argparse.ArgumentParser(
        prog="process.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python process.py --input scans --output out --preset fast --report\n"
        "  python process.py --input scans --output out --weights my_bundle --device cuda\n",
    )
    add = parser.add_argument
    add("--input", type=Path, default=Path("/input"), help="folder with the scans (default /input)")
    add(
        "--output",
        type=Path,
        default=Path("/output"),
        help="folder for masks and results.json (default /output)",
    )
    add(
        "--weights",
        type=Path,
        help="weights bundle (default /opt/ml/model if it holds one, else weights/)",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda", "torch-cpu"],
        default="auto",
        help="auto takes a GPU if one works, else the CPU (OpenVINO); torch-cpu is the reference, "
        "several times slower",
    )
    add(
        "--preset",
        choices=["full", "balanced", "fast"],
        default="full",
        help="full: all folds, all mirrorings; balanced: all folds; fast: one fold (default full)",
    )
    add("--report", action="store_true", help="also write an overlay picture of each case")
    add("--input-slug", help="Grand Challenge input socket (default from the bundle)")
    add("--output-slug", help="Grand Challenge output socket (default from the bundle)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status: 0 if every case was segmented."""
    arguments = parse_arguments(argv)
    try:
        weights = choose_weights(arguments.weights)
        slugs = socket_names(weights)
        job = find_cases(
            arguments.input,
            arguments.output,
            input_slug=arguments.input_slug or slugs["input_slug"],
            output_slug=arguments.output_slug or slugs["output_slug"],
        )
        check_writable(arguments.output)
        return run(arguments, job, weights)
    except IchsegError as error:
        return fail(str(error))
    except MemoryError:
        return fail(f"{arguments.input}: out of memory")


def run(arguments: argparse.Namespace, job: Job, weights: Path) -> int:
    """Segment every case; one bad scan does not stop the others."""
    from ichseg.predict import Ensemble

    ensemble = Ensemble.load(weights, arguments.device)
    say(f"{ensemble.model.name} {ensemble.model.version}: {ensemble.model.description}")
    say(f"{len(job.cases)} case(s), preset {arguments.preset}, {ensemble.engine.name}")
    results = []
    for number, case in enumerate(job.cases, 1):
        say(f"[{number}/{len(job.cases)}] {case.name}")
        try:
            results.append(segment_case(case, ensemble, arguments, job))
        except IchsegError as error:
            say(f"  failed: {error}")
            results.append(CaseResult(case.name, None, str(error), {}))
    write_results(results, arguments.output / "results.json")
    failed = [result for result in results if result.error]
    for result in results:
        if not result.error:
            say(
                f"{result.image}: {result.report['volume_ml']:.2f} mL -> "
                f"{arguments.output / str(result.mask)}"
            )
    if failed:
        return fail(
            f"{len(failed)} of {len(results)} cases failed: {'; '.join(r.error for r in failed)}"
        )
    return 0


def segment_case(
    case: InputCase, ensemble: Ensemble, arguments: argparse.Namespace, job: Job
) -> CaseResult:
    """Read, segment and write one case."""
    from ichseg import volume

    image = volume.read(case.image)
    segmentation = ensemble.segment(image, arguments.preset, Progress())
    volume.write(segmentation.mask, case.output)
    if arguments.report and not job.platform:
        from ichseg import report

        report.write_overlay(
            image, segmentation.mask, arguments.output / f"{volume.stem_of(case.image)}.png"
        )
    facts = {
        "volume_ml": round(segmentation.volume_ml, 3),
        "warnings": list(segmentation.warnings),
        "ran": segmentation.ran,
        "seconds": segmentation.seconds,
    }
    ran, took = segmentation.ran, segmentation.seconds
    say(
        f"  {segmentation.volume_ml:.2f} mL in {took['total']:.1f} s, "
        f"of it {took['compile']:.1f} s for compiling; "
        f"{ran['tiles_skipped']} of {ran['tiles']} tiles skipped as air"
    )
    return CaseResult(case.name, str(case.output.relative_to(arguments.output)), "", facts)


class Progress:
    """Forward passes done: a rewritten line at a terminal, a few plain lines elsewhere."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()
        self.first = 0  # passes done when the clock began: the first ones also warm up

    def __call__(self, done: int, total: int) -> None:
        """Say how long it will take, then how far it is: each second at a terminal, else minute."""
        now = time.monotonic()
        if self.first == 0:
            self.began, self.first = now, done
            return
        left = (now - self.began) / (done - self.first) * (total - done)
        at_terminal = sys.stderr.isatty()
        if self.said < self.began:
            self.said = now
            text = f"{left:.0f} seconds" if left < 100 else f"{left / 60:.1f} minutes"
            say(f"  {total} forward passes, about {text}")
        if now - self.said < (1 if at_terminal else 60) and not (at_terminal and done == total):
            return
        self.said = now
        text = f"  {done}/{total} forward passes, {left:.0f} s left"
        sys.stderr.write(
            f"\r{text:60}" + ("\n" if done == total else "") if at_terminal else text + "\n"
        )
        sys.stderr.flush()


def choose_weights(given: Path | None) -> Path:
    """The bundle to use: the flag's, else the platform's mount, else the one beside this file."""
    if given is not None:
        return given
    return MOUNTED_WEIGHTS if (MOUNTED_WEIGHTS / "model.json").is_file() else HERE / "weights"


def socket_names(weights: Path) -> dict[str, Any]:
    """Input and output slug of the bundle, read without torch; loading checks the rest."""
    path = weights / "model.json"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
        return {"input_slug": model["input_slug"], "output_slug": model["output_slug"]}
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot read ({error.strerror}), expected a weights bundle in {weights}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: not the description of a weights bundle ({error!r})"
        ) from error


def check_writable(output: Path) -> None:
    """Refuse an output folder that cannot be written before any work is done."""
    probe = output / ".writing-probe"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{output}: cannot write results there ({error.strerror})") from error


def say(text: str) -> None:
    """One plain line on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def fail(reason: str) -> int:
    """The last line on stderr says why; the status says that."""
    say(f"error: {' '.join(reason.split())}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
