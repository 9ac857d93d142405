"""What a process holds of the machine, for the events: what grows with every recovery is a leak."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

PROCESS = Path("/proc/self")
ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


def holdings() -> dict[str, int]:
    """Counts of threads, child processes and open files, sockets and memfds among them, and bytes
    of memory that is this process's own: resident, neither a file's nor shared.
    """
    targets = _open_files()
    tasks = os.listdir(PROCESS / "task")
    resident = ANONYMOUS.search((PROCESS / "status").read_text())
    return {
        "threads": len(tasks),
        "children": sum(map(_children, tasks)),
        "files": len(targets),
        "sockets": sum(target.startswith("socket:") for target in targets),
        "memfds": sum(target.startswith("/memfd:") for target in targets),
        "resident_bytes": 1024 * int(resident[1]) if resident is not None else 0,
    }


def _open_files() -> list[str]:
    found = []
    for name in os.listdir(PROCESS / "fd"):
        # Another thread may have closed it, and the one that lists the folder is gone for sure.
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(PROCESS / "fd" / name))
    return found


def _children(task: str) -> int:
    # A thread may have ended since it was listed.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return len((PROCESS / "task" / task / "children").read_text().split())
    return 0
