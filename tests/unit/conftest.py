"""A forked child for a test that changes its process for good, or counts what its process holds."""

import multiprocessing
from collections.abc import Callable

import pytest


@pytest.fixture
def apart() -> Callable[[Callable[[], None]], None]:
    """Runs a function in a child of its own; its failed assertions fail the test."""

    def run(body: Callable[[], None]) -> None:
        child = multiprocessing.get_context("fork").Process(target=body)
        child.start()
        child.join()
        assert child.exitcode == 0, "see the child's traceback above"

    return run
