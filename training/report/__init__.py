"""An evaluation becomes a page: curves, charts and every case, the worst first.

In comes a workspace or an evaluation; out comes ``report/index.html``. Open ``command`` first:
``cross_validation`` gathers what a workspace has to show, ``draw`` draws the cases, and
``evaluation_page`` with ``charts`` and ``templates/`` says the rest.
"""
