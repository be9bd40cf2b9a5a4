"""A trained nnU-Net, imported and back again, against nnunetv2 2.8.1: the same volumes and weights.

    PYTHONPATH=. .venv/bin/python benchmarks/parity.py [--rival-env FOLDER]
        [--trained MODEL_FOLDER --images FOLDER]

Tiny networks of each kind are trained by the rival on two head CTs of ``test/sample``, one real
and one synthetic, to find bone and dense tissue. Then nnunetv2 predicts, its half-precision sums
patched to fp32 (the column "rival" says how far it is from itself without), and so does
``process.py`` in float32 with the imported bundle. ``export-nnunet`` brings the bundle back;
nnunetv2 predicts by that and saves what it has loaded, of which ``import-nnunet`` has to make the
same bundle. ``--trained`` compares a real model as well, on the first images of a folder, and
``--only own`` the default weights, which nnU-Net cannot express in full.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from benchmarks import rivals
from benchmarks.parity_ours import probabilities_of
from benchmarks.parity_plans import DATASET, NETWORKS, REGIONS, make_plans
from benchmarks.rows import Row, at_most, report
from ichseg.files import stem_of
from ichseg.model.bundle import Model as Bundle
from ichseg.model.bundle import load_model
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_WEIGHTS = ROOT / "weights"
SLICES = 16  # of each sample
SAMPLES = ("ge_intraparenchymal.mha", "synthetic_subdural.nii.gz")
LARGEST_DIFFERENCE = 1e-3  # of a probability
LARGEST_MARGIN = 2e-3  # of the rival's two best, where labels differ
LEAST_DICE = 0.9995
MOST_CHANGED = 1e-4  # share of the voxels whose label is another one once exported
FOREGROUND = (0.001, 0.2)  # share of the volume that each mask has to hold


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder and how it came about.

    Attributes:
        name: What the table calls it.
        folder: The model folder, as nnU-Net v2 leaves it.
        configuration: The name of its configuration.
        folds: How many folds to train; 0 where it is trained already.
        steps: How many steps to train.
        previous: The first stage, where this is a cascade's second.
        again: Where the rival writes what it has loaded, a model folder as well; None if not asked.
    """

    name: str
    folder: Path
    configuration: str
    folds: int
    steps: int
    previous: Model | None = None
    again: Path | None = None

    @property
    def out(self) -> str:
        """How the names of the rival's results begin."""
        return str(self.folder.parent / f"rival-{self.folder.name}")

    def request(self) -> dict[str, Any]:
        """What ``parity_rival.py`` is asked to predict."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "out": self.out,
            "configuration": self.configuration,
            "folds": self.folds,
            "steps": self.steps,
            "previous": self.previous and self.previous.out,
            "again": self.again and str(self.again),
        }


@dataclass(frozen=True, slots=True)
class Case:
    """A volume, and what a network may be trained to find in it."""

    name: str
    image: Path
    label: Path | None


def main() -> int:
    """Print one table and one line of JSON; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        choices=[*NETWORKS, "regions", "trained", "own"],
        action="append",
        help="a part of it",
    )
    parser.add_argument("--steps", type=int, default=60, help="of each training [%(default)s]")
    parser.add_argument("--trained", type=Path, metavar="MODEL_FOLDER", help="a real nnU-Net")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="for the real nnU-Net")
    parser.add_argument("--cases", type=int, default=4, help="at most so many [%(default)s]")
    rivals.add_arguments(parser)
    args = parser.parse_args()
    python = rivals.python_of(args.rival_env)
    parts = args.only or [*NETWORKS, "regions", *(["trained"] if args.trained else [])]
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-parity-") as scratch:
        folder = Path(scratch)
        cases = make_cases(folder / "cases")[: args.cases]
        for part in parts:
            began = time.perf_counter()
            if part in NETWORKS:
                rows += compare(make_models(folder / part, part, args.steps), cases, python)
            elif part == "regions":
                rows += compare([make_regions(folder / part, args.steps)], cases, python)
            elif part == "own":
                (folder / part).mkdir()
                rows += compare_exports(
                    DEFAULT_WEIGHTS, folder / part, [(c, None) for c in cases], python, part
                )
            else:
                paths = sorted(args.images.glob("[!.]*.nii.gz"))[: args.cases]
                listed = [Case(stem_of(path), path, None) for path in paths]
                rows += compare([link_trained(folder / part, args.trained)], listed, python)
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    return report("parity", rows)


def make_cases(folder: Path) -> list[Case]:
    """Make the cases: the samples, with labels 1 for bone and 2 for dense tissue."""
    cases = []
    for name in SAMPLES:
        image = middle(volume.read(ROOT / "test" / "sample" / "input" / name))
        smooth = ndimage.gaussian_filter(image.voxels.astype(np.float32), (0, 1.5, 1.5))
        labels = np.where(smooth > 300, 1, np.where((smooth > 38) & (smooth < 100), 2, 0))
        stem = name.partition(".")[0]
        case = Case(stem, folder / "images" / f"{stem}.mha", folder / "labels" / f"{stem}.mha")
        volume.write(image, case.image)
        volume.write(image.with_voxels(labels.astype(np.uint8)), case.label or Path())
        cases.append(case)
    return cases


