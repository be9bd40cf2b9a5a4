"""Pictures and the page: what people look at instead of reading JSON.

In come scans, masks and what was found; out come pictures, an ``index.html`` that opens from a disk
without a network, and a viewer for each case. ``case_files`` writes one case as it ends, with
``pictures`` and ``viewer``; ``inference_page`` writes the page of all. Open ``inference_page``
first, and ``templates/page.html``, which is the frame of every page.
"""

REPORT_FOLDER = "report"  # beside the masks, or in a workspace
PAGE_FILE = "index.html"
CASES_FOLDER = "cases"  # beside the page
