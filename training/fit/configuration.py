"""What the user chooses about training: a frozen object whose fields are flags of ``train``."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ichseg.errors import TrainingError
from ichseg.model import strict_json
from training.batches.augmentation import MSD2018, NNUNETV2, AugmentationConfig, flag
from training.batches.stream import StreamOptions
from training.fit import schedule
from training.fit.schedule import ScheduleRules

SCHEMA_VERSION = 2
OPTIMISERS = ("adam", "sgd")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
MEMORY_FORMATS = ("contiguous", "channels_last")


def _new_option(default: Any, doc: str) -> Any:
    """A ``flag`` that older files of settings do not have."""
    return field(default=default, metadata={"help": doc, "optional": True})


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """What the user chose. Each field is a flag of ``train``; a recipe is one such object."""

    schema_version: int = SCHEMA_VERSION
    recipe: str = "msd2018"
    epochs: int = flag(1000, "train for at most so many epochs")
    batches_per_epoch: int = flag(250, "training batches of an epoch")
    validation_batches: int = flag(50, "validation batches after each epoch")
    minutes: float | None = flag(None, "end after so many minutes of training, whatever the epoch")
    optimiser: str = flag("adam", "adam or sgd")
    learning_rate: float = flag(3e-4, "at the start; the schedule lowers it")
    weight_decay: float = flag(3e-5, "L2 penalty on all weights")
    amsgrad: bool = flag(True, "adam: never let the second moment shrink")
    momentum: float = flag(0.99, "sgd: share of the last step that the next one keeps")
    nesterov: bool = flag(True, "sgd: look ahead along the momentum")
    gradient_clip: float = flag(
        0.0, "scale a gradient whose L2 norm is larger down to this; 0 never does"
    )
    lr_schedule: str = flag(
        "plateau", "plateau (moving averages of the losses) or poly (fixed length)"
    )
    poly_exponent: float = flag(
        0.9, "poly: rate falls as (1 - done)^exponent, by epochs or minutes"
    )
    loss_momentum: float = flag(0.93, "plateau: weight of the old value in the loss averages")
    loss_threshold: float = flag(5e-3, "plateau: a smaller change is no improvement")
    drop_patience: int = flag(30, "plateau: epochs without improvement before the rate drops")
    drop_factor: float = flag(0.2, "plateau: what the rate is multiplied by then")
    stop_patience: int = flag(60, "plateau: epochs without better validation before the end")
    lowest_rate: float = flag(1e-6, "plateau: a lower rate ends the training")
    foreground_fraction: float = flag(0.33, "share of a batch that must contain foreground")
    centre_jitter: float = flag(
        0.0,
        "where in its patch that foreground may lie: 0 puts one of its voxels in the centre, 1 "
        "anywhere, 0.5 up to half of the way to the border",
    )
    lesion_fraction: float = _new_option(
        0.0,
        "share of those foreground patches that are centred on a lesion, each lesion of the case "
        "as likely as another, however small; 0 goes by voxels alone",
    )
    hard_fraction: float = _new_option(
        0.0,
        "share of the other patches that are centred on a lesion that the fold's network got "
        "wrong, as `hard-examples` listed them",
    )
    top_k_fraction: float = _new_option(
        1.0,
        "top-k loss: the cross-entropy is averaged over this share of the voxels, those where it "
        "is highest; 1 takes all",
    )
    augmentation: AugmentationConfig = field(default=MSD2018)
    pretrained: str | None = flag(
        None,
        "folder of a weights bundle, or of nnU-Net v2's results of one configuration, to begin "
        "with, as far as its tensors fit",
    )
    seed: int = flag(0, "of network and batches; fixes everything on the CPU bit for bit")
    device: str = flag("auto", "auto, cpu or cuda")
    precision: str = flag(
        "fp32",
        "of convolutions; loss and weights stay in fp32. One of fp32, bf16, fp16 (CUDA only; the "
        "loss is scaled), or auto (bf16 where card or processor computes it, else fp16 on CUDA and "
        "fp32 on the CPU)",
    )
    compile: bool | None = flag(
        None,
        "compile the network with torch.compile, which takes a minute once; without either flag a "
        "trial decides on a GPU, unless --deterministic is given; on a CPU it is not compiled",
    )
    deterministic: bool = flag(
        False, "the same sums in the same order on CUDA, too, where torch can; slower"
    )
    memory_format: str = flag("contiguous", "contiguous or channels_last")
    threads: int = flag(0, "of torch on the CPU; 0 leaves it to torch")
    workers: int = flag(1, "processes that make batches; 0 makes them in between")
    prefetch: int = flag(4, "batches made ahead")
    augmentation_engine: str = flag(
        "auto",
        "who augments: host (the workers), device (the GPU; workers only read), or auto (the GPU "
        "if there is one)",
    )
    gpu_cache: str = flag(
        "auto",
        "keep all cases in the memory of the device that augments, so that nothing is read while "
        "training: yes, no, or auto (on a GPU where they leave it enough for training)",
    )
    validation: bool = flag(True, "segment the fold's validation cases at the end")
    validation_mirrors: bool = flag(True, "average over mirrorings in that")
    tensorboard: bool = flag(False, "also write for TensorBoard, to the run's tensorboard/")
    mlflow: bool = _new_option(
        False, "also log to MLflow, to MLFLOW_TRACKING_URI or else to the run's mlflow/mlflow.db"
    )

    def __post_init__(self) -> None:
        strict_json.check_schema("config", self.schema_version, SCHEMA_VERSION)
        for name in ("epochs", "batches_per_epoch", "validation_batches", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("seed", "workers", "threads", "weight_decay", "gradient_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not self.learning_rate > 0 or (self.minutes is not None and not self.minutes > 0):
            raise ValueError(
                f"learning_rate {self.learning_rate}, minutes {self.minutes}, expected more than 0"
            )
        if not 0 <= self.foreground_fraction <= 1:
            raise ValueError(f"foreground_fraction is {self.foreground_fraction}, expected 0 to 1")
        for name in ("centre_jitter", "lesion_fraction", "hard_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.top_k_fraction <= 1:
            raise ValueError(
                f"top_k_fraction is {self.top_k_fraction}, expected more than 0, at most 1"
            )
        if not 0 <= self.momentum < 1 or (
            self.optimiser == "sgd" and self.nesterov and not self.momentum
        ):
            raise ValueError(
                f"momentum is {self.momentum}, expected 0 to less than 1, and 0 without nesterov"
            )
        allowed = {
            "optimiser": OPTIMISERS,
            "precision": PRECISIONS,
            "memory_format": MEMORY_FORMATS,
            "lr_schedule": schedule.SCHEDULES,
            "device": ("auto", "cpu", "cuda"),
            "augmentation_engine": ("auto", "host", "device"),
            "gpu_cache": ("auto", "yes", "no"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(values)}"
                )

    @property
    def stream(self) -> StreamOptions:
        """Who makes batches, and how far ahead."""
        return StreamOptions(
            engine=self.augmentation_engine,
            workers=self.workers,
            prefetch=self.prefetch,
            gpu_cache=self.gpu_cache,
        )

    @property
    def rules(self) -> ScheduleRules:
        """The schedule's numbers."""
        return ScheduleRules(
            kind=self.lr_schedule,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            minutes=self.minutes,
            momentum=self.loss_momentum,
            threshold=self.loss_threshold,
            drop_patience=self.drop_patience,
            drop_factor=self.drop_factor,
            stop_patience=self.stop_patience,
            lowest_rate=self.lowest_rate,
            exponent=self.poly_exponent,
        )


