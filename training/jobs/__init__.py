"""Stages become jobs: the commands that train folds, and the one that does whatever is left to do.

In come a dataset and a workspace; out comes a finished workspace with its bundles. ``train`` trains
and validates folds, one after another or, by ``queue``, side by side on GPUs; ``run`` goes through
the table of ``stages``. Open ``run`` first.
"""
