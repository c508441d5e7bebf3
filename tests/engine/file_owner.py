"""An owner as a process of its own: `python file_owner.py HOME RUN LEASE [word ...]`. Says on stdout what it did.

Words: `nowatch` no watchdog · `between` stops itself (SIGSTOP) in the middle of inject · `mute` never renews ·
`leave` leaves with the lease open, after a good-bye · `end` recovers, closes and leaves · `ttl=S`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from file_target import driver, make_lease

from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.engine.watchdog import start_watchdog
from mlchaos_dagster.errors import MlChaosError
from mlchaos_dagster.settings import Home


def main() -> None:
    home, run_id, lease_id, words = Home(Path(sys.argv[1])), sys.argv[2], sys.argv[3], sys.argv[4:]
    ttl = next((float(w[4:]) for w in words if w.startswith("ttl=")), 30.0)
    ledger, files = FileLedger(home.ledger, SystemClock()), driver("files", home, "test")
    handle = None
    if "nowatch" not in words:
        handle = start_watchdog(
            home, run_id, current_owner(), ttl, environment="test", driver="files", factory="file_target:driver"
        )
        assert handle.wait_alive()
        say(f"watchdog {handle.pid}")
    try:
        lease = ledger.open(make_lease(lease_id, ("t1", "t2"), run_id=run_id, stop_between="between" in words))
        say("open")
        ledger.check(lease)
        files.inject(lease)
        say("injected")
        if "end" in words or "leave" in words:
            if "end" in words:
                files.recover(lease)
                ledger.close(lease, files.active(lease).lines)
            if handle is not None:
                handle.close()
            say("left")
            return
        lost = False
        while True:
            if "mute" not in words:
                ledger.renew(lease)
            if handle is not None and not lost and not handle.alive():
                lost = True
                say("watchdog lost")
            time.sleep(0.05)
    except MlChaosError as e:
        say(f"{type(e).__name__} {e}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


main()
