"""Command line of the training half: ``python -m training COMMAND``."""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from ichseg import __version__, completion
from ichseg.app.start import ensure_streams
from ichseg.errors import IchsegError
from training.data.parallel import load_early
from training.jobs import command

# command: (module, what it does, an example)
COMMANDS = {
    "run": (
        "training.jobs.run",
        "from a dataset to weights: whatever of the commands below is not done yet",
        "run data/Task01_Bleeds --workspace work",
    ),
    "synthesize": (
        "phantom.synthesize",
        "make head-CT phantoms with bleeds, as an MSD dataset",
        "synthesize --out data/Task01_Bleeds --cases 100 --seed 1",
    ),
    "real-heads": (
        "training.data.real_heads",
        "make a training set of real head CT from two public downloads",
        "real-heads --phe-sich PHE-SICH-CT-IDS --ct-ich CT-ICH --out data/Task02_RealHeads",
    ),
    "convert": (
        "training.data.convert",
        "bring a dataset into a workspace: MSD, nnU-Net, INSTANCE, BHSD, CT-ICH or plain pairs",
        "convert data/Task01_Bleeds --workspace work",
    ),
    "verify": (
        "training.data.verify",
        "check every case, in one table",
        "verify --workspace work",
    ),
    "fingerprint": (
        "training.planning.fingerprint",
        "measure spacings, sizes and foreground intensities",
        "fingerprint --workspace work",
    ),
    "plan": (
        "training.planning.planner",
        "decide spacing, patch, batch and network",
        "plan --workspace work",
    ),
    "preprocess": (
        "training.store.preprocess",
        "bring all cases into a configuration's grid",
        "preprocess 3d_fullres --workspace work",
    ),
    "train": (
        "training.jobs.train",
        "train folds; the same command resumes them",
        "train 3d_fullres --workspace work --fold 0",
    ),
    "hard-examples": (
        "training.crossval.mining",
        "list the lesions that a fold's network gets wrong in its own training cases",
        "hard-examples 3d_fullres --workspace work --fold 0",
    ),
    "cross-validate": (
        "training.crossval.merge",
        "score all training cases, each by the fold that had not seen it",
        "cross-validate --workspace work",
    ),
    "select": (
        "training.crossval.selection",
        "choose configurations and post-processing by the cross-validation",
        "select --workspace work",
    ),
    "export": (
        "training.bundle.export",
        "write what was selected, or one configuration, as a weights bundle",
        "export --workspace work --out bundle",
    ),
    "evaluate": (
        "training.scoring.evaluate",
        "score a folder of masks against their references",
        "evaluate --predictions out --references data/Task01_Bleeds/labelsTr --out evaluation",
    ),
    "compare": (
        "training.scoring.compare",
        "say whether one evaluation is better than another of the same cases",
        "compare evaluation other_evaluation",
    ),
    "report": (
        "training.report.command",
        "make a page of a cross-validation: charts, and every case to look at, the worst first",
        "report work",
    ),
    "import-nnunet": (
        "training.bundle.import_nnunet",
        "turn a trained nnU-Net v2 into a weights bundle",
        "import-nnunet nnUNet_results/Dataset001_Bleeds/nnUNetTrainer__nnUNetPlans__3d_fullres "
        "--out bundle",
    ),
    "export-nnunet": (
        "training.bundle.export_nnunet",
        "turn a weights bundle into a trained nnU-Net v2",
        "export-nnunet weights --out nnUNet_results/Dataset001_Bleeds",
    ),
}
# Those that work on all cases, in processes that have the same modules to load.
_SIDE_BY_SIDE = ("convert", "verify", "fingerprint", "preprocess", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded."""
    completion.answer(_parser_to_complete_by)
    parser = _top_parser()
    chosen = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # comes with blosc2, and greets
    command.end_with_parent()
    # Before numpy is loaded. Sums in several threads differ in their last bits from those in one,
    # and cases that are worked on side by side would only wait for each other's threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        name = COMMANDS[chosen.command][0]
        if chosen.command in _SIDE_BY_SIDE and not {"-h", "--help"} & set(chosen.arguments):
            load_early(name)
        module = importlib.import_module(name)
        return int(module.main(_parser_of(chosen.command).parse_args(chosen.arguments)))
    except IchsegError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command's own arguments."""
    module, summary, example = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"python -m training {name}",
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  python -m training {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    importlib.import_module(module).add_arguments(parser)
    return parser


def _parser_to_complete_by(words: Sequence[str]) -> tuple[argparse.ArgumentParser, int]:
    """For the shell: the parser of the command that has been typed, or one of their names."""
    if words and words[0] in COMMANDS:
        return _parser_of(words[0]), 1
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=COMMANDS)
    return parser, 0


def _top_parser() -> argparse.ArgumentParser:
    width = max(len(name) for name in COMMANDS)
    listing = "\n".join(
        f"  {name:<{width}}  {summary}" for name, (_, summary, _) in COMMANDS.items()
    )
    examples = "\n".join(f"  python -m training {example}" for _, _, example in COMMANDS.values())
    parser = argparse.ArgumentParser(
        prog="python -m training",
        usage="python -m training COMMAND [options]\n       python -m training COMMAND --help",
        description="From a dataset to a weights bundle: run does it all, the others a step each."
        "\n\n"
        f"commands, in order:\n{listing}",
        epilog=f"in one command, or from nothing to weights in single ones:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ichseg {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


class _Stdout:
    """Standard output that a command goes on without when nothing can be written there any more.

    Attributes:
        lost: The number of the error from which on nothing was written; 0 if all was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.lost = stream, 0

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or note why not."""
        with self._noting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or note why not."""
        with self._noting():
            self._stream.flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error.errno or errno.EIO
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # or Python would try again as it ends
            os.close(nowhere)


def _process() -> int:
    """Run one command as a process of its own; its exit status, once all has been written."""
    ensure_streams()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    stdout = _Stdout(sys.stdout)
    sys.stdout = stdout  # type: ignore[assignment]
    status = 1
    try:
        status = main()
    except SystemExit as end:  # argparse's
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
    stdout.flush()
    if stdout.lost == errno.EPIPE:
        return 128 + signal.SIGPIPE  # whoever reads has what he wanted, as `| head -1`
    if stdout.lost:
        sys.stderr.write(f"error: standard output: {os.strerror(stdout.lost)}\n")
        return 1
    return status


if __name__ == "__main__":
    exit_status = _process()
    if "training.fit.process_group" in sys.modules:
        sys.modules["training.fit.process_group"].leave(exit_status)
    sys.exit(exit_status)
