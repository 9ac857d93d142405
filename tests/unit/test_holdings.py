"""What a process holds is counted by kind."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron_moetion.holdings import holdings


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
        stack.callback(thread.join)
        stack.callback(enough.set)
        yield


def test_each_kind_is_counted_and_gone_afterwards() -> None:
    before = holdings()
    with one_of_each():
        during = holdings()
    grown = {name: during[name] - before[name] for name in before if name != "resident_bytes"}
    assert grown == {"threads": 1, "children": 1, "files": 4, "sockets": 2, "memfds": 1}
    after = holdings()
    assert {n: after[n] for n in grown} == {n: before[n] for n in grown}


def test_memory_of_its_own_counts_once_it_is_written_to() -> None:
    before = holdings()["resident_bytes"]
    kept = bytearray(os.urandom(1 << 24))
    assert holdings()["resident_bytes"] - before >= len(kept) // 2
