"""What is different when Chaos Mesh makes a fault. For people: `docs/backends.md`."""

from __future__ import annotations

from mlchaos_dagster.drivers.cluster.differences import Difference

START = "From our resource to the effect one reconcile of its controller: it is made paused, its selection is held against the frozen pods, then it is let go."
END = "A pause recovers and keeps the status readable; the resource goes after our own look."
_DURATION = "Chaos Mesh's controller, at the duration; with the controller down it lasts until that is back."
_NETWORK = "From inside the pod, by a container of ours: the rules and queues of its network, and connections to the other end."
_NETEM = "The kernel needs `netem`: where it has none, Chaos Mesh tries for ever, and the run says so and takes it back. IPv4 only. `kubernetes.ports` is refused."
_FROZEN_END = "The other end is its pods' and Services' addresses as they were when the fault was planned."
_STRESS = "A process of the daemon in the container's cgroup; its limits hold, its HPA acts."

DIFFERENCES = {
    "pod_delete": Difference(
        "PodChaos `pod-kill`",
        "Deletes the frozen pods by name. An `interval` is ours: one PodChaos after the other.",
        "Nothing to end.",
        "Each frozen pod is gone, by uid.",
        "A kill is done at once and deaf to a pause. `evict: true` is refused.",
    ),
    "pod_failure": Difference(
        "PodChaos `pod-failure`",
        "Images of all containers are swapped for a pause image and back, as we do it: two restarts, and a further one soon after runs into the kubelet's back-off.",
        _DURATION,
        "Images of the frozen pods, and that they are not ready.",
    ),
    "container_kill": Difference(
        "PodChaos `container-kill`",
        "The daemon kills the container through the node's runtime; ours gets SIGKILL from inside the pod.",
        "Nothing to end.",
        "That start of the container is over, by its id.",
    ),
    "network_latency": Difference(
        "NetworkChaos `delay`",
        f"Delays what leaves the pod, so a round trip takes longer by the delay once; ours delays both directions. {_FROZEN_END}",
        _DURATION,
        _NETWORK,
        _NETEM,
    ),
    "network_loss": Difference(
        "NetworkChaos `loss`",
        f"Drops what leaves the pod; ours drops both directions. {_FROZEN_END}",
        _DURATION,
        _NETWORK,
        _NETEM,
    ),
    "network_partition": Difference(
        "NetworkChaos `partition`",
        f"iptables and ipset in the pod's network drop both directions; with ports only what leaves. {_FROZEN_END}",
        _DURATION,
        _NETWORK,
        "IPv4 only: over IPv6 the link stays.",
    ),
    "network_isolation": Difference(
        "NetworkChaos `partition`",
        "From everybody but the pod's own node, whose kubelet goes on asking.",
        _DURATION,
        _NETWORK,
        "IPv4 only.",
    ),
    "dns_failure": Difference(
        "DNSChaos `error`",
        "The pod's resolver is pointed at Chaos Mesh's DNS server, which answers every name with an error: fast failures. Ours drops the queries: slow ones, by time-out.",
        _DURATION,
        "The pod's `/etc/resolv.conf`, read in the container.",
        "Needs the chart's `dnsServer`, and `cat` in the container.",
    ),
    "cpu_stress": Difference(
        "StressChaos `cpu`",
        f"{_STRESS} All workers are equally busy: a fraction of a core is spread over them.",
        _DURATION,
        "Stressors among the container's processes, and what its cgroup burns.",
        "A container in back-off is not retried into success: the inject fails.",
    ),
    "memory_stress": Difference(
        "StressChaos `memory`",
        f"{_STRESS} Asked for more than the limit, the stressor is killed and the service lives; with ours the kernel takes the service.",
        _DURATION,
        "Stressors among the container's processes, and the memory of its cgroup.",
        "Whole MiB.",
    ),
}
"""Neutral kind → what is different."""
