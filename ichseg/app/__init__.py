"""The program around the segmentation: arguments, cases, a folder's pipeline, results, server.

In comes a command line or a POST; out come masks, ``results.json`` and one line that says why if
something failed. Open ``main`` first, which reads from the arguments to the exit status; then
``pipeline`` for a folder of cases, and ``one_case`` for what is done to each.
"""
