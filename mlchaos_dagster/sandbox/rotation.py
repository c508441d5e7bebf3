"""Rotations of what the edge proves itself by, and of what its clients do. They are acts: what is new stays.

A rotation is not undone. Recovery means that it is complete, whenever it is asked for: what was new is the only thing that
is accepted, what was old is refused. Afterwards nothing of the lease is left: no second credential, no certificate that
is served or trusted beside the new one, no task. An early end brings forward what would have come anyway.

Both go in the order that keeps clients whole if the platform has its mechanism: the edge knows the new one first, the
clients get it then, the old one is refused last.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from . import audit, pki
from .faults import Fault, Refused
from .handlers import number, only

if TYPE_CHECKING:
    from .slots import Slot
    from .supervisor import Supervisor

_CALL_S = 0.6
_LOOK_S = 0.4
_REVOKE_AFTER_S = 2.0
"""From the new certificate on disk to the old one being revoked: an edge that reloads at all has done so by then."""
_CLIENTS_AFTER_S = 1.0
"""From the edge knowing a new credential to the clients having it: mounted secrets reach them late, on Kubernetes by up
to a minute, which is 1.5 s at the sandbox's scale. They read theirs again within another half second."""
_UNANSWERED = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


@dataclass
class _Certificate:
    before: str
    serial: int
    after: str
    revoked: bool = False


@dataclass
class _Credential:
    old: str
    new: str
    until: float
    given: bool = False
    withdrawn: bool = False


class _Rotation:
    """What both have in common."""

    kind = ""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.files = pki.files(supervisor.directory)
        self.audit = supervisor.directory / audit.NAME

    def targets(self) -> Collection[str]:
        """The edge."""
        return [name for name, slot in self.supervisor.slots.items() if slot.role == "edge"]

    async def note(self, fault: Fault, what: str, **details: Any) -> None:
        """One entry of the audit log. Raises Refused(503): what is not audited is not done."""
        try:
            await audit.note(self.audit, f"lease {fault.lease_id}", what, fault.target, **details)
        except OSError as error:
            raise Refused(503, f"the audit log cannot be written: {error}") from error

    def slot(self, fault: Fault) -> Slot | None:
        """The edge's, while it can be asked."""
        slot = self.supervisor.slots.get(fault.target)
        return slot if slot is not None and slot.running and slot.port is not None else None

    async def reload(self, fault: Fault) -> dict[str, Any] | None:
        """Have the edge look at its files now; what it serves and accepts, None when it did not answer."""
        if (slot := self.slot(fault)) is None:
            return None
        try:
            status, answer = await self.supervisor.call(slot, "PUT", "/reload", None, _CALL_S)
        except _UNANSWERED:
            return None
        return answer if status == 200 else None

    def users_port(self) -> int:
        """Port of the HTTPS face; 0 before there is one."""
        try:
            return int((self.files.directory / "port").read_text())
        except (OSError, ValueError):
            return 0

    def must_run(self, fault: Fault) -> None:
        """Raises Refused(503)."""
        if self.slot(fault) is None or not self.users_port():
            raise Refused(503, f"{fault.target} is not running; try again")

    def must_be_alone(self, others: Collection[Any]) -> None:
        """A second rotation of the same would end the first one's overlap. Raises Refused(409)."""
        if others:
            raise Refused(409, f"another {self.kind} is not complete yet")

    async def audited(self) -> str:
        """A line of evidence about the audit log."""
        broken = await asyncio.to_thread(audit.verify, self.audit)
        last = await asyncio.to_thread(audit.head, self.audit)
        return f"audit log: {last.n} entries, {'chain intact' if broken is None else f'BROKEN at line {broken}'}"


