"""Pictures and the page: what people look at instead of reading JSON.

In come volumes, masks and results; out come pictures, an ``index.html`` that opens from a disk
without a network, and a viewer for each case. Open ``report`` first.
"""