TRAINING_RECIPES = {
    # P18, the paper; amsgrad and weight decay, of which it says nothing, are C19's
    "msd2018": TrainingConfig(),
    # V2
    "nnunetv2": TrainingConfig(
        recipe="nnunetv2",
        optimiser="sgd",
        learning_rate=1e-2,
        lr_schedule="poly",
        gradient_clip=12.0,
        augmentation=NNUNETV2,
        precision="auto",
    ),
    # for a small network on a few CPU cores, as long as --minutes says
    "compact": TrainingConfig(
        recipe="compact",
        batches_per_epoch=100,
        validation_batches=10,
        learning_rate=1e-3,
        lr_schedule="poly",
        centre_jitter=1.0,  # docs/decisions/0011
        augmentation=dataclasses.replace(MSD2018, image_order=1),
        precision="auto",
        memory_format="channels_last",
        threads=1,
        workers=0,
        validation_mirrors=False,
    ),
}


@dataclass(frozen=True, slots=True)
class GivenSettings:
    """The settings that the user gave as flags; all others are a recipe's.

    Attributes:
        training: Values of fields of ``TrainingConfig``, by name.
        augmentation: Values of fields of ``AugmentationConfig``, by name.
    """

    training: Mapping[str, Any]
    augmentation: Mapping[str, Any]

    def over(self, recipe: str) -> TrainingConfig:
        """The recipe with these settings in place of its own.

        Raises:
            TrainingError: A value is out of range, or there is no such recipe.
        """
        if recipe not in TRAINING_RECIPES:
            raise TrainingError(
                f"no training recipe {recipe!r} yet, expected one of {', '.join(TRAINING_RECIPES)}"
            )
        base = TRAINING_RECIPES[recipe]
        try:
            augmentation = dataclasses.replace(base.augmentation, **self.augmentation)
            return dataclasses.replace(base, augmentation=augmentation, **self.training)
        except ValueError as error:
            raise TrainingError(str(error)) from error

    def flags(self) -> tuple[str, ...]:
        """The same as words of a command line."""
        words: list[str] = []
        for name, value in {**self.training, **self.augmentation}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                words += [f"--{flag}", *map(str, value)]
            else:
                words += [f"--{flag}", str(value)]
        return tuple(words)


