"""Two real gloo ranks, started once for all tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

PROGRAM = Path(__file__).with_name("regroup_cases.py")


@pytest.fixture(scope="session")
def two_ranks() -> list[dict[str, Any]]:
    """What each rank of `regroup_cases.py` observed."""
    # As in a job, the store is no rank's.
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(server.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(e for _, e in outputs)
    return [json.loads(out) for out, _ in outputs]
