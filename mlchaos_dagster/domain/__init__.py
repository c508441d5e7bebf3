"""What an experiment, an environment, a plan and a record are. Pure: no I/O, no clock, no randomness."""
