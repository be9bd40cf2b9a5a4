"""Datasets as they arrive become one workspace, checked and split into folds.

In comes a dataset in one of the field's layouts; out come ``dataset.json``, images and labels below
``WORKSPACE/raw`` and ``splits.json``. Open ``workspace``, where everything lies, and ``dataset``
first, then ``convert`` and ``verify``.
"""
