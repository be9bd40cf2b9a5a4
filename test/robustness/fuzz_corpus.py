"""Mutants, made by program: mutant ``i`` of a seed is always the same."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import random
import shutil
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from helpers.dicom_files import make_slice, save
from pydicom.dataset import Dataset
from robustness import fuzz_datasets, fuzz_nnunet, fuzz_scans

from ichseg.scan.dicom.elements import PLAIN
from ichseg.scan.volume import Volume, write

SCANS = {
    "hu": fuzz_scans.tricked,
    "nifti-frames": fuzz_scans.framed,
    "dicom-mixture": fuzz_scans.mixture,
}
KINDS = (
    "mha", "mha-packed", "mhd", "nrrd", "nii", "nii.gz", "dicom", "dicom-packed", "model.json",
    "safetensors", "inputs.json", "nnunet", "export-nnunet", *SCANS, *fuzz_datasets.KINDS,
)  # fmt: skip
FEWER = {"real-heads": 4, "backgrounds": 4}  # what takes longer to read, a share of the others
HUGE = ("99999999999", "-1", "0", "1e9", "4294967296", "2147483647", "nan", "", "65536 65536")
PATHS = (
    "/etc/passwd", "../../../../etc/passwd", "LIST", "case%03d.raw 1 3 1", "LOCAL\0", "file:///etc",
    "C:\\x", "~/x", "/proc/self/mem", "/dev/zero", "model.json", ".",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """One file, or a folder's, and how to read it.

    Attributes:
        name: For the table, such as ``nii-0012``.
        kind: One of ``KINDS``.
        path: What is read: the file, or the folder of a bundle, of slices, of a trained nnU-Net, of
            a dataset or of the platform's input.
    """

    name: str
    kind: str
    path: Path


def make(folder: Path, kind: str, number: int, seed: int, bundle: Path) -> Mutant:
    """Write one mutant.

    Args:
        folder: Where.
        kind: One of ``KINDS``.
        number: Which.
        seed: Of all.
        bundle: A sound weights bundle, small.
    """
    rng = random.Random(f"{seed} {kind} {number}")
    name = f"{kind.replace('.', '-')}-{number:04}"
    home = folder / name
    home.mkdir(parents=True)
    if kind in ("mha", "mha-packed", "mhd", "nrrd", "nii", "nii.gz"):
        path = home / f"case.{kind.removesuffix('-packed')}"
        path.write_bytes(_volume(home, kind, rng))
        return Mutant(name, kind, path)
    if kind == "nnunet":
        return Mutant(name, kind, fuzz_nnunet.folder(home, rng, _model, _noise))
    if kind in fuzz_datasets.KINDS:
        return Mutant(name, kind, fuzz_datasets.make(home, kind, rng, _model, _noise))
    if kind in SCANS:
        return Mutant(name, kind, SCANS[kind](home, rng))
    if kind.startswith("dicom"):
        _slices(home, kind == "dicom-packed", rng)
        return Mutant(name, kind, home)
    if kind == "inputs.json":
        (home / "images" / "ct").mkdir(parents=True)
        write(_scan(rng), home / "images" / "ct" / "a.mha")
        text = json.dumps(_inputs(rng))
        (home / kind).write_bytes(
            _noise(text.encode(), rng) if rng.random() < 0.4 else text.encode()
        )
        return Mutant(name, kind, home)
    for file in bundle.iterdir():  # no links by name: those lead out of the bundle
        try:
            (home / file.name).hardlink_to(file.resolve())
        except OSError:  # another disk
            shutil.copy(file, home)
    victim = min(home.glob("*.safetensors")) if kind == "safetensors" else home / "model.json"
    change = _safetensors if kind == "safetensors" else _model
    changed = change(victim.read_bytes(), rng)
    victim.unlink()
    victim.write_bytes(changed)
    if kind == "safetensors" and rng.random() < 0.7:  # or the checksum alone would refuse it
        _mend_checksum(home, victim)
    return Mutant(name, kind, home)


def _scan(rng: random.Random) -> Volume:
    size = tuple(rng.randint(1, 9) for _ in range(3))
    voxels = np.random.default_rng(rng.randrange(2**32)).integers(-1000, 1500, size)
    dtype = rng.choice((np.int16, np.uint8, np.float32, np.int32, np.float64))
    return Volume(voxels.astype(dtype), (5.0, 0.5, 0.5), (1.0, -2.0, 3.0))


def _volume(home: Path, kind: str, rng: random.Random) -> bytes:
    scan = _scan(rng)
    if kind.startswith("mh"):
        packed, beside = kind == "mha-packed", "case.raw" if kind == "mhd" else ""
        body = np.ascontiguousarray(scan.voxels).tobytes()
        if beside:
            (home / beside).write_bytes(_noise(body, rng) if rng.random() < 0.3 else body)
        return _mha(scan, packed, beside, rng)
    if kind == "nrrd":
        return _nrrd(scan, rng)
    whole = home / "whole.nii"
    write(scan, whole)
    content = bytearray(whole.read_bytes())
    whole.unlink()
    for _ in range(rng.randint(1, 4)):
        where, form = rng.choice(_NIFTI_FIELDS)
        size = struct.calcsize("<" + form)
        value = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        content[where : where + size] = value
    changed = bytes(content)
    if rng.random() < 0.3:
        changed = _noise(changed, rng)
    if kind == "nii":
        return changed
    packed = gzip.compress(changed, rng.choice((1, 9)))
    return _noise(packed, rng) if rng.random() < 0.3 else packed


_NIFTI_FIELDS = [
    (0, "i"), *((40 + 2 * i, "h") for i in range(8)), (70, "h"), (72, "h"),
    *((76 + 4 * i, "f") for i in range(8)), (108, "f"), (112, "f"), (116, "f"), (123, "b"),
    (252, "h"), (254, "h"), *((256 + 4 * i, "f") for i in range(18)), (344, "4s"), (348, "i"),
]  # fmt: skip


def _slices(home: Path, packed: bool, rng: random.Random) -> None:
    """Three slices of a CT, one or all of them altered."""
    altered = rng.choice(([0], [1], [2], [0, 1, 2]))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(-900, 900, (3, 40, 32))
    for number in range(3):
        made = make_slice(pixels[number], (0.0, 0.0, 5.0 * number))
        syntax = rng.choice(PLAIN)
        if packed:
            made.PixelData, syntax = _packed(rng.choice(("JPEG", "JPEG2000")))
            made["PixelData"].is_undefined_length = True
            made.PixelRepresentation, made.RescaleIntercept = 1, 0
        elif number in altered and rng.random() < 0.6:
            for _ in range(rng.randint(1, 3)):
                name = rng.choice([e.keyword for e in made if e.keyword != "PixelData"])
                if rng.random() < 0.2:
                    delattr(made, name)
                else:
                    _put(made, name, rng)
                    break
        path = home / f"{number}.dcm"
        with warnings.catch_warnings(), contextlib.suppress(*_PYDICOM_REFUSES):
            warnings.simplefilter("ignore")
            save(made, path, syntax)
        if not path.exists():
            path.write_bytes(rng.randbytes(400))
        if number in altered and (packed or rng.random() < 0.6):
            content = path.read_bytes()
            pixels_at = content.find(b"\xe0\x7f\x10\x00")
            only_pixels = packed and pixels_at > 0 and rng.random() < 0.6
            path.write_bytes(_dicom_noise(content, pixels_at if only_pixels else 132, rng))


_PYDICOM_REFUSES = (ValueError, TypeError, AttributeError, OverflowError, struct.error, KeyError)


def _put(made: Dataset, name: str, rng: random.Random) -> None:
    """Another value, as a string of the file would have it."""
    element = made[name]
    if element.VR == "US":
        element.value = rng.choice((0, 1, 2, 15, 4096, 65535))
    else:
        words = ("1e9\\1e9", "nan\\0\\0", "-1", "0\\0", "x" * 900, "", "1\\0\\0\\0\\1\\0", *HUGE)
        element._value = rng.choice((*words, *PATHS))  # as it stands, unchecked


@functools.cache
def _packed(compressor: str) -> tuple[bytes, str]:
    """Pixels of 40 x 32, compressed, with their transfer syntax."""
    pixels = np.random.default_rng(1).integers(-900, 900, (1, 40, 32)).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    with tempfile.TemporaryDirectory() as folder:
        writer.SetFileName(f"{folder}/a.dcm")
        writer.Execute(sitk.GetImageFromArray(pixels))
        written = pydicom.dcmread(f"{folder}/a.dcm")
    return written.PixelData, written.file_meta.TransferSyntaxUID


def _dicom_noise(content: bytes, start: int, rng: random.Random) -> bytes:
    """Lengths and types of elements exchanged, from ``start`` on; or any bytes."""
    if rng.random() < 0.3:
        return content[:start] + _noise(content[start:], rng)
    changed = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        where = rng.randrange(start, len(changed) - 8)
        piece = rng.choice(
            (b"\xff\xff\xff\xff", bytes(4), b"SQ\0\0", b"UN\0\0", b"\xfe\xff\x00\xe0",
             b"\xfe\xff\xdd\xe0", b"\xe0\x7f\x10\x00", b"\xff\xff\xff\x7f", rng.randbytes(2))
        )  # fmt: skip
        changed[where : where + len(piece)] = piece
    return bytes(changed)


def _mha(scan: Volume, packed: bool, beside: str, rng: random.Random) -> bytes:
    """A header with its voxels, or alone where they lie in a file ``beside``."""
    types = {"i2": "SHORT", "u1": "UCHAR", "f4": "FLOAT", "i4": "INT", "f8": "DOUBLE"}
    body = b"" if beside else np.ascontiguousarray(scan.voxels).tobytes()
    if packed:
        body = zlib.compress(body)
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(packed),
        "CompressedDataSize": str(len(body)),
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": "0.5 0.5 5",
        "DimSize": " ".join(map(str, scan.voxels.shape[::-1])),
        "ElementType": f"MET_{types[scan.voxels.dtype.str[1:]]}",
        "ElementDataFile": beside or "LOCAL",
    }
    if not packed:
        del fields["CompressedDataSize"]
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(fields))
        if key == "ElementDataFile":
            fields[key] = rng.choice(PATHS)
        elif rng.random() < 0.2:
            del fields[key]
            fields = {rng.choice(("Comment", "HeaderSize", "ElementNbits")): "9"} | fields
        else:
            words = fields[key].split() or [""]
            words[rng.randrange(len(words))] = rng.choice((*HUGE, "True", "x" * 300, "-0.0"))
            fields[key] = " ".join(words)
    if rng.random() < 0.1:
        fields = dict(sorted(fields.items(), key=lambda _: rng.random()))
    text = "".join(f"{key} = {value}\n" for key, value in fields.items()).encode()
    return _noise(text + body, rng) if rng.random() < 0.4 else text + body


def _nrrd(scan: Volume, rng: random.Random) -> bytes:
    types = {"i2": "short", "u1": "uchar", "f4": "float", "i4": "int", "f8": "double"}
    packed = rng.random() < 0.5
    body = np.ascontiguousarray(scan.voxels).tobytes()
    fields = {
        "type": types[scan.voxels.dtype.str[1:]],
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, scan.voxels.shape[::-1])),
        "space directions": "(0.5,0,0) (0,0.5,0) (0,0,5)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "gzip" if packed else "raw",
        "space origin": "(1,-2,3)",
    }
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(fields))
        if rng.random() < 0.2:
            del fields[key]
            key = rng.choice(("data file", "byte skip", "line skip", "spacings", "space units"))
            fields[key] = rng.choice((*PATHS, "9", "-1", "0.5 0.5 5", '"m" "m" "m"'))
        else:
            words = fields[key].replace(",", " , ").split() or [""]
            words[rng.randrange(len(words))] = rng.choice((*HUGE, "none", "x" * 300, "(0,0,0)"))
            fields[key] = " ".join(words)
    lines = ["NRRD0004", *(f"{key}: {value}" for key, value in fields.items()), "", ""]
    text = "\n".join(lines).encode()
    whole = text + (gzip.compress(body) if packed else body)
    return _noise(whole, rng) if rng.random() < 0.4 else whole


def _noise(content: bytes, rng: random.Random) -> bytes:
    """Cut, grown, doubled, or with bytes changed."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        if not changed:
            break
        where = rng.randrange(len(changed))
        what = rng.randrange(5)
        if what == 0:
            del changed[where:]
        elif what == 1:
            changed[where:where] = rng.randbytes(rng.randint(1, 2000))
        elif what == 2:
            changed[where : where + 40] = changed[:40]
        else:
            changed[where] = rng.randrange(256)
    return bytes(changed)


