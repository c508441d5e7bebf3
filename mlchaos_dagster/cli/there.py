"""The cluster of the chosen environment, for `status`, `stop` and `recover`: leases of other machines, and its lever."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mlchaos_dagster import wiring
from mlchaos_dagster.cli.app import App
from mlchaos_dagster.errors import SpecError
from mlchaos_dagster.kube.remote import RemoteLedger

if TYPE_CHECKING:
    from mlchaos_dagster.kube.leases import ClusterLedger


class There(RemoteLedger):
    """The ledger in the cluster of the chosen environment."""

    def __init__(self, app: App) -> None:
        super().__init__(lambda: wiring.cluster_of(app.environment, app.settings), app.settings.user)
        self.app = app

    @property
    def exists(self) -> bool:
        """Whether the environment has a cluster. A library that is wrong keeps nobody from stopping what is here."""
        try:
            return self.app.environment.kubernetes is not None
        except SpecError:
            return False

    def state(self) -> dict[str, Any]:
        """For `status`: its lever, its sweeper, its open leases; why not, where it does not answer."""
        from mlchaos_dagster.cli.places import lease_json

        def look(ledger: ClusterLedger) -> dict[str, Any]:
            now = time.time()
            return {
                "lever": ledger.lever.read(),
                "sweeper": ledger.sweeper(),
                "open_leases": [lease_json(x, now) for x in ledger.leases()],
                "unreadable_leases": list(ledger.unreadable()),
            }

        found, said = self.ask(look).wait()
        return {"error": said} if found is None else {"error": "", **found}
