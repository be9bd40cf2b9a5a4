"""Masks and references become scores: measures, lesions, statistics, tables.

In come two folders or files of labels; out come ``metrics.json``, ``evaluation.json``,
``cases.csv``, and by case ``detection.json``. Open ``evaluate`` first; INSTANCE 2022's measures are
in ``measures``, its surface Dice in ``surface``, whether there is a bleed at all in ``detection``.
"""
