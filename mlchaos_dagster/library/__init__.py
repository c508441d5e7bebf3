"""Experiments, environments, suites and JSON Schemas that are shipped: data, read by `mlchaos_dagster.catalog`."""