def _model(content: bytes, rng: random.Random) -> bytes:
    """Values of a JSON file exchanged for others, somewhere in the tree."""
    tree = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        _change_somewhere(tree, rng)
    text = json.dumps(tree).encode()
    return _noise(text, rng) if rng.random() < 0.3 else text


def _change_somewhere(tree: object, rng: random.Random) -> None:
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))  # type: ignore[arg-type]
        if not keys:
            return
        key = rng.choice(list(keys))
        below = node[key]  # type: ignore[index]
        if isinstance(below, (dict, list)) and below and rng.random() < 0.85:
            node = below
            continue
        odd: list[object] = [
            None, -1, 0, 10**9, 2**70, 1e308, "", "x" * 10_000, [], {}, True, *PATHS,
            [[[]]] * 3, "../../x.safetensors", "/etc/passwd.safetensors", [10**6] * 3, [0, 0, 0],
        ]  # fmt: skip
        if rng.random() < 0.15 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = rng.choice(odd)  # type: ignore[index]
        return


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    choices: list[Callable[[], bytes]] = [
        lambda: (
            struct.pack("<Q", rng.choice((0, 2**63, 2**64 - 1, length * 2, length - 1)))
            + content[8:]
        ),
        lambda: _noise(content, rng),
        lambda: content[: rng.randrange(len(content))],
        lambda: _other_tensors(content, length, rng),
    ]
    return rng.choice(choices)()


