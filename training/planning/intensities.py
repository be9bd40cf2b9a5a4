"""How intensities are normalised: what the network sees of HU, or of another modality's numbers."""

from __future__ import annotations

from ichseg.errors import DatasetError, PlansError
from ichseg.model.plans import Normalisation
from ichseg.wording import times
from training.data.dataset import Dataset, is_ct
from training.planning.fingerprint import Fingerprint

_RESCALED = ("rescale_to_0_1", "rgb_to_0_1")  # nnU-Net's names of normalisations not done here
_MASKED_BELOW = 0.75  # relative size after the crop below which z-scores keep to the nonzero region


def plan_normalisations(
    fingerprint: Fingerprint, dataset: Dataset, ct_clip: tuple[float, float] | None
) -> tuple[Normalisation, ...]:
    """CT is normalised by the foreground of all cases, every other modality image by image.

    Args:
        fingerprint: The dataset's, with the foreground's intensities.
        dataset: The dataset, whose channels name their modality.
        ct_clip: Limits in HU in place of the percentiles, or None.

    Raises:
        PlansError: The limits fit no channel, or leave out its foreground.
        DatasetError: The foreground of a CT channel has no spread to normalise by, or a channel
            names a normalisation that there is not.
    """
    if ct_clip is not None and not any(is_ct(channel) for channel in dataset.channels):
        raise PlansError(
            f"CT clip {times(ct_clip)} HU, but no channel is CT: {', '.join(dataset.channels)}"
        )
    found = []
    masked = fingerprint.relative_size < _MASKED_BELOW
    for channel, foreground in zip(dataset.channels, fingerprint.intensities, strict=True):
        low, high = ct_clip or (foreground.percentile_00_5, foreground.percentile_99_5)
        if channel.strip().casefold() in _RESCALED:
            raise DatasetError(
                f"channel {channel}: no such normalisation, expected CT, noNorm (which leaves "
                "intensities as they are), or another name, which means z-scores of each image"
            )
        if channel.strip().casefold() == "nonorm":
            found.append(Normalisation("none"))
        elif not is_ct(channel):
            found.append(Normalisation("zscore", masked=masked))
        elif not (foreground.deviation > 0 and low < high):
            raise DatasetError(
                f"channel {channel}: nearly all foreground voxels are {foreground.median:g}, "
                "expected intensities with a spread"
            )
        elif ct_clip is not None and not low < foreground.mean < high:
            raise PlansError(
                f"CT clip {low:g} to {high:g} HU leaves out the foreground of channel {channel}, "
                f"whose mean is {foreground.mean:.1f} HU"
            )
        else:
            found.append(Normalisation("ct", low, high, foreground.mean, foreground.deviation))
    return tuple(found)
