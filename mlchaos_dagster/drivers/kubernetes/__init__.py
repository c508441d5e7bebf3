"""The Kubernetes backend: faults on real pods, workloads, nodes and their network, undone from any machine.

driver.py     the engine's verbs, dispatched to the handler of the fault's kind
handler.py    what one fault kind must be able to do
preflight.py  guards that hold for every kind
ledger.py     leases as `coordination.k8s.io/Lease` objects
faults/       the handlers
"""
