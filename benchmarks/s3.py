"""Objects damaged by the ten thousand, the injector killed at random moments; what is left behind?

    python -m benchmarks.s3 [--objects 10000] [--kills 20] [--seed 1] [--endpoint URL --access-key A --secret-key S]

Without an endpoint a moto server is started as a process of its own. Against another implementation, such as versitygw or
MinIO (both Go programs; test tools, no dependencies of this project):

    go install github.com/versity/versitygw/cmd/versitygw@latest
    versitygw --access access --secret secret --port 127.0.0.1:7070 posix --versioning-dir VERSIONS OBJECTS
    python -m benchmarks.s3 --endpoint http://127.0.0.1:7070 --access-key access --secret-key secret
    MLCHAOS_TEST_S3=http://127.0.0.1:7070 MLCHAOS_TEST_S3_KEYS=access:secret \
        python -m pytest tests/drivers/test_s3_driver.py

    go install github.com/minio/minio@latest
    MINIO_ROOT_USER=access MINIO_ROOT_PASSWORD=secretsecret minio server --address 127.0.0.1:7071 OBJECTS

Each trial runs the driver's verbs in the order of the fault window (undo, lease, inject, recover, prove, close) in a child
process, with the real ledger, and kills it with SIGKILL: half of the trials while it injects, half while it recovers; in
every fourth the first sweeper is killed, too. Meanwhile somebody else overwrites objects, damaged ones among them. Then the
sweep that `mlchaos recover` runs, in another process. A check that shares no code with the driver compares every version of
every object in the bucket with what must be there, and reads the contents of all that were chosen (at the end: of all).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.config import Config

from benchmarks.lab import ROOT, heading, row, table
from mlchaos_dagster import wiring
from mlchaos_dagster.domain.environment import S3Location, Target
from mlchaos_dagster.engine.incidents import IncidentLog
from mlchaos_dagster.engine.ledger import FileLedger
from mlchaos_dagster.engine.ports import Lease, SystemClock
from mlchaos_dagster.engine.processes import current_owner
from mlchaos_dagster.engine.sweep import sweep
from mlchaos_dagster.settings import Home

KIND, PREFIX, SIZE = "s3_object_corruption", "training/", 2048
HOWS = ("random_bytes", "truncate", "bit_flip", "swap")
THIRD_PARTY = 6
"""Objects that somebody else overwrites in each trial."""


# ---- the children


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def injector(home: Home, endpoint: str, bucket: str, how: str, fraction: float) -> None:
    """The verbs as the fault window calls them; every phase is told as a JSON line."""
    ledger, clock = FileLedger(home.ledger, SystemClock()), SystemClock()
    driver = wiring.driver("s3", home, "bench")
    target = Target(
        select="*",
        s3=S3Location(
            endpoint=endpoint,
            bucket=bucket,
            prefix=PREFIX,
            access_key="env:BENCH_ACCESS",
            secret_key="env:BENCH_SECRET",
        ),
    )
    lease_id = f"mlchaos-bench-{uuid.uuid4().hex[:10]}"
    params: dict[str, Any] = {"fraction": fraction, "prefix": "", "how": how}

    def timed(name: str, work: Any) -> Any:
        say(begin=name)
        began = time.perf_counter()
        result = work()
        say(end=name, seconds=round(time.perf_counter() - began, 3))
        return result

    targets = driver.resolve(target)
    undo = timed("undo", lambda: driver.undo(KIND, targets, params, target=target, backup=home.backups / lease_id))
    now = clock.wall()
    lease = ledger.open(
        Lease(
            lease_id,
            "bench",
            "bench",
            "bench",
            "s3",
            KIND,
            targets,
            params,
            undo,
            600.0,
            now,
            now + 600.0,
            current_owner(),
        )
    )

    def step(done: int, total: int) -> None:
        ledger.renew(lease)
        say(done=done, total=total)

    timed("inject", lambda: driver.inject(lease, step))
    seen = timed("confirm", lambda: driver.active(lease))
    say(effective=seen.effective, lines=seen.lines)
    timed("recover", lambda: driver.recover(lease, step))
    seen = timed("prove", lambda: driver.active(lease))
    say(present=seen.present, lines=seen.lines)
    if not seen.present:
        ledger.close(lease, seen.lines)


def sweeper(home: Home) -> None:
    """As `mlchaos recover`, without an observer: the owner is dead."""
    clock = SystemClock()
    ledger = FileLedger(home.ledger, clock)
    say(begin="sweep")
    for result in sweep(
        ledger,
        lambda name, environment: wiring.driver(name, home, environment),
        clock,
        IncidentLog(home.incidents, clock),
    ):
        say(clean=result.clean, seconds=result.seconds, error=result.error, lines=result.evidence)


@dataclass
class Child:
    """One of them, its lines and its memory."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    peak_mib: float = 0.0

    @classmethod
    def start(cls, role: str, *arguments: str) -> Child:
        command = [sys.executable, "-m", "benchmarks.s3", "--role", role, *arguments]
        child = cls(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        threading.Thread(target=child._read, daemon=True).start()
        threading.Thread(target=child._watch, daemon=True).start()
        return child

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def _watch(self) -> None:
        process = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                self.peak_mib = max(self.peak_mib, process.memory_info().rss / 2**20)
            except psutil.Error:
                return
            time.sleep(0.02)

    def until(self, **facts: Any) -> None:
        """Wait for a line with these facts, or the end."""
        while self.process.poll() is None and not any(facts.items() <= line.items() for line in list(self.lines)):
            time.sleep(0.002)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def seconds(self, name: str) -> float | None:
        return next((line["seconds"] for line in self.lines if line.get("end") == name), None)

    @property
    def phase(self) -> str:
        begun = [line["begin"] for line in self.lines if "begin" in line]
        ended = [line["end"] for line in self.lines if "end" in line]
        if not begun:
            return "start"
        done = next((f" {x['done']:,}/{x['total']:,}" for x in reversed(self.lines) if "done" in x), "")
        return (
            f"after {begun[-1]}"
            if begun[-1] in ended
            else begun[-1] + (done if begun[-1] in ("inject", "recover") else "")
        )


# ---- the bucket, as somebody sees it who knows nothing of us


class Bucket:
    """What must be in it, and a comparison with what is. Shares no code with the driver."""

    def __init__(self, endpoint: str, access: str, secret: str) -> None:
        self.client = boto3.client(
            "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=access, aws_secret_access_key=secret,
            config=Config(
                s3={"addressing_style": "path"}, max_pool_connections=16, connect_timeout=5, read_timeout=120,
                request_checksum_calculation="when_required", retries={"total_max_attempts": 1},
            ),
        )  # fmt: skip
        self.name = f"bench-{uuid.uuid4().hex[:8]}"
        self.client.create_bucket(Bucket=self.name)
        self.client.put_bucket_versioning(Bucket=self.name, VersioningConfiguration={"Status": "Enabled"})
        self.current: dict[str, str] = {}
        """Key → version id that must be current."""
        self.sha256: dict[tuple[str, str], str] = {}
        """(key, version id) → of its content; all versions that must be there."""
        self.theirs: set[str] = set()
        self._lock = threading.Lock()

    def put(self, key: str, body: bytes) -> None:
        version = self.client.put_object(Bucket=self.name, Key=key, Body=body)["VersionId"]
        with self._lock:
            self.current[key] = version
            self.sha256[key, version] = hashlib.sha256(body).hexdigest()

    def fill(self, objects: int, rng: random.Random) -> None:
        bodies = [(f"{PREFIX}{i % 100:02}/part-{i:05}", rng.randbytes(SIZE)) for i in range(objects)]
        bodies += [(f"other/{i:03}", rng.randbytes(SIZE)) for i in range(max(10, objects // 50))]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda it: self.put(*it), bodies))

    def overwrite(self, key: str, rng: random.Random) -> None:
        """As somebody else would, in the middle of it."""
        self.put(key, rng.randbytes(SIZE + rng.randrange(100)))
        self.theirs.add(key)

    def compare(self, read: set[str]) -> tuple[int, int, int]:
        """(objects not restored, objects wrongly touched, writes of others lost); contents of `read` are read."""
        latest: dict[str, str] = {}
        there: set[tuple[str, str]] = set()
        for page in self.client.get_paginator("list_object_versions").paginate(Bucket=self.name):
            for entry in page.get("Versions", []):
                there.add((entry["Key"], entry["VersionId"]))
                if entry["IsLatest"]:
                    latest[entry["Key"]] = entry["VersionId"]
            for entry in page.get("DeleteMarkers", []):
                there.add((entry["Key"], entry["VersionId"]))
        bad = {key for key, version in self.current.items() if latest.get(key) != version}
        bad |= {key for key, _ in there ^ set(self.sha256)}

        def differs(key: str) -> bool:
            body = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
            return hashlib.sha256(body).hexdigest() != self.sha256[key, self.current[key]]

        with ThreadPoolExecutor(8) as pool:
            keys = sorted(read - bad)
            bad |= {key for key, wrong in zip(keys, pool.map(differs, keys), strict=True) if wrong}
        return len((bad & read) - self.theirs), len(bad - read - self.theirs), len(bad & self.theirs)


def moto() -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", code], stdout=quiet, stderr=quiet)
    for _ in range(600):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return process, f"http://127.0.0.1:{port}"


# ---- trials


@dataclass
class Trial:
    """One kill and what came after it."""

    number: int
    how: str
    killed: str
    chosen: int
    left: tuple[int, int, int]
    open_leases: int
    undo_s: float | None
    inject_s: float | None
    sweep_s: float | None
    peak_mib: float


class Bench:
    """All trials on one bucket. What others wrote in one trial is the next one's original."""

    def __init__(self, bucket: Bucket, endpoint: str, home: Home, rng: random.Random) -> None:
        self.bucket, self.endpoint, self.home, self.rng = bucket, endpoint, home, rng
        self.inject_s, self.recover_s = 1.0, 1.0
        self.chosen: set[str] = set()

    def child(self, how: str, fraction: float) -> Child:
        arguments = ["--home", str(self.home.root), "--endpoint", self.endpoint, "--bucket", self.bucket.name]
        return Child.start("injector", *arguments, "--how", how, "--fraction", str(fraction))

    def whole(self, fraction: float) -> Child:
        """One run that nobody disturbs: how long everything takes."""
        child = self.child("random_bytes", fraction)
        child.until(begin="inject")
        self._note_chosen()
        child.process.wait()
        self.inject_s = child.seconds("inject") or 1.0
        self.recover_s = child.seconds("recover") or 1.0
        return child

    def _note_chosen(self) -> set[str]:
        found = {
            o["key"] for lease in FileLedger(self.home.ledger, SystemClock()).leases() for o in lease.undo["objects"]
        }
        self.chosen |= found
        return found

    def trial(self, number: int, fraction: float) -> Trial:
        rng, how = self.rng, HOWS[number % len(HOWS)]
        child = self.child(how, fraction)
        child.until(begin="inject")
        chosen = self._note_chosen()
        others = sorted(set(self.bucket.current) - chosen)
        keys = [*rng.sample(sorted(chosen), THIRD_PARTY - 2), *rng.sample(others, 2)]
        early, late = keys[::2], keys[1::2]

        def third_party() -> None:
            for key in early:
                time.sleep(self.inject_s / (2 * len(early)))
                self.bucket.overwrite(key, random.Random(f"{number} {key}"))

        somebody = threading.Thread(target=third_party)
        somebody.start()
        if number % 2:
            child.until(begin="recover")
            time.sleep(rng.uniform(0, self.recover_s))
        else:
            time.sleep(rng.uniform(0, self.inject_s))
        child.kill()
        killed = child.phase
        somebody.join()
        for key in late:
            self.bucket.overwrite(key, random.Random(f"{number} {key}"))
        if number % 4 == 3:
            first = Child.start("sweeper", "--home", str(self.home.root))
            first.until(begin="sweep")
            time.sleep(rng.uniform(0, self.recover_s))
            first.kill()
            killed += ", then the sweeper"
        last = Child.start("sweeper", "--home", str(self.home.root))
        last.process.wait()
        swept = next((line for line in last.lines if "clean" in line), None)
        if swept and not swept["clean"]:
            print(f"trial {number}: {swept['error']}", file=sys.stderr)
        return Trial(
            number, how, killed, len(chosen), self.bucket.compare(chosen | set(keys)),
            len(FileLedger(self.home.ledger, SystemClock()).leases()),
            child.seconds("undo"), child.seconds("inject"), swept["seconds"] if swept else None, child.peak_mib,
        )  # fmt: skip


def main() -> int:
    """Run the trials; exit 1 when anything was left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--objects", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--endpoint", default="")
    parser.add_argument("--access-key", default="access")
    parser.add_argument("--secret-key", default="secret")
    for hidden in ("--role", "--home", "--bucket", "--how"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "injector":
        injector(Home(Path(args.home)), args.endpoint, args.bucket, args.how, args.fraction)
        return 0
    if args.role == "sweeper":
        sweeper(Home(Path(args.home)))
        return 0
    os.environ |= {"BENCH_ACCESS": args.access_key, "BENCH_SECRET": args.secret_key}
    rng = random.Random(args.seed)
    server, endpoint = (None, args.endpoint) if args.endpoint else moto()
    try:
        bucket = Bucket(endpoint, args.access_key, args.secret_key)
        with tempfile.TemporaryDirectory(prefix="mlchaos-s3-") as directory:
            return run(args, Bench(bucket, endpoint, Home(Path(directory) / "home"), rng), rng)
    finally:
        if server is not None:
            server.terminate()
            server.wait()


def run(args: argparse.Namespace, bench: Bench, rng: random.Random) -> int:
    began = time.perf_counter()
    bench.bucket.fill(args.objects, rng)
    heading(f"S3: {args.fraction:.0%} of {args.objects:,} objects damaged, the injector killed {args.kills} times")
    print(f"Store: {args.endpoint and 'given' or 'moto'}, filled in {time.perf_counter() - began:.0f} s\n")
    whole = bench.whole(args.fraction)
    table("undisturbed: undo s | inject s | confirm s | recover s | prove s | peak RSS MiB")
    row(*(whole.seconds(name) for name in ("undo", "inject", "confirm", "recover", "prove")), f"{whole.peak_mib:.0f}")
    for line in whole.lines:
        for said in line.get("lines", []):
            print(f"\n> {said}")
    wrong = [bench.bucket.compare(bench.chosen)]
    print(flush=True)
    table(
        "# | damage | killed in | chosen | not restored | wrongly touched | others' writes lost | open leases"
        " | undo s | inject s | sweep s | peak RSS MiB"
    )
    leases = 0
    for number in range(args.kills):
        t = bench.trial(number, args.fraction)
        row(
            t.number + 1, t.how, t.killed, t.chosen, *t.left, t.open_leases, t.undo_s, t.inject_s or "",
            t.sweep_s if t.sweep_s is None else round(t.sweep_s, 2), f"{t.peak_mib:.0f}",
        )  # fmt: skip
        sys.stdout.flush()
        wrong.append(t.left)
        leases += t.open_leases
    wrong.append(bench.bucket.compare(set(bench.bucket.current)))
    total = [sum(column) for column in zip(*wrong, strict=True)]
    print(
        f"\nOver all: {total[0]} objects not restored, {total[1]} wrongly touched, {total[2]} writes of others lost"
        f" (of {len(bench.bucket.theirs)}), {leases} leases left open; at the end the content of all"
        f" {len(bench.bucket.current):,} objects was read. {time.perf_counter() - began:.0f} s."
    )
    return 1 if any(total) or leases else 0


if __name__ == "__main__":
    sys.exit(main())
