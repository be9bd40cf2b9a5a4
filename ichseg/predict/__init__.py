"""A ``Volume`` becomes a ``Segmentation``: prepared, predicted by tiles, restored.

In come volumes and a model; out comes a mask on the grid of the input with what was found in it.
The way is ``prepare`` (axes, crop, resample, normalise), ``sliding_window`` and ``passes`` (fold
times mirroring, running mean), the way back to the input's grid, ``components``. Open ``ensemble``
first.
"""
