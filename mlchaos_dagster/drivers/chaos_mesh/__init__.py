"""The Chaos Mesh backend: its controller and daemons make the fault, we guard, watch, stop and prove.

driver.py       which kinds there are
resources.py    the resources that we create
specs.py        neutral fault → kind and spec of Chaos Mesh
states.py       what a resource's status says
life.py         created, injected, recovered, deleted
leavings.py     what is left at the pods when Chaos Mesh cannot take it back
handler.py      the verbs for all kinds
brought.py      a team's own resource
eyes.py         our own look at the pods, by kind
preflight.py    what speaks against it, before anything is measured
"""
