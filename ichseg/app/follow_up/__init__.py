"""Two scans of a patient: ``ichseg compare-scans A B``.

In come two scans; out come their masks, how much the bleeds have grown, lesion by lesion, and a
page with both scans side by side. Open ``compare`` first; ``growth`` has the numbers, and
``ichseg.scan.register`` brings one scan onto the other.
"""
