"""Damages a file inside a container and puts it back. Sent to it over an exec stream, after `drivers/s3_damage.py`.

    python3 -c BOOT LENGTHS MLCHAOS_LEASE=ID hold ORDER      keeps the original, damages the file when it is told `go`
    python3 -c BOOT LENGTHS - look|restore ORDER             reads what is there | puts the original back; one JSON object

The original is never rewritten: it gets a second name beside the first (a copy, read back, where the volume knows no
second names), and the damaged content replaces the first name at once. Whoever takes the lease away removes what was
prepared for that, so that a late `go` finds nothing to put in place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import shutil
import signal
import stat
import sys
import time

TYPE_CHECKING = False  # the module typing is not worth its start-up time in a busy container
if TYPE_CHECKING:
    from mlchaos_dagster.drivers.s3_damage import damaged

MARKER = "MLCHAOS_LEASE="
CHUNK = 1024 * 1024
END_S = 3.0


def say(**words: object) -> None:
    """One JSON line."""
    os.write(1, (json.dumps(words) + "\n").encode())


def chunks(path: str):
    """Of a file."""
    with open(path, "rb") as file:
        while True:
            chunk = file.read(CHUNK)
            if not chunk:
                return
            yield chunk


def digest(parts) -> str:
    """SHA-256 of content."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def sha256_of(path: str) -> str:
    """Of a file; empty when it cannot be read."""
    try:
        return digest(chunks(path))
    except OSError:
        return ""


def kept(path: str, lease: str) -> str:
    """Where the original is while the file is damaged."""
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.mlchaos-{lease}")


def partial(path: str, lease: str) -> str:
    """What becomes the damaged file."""
    return kept(path, lease) + ".damaged"


def sync(directory: str) -> None:
    """Make what was renamed in it durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def marked(lease: str) -> list:
    """Pids of the living processes of a lease."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if (MARKER + lease).encode() in words:
                found.append(int(name))
    return found


def look(order: dict) -> dict:
    """What is at the path and beside it. With `how` and `seed`: what its damage will be, too."""
    path, lease = os.path.realpath(order["path"]), order["lease"]
    found: dict = {
        "path": path,
        "sha256": "",
        "kept": os.path.lexists(kept(path, lease)),
        "partial": os.path.lexists(partial(path, lease)),
        "user": [os.geteuid(), os.getegid()],
        "unfit": "",
    }
    try:
        now = os.stat(path)
    except OSError as e:
        return dict(found, unfit=f"cannot be read: {e.strerror}")
    found.update(size=now.st_size, ino=now.st_ino, mtime_ns=now.st_mtime_ns, mode=stat.S_IMODE(now.st_mode))
    found.update(uid=now.st_uid, gid=now.st_gid, unfit=unfit(path, now))
    if not stat.S_ISREG(now.st_mode):
        return found
    found["sha256"] = sha256_of(path)
    if found["sha256"] and now.st_size and "seed" in order:
        found["damaged_sha256"] = digest(damaged(chunks(path), now.st_size, order["how"], order["seed"]))
    return found


def unfit(path: str, now: os.stat_result) -> str:
    """Why the file cannot be replaced and given back as it was; empty: it can."""
    directory = os.path.dirname(path)
    if not stat.S_ISREG(now.st_mode):
        return "is no regular file"
    if not now.st_size:
        return "is empty: there is nothing to damage"
    if now.st_nlink > 1:
        return f"has {now.st_nlink} names (hard links): the others would keep the old content"
    if os.path.ismount(path):
        return "is mounted by itself (subPath): it can only be replaced in a directory that is mounted"
    if not os.access(path, os.R_OK):
        return "may not be read by the container's user"
    if not os.access(directory, os.W_OK):
        return f"is in {directory}, where the container's user may not write"
    if os.geteuid() != 0 and (now.st_uid != os.geteuid() or now.st_gid not in [os.getegid(), *os.getgroups()]):
        return f"belongs to {now.st_uid}:{now.st_gid}, and the container's user could not give its like to them"
    room = os.statvfs(directory)
    if room.f_bavail * room.f_frsize < 2 * now.st_size:
        return f"has {now.st_size} bytes, and its volume no room for two more of it"
    return ""


def keep(path: str, where: str) -> None:
    """Give the original a second name. Raises OSError; also when that name is taken."""
    try:
        os.link(path, where)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV):
            raise
        shutil.copy2(path, where)
        now = os.stat(path)
        os.chown(where, now.st_uid, now.st_gid)
        os.chmod(where, stat.S_IMODE(now.st_mode))
    with open(where, "rb") as file:
        os.fsync(file.fileno())
    sync(os.path.dirname(path))


def hold(order: dict) -> None:
    """Prepare the damage, wait for the word, put it in place."""
    path, lease, limit = order["path"], order["lease"], max(1.0, float(order["seconds"]))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limit)
    ready, where = partial(path, lease), kept(path, lease)
    made: list = []
    try:
        keep(path, where)
        made = [where, ready]
        if sha256_of(where) != order["sha256"]:
            raise ValueError("it was changed since it was looked at")
        now = os.stat(path)
        with open(ready, "wb") as file:
            for chunk in damaged(chunks(path), now.st_size, order["how"], order["seed"]):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.chown(ready, now.st_uid, now.st_gid)
        os.chmod(ready, stat.S_IMODE(now.st_mode))
        say(state="armed")
        if not told_to_go():
            return
        os.replace(ready, path)
        made = []
        sync(os.path.dirname(path))
        say(state="holding")
    except (OSError, ValueError) as e:
        say(state="failed", error=f"{path}: {e}")
    finally:
        for name in made:
            remove(name)


def told_to_go() -> bool:
    """Wait for the word on standard input. False: it ended."""
    said = b""
    while b"go\n" not in said:
        select.select([0], [], [])
        words = os.read(0, 4096)
        if not words:
            return False
        said += words
    return True


def restore(order: dict) -> dict:
    """Put the original back where the file is as we left it; what others wrote since stays. Idempotent.

    Raises:
        ValueError: the file is damaged, and the original is not there any more.
    """
    path, lease = order["path"], order["lease"]
    until, pids = time.monotonic() + END_S, marked(lease)
    while pids and time.monotonic() < until:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # gone in between
        time.sleep(0.02)
        pids = marked(lease)
    remove(partial(path, lease))
    where = kept(path, lease)
    if sha256_of(path) == order["damaged_sha256"]:
        if not os.path.exists(where):
            raise ValueError(f"{path} is damaged, and the original beside it is gone")
        if os.stat(where).st_ino != order["ino"] and sha256_of(where) != order["sha256"]:
            raise ValueError(f"{path} is damaged, and so is the original's copy {where}")
        os.replace(where, path)
        sync(os.path.dirname(path))
    else:
        remove(where)
    return look({"path": path, "lease": lease})


def remove(path: str) -> None:
    """A file, if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def main(arguments: list) -> None:
    """`[LENGTHS, MARKER, VERB, ORDER]`."""
    verb, order = arguments[2], json.loads(arguments[3])
    if verb == "hold":
        hold(order)
    else:
        try:
            say(**{"look": look, "restore": restore}[verb](order))
        except (OSError, ValueError) as e:
            sys.exit(str(e))


if __name__ == "__main__":
    main(sys.argv[1:])
