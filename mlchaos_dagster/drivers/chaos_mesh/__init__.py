"""The Chaos Mesh backend: its controller and daemons make the fault, we guard, watch, stop and prove.

driver.py         which kinds there are
faults.py         neutral kind → handler
specs.py          neutral fault → kind and spec of Chaos Mesh
resources.py      the resources that we create
states.py         what a resource's status says
handler.py        the verbs for all kinds; pod_kill.py for kills at an interval, brought.py for a team's own resource
life.py           created paused, let go, stopped, deleted
leavings.py       what is noted at the pods when Chaos Mesh cannot take it back
preflight.py      what speaks against it, before anything is measured
eyes.py           our own look: pod_eyes.py (from the API server), inside_eyes.py (by eye.py, a container of ours),
                  resolver_eyes.py and mount_eyes.py (files in the container)
"""