def middle(image: Volume) -> Volume:
    """The slices in the middle, enough for several tiles."""
    first = (image.voxels.shape[0] - SLICES) // 2
    offset = np.array(image.direction).reshape(3, 3)[:, 0] * first * image.spacing_mm[0]
    z, y, x = (float(value) for value in image.origin_mm + offset)
    return replace(image, voxels=image.voxels[first : first + SLICES].copy(), origin_mm=(z, y, x))


def make_models(folder: Path, network: str, steps: int) -> list[Model]:
    """Make one untrained model of each configuration; 3d_fullres with two folds."""
    plans = make_plans(network)
    for name in plans["configurations"]:
        write_model(folder / f"nnUNetTrainer__nnUNetPlans__{name}", plans, DATASET)

    def model(name: str, folds: int = 1, previous: Model | None = None) -> Model:
        path = folder / f"nnUNetTrainer__nnUNetPlans__{name}"
        return Model(f"{NETWORKS[network]} {name}", path, name, folds, steps, previous)

    lowres = model("3d_lowres")
    cascade = model("3d_cascade_fullres", previous=lowres)
    return [model("2d"), model("3d_fullres", folds=2), lowres, cascade]


def link_trained(folder: Path, trained: Path) -> Model:
    """Take a model that is trained already; nothing is written into its folder."""
    folder.mkdir()
    (folder / trained.name).symlink_to(trained.resolve())
    name = trained.name.rpartition("__")[2]
    return Model(f"trained {name}", folder / trained.name, name, 0, 0)


def make_regions(folder: Path, steps: int) -> Model:
    """Make a network of regions that overlap."""
    path = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    write_model(path, make_plans("PlainConvUNet"), REGIONS)
    return Model("regions 3d_fullres", path, "3d_fullres", 1, steps)


