"""CUDA's driver API by ctypes: devices, their memory, allocations. As a program it tells the devices and is gone.

    python -m mlchaos_dagster.drivers.cuda LIBRARY [DEVICE …]      one JSON object on stdout

A context costs hundreds of megabytes on the device as long as its process lives, so the driver's own process never
has one: it asks this program, and `gpu_hog` holds the memory. Imports the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import sys
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

LIBRARY = "libcuda.so.1"
"""Comes with NVIDIA's kernel driver, on bare machines and (mounted by its container toolkit) in containers."""
_OUT_OF_MEMORY = 2
_NO_DEVICE = 100


class CudaError(Exception):
    """CUDA said no; `code` is its result, 0 when there is no CUDA to ask."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    @property
    def out_of_memory(self) -> bool:
        """The device has no room for what was asked."""
        return self.code == _OUT_OF_MEMORY


@dataclass(frozen=True)
class Device:
    """One device, as it is now."""

    index: int
    """As this process counts: `CUDA_VISIBLE_DEVICES` decides."""
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int | None
    """None: not asked, or the device had not even room for a context."""


def name_of(index: int) -> str:
    """The id of a device, as targets are called."""
    return f"gpu-{index}"


class Cuda:
    """The library, initialised. Its contexts live as long as the process."""

    def __init__(self, library: str = LIBRARY) -> None:
        """Raises CudaError: it cannot be loaded, or there is no device."""
        try:
            self._library = ctypes.CDLL(library)
        except OSError as e:
            raise CudaError(f"no CUDA device: {library} cannot be loaded") from e
        try:
            self._call("cuInit", 0)
        except CudaError as e:
            if e.code == _NO_DEVICE:
                raise CudaError(f"no CUDA device: {library} is here and finds none", e.code) from e
            raise

    def devices(self, memory_of: Collection[str] = ()) -> list[Device]:
        """All devices, in order; free memory only for those named (`gpu-0` or UUID): asking takes a context there.

        Raises:
            CudaError: the driver does not answer as it should.
        """
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return [self._device(index, memory_of) for index in range(count.value)]

    def _device(self, index: int, memory_of: Collection[str]) -> Device:
        handle, name, total = self._handle(index), ctypes.create_string_buffer(256), ctypes.c_size_t()
        self._call("cuDeviceGetName", name, 256, handle)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(total), handle)
        raw = ctypes.create_string_buffer(16)
        # Version 2 tells parts of a divided device (MIG) apart; older drivers have only the first.
        newer = hasattr(self._library, "cuDeviceGetUuid_v2")
        self._call("cuDeviceGetUuid_v2" if newer else "cuDeviceGetUuid", raw, handle)
        own = f"GPU-{uuid.UUID(bytes=raw.raw)}"
        free: int | None = None
        if own in memory_of or name_of(index) in memory_of:
            try:
                self.use(index)
                free = self.memory()[0]
            except CudaError as e:
                if not e.out_of_memory:
                    raise
        return Device(index, own, name.value.decode(errors="replace"), total.value, free)

    def use(self, index: int) -> None:
        """Make this device current for the calling thread, in its primary context. Raises CudaError."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._handle(index))
        self._call("cuCtxSetCurrent", context)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the current device. Raises CudaError."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """So many bytes on the current device, written to, so that they are really there. Raises CudaError."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0xA5), ctypes.c_size_t(size))
        self._call("cuCtxSynchronize")
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give an allocation of the current device back. Raises CudaError."""
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def _handle(self, index: int) -> ctypes.c_int:
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), index)
        return handle

    def _call(self, name: str, *args: Any) -> None:
        try:
            code = int(getattr(self._library, name)(*args))
        except AttributeError as e:
            raise CudaError(f"this is no CUDA driver library: it has no {name}") from e
        if code:
            raise CudaError(f"{name}: {self._words(code)}", code)

    def _words(self, code: int) -> str:
        text = ctypes.c_char_p()
        known = hasattr(self._library, "cuGetErrorString")
        if known and self._library.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value:
            return f"{text.value.decode(errors='replace')} ({code})"
        return f"CUDA error {code}"


def main(arguments: list[str]) -> int:
    """`{"devices": […]}`, or `{"error": "…"}` and 1."""
    try:
        found = Cuda(arguments[0]).devices(arguments[1:])
    except CudaError as e:
        sys.stdout.write(json.dumps({"error": str(e)}))
        return 1
    sys.stdout.write(json.dumps({"devices": [asdict(device) for device in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
