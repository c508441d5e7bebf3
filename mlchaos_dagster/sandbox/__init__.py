"""A small ML platform of real processes on loopback: what the sandbox environment breaks.

Nothing in this package imports the rest of ``mlchaos_dagster``: it is the system under test, and a judge must not
share code with the accused. Callers need only :mod:`mlchaos_dagster.sandbox.api`, which imports the standard library.
"""