class CertificateRotation(_Rotation):
    """A new certificate on disk; two seconds later the old one is revoked, and clients refuse it.

    Seen by a TLS handshake of our own. It fired when the certificate on disk is another one than before; whether it is
    served is the platform's part, and what the experiment is about.
    """

    kind = "certificate_rotation"

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor)
        self.done: dict[tuple[str, str, str], _Certificate] = {}

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """None."""
        only(self.kind, given)
        return {}

    async def inject(self, fault: Fault) -> None:
        """Issue it. Raises Refused(503)."""
        self.must_run(fault)
        self.must_be_alone(self.done)
        before = await _fingerprint(self.users_port())
        if before is None:
            raise Refused(503, f"{fault.target} does not answer a TLS handshake; try again")
        try:
            _, serial = await asyncio.to_thread(pki.served, self.files)
            after = await asyncio.to_thread(pki.issue, self.files)
        except OSError as error:
            raise Refused(503, f"no certificate could be issued: {error}") from error
        self.done[fault.key] = _Certificate(before, serial, after)
        await self.note(fault, "certificate_issued", before=before, after=after)
        await self.reload(fault)
        fault.tasks.append(asyncio.get_running_loop().create_task(self._revoke_later(fault)))

    async def clear(self, fault: Fault) -> None:
        """Complete it: the old certificate is revoked. Raises Refused(503)."""
        if (mine := self.done.get(fault.key)) is None:
            return
        await self._revoke(fault, mine)
        del self.done[fault.key]

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """What a new connection gets now, against what is on disk."""
        if (mine := self.done.get(fault.key)) is None:
            return None
        on_disk, _ = await asyncio.to_thread(pki.served, self.files)
        now = await _fingerprint(self.users_port())
        lines = [
            f"{fault.target} served {_short(mine.before)} before, {_short(now)} now (TLS handshake); "
            f"on disk is {_short(on_disk)}",
            f"the old certificate is {'revoked' if mine.revoked else 'still trusted'}",
            await self.audited(),
        ]
        facts = {"before": mine.before, "after": mine.after, "served": now, "revoked": mine.revoked}
        return on_disk == mine.after != mine.before, lines, facts

    async def _revoke_later(self, fault: Fault) -> None:
        await asyncio.sleep(_REVOKE_AFTER_S)
        async with self.supervisor.book.lock:
            if (mine := self.done.get(fault.key)) is not None:
                with suppress(Refused):  # ``clear`` tries again, and says so
                    await self._revoke(fault, mine)

    async def _revoke(self, fault: Fault, mine: _Certificate) -> None:
        if mine.revoked:
            return
        try:
            await asyncio.to_thread(pki.revoke, self.files, mine.serial)
        except OSError as error:
            raise Refused(503, f"the list of revoked certificates cannot be written: {error}") from error
        mine.revoked = True
        self.supervisor.truth.write(
            "certificate_revoked", fault.target, None, fault.lease_id, fingerprint=mine.before, next=mine.after
        )
        await self.note(fault, "certificate_revoked", fingerprint=mine.before)


