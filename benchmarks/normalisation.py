"""What torch's sums over channels-last tensors on the CPU do to Dice, see decision 0009.

    PYTHONPATH=. .venv/bin/python -m training synthesize --out T --cases 12 --seed 7
    PYTHONPATH=. .venv/bin/python benchmarks/normalisation.py --data T

Each network of a bundle segments the sample scans and those of a dataset twice in channels-last:
with exact instance normalisation, and as training had it once, by torch's batch normalisation of
one sample, which adds a channel's voxels up one after another in float32. ``ours`` is the exact
one, ``rival`` the other. Weights and tiles are the same, and nothing is mirrored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rows import Row, at_most, report
from ichseg.engine import torch_engine
from ichseg.engine.engine import in_batches
from ichseg.model import bundle, instance_norm
from ichseg.model.bundle import Member, Model
from ichseg.model.default_weights import default_weights
from ichseg.model.network import build_network
from ichseg.predict import prepare, sliding_window
from ichseg.predict.dice import dice_of_masks
from ichseg.predict.restore import restore
from ichseg.scan import reader
from training.data.layouts import read_source

SAMPLES = Path(__file__).resolve().parents[1] / "test" / "sample"
BATCH = 4  # tiles
LARGEST_DIFFERENCE = 0.01  # of the Dice of any case


def by_batch_norm(norm: nn.InstanceNorm3d, x: Tensor, layout: torch.memory_format) -> Tensor:
    """Instance normalisation as it was in channels-last."""
    assert x.is_contiguous(memory_format=layout)
    return torch.cat([
        functional.batch_norm(
            sample, None, None, norm.weight, norm.bias, training=True, eps=norm.eps
        )
        for sample in torch.split(x, 1)
    ])  # fmt: skip


def scans(data: Path | None) -> Iterator[tuple[Path, Path]]:
    """Scans with their references."""
    for path in sorted((SAMPLES / "input").iterdir()):
        yield path, SAMPLES / "reference" / path.name
    for case in read_source(data).cases if data is not None else ():
        if case.label is not None:
            yield case.images[0], case.label


def network_of(model: Model, folder: Path, member: Member) -> nn.Module:
    """A network in channels-last, as ``compact`` trains it."""
    plans = model.plans
    configuration = plans.configuration(member.configuration)
    network = build_network(
        configuration.architecture, plans.input_channels(configuration), plans.scores
    )
    network.load_state_dict(torch_engine.tensors(bundle.load_state(folder, member)), strict=False)
    return network.eval().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def segment(
    model: Model, member: Member, network: nn.Module, image: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Labels in the scan's grid, and probabilities in the network's."""
    configuration = model.plans.configuration(member.configuration)
    scan = reader.in_hu(reader.read(image), image)
    given = prepare.prepare([scan], model.plans, configuration)

    @torch.inference_mode()
    def run(tiles: Tensor) -> Tensor:
        found: Tensor = network(tiles.contiguous(memory_format=torch.channels_last_3d))
        return found.contiguous().softmax(1)

    scores = sliding_window.predict_tiled(
        in_batches(run, BATCH), torch.from_numpy(given.data), configuration.tile
    )
    return restore([(scores, given.placement)], model.plans), np.asarray(scores)


def main() -> int:
    """Compare; print one table and one line of JSON; 1 if a Dice differs by more than the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=default_weights(), metavar="BUNDLE")
    parser.add_argument("--folds", nargs="+", metavar="K", help="of the bundle's networks [all]")
    parser.add_argument("--data", type=Path, metavar="DATASET", help="further scans with labels")
    parser.add_argument("--threads", type=int, default=1, help="[%(default)s]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = bundle.load_model(args.weights)
    dice: list[tuple[float, float]] = []
    largest, changed, marked = 0.0, 0, 0
    for member in model.members:
        if args.folds and member.fold not in args.folds:
            continue
        network = network_of(model, args.weights, member)
        for image, reference in scans(args.data):
            exact, scores = segment(model, member, network, image)
            with mock.patch.object(instance_norm, "_normalise", by_batch_norm):
                other, their_scores = segment(model, member, network, image)
            truth = np.asarray(reader.read(reference).voxels) == 1
            pair = (
                dice_of_masks(exact == 1, truth, empty=1.0),
                dice_of_masks(other == 1, truth, empty=1.0),
            )
            dice.append(pair)
            largest = max(largest, float(abs(scores - their_scores).max()))
            changed, marked = changed + int((exact != other).sum()), marked + int(exact.sum())
            print(
                f"fold {member.fold} {image.name}: Dice {pair[0]:.4f}, the other {pair[1]:.4f}",
                flush=True,
            )
    means = np.mean(dice, axis=0)
    apart = float(np.abs(np.subtract(*np.transpose(dice))).max())
    rows = [
        Row("mean Dice", float(means[0]), float(means[1]), "Dice", None, None, None),
        Row("voxels that differ, of 1000 marked", 1000 * changed / max(marked, 1), None, "voxels",
            None, None, None),
        Row("largest difference of a probability", largest, None, "", None, None, None),
        at_most("largest difference of a Dice", apart, "Dice", LARGEST_DIFFERENCE),
    ]  # fmt: skip
    return report("normalisation", rows)


if __name__ == "__main__":
    sys.exit(main())
