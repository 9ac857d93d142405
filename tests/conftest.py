"""What every test process needs before it imports torch or draws an example."""

import os

from hypothesis import settings

# Tests of stand-ins fork, and a child has none of the threads of OpenMP that it would wait for.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Property-based tests draw the same examples in every run, so that a red run can be run again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
