"""Tasks that run as long as their process: one that fails ends it, and the supervisor starts it anew."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Coroutine
from typing import Any

_tasks: set[asyncio.Task[None]] = set()


def background(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run it beside the service. A process that does only half of its work must not look alive."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _tasks.add(task)
    task.add_done_callback(_done)


def _done(task: asyncio.Task[None]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        traceback.print_exception(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(1)
