"""The native Kubernetes backend: faults on real pods, workloads, nodes and their network, undone from any machine.

driver.py     which kinds there are
faults/       their handlers
actions.py    rollback actions
agents.py     our helper containers in target pods
"""