def _mend_checksum(home: Path, victim: Path) -> None:
    path = home / "model.json"
    model = json.loads(path.read_bytes())
    for member in model["members"]:
        if member["file"] == victim.name:
            member["sha256"] = hashlib.sha256(victim.read_bytes()).hexdigest()
    path.unlink()
    path.write_text(json.dumps(model), encoding="utf-8")


def _other_tensors(content: bytes, length: int, rng: random.Random) -> bytes:
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    tensor = header[name]
    what = rng.randrange(4)
    if what == 0:
        tensor["shape"] = rng.choice(([10**9, 10**9], [-1], [0], [], [2**62, 4]))
    elif what == 1:
        tensor["data_offsets"] = rng.choice(([0, 2**40], [5, 1], [-4, 4], [0, 0]))
    elif what == 2:
        tensor["dtype"] = rng.choice(("F64", "BF16", "I8", "X", "BOOL"))
    else:
        header[rng.choice(("../x", "", "x" * 9999))] = header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _inputs(rng: random.Random) -> list[object]:
    where = rng.choice(("images/ct", *PATHS, "images/../images/ct", "images/ct/../../.."))
    entry: dict[str, object] = {
        "image": rng.choice((None, {"name": "a.mha"}, 3, [], {"name": "../../x"})),
        rng.choice(("interface", "socket")): {
            "slug": rng.choice(("head-ct", "../x", "", 7)),
            "relative_path": where,
            "super_kind": rng.choice(("Image", "File", None, 9)),
        },
    }
    return rng.choice(
        ([entry], [entry] * 3, [], [[]], [None], [{}], [{"interface": None}], [{"socket": None}])
    )
