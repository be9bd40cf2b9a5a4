"""Cases become preprocessed arrays on disk, readable patch by patch.

In come a workspace and a configuration of its plans; out comes
``WORKSPACE/preprocessed/<configuration>`` with Blosc2 arrays of intensities and labels, each
case with a digest of the files it was made from. Open ``preprocess`` first; ``chunks`` is the
format.
"""
