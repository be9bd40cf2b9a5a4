"""Batches become trained weights: the loop, its step, schedule and checkpoints.

In come a configuration's batches and a ``TrainingConfig``; out comes a fold's folder with
checkpoints, ``progress.csv`` and ``progress.png``. Open ``loop`` first.
"""
