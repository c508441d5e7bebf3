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
    import ssl

    try:
        context = trusting(config["ca_file"])
    except OSError as error:
        leave(f"ca_file {config['ca_file']!r}: {error}")
    if not config["verify_tls"]:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def trusting(ca_file: str) -> ssl.SSLContext:
    """Trust the certificates of a PEM file (empty: the machine's own). With a list of revoked certificates (CRL) in
    it, what is on the list is refused.

    Raises:
        OSError: the file cannot be read, or holds no certificate.
    """
    import ssl  # only https pays for it

    context = ssl.create_default_context(cafile=ca_file or None)
    if ca_file:
        with open(ca_file, "rb") as file:
            if b"-----BEGIN X509 CRL-----" in file.read():
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


class Watched:
    """A file that may be replaced while we run."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Whether it is another one than at the last look, or was never looked at; one that is gone has not changed."""
        now = self._stamp()
        if now is None or now == self._seen:
            return False
        self._seen = now
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


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
