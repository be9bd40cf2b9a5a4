"""Where jobs run: ``local`` is this machine, ``cluster`` the nodes of a Ray cluster.

In come jobs, as they are ready; out comes how each ended. ``queue`` says what a place has to be
able to do. Open ``local`` first.
"""
