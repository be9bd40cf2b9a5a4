"""What the user chooses about training: a frozen object whose fields are flags of ``train``."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ichseg.errors import TrainingError
from training import schedule
from training.augment import AugmentationConfig
from training.schedule import ScheduleRules

SCHEMA_VERSION = 1
PRECISIONS = ("fp32", "bf16")
MEMORY_FORMATS = ("contiguous", "channels_last")


def _option(default: Any, doc: str) -> Any:
    """A field of ``TrainingConfig``, with the line that its flag's help shows."""
    return field(default=default, metadata={"help": doc})


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """What the user chose. Each field is a flag of ``train``; a recipe is one such object."""

    schema_version: int = SCHEMA_VERSION
    recipe: str = "msd2018"
    epochs: int = _option(1000, "train for at most so many epochs")
    batches_per_epoch: int = _option(250, "training batches of an epoch")
    validation_batches: int = _option(50, "validation batches after each epoch")
    minutes: float | None = _option(
        None, "end after so many minutes of training, whatever the epoch"
    )
    learning_rate: float = _option(3e-4, "of Adam, at the start")
    weight_decay: float = _option(3e-5, "L2 penalty of Adam")
    amsgrad: bool = _option(True, "the amsgrad variant of Adam")
    lr_schedule: str = _option(
        "plateau", "plateau (moving averages of the losses) or poly (fixed length)"
    )
    poly_exponent: float = _option(
        0.9, "poly: rate falls as (1 - done)^exponent, by epochs or minutes"
    )
    loss_momentum: float = _option(0.93, "plateau: weight of the old value in the loss averages")
    loss_threshold: float = _option(5e-3, "plateau: a smaller change is no improvement")
    drop_patience: int = _option(30, "plateau: epochs without improvement before the rate drops")
    drop_factor: float = _option(0.2, "plateau: what the rate is multiplied by then")
    stop_patience: int = _option(60, "plateau: epochs without better validation before the end")
    lowest_rate: float = _option(1e-6, "plateau: a lower rate ends the training")
    foreground_fraction: float = _option(0.33, "share of a batch that is centred on foreground")
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    seed: int = _option(0, "of network and batches; fixes everything on the CPU bit for bit")
    device: str = _option("auto", "auto, cpu or cuda")
    precision: str = _option("fp32", "fp32, or bf16 (autocast; the loss stays in fp32)")
    memory_format: str = _option("contiguous", "contiguous or channels_last")
    threads: int = _option(0, "of torch on the CPU; 0 leaves it to torch")
    workers: int = _option(1, "processes that make batches; 0 makes them in between")
    prefetch: int = _option(4, "batches made ahead")
    validation: bool = _option(True, "segment the fold's validation cases at the end")
    validation_mirrors: bool = _option(True, "average over mirrorings in that")

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"config schema {self.schema_version}, this code reads {SCHEMA_VERSION}"
            )
        for name in ("epochs", "batches_per_epoch", "validation_batches", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("seed", "workers", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not self.learning_rate > 0 or (self.minutes is not None and not self.minutes > 0):
            raise ValueError(
                f"learning_rate {self.learning_rate}, minutes {self.minutes}, expected more than 0"
            )
        if not 0 <= self.foreground_fraction <= 1:
            raise ValueError(f"foreground_fraction is {self.foreground_fraction}, expected 0 to 1")
        allowed = {
            "precision": PRECISIONS,
            "memory_format": MEMORY_FORMATS,
            "lr_schedule": schedule.SCHEDULES,
            "device": ("auto", "cpu", "cuda"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(values)}"
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


RECIPES = {
    "msd2018": TrainingConfig(),
    # for a small network on a few CPU cores, as long as --minutes says
    "compact": TrainingConfig(
        recipe="compact",
        batches_per_epoch=100,
        validation_batches=10,
        learning_rate=1e-3,
        lr_schedule="poly",
        augmentation=AugmentationConfig(image_order=1),
        precision="bf16",
        memory_format="channels_last",
        threads=1,
        workers=0,
        validation_mirrors=False,
    ),
}


def config_from(args: argparse.Namespace, recipe: str) -> TrainingConfig:
    """The recipe with the flags that were given.

    Raises:
        TrainingError: A value is out of range, or there is no such recipe.
    """
    if recipe not in RECIPES:
        raise TrainingError(
            f"no training recipe {recipe!r} yet, expected one of {', '.join(RECIPES)}"
        )
    base = RECIPES[recipe]
    try:
        augmentation = dataclasses.replace(base.augmentation, **_given(args, AugmentationConfig))
        return dataclasses.replace(base, augmentation=augmentation, **_given(args, TrainingConfig))
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _flag_fields(cls: type[Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, type and help of each field that is a flag."""
    hints = typing.get_type_hints(cls)
    for option in dataclasses.fields(cls):
        if option.name not in ("schema_version", "recipe", "augmentation"):
            yield option.name, hints[option.name], option.metadata.get("help", "")


def add_flags(group: Any, cls: type[Any], defaults: Any) -> None:
    """One flag for each field of a config class; left out, it is the recipe's value."""
    for name, hint, text in _flag_fields(cls):
        default = getattr(defaults, name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        options: dict[str, Any] = {"default": None, "help": f"{text} [{shown}]".strip()}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            options |= {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
        else:
            kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
            options |= {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def _given(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    values = {name: getattr(args, name) for name, _, _ in _flag_fields(cls)}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items() if v is not None}
