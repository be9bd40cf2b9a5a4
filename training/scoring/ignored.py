"""Voxels that nobody could tell are left out of every score.

A reference marks them with a label of its own, see ``training.data.dataset.Dataset``. There both
masks become background before anything is counted or measured: what was found there is neither
right nor wrong, and where both masks run into such a region, both end at its border.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.generic]


def leave_out(
    prediction: Labels, reference: Labels, ignore_label: int | None
) -> tuple[Labels, Labels]:
    """Both masks with background where the reference has the label to ignore.

    Args:
        prediction: The labels that were found, shape ``(z, y, x)``; left as they are.
        reference: The labels of the reference, of the same shape; left as they are.
        ignore_label: The label to ignore; None if there is none.
    """
    if ignore_label is None:
        return prediction, reference
    told = reference != ignore_label
    if told.all():
        return prediction, reference
    return np.where(told, prediction, 0), np.where(told, reference, 0)
