"""Dagster: assets, ops, checks, jobs, schedules, sensors. The only package that imports it.

Importing this package imports nothing else; `mlchaos list`, `stop` and `recover` never come here.
"""
