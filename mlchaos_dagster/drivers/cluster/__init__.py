"""What all backends on a Kubernetes cluster share: native, Litmus and Chaos Mesh.

driver.py     the engine's verbs, dispatched to the handler of the fault's kind
handler.py    what one fault kind must be able to do
preflight.py  guards that hold for every kind
rivals.py     who else is at work on a target
planned.py    chaos of others that starts by itself
frozen.py     the frozen object and no other
rounds.py     what replaced the frozen pods, again at an interval
evidence.py   what was read at each target, as one
beside.py     a verb that waits, beside the engine's loop
"""

from __future__ import annotations

PLACES = {
    "kubernetes": "kubernetes.driver:KubernetesDriver",
    "litmus": "litmus.driver:LitmusDriver",
    "chaos_mesh": "chaos_mesh.driver:ChaosMeshDriver",
}
"""Backend → where its driver is."""
