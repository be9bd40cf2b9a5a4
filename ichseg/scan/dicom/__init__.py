"""A folder of DICOM slices becomes one ``Volume``, and a mask may become a DICOM-SEG.

In comes a folder. ``studies`` says which cases lie in it; of each case ``sorting`` reads the files
(``files``, ``elements``), ``stacking`` puts slices in their order, ``choosing`` compares the
series, ``pixels`` decodes what is used (compressed ones in a process of their own, ``decompress``)
and ``straighten`` brings tilted or unevenly spaced slices onto a straight grid. Open ``series``
first.
"""