class CredentialRotation(_Rotation):
    """A new credential; the clients get it a second later, the old one is refused ``overlap_s`` after the new one came."""

    kind = "credential_rotation"

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor)
        self.done: dict[tuple[str, str, str], _Credential] = {}

    def params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``overlap_s`` (2)."""
        only(self.kind, given, "overlap_s")
        return {"overlap_s": number(self.kind, given, "overlap_s", 0, 3600, 2.0)}

    async def inject(self, fault: Fault) -> None:
        """Have the edge know the new one. Raises Refused(503)."""
        self.must_run(fault)
        self.must_be_alone(self.done)
        try:
            old = (await asyncio.to_thread(self.files.authorization.read_text)).strip()
        except OSError as error:
            raise Refused(503, f"the clients' credential cannot be read: {error}") from error
        new, until = pki.new_credential(), time.time() + fault.params["overlap_s"]
        self.done[fault.key] = _Credential(old, new, until)
        await self.note(fault, "credential_issued", old=pki.digest(old)[:12], new=pki.digest(new)[:12])
        try:
            await asyncio.to_thread(pki.accept, self.files, [(new, None), (old, until)])
        except OSError as error:
            raise Refused(503, f"the accepted credentials cannot be written: {error}") from error
        answer = await self.reload(fault)
        if answer is None or answer["current"] != pki.digest(new):
            raise Refused(503, f"{fault.target} did not take the new credential; try again")
        fault.tasks.append(asyncio.get_running_loop().create_task(self._complete_later(fault)))

    async def clear(self, fault: Fault) -> None:
        """Complete it: clients have the new one, the old one is refused. Raises Refused(503)."""
        if (mine := self.done.get(fault.key)) is None:
            return
        await self._give(fault, mine)
        await self._withdraw(fault, mine)
        del self.done[fault.key]

    async def seen(self, fault: Fault) -> tuple[bool, list[str], dict[str, Any]] | None:
        """What the edge answers to the new credential and to the old one now."""
        if (mine := self.done.get(fault.key)) is None:
            return None
        new, old = await asyncio.gather(self._ask(mine.new), self._ask(mine.old))
        left = mine.until - time.time()
        when = "withdrawn" if mine.withdrawn else f"its overlap ends in {max(0.0, left):.1f} s"
        lines = [
            f"{fault.target} answers {new or 'nothing'} to the new credential, {old or 'nothing'} to the old one ({when})",
            f"clients have the {'new' if mine.given else 'old'} one",
            await self.audited(),
        ]
        return new == 200, lines, {"new": new, "old": old, "given": mine.given, "withdrawn": mine.withdrawn}

    async def _complete_later(self, fault: Fault) -> None:
        await asyncio.sleep(_CLIENTS_AFTER_S)
        async with self.supervisor.book.lock:
            if (mine := self.done.get(fault.key)) is None:
                return
            with suppress(Refused):  # ``clear`` tries again, and says so
                await self._give(fault, mine)
        await asyncio.sleep(max(0.0, mine.until - time.time()))
        async with self.supervisor.book.lock:
            if fault.key in self.done:
                with suppress(Refused):
                    await self._withdraw(fault, mine)

    async def _give(self, fault: Fault, mine: _Credential) -> None:
        if mine.given:
            return
        try:
            await asyncio.to_thread(pki.give_to_clients, self.files, mine.new)
        except OSError as error:
            raise Refused(503, f"the clients' credential cannot be written: {error}") from error
        mine.given = True
        self.supervisor.truth.write("credential_given", "clients", None, fault.lease_id)

    async def _withdraw(self, fault: Fault, mine: _Credential) -> None:
        """Refuse the old one, and see it refused. An edge that does not confirm is killed: a new one reads the files."""
        if mine.withdrawn:
            return
        try:
            await asyncio.to_thread(pki.accept, self.files, [(mine.new, None)])
        except OSError as error:
            raise Refused(503, f"the accepted credentials cannot be written: {error}") from error
        answer = await self.reload(fault)
        slot = self.slot(fault)
        if slot is not None and (answer is None or answer["current"] != pki.digest(mine.new)):
            self.supervisor.truth.write("edge_unresponsive", slot.name, slot.pid, fault.lease_id)
            await slot.kill(fault.lease_id)
            if slot.running:
                raise Refused(503, f"{slot.name} neither answers nor dies")
        old, new = await asyncio.gather(self._ask(mine.old), self._ask(mine.new))
        if old == 200:
            raise Refused(503, f"{fault.target} still accepts the old credential")
        mine.withdrawn = True
        self.supervisor.truth.write("credential_withdrawn", fault.target, None, fault.lease_id, old=old, new=new)
        await self.note(fault, "credential_withdrawn", credential=pki.digest(mine.old)[:12], old=old, new=new)

    async def _ask(self, credential: str) -> int:
        """Status of a real request with a credential, over TLS that is verified; 0: no answer."""
        try:
            context = await asyncio.to_thread(_trusting, self.files.trust)
            url = f"https://127.0.0.1:{self.users_port()}/whoami"
            timeout = aiohttp.ClientTimeout(total=_LOOK_S)
            headers = {"Authorization": credential}
            connector = aiohttp.TCPConnector(ssl=context, force_close=True)
            async with aiohttp.ClientSession(connector=connector) as session:
                async with session.get(url, headers=headers, timeout=timeout) as response:
                    return response.status
        except _UNANSWERED:
            return 0


def _trusting(trust: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(trust))
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


async def _fingerprint(port: int) -> str | None:
    """SHA-256 of the certificate that a new connection gets, whoever trusts it; None: no handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        opening = asyncio.open_connection("127.0.0.1", port, ssl=context)
        _, writer = await asyncio.wait_for(opening, _LOOK_S)
    except (asyncio.TimeoutError, OSError):
        return None
    try:
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return hashlib.sha256(found).hexdigest() if found else None
    finally:
        writer.transport.abort()


def _short(fingerprint: str | None) -> str:
    return f"certificate {fingerprint[:12]}" if fingerprint else "nothing"
