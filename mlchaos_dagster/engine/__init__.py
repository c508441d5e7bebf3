"""The order of a run, the fault window, the ledger and everything that takes a fault away."""