def write_model(folder: Path, plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Write what stands in a model folder beside its folds."""
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))


def compare(models: Sequence[Model], cases: Sequence[Case], python: Path) -> list[Row]:
    """Let both sides predict every case by every model."""
    unpatched = ask_rival(models, cases, python, models[0].folder.parent)
    rows = []
    for model in models:
        as_it_is = unpatched[model.name]
        print(
            f"{model.name}: nnunetv2 unpatched differs from itself patched by up to "
            f"{as_it_is['largest']:.1e}, {as_it_is['labels']} labels",
            flush=True,
        )
        rows += compare_model(model, cases, as_it_is["largest"], python)
    return rows


def compare_model(model: Model, cases: Sequence[Case], unpatched: float, python: Path) -> list[Row]:
    """The rows for one model, the worst of its cases."""
    weights = model.folder.parent / f"bundle-{model.folder.name}"
    stages = [model.folder] if model.previous is None else [model.previous.folder, model.folder]
    _call([sys.executable, "-m", "training", "import-nnunet", *map(str, stages), "--out",
           str(weights)])  # fmt: skip
    differences, margins, dices = [0.0], [0.0], [1.0]
    masks: list[tuple[Case, npt.NDArray[Any] | None]] = []
    for case in cases:
        rival = np.load(f"{model.out}_{case.name}_probabilities.npy")
        theirs = np.load(f"{model.out}_{case.name}_labels.npy")
        share = float((theirs > 0).mean())
        assert FOREGROUND[0] <= share <= FOREGROUND[1], f"{case.name}: {share:.2%} foreground"
        began = time.perf_counter()
        ours = segment(case, weights, model.folder.parent)
        took = time.perf_counter() - began
        mine = probabilities_of(weights, volume.read(case.image))
        largest = float(np.abs(mine - rival).max())
        where = ours != theirs
        margin = float(margin_of(rival[:, where], regions=mine.shape[0] < 3).max(initial=0))
        found = [
            2 * int(((ours == k) & (theirs == k)).sum()) / both
            for k in range(1, int(theirs.max()) + 1)
            if (both := int((ours == k).sum() + (theirs == k).sum()))
        ]
        print(
            f"{model.name}, {case.name}: {share:.1%} foreground, largest difference {largest:.1e}, "
            f"{int(where.sum())} of {theirs.size} labels differ (margin {margin:.1e}), "
            f"Dice {', '.join(f'{d:.6f}' for d in found)}; ours {took:.0f} s",
            flush=True,
        )
        masks.append((case, ours))
        differences.append(largest)
        margins.append(margin)
        dices += found
    return [
        replace(
            at_most(f"{model.name}: largest difference of probabilities", max(differences), "",
                    LARGEST_DIFFERENCE),
            rival=unpatched,
        ),
        at_most(f"{model.name}: rival's margin where labels differ", max(margins), "",
                LARGEST_MARGIN),
        at_most(f"{model.name}: 1 - smallest Dice of a class", 1 - min(dices), "", 1 - LEAST_DICE),
        *compare_exports(weights, model.folder.parent, masks, python, model.name),
    ]  # fmt: skip


def compare_exports(
    weights: Path,
    scratch: Path,
    masks: Sequence[tuple[Case, npt.NDArray[Any] | None]],
    python: Path,
    name: str,
) -> list[Row]:
    """Rows for a bundle that is exported, predicted with by the rival, and imported again.

    The default weights are not imported again: their plans hold what nnU-Net has no words for.

    Args:
        weights: The bundle.
        scratch: A folder to work in.
        masks: The cases, and our labels of each as far as they are known.
        python: The rival's Python.
        name: What the table calls the bundle.
    """
    out = scratch / f"export-{weights.name}"
    _call([sys.executable, "-m", "training", "export-nnunet", str(weights), "--out", str(out)])
    bundle = load_model(weights)
    (decides,) = bundle.averaged
    previous = bundle.plans.configuration(decides).previous_stage
    models: list[Model] = []
    for stage in [decides] if previous is None else [previous, decides]:
        (folder,) = out.glob(f"*__{stage}")
        again = out / "again" / folder.name
        first = models[0] if models else None
        models.append(Model(f"{name} exported", folder, stage, 0, 0, first, again))
    ask_rival(models, [case for case, _ in masks], python, out)
    shares = []
    for case, known in masks:
        ours = segment(case, weights, scratch) if known is None else known
        theirs = np.load(f"{models[-1].out}_{case.name}_labels.npy")
        differ, found = int((ours != theirs).sum()), int((theirs > 0).sum())
        print(
            f"{name} exported, {case.name}: {differ} of {theirs.size} labels differ, "
            f"{found} foreground",
            flush=True,
        )
        shares.append(differ / theirs.size)
    row = f"{name}: share of labels that differ once exported"
    rows = [at_most(row, max(shares), "", MOST_CHANGED)]
    if weights != DEFAULT_WEIGHTS:
        back = out / "bundle"
        _call([sys.executable, "-m", "training", "import-nnunet",
               *(str(model.again) for model in models), "--out", str(back)])  # fmt: skip
        row = f"{name}: fields of the bundle that differ after export, nnunetv2 and import"
        rows.append(at_most(row, len(differing(bundle, load_model(back))), "", 0))
    return rows


def differing(one: Bundle, two: Bundle) -> list[str]:
    """The fields in which two bundles differ, beside their names and where they come from."""
    names = {field.name for field in fields(Bundle)} - {"name", "description", "provenance"}
    found = sorted(name for name in names if getattr(one, name) != getattr(two, name))
    for name in found:
        print(f"{name}: {getattr(one, name)} before, {getattr(two, name)} after", flush=True)
    return found


def ask_rival(
    models: Sequence[Model], cases: Sequence[Case], python: Path, folder: Path
) -> dict[str, Any]:
    """Let the rival train and predict; by model how far unpatched it is from itself."""
    request = {
        "models": [model.request() for model in models],
        "cases": [
            {"name": case.name, "image": str(case.image), "label": str(case.label)}
            for case in cases
        ],
        "answer": str(folder / "answer.json"),
    }
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("parity_rival.py")
    _call([str(python), str(script), str(folder / "request.json")])
    return {row["model"]: row for row in json.loads((folder / "answer.json").read_text())}


def segment(case: Case, weights: Path, scratch: Path) -> npt.NDArray[np.integer]:
    """Segment by the command line; the labels."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        source.mkdir()
        shutil.copy(case.image, source)  # a link that leads out of the folder is refused
        _call([sys.executable, "process.py", "--input", str(source), "--output", str(out),
               "--weights", str(weights), "--device", "cpu", "--precision", "float32"])  # fmt: skip
        (result,) = json.loads((out / "results.json").read_text())
        (mask,) = [p for p in out.rglob("*") if p.name.endswith((".mha", ".nii.gz"))]
        assert result
        return volume.read(mask).voxels.astype(np.uint8)


def margin_of(probabilities: npt.NDArray[Any], *, regions: bool) -> npt.NDArray[Any]:
    """The margin of each voxel of ``(K, n)``: between the two best scores, or from a half."""
    if regions:
        margin: npt.NDArray[Any] = 2 * np.abs(probabilities - 0.5).min(0)
        return margin
    best = np.sort(probabilities, 0)
    gap: npt.NDArray[Any] = best[-1] - best[-2]
    return gap


def _call(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stdout[-3000:]}")
    for line in done.stdout.splitlines():
        if line.startswith(("patched", "trained")):
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
