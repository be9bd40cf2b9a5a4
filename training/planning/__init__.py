"""A dataset's fingerprint becomes plans: spacing, patch, batch, network, cascade.

In come the converted cases; out come ``fingerprint.json`` and ``plans.json``. Recipes are tables of
constants for one family of functions. Open ``planner`` first.
"""
