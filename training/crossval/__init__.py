"""Trained folds become one judgement: validation, cascade labels, merging, selection.

In come the folds' checkpoints; out come masks of cases that their networks had not seen, one
evaluation over all training cases, and ``selection.json``. Open ``validate`` first, then ``merge``
and ``selection``.
"""
