"""What a process holds is counted by kind."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_moetion.holdings import holdings

Apart = Callable[[Callable[[], None]], None]


@contextmanager
def one_of_each() -> Iterator[None]:
    """A memfd, a pair of sockets, a pipe, a thread and a child that waits for the pipe's end."""
    enough = threading.Event()
    thread = threading.Thread(target=enough.wait)
    with ExitStack() as stack:
        stack.callback(os.close, os.memfd_create("one"))
        for end in socket.socketpair():
            stack.callback(end.close)
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
        )
        stack.callback(child.wait)
        assert child.stdin is not None
        stack.callback(child.stdin.close)
        thread.start()
        stack.callback(see_the_end, thread)
        stack.callback(enough.set)
        yield


def see_the_end(thread: threading.Thread) -> None:
    """The system ends a thread a moment after Python, and counts it until then."""
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        os.sched_yield()


def test_each_kind_is_counted_and_gone_afterwards(apart: Apart) -> None:
    def body() -> None:
        before = holdings()
        with one_of_each():
            during = holdings()
        grown = {name: during[name] - before[name] for name in before if name != "resident_bytes"}
        assert grown == {"threads": 1, "children": 1, "files": 4, "sockets": 2, "memfds": 1}
        after = holdings()
        assert {n: after[n] for n in grown} == {n: before[n] for n in grown}

    # Threads of earlier tests may still be ending in this process.
    apart(body)


def test_memory_of_its_own_counts_once_it_is_written_to(apart: Apart) -> None:
    def body() -> None:
        before = holdings()["resident_bytes"]
        kept = bytearray(os.urandom(1 << 24))
        assert holdings()["resident_bytes"] - before >= len(kept) // 2

    apart(body)
