"""What every test process needs before it imports torch or draws an example."""

import os
from collections import Counter

import pytest
from hypothesis import settings

from tests.equivalence.matrix import PROPERTY, Row

# Tests of stand-ins fork, and a child has none of the threads of OpenMP that it would wait for.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Property-based tests draw the same examples in every run, so that a red run can be run again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists the failure matrix: each recovery by name, once, however many tests saw its run.

    Here, as a process that only deals tests out to others reads no other `conftest.py`.
    """
    passed = terminalreporter.stats.get("passed", [])
    found = [Row(**row) for r in passed for name, row in r.user_properties if name == PROPERTY]
    rows = sorted(dict.fromkeys(found), key=lambda row: (row.cut, row.run, row.committed))
    if not rows:
        return
    terminalreporter.section("failure matrix: recovered from, and every bit compared")
    for row in rows:
        terminalreporter.line(row.line())
    for cut, number in sorted(Counter(row.cut for row in rows).items()):
        failures = sum(row.count for row in rows if row.cut == cut)
        terminalreporter.line(f"{cut} cut: {number} recoveries from {failures} failures")
