"""Cases become preprocessed arrays on disk, readable patch by patch.

In come a workspace and a configuration of its plans; out comes
``WORKSPACE/preprocessed/<configuration>`` with Blosc2 arrays of intensities and labels. Open
``preprocess`` first; ``chunks`` is the format.
"""
