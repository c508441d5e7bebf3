"""From records and verdicts to what people read: the picture, the report, the terminal, JSON.

Pure functions of a record: no clock, no network. Heavy libraries (matplotlib, rich, jinja2) are imported where they
are used, so that `mlchaos status` never waits for them.
"""
