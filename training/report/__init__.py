"""An evaluation becomes a page: curves, charts and every case, the worst first.

In comes a workspace or an evaluation; out comes ``report/index.html``. Open ``command`` first,
which gathers what is shown; ``evaluation_page`` and ``templates/`` say how.
"""
