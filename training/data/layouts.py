"""The layouts in which datasets arrive, each read where it lies; nothing is written.

Medical Segmentation Decathlon (MSD) task, 3D or 4D with the channels last:

    dataset.json   imagesTr/<case>.nii.gz   labelsTr/<case>.nii.gz

nnU-Net version 1 raw folder (``TaskXXX_Name``): the same list of cases, one file a channel

    dataset.json   imagesTr/<case>_0000.nii.gz   labelsTr/<case>.nii.gz

nnU-Net version 2 raw folder (``DatasetXXX_Name``): ``file_ending`` in place of the list, or the
files of each case under ``dataset``

Without a description, a folder of images beside one of labels of the same names; any, or those of
INSTANCE 2022, of BHSD and of CT-ICH 1.3:

    images/<case>.nii.gz    labels/<case>.nii.gz
    train/data/001.nii.gz   train/label/001.nii.gz
    images/<case>.nii.gz    ground truths/<case>.nii.gz
    ct_scans/049.nii        masks/049.nii
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ichseg.errors import DatasetError, InputError
from ichseg.files import WRITTEN_SUFFIXES, is_named_as_scan, stem_of
from ichseg.model import strict_json
from ichseg.scan import volume
from training.data.dataset import Case
from training.data.regions import BACKGROUND, IGNORE, Declared, declare
from training.data.workspace import DATASET_FILE

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset where it lies.

    Attributes:
        layout: What it was recognised as, in words.
        name, channels: The fields of ``Dataset`` with these names.
        declared: What is said of the labels.
        cases: The cases, sorted by name; each has one image file a channel, or one 4D file.
        masks: Whether labels may be masks of 0 and 255, as programs for pictures write them; 255
            then means 1.
    """

    layout: str
    name: str
    channels: tuple[str, ...]
    declared: Declared
    cases: tuple[Case, ...]
    masks: bool = False


@dataclass(frozen=True, slots=True)
class Pairs:
    """A layout without a description: a folder of images, and one of labels of the same names.

    Attributes:
        layout: What it is called.
        images: The folder of images.
        labels: The folder of labels.
        names: The labels' names by value.
        name: The dataset's name; empty for that of its folder.
        masks: The field of ``Source`` with this name.
    """

    layout: str
    images: str
    labels: str
    names: tuple[str, ...] = ("background", "hemorrhage")
    name: str = ""
    masks: bool = True


# BHSD's five kinds in its authors' order.
_KINDS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
_PAIRS = (
    Pairs("INSTANCE 2022 download", "train/data", "train/label", name="INSTANCE2022", masks=False),
    Pairs("images and labels", "images", "labels"),
    Pairs("BHSD download", "images", "ground truths", ("background", *_KINDS), "BHSD"),
    Pairs("CT-ICH download", "ct_scans", "masks", name="CT-ICH"),
)


