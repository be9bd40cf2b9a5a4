"""A ``Volume`` becomes a ``Segmentation``: prepared, predicted by tiles, restored.

In come volumes and a model; out comes a mask on the grid of the input with what was found in it.
The way is ``presets`` (what has to be done), ``prepare`` (crop, resample, normalise), ``passes``
(fold times mirroring, running mean) over tiles by ``sliding_window``, ``restore`` (back to the
input's grid), ``components``; ``many`` takes many scans that way. Open ``ensemble`` first.
"""
