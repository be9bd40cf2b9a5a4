"""A file or a folder of slices becomes a ``Volume`` in HU, and a mask becomes a file again.

In comes a path: MHA, NIfTI or a folder of DICOM slices. Out goes a ``Volume``: voxels in
``(z, y, x)`` with spacing, origin and direction in mm, checked against the file before memory is
taken. The way back writes a mask on the same grid and reads it again. Open ``volume`` first;
``headers`` is the door that stands before ITK (``metaimage`` and ``nifti`` know the two kinds of
header, ``stored`` the bytes behind them), ``reader`` chooses between files and DICOM folders, and
``plausibility`` says whether the values can be a head CT's.
"""
