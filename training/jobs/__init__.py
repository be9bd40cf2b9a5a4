"""Stages become jobs: a graph of commands, and where they run.

In come a dataset and a workspace; out comes a finished workspace with its bundles. ``graph`` says
which jobs there are and which wait for which, ``done`` what shows that one need not be run,
``queue`` hands those that are ready to one of ``places``: this machine, or a Ray cluster. Each job
is a command that can be run by hand and goes on where it was stopped; ``train`` is that of a fold.
Open ``run`` first, then ``graph``.
"""
