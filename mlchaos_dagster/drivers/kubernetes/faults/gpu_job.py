"""The program of the Job that holds a GPU's memory; runs in the helper image, on the device that the node gives it.

    python -m mlchaos_dagster.drivers.kubernetes.faults.gpu_job DIRECTORY LEASE FRACTION SECONDS

`DIRECTORY/LEASE.held` says what is held (the Job's readiness probe reads it); why it could not be had stands in the
container's termination message. Ends at its deadline by itself, and with its pod.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from mlchaos_dagster.drivers import gpu_hog
from mlchaos_dagster.drivers.cuda import LIBRARY, Cuda, CudaError
from mlchaos_dagster.engine.files import write_json

TERMINATION = Path("/dev/termination-log")
_GRANULE = 2 << 20
"""CUDA's own unit of allocation."""


def main(arguments: list[str], library: str = LIBRARY) -> int:
    """As `gpu_hog.main`."""
    directory, lease_id = Path(arguments[0]), arguments[1]
    fraction, seconds = float(arguments[2]), float(arguments[3])
    try:
        devices = Cuda(library).devices()
    except CudaError as e:
        return _failed(str(e))
    wanted = {device.uuid: int(device.total_bytes * fraction) // _GRANULE * _GRANULE for device in devices}
    order = {
        "lease_id": lease_id,
        "library": library,
        "deadline_mono": time.monotonic() + seconds,
        "devices": wanted,
    }
    files = gpu_hog.Files(directory, lease_id)
    write_json(files.order, order)
    code = gpu_hog.main([str(directory), lease_id])
    if code == 1:
        said = json.loads(files.held.read_bytes())
        return _failed(str(said.get("error", "the memory could not be had")))
    return code


def _failed(said: str) -> int:
    with suppress(OSError):
        TERMINATION.write_text(said)
    sys.stderr.write(said + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