def read_source(folder: Path, labels: tuple[str, ...] = ()) -> Source:
    """Recognise a dataset's layout and list its cases, all of whose files are there.

    Args:
        folder: The dataset.
        labels: Names of the values 0, 1 and so on, of a layout that does not name them; by default
            what its authors call them, or background and hemorrhage.

    Raises:
        DatasetError: The layout is unknown, uses what is not supported, or files are missing,
            left over, or hold other channels than declared. Each such file is logged.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    path = folder / DATASET_FILE
    pairs = _pairs_in(folder)
    if path.is_file():
        if labels:
            raise DatasetError(f"{path}: names its labels itself, expected no --labels")
        raw = strict_json.load_object(path, strict=False)
        if not isinstance(raw, Mapping):
            raise DatasetError(f"{path}: found {type(raw).__name__}, expected an object")
        source = _read_described(folder, path, raw)
        declared = raw.get("numTraining")
        if declared is not None and str(declared) != str(len(source.cases)):
            _log.warning("%s: numTraining is %s, found %d cases", path, declared, len(source.cases))
        if "dataset" not in raw and (others := _left_over(source.cases)):
            _log.warning(
                "%s: %d files beside those of the cases are not among them, such as %s; they are "
                "left out",
                path,
                len(others),
                others[0],
            )
    elif len(pairs) == 1:
        source = _read_pairs(folder, pairs[0], labels)
    elif pairs:
        names = ", ".join(f"{p.images} with {p.labels}" for p in pairs)
        raise DatasetError(f"{folder}: {names}, expected one of them")
    else:
        known = ", ".join(f"{p.images} with {p.labels}" for p in _PAIRS)
        around = *sorted(folder.iterdir()), folder.resolve().parent
        near = [at for at in around if (at / DATASET_FILE).is_file() or _pairs_in(at)]
        raise DatasetError(
            f"{folder}: no {DATASET_FILE} of an MSD task or nnU-Net raw folder, and no folder of "
            f"images beside one of labels; expected one of {known}"
            + "".join(f"; did you mean {at}?" for at in near[:1])
        )
    if not source.cases:
        raise DatasetError(f"{folder}: lists no training cases")
    _refuse(folder, (problem for case in source.cases for problem in _problems(case, source)))
    return source


def _pairs_in(folder: Path) -> list[Pairs]:
    """The layouts without a description whose two folders lie in this one."""
    return [p for p in _PAIRS if (folder / p.images).is_dir() and (folder / p.labels).is_dir()]


def _read_described(folder: Path, path: Path, raw: Mapping[str, Any]) -> Source:
    """A dataset with a dataset.json, in one of three layouts."""
    channels, declared = _channels(raw, path), _labels(raw, path)
    name = str(raw.get("name") or folder.resolve().name)
    if "file_ending" in raw:
        layout, cases = "nnU-Net v2 raw folder", _v2_cases(folder, path, raw, channels)
    else:
        listed = _listed(folder, path, raw)
        # version 1 lists <case>.nii.gz for the files <case>_0000.nii.gz, ...
        split = any(
            not image.is_file() and _channel_file(image, 0).is_file() for image, _ in listed
        )
        layout = "nnU-Net v1 raw folder" if split else "MSD task"
        cases = [
            Case(
                stem_of(image),
                tuple(_channel_file(image, i) for i in range(len(channels))) if split else (image,),
                label,
            )
            for image, label in listed
        ]
    return Source(layout, name, channels, declared, _sorted(cases))


def _listed(folder: Path, path: Path, raw: Mapping[str, Any]) -> list[tuple[Path, Path]]:
    """Image and label of the cases listed; macOS leaves hidden ``._name`` beside each."""
    listed = raw.get("training")
    if not isinstance(listed, list):
        raise DatasetError(f"{path}: training is {short(listed)}, expected a list of cases")
    pairs = []
    for entry in listed:
        if not isinstance(entry, Mapping) or not {"image", "label"} <= entry.keys():
            raise DatasetError(f"{path}: training lists {short(entry)}, expected image and label")
        image, label = folder / str(entry["image"]), folder / str(entry["label"])
        if not image.name.startswith("."):
            pairs.append((image, label))
    return pairs


def _channel_file(image: Path, channel: int) -> Path:
    suffix = image.name[len(stem_of(image)) :]
    return image.with_name(f"{stem_of(image)}_{channel:04d}{suffix}")


def _v2_cases(
    folder: Path, path: Path, raw: Mapping[str, Any], channels: tuple[str, ...]
) -> list[Case]:
    explicit, ending = raw.get("dataset"), raw["file_ending"]
    if explicit is not None:
        return list(_v2_explicit(folder, path, explicit))
    if ending not in WRITTEN_SUFFIXES:
        raise DatasetError(
            f"{path}: file_ending is {short(ending)}, expected one of {', '.join(WRITTEN_SUFFIXES)}"
        )
    images: dict[str, list[str]] = {}
    problems = []
    for file in _files(folder / "imagesTr", ending):
        found = re.fullmatch(r"(.+)_(\d{4})", file.name.removesuffix(ending))
        if found is None:
            problems.append(f"{file}: its name does not end in a channel, such as _0000{ending}")
        else:
            images.setdefault(found[1], []).append(found[2])
    wanted = [f"{channel:04d}" for channel in range(len(channels))]
    problems += [
        f"case {name}: {folder / 'imagesTr'} holds its channels {', '.join(found)}, expected "
        f"{', '.join(wanted)}"
        for name, found in images.items()
        if found != wanted
    ]
    labels = {file.name.removesuffix(ending) for file in _files(folder / "labelsTr", ending)}
    problems += _unpaired(images, labels, folder / "imagesTr", folder / "labelsTr")
    _refuse(folder, problems)
    return [
        Case(
            name,
            tuple(folder / "imagesTr" / f"{name}_{channel}{ending}" for channel in wanted),
            folder / "labelsTr" / f"{name}{ending}",
        )
        for name in images
    ]


def _v2_explicit(folder: Path, path: Path, explicit: Any) -> Iterator[Case]:
    """Cases whose files are named one by one, relative to the folder or absolutely."""
    if not isinstance(explicit, Mapping):
        raise DatasetError(f"{path}: dataset is {short(explicit)}, expected an object of cases")
    for name, entry in explicit.items():
        if (
            not isinstance(entry, Mapping)
            or not isinstance(entry.get("images"), list)
            or not isinstance(entry.get("label"), str)
        ):
            raise DatasetError(
                f"{path}: dataset lists {name}: {short(entry)}, expected images (a list) and label"
            )
        images = tuple(folder / str(image) for image in entry["images"])
        yield Case(name, images, folder / entry["label"])


def _read_pairs(folder: Path, pairs: Pairs, labels: tuple[str, ...]) -> Source:
    """A folder of images beside one of labels, of equal names."""
    found: dict[str, dict[str, Path]] = {}
    for part in (pairs.images, pairs.labels):
        found[part] = {}
        for file in _files(folder / part):
            other = found[part].setdefault(stem_of(file), file)
            if other != file:
                raise DatasetError(
                    f"{folder / part}: two files of one case, {other.name} and {file.name}; "
                    "expected one"
                )
    images, references = found[pairs.images], found[pairs.labels]
    _refuse(folder, _unpaired(images, references, folder / pairs.images, folder / pairs.labels))
    return Source(
        layout=pairs.layout,
        name=pairs.name or folder.resolve().name,
        channels=("CT",),
        declared=Declared(labels or pairs.names),
        cases=_sorted(Case(name, (image,), references[name]) for name, image in images.items()),
        masks=pairs.masks,
    )


def _files(folder: Path, ending: str = "") -> Iterator[Path]:
    """The volumes in a folder, by name; hidden files are passed over."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder")
    for file in sorted(folder.iterdir()):
        if is_named_as_scan(file) and file.name.endswith(ending):
            yield file


