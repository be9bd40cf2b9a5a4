"""The program around the segmentation: arguments, cases, a folder's pipeline, results, server.

In comes a command line or a POST; out come masks, ``results.json`` and one line that says why if
something failed. Open ``arguments`` for what a user can ask for, then ``pipeline``.
"""
