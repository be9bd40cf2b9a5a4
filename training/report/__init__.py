"""An evaluation becomes a page: curves, charts and every case, the worst first.

In comes a workspace or an evaluation; out comes ``report/index.html``. Open ``report`` first.
"""
