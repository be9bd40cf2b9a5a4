"""A folder of scans through several workers: a process for each of several GPUs.

Each worker has its ensemble loaded once and asks a desk for the next scan; what a worker that died
had in its hands is done by another. In come the cases of a run, out come their results, one for
each. Open ``spread`` first, then ``desk`` and ``worker``. ``processes`` begins the workers.
"""
