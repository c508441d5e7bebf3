"""Labels and annotations by which everything of ours in a cluster is found."""

PREFIX = "mlchaos.dev/"
"""Of all that are ours alone."""
OPT_IN = "mlchaos.dev/allow"
"""On a namespace: `true` lets faults in."""
MANAGED_BY = "app.kubernetes.io/managed-by"
OURS = "mlchaos"
"""Value of `MANAGED_BY` on every object that we create."""
OURS_SELECTOR = f"{MANAGED_BY}={OURS}"
LEASE = "mlchaos.dev/lease"
"""On every object that belongs to one lease: its id."""
COMPONENT = "mlchaos.dev/component"
"""What an object of ours is: `lease`, `undo`, `sweeper`, `lever`, `fault`, `backup`."""


def of_lease(lease_id: str, component: str) -> dict[str, str]:
    """Labels of an object that belongs to a lease."""
    return {MANAGED_BY: OURS, COMPONENT: component, LEASE: lease_id}