def settings_from(args: argparse.Namespace) -> GivenSettings:
    """The flags of ``add_settings`` that were given."""
    return GivenSettings(_given(args, TrainingConfig), _given(args, AugmentationConfig))


def load_settings(path: Path) -> TrainingConfig:
    """Read a run's ``config.json``, in which versions up to 0.1 called ``gpu_cache`` ``resident``.

    Raises:
        PlansError: It is missing, damaged, or of a version with other settings.
    """
    raw = strict_json.load_object(path, strict=True)
    if isinstance(raw, dict) and "resident" in raw:
        raw["gpu_cache"] = raw.pop("resident")
    return strict_json.from_json(TrainingConfig, raw, where=str(path))


def differences(now: Any, before: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and former value of each setting that is another; of those in settings, too."""
    for option in dataclasses.fields(now):
        new, old = getattr(now, option.name), getattr(before, option.name)
        if dataclasses.is_dataclass(new):
            yield from differences(new, old)
        elif new != old:
            yield option.name, new, old


def _flag_fields(cls: type[Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, type and help of each field that is a flag."""
    hints = typing.get_type_hints(cls)
    for option in dataclasses.fields(cls):
        if option.name not in ("schema_version", "recipe", "augmentation"):
            yield option.name, hints[option.name], option.metadata.get("help", "")


def add_flags(group: Any, cls: type[Any], recipes: Mapping[str, Any]) -> None:
    """One flag for each field of a config class; left out, it is the recipe's value.

    Args:
        group: The parser, or the group of a parser, to add them to.
        cls: The config class.
        recipes: The class's object in each recipe; the help shows the first's values, and others'
            where they differ.
    """
    for name, hint, text in _flag_fields(cls):
        shown = {recipe: _shown(getattr(values, name)) for recipe, values in recipes.items()}
        usual, *_ = shown.values()
        others = [f"; {recipe}: {value}" for recipe, value in shown.items() if value != usual]
        options: dict[str, Any] = {"default": None, "help": f"{text} [{usual}{''.join(others)}]"}
        if hint in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
        else:
            kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
            options |= {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def _shown(value: Any) -> str:
    """A default, as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """All flags of the trainer's settings."""
    settings = parser.add_argument_group(
        "settings", "In brackets the default of recipe msd2018, and of others where they differ."
    )
    add_flags(settings, TrainingConfig, TRAINING_RECIPES)
    ranges = parser.add_argument_group("augmentation", "Probabilities and ranges.")
    add_flags(
        ranges,
        AugmentationConfig,
        {name: recipe.augmentation for name, recipe in TRAINING_RECIPES.items()},
    )


def _given(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    values = {name: getattr(args, name) for name, _, _ in _flag_fields(cls)}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if v is not None}