def _left_over(cases: Sequence[Case]) -> list[Path]:
    """The volumes that lie beside the images and labels of the cases and are of none of them."""
    known = {path for case in cases for path in case.files}
    folders = sorted({path.parent for path in known if path.parent.is_dir()})
    return [file for folder in folders for file in _files(folder) if file not in known]


def _unpaired(
    images: Iterable[str], labels: Iterable[str], image_folder: Path, label_folder: Path
) -> list[str]:
    with_image, with_label = set(images), set(labels)
    return [
        f"case {name}: an image in {image_folder}, but no label in {label_folder}"
        for name in sorted(with_image - with_label)
    ] + [
        f"case {name}: a label in {label_folder}, but no image in {image_folder}"
        for name in sorted(with_label - with_image)
    ]


def _channels(raw: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    key = "channel_names" if "channel_names" in raw else "modality"
    table = raw.get(key)
    if not isinstance(table, Mapping) or not table:
        raise DatasetError(
            f"{path}: {key} is {short(table)}, expected an object such as {{'0': 'CT'}}"
        )
    return tuple(str(table[number]) for number in _consecutive(table, path, key))


def _labels(raw: Mapping[str, Any], path: Path) -> Declared:
    """Label names by value, regions, and the value of the label named ``ignore``, if there is one.

    MSD and nnU-Net v1 write value -> name, nnU-Net v2 writes name -> value, or name -> values where
    labels are regions. As in the latter, the label to ignore is the highest.
    """
    table = raw.get("labels")
    if not isinstance(table, Mapping) or not table:
        raise DatasetError(
            f"{path}: labels is {short(table)}, expected an object such as {{'0': 'background'}}"
        )
    if any(isinstance(value, list) and len(value) > 1 for value in table.values()):
        try:
            return _regions(table, raw.get("regions_class_order"))
        except ValueError as error:
            raise DatasetError(f"{path}: {error}") from error
    table = {
        name: value[0] if isinstance(value, list) and value else value
        for name, value in table.items()
    }
    if not any(isinstance(value, str) for value in table.values()):
        by_value = {str(value): name for name, value in table.items()}
        if len(by_value) < len(table):
            raise DatasetError(f"{path}: labels {dict(table)} give one value to two names")
        table = by_value
    names = [str(table[number]) for number in _consecutive(table, path, "labels")]
    if IGNORE not in names:
        return Declared(tuple(names))
    if names.index(IGNORE) != len(names) - 1:
        raise DatasetError(
            f"{path}: label {IGNORE!r} is {names.index(IGNORE)}, expected the highest, "
            f"{len(names) - 1}"
        )
    return Declared(tuple(names[:-1]), ignore_label=len(names) - 1)


def _regions(table: Mapping[str, Any], order: Any) -> Declared:
    """Regions, one name or more of which stands for several labels.

    Raises:
        ValueError: The labels or the order are not as nnU-Net v2 has them.
    """
    values: dict[str, tuple[int, ...]] = {}
    for name, value in table.items():
        held = value if isinstance(value, list) else [value]
        if not held or not all(isinstance(v, int) and not isinstance(v, bool) for v in held):
            raise ValueError(
                f"label {short(name)} is {short(value)}, expected a whole number, or several"
            )
        values[str(name)] = tuple(sorted(set(held)))
    background, ignored = values.pop(BACKGROUND, None), values.pop(IGNORE, None)
    every = sorted({label for held in values.values() for label in held})
    last = len(every)
    if background != (0,) or every != list(range(1, last + 1)):
        raise ValueError(
            f"labels {dict(table)}, expected background 0, and regions of 1, 2 and so on"
        )
    if ignored not in (None, (last + 1,)):
        raise ValueError(f"label {IGNORE!r} is {table[IGNORE]}, expected the highest, {last + 1}")
    if not isinstance(order, list) or len(order) != len(set(map(str, order))):
        raise ValueError(
            f"regions_class_order is {short(order)}, expected the label that each region writes"
        )
    if not all(label in every for label in order):
        raise ValueError(f"regions_class_order is {order}, expected among 1 to {last}")
    return declare(values, order, None if ignored is None else last + 1)


def _consecutive(table: Mapping[str, Any], path: Path, what: str) -> list[str]:
    """The keys "0", "1", ... in order."""
    numbers = [str(i) for i in range(len(table))]
    if set(table) != set(numbers):
        raise DatasetError(f"{path}: {what} has keys {sorted(table)}, expected {numbers}")
    return numbers


def _problems(case: Case, source: Source) -> Iterator[str]:
    """What is wrong with the files of one case, from their names and headers."""
    shapes = []
    for file in case.files:
        try:
            shapes.append(volume.stored_shape(file))
        except InputError as error:
            yield f"case {case.name}: {error}"
    if len(shapes) <= len(case.images):  # said already
        return
    channels = [shape[0] if len(shape) == 4 else 1 for shape in shapes[:-1]]
    one_each = len(channels) == len(source.channels) and all(len(s) == 3 for s in shapes[:-1])
    stacked = len(channels) == 1 and channels[0] == len(source.channels)
    if not one_each and not stacked:
        yield (
            f"case {case.name}: {', '.join(str(image) for image in case.images)}: "
            f"{sum(channels)} channels in {len(channels)} files, expected {len(source.channels)} "
            f"({', '.join(source.channels)}), one a file or all in one"
        )


def _refuse(folder: Path, problems: Iterable[str]) -> None:
    found: Sequence[str] = list(problems)
    if len(found) > 1:
        for problem in found:
            _log.error("%s", problem)
        raise DatasetError(f"{folder}: {len(found)} problems, the first: {found[0]}")
    if found:
        raise DatasetError(found[0])


def _sorted(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(sorted(cases, key=lambda case: case.name))
