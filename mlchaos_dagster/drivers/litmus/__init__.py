"""The backend Litmus: neutral faults, and ChaosEngines that a team brings along, under our guards and our abort.

driver.py     the engine's verbs; the tool's own judgement
handler.py    one lease as one ChaosEngine
faults.py     which experiment, with which variables
engine.py     the ChaosEngine of a lease
tracks.py     everything that belongs to one ChaosEngine, as the cluster has it
states.py     what of it says injected, failed, over, judged
recovery.py   stopped, cleaned, proven, removed; also without the operator
guards.py     what is missing, and the command that brings it
eyes.py       our own look at the targets
"""
