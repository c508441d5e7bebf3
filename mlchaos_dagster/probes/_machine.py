"""What a measuring child process needs from the machine: precise waiting, open files, certificates, a sure exit.

Knows nothing of schedules and requests. Standard library only.
"""

from __future__ import annotations

import os
import resource
import select
import selectors
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import ssl


class PreciseSelector(selectors.EpollSelector if sys.platform == "linux" else selectors.DefaultSelector):
    """Epoll waits in whole milliseconds and so makes requests half a millisecond late on average; select does not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0 or sys.platform != "linux":
            return super().select(timeout)
        select.select([self.fileno()], [], [], timeout)
        return super().select(0)


def tls_context(config: dict[str, Any]) -> ssl.SSLContext:
    """What to trust; ends the process, in words, when the caller's certificates cannot be read."""
    import ssl  # only https pays for it

    try:
        context = ssl.create_default_context(cafile=config["ca_file"] or None)
    except OSError as error:
        leave(f"ca_file {config['ca_file']!r}: {error}")
    if not config["verify_tls"]:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def leave(reason: str) -> NoReturn:
    """Leave at once: nothing here needs unwinding, and a hanging connection must not hold the process."""
    if reason:
        say(reason)
    os._exit(1 if reason else 0)


def say(text: str) -> None:
    """A line on standard error, if anybody reads it."""
    try:
        os.write(2, text.encode("utf-8", "replace")[:500] + b"\n")
    except OSError:  # the reader is dead, which is no reason to live on
        pass


def raise_file_limit(wanted: int) -> int:
    """Connections this process may hold open, after asking the kernel for `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        except (OSError, ValueError):  # macOS refuses more than OPEN_MAX
            target = soft
        return target
    return wanted
