"""A folder of DICOM slices becomes one ``Volume``, and a mask may become a DICOM-SEG.

In comes a folder; its elements are read by ``files``, the series is chosen by ``series``, the
pixels are decoded by ``pixels`` (compressed ones in a process of their own, ``decompress``), and
``straighten`` brings tilted or unevenly spaced slices onto a straight grid. Open ``series`` first.
"""
