"""Measurements of the target. Imports nothing: the load generator's child process starts in milliseconds."""
