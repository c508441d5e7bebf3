"""What is different when Litmus makes a fault. For people: `docs/backends.md`."""

from __future__ import annotations

from mlchaos_dagster.drivers.cluster.differences import Difference

START = "Seconds from our ChaosEngine to the effect (seen: 15 s for `pod_delete`, 14 s for `network_partition`, 26 s for `cpu_stress`); more where images are pulled. They count to the measured window and to `detect`, and make effects smaller than the harm; objectives must hold over the fault's own duration, too."
END = "Litmus's own stop takes 9 to 13 s (seen); we prove the target clean ourselves, as soon as its Jobs and pods are gone."
_EXPERIMENT = "The experiment undoes it at its duration, as long as it and its helper live; when they are killed without grace it stays until the sweeper or `mlchaos clean`."
_CGROUP = "CPU or memory of the container's cgroup, read inside it: Python must be in the container."
_WIRE = "From inside the pod: connections and requests to the other end, and the kernel's own queue (`netem`)."
_STRESS = (
    "A privileged helper on the node puts stress-ng into the container's cgroup; its limits hold, its HPA acts. The helper is "
    "in the namespace of the engine and shares the node's processes."
)
_NETEM = "The kernel needs `netem`. Pod security must let a privileged helper in."

DIFFERENCES = {
    "pod_delete": Difference(
        "`pod-delete`",
        "The frozen pods by name, once. `signal: kill` is `FORCE=true`, which deletes with no grace.",
        "Nothing to end.",
        "Each frozen pod is gone, by uid.",
        "`evict: true` is refused: Litmus asks no budget (our guards do, before). An `interval` only where all pods of the workload are hit, or a StatefulSet's, since a second round could not be kept to frozen pods.",
    ),
    "container_kill": Difference(
        "`container-kill`",
        "SIGKILL through the node's container runtime, not from inside the pod: no helper container is added to the pod.",
        "Nothing to end; at an interval the experiment's duration.",
        "That start of the container is over, by its id.",
        "Pod security must let a privileged helper in. For another runtime than containerd: `kubernetes.litmus.env`.",
    ),
    "cpu_stress": Difference(
        "`pod-cpu-hog`", _STRESS, _EXPERIMENT, _CGROUP, "A load of less than 1 % of a core is taken for 1 %."
    ),
    "memory_stress": Difference(
        "`pod-memory-hog`",
        _STRESS
        + " Asked for more than the limit, the stressor is killed and the service lives; with ours the kernel takes the service.",
        _EXPERIMENT,
        _CGROUP,
        "Whole MiB.",
    ),
    "network_latency": Difference(
        "`pod-network-latency`",
        "`netem` at the root of the pod's interface delays what leaves the pod, to the other end's addresses as they were when the fault was planned; ours delays both directions and follows no queue.",
        _EXPERIMENT,
        _WIRE,
        _NETEM + " Whole milliseconds. It replaces the root queue of the interface.",
    ),
    "network_loss": Difference(
        "`pod-network-loss`",
        "`netem` drops what leaves the pod; ours drops both directions.",
        _EXPERIMENT,
        _WIRE,
        _NETEM + " It replaces the root queue of the interface.",
    ),
    "network_partition": Difference(
        "`pod-network-partition`",
        "A NetworkPolicy on the frozen pods, which we mark by a label: the cluster's network must enforce policies, and connections that are open may live on, as its network decides.",
        "The experiment removes the policy at its duration; when it is killed the policy stays until the sweeper or `mlchaos clean`.",
        "From inside the pod: connections to the other end; and the policy itself.",
        "Pods of one workload of a kind that Litmus knows. All ports: `kubernetes.ports` is refused.",
    ),
    "network_isolation": Difference(
        "`pod-network-partition`",
        "The same, with nothing let through. As with any NetworkPolicy the pod's own node still reaches it.",
        "As `network_partition`.",
        "From inside the pod: connections to anybody; and the policy itself.",
        "As `network_partition`.",
    ),
}
"""Neutral kind → what is different."""
