"""A file or a folder of slices becomes a ``Volume`` in HU, and a mask becomes a file again.

In comes a path (MetaImage, NRRD, NIfTI or a folder of DICOM slices) or, by ``images``, what a
caller from Python has: an array, an image of nibabel or SimpleITK. Out goes a ``Volume``: voxels in
``(z, y, x)`` with spacing, origin and direction in mm, checked against the file before memory is
taken. The way back writes a mask on the same grid and reads it again. Open ``volume`` first;
``headers`` is the door that stands before ITK (``metaimage``, ``nifti`` and ``nrrd`` know the kinds
of header, ``stored`` the bytes behind them), ``reader`` chooses between files and DICOM folders,
``plausibility`` says whether the values can be a head CT's, and ``slices`` whether its slices can.
"""
