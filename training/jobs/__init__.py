"""Stages become jobs: ``run`` does whatever is not done yet, ``queue`` puts folds on GPUs.

In come a dataset and a workspace; out comes a finished workspace with its bundles. Open ``run``
first.
"""
