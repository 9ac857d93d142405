"""Ports for jobs that meet at one."""

import contextlib
import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port on which nobody listens.

    It is below those that the kernel gives to whoever asks for any: between this call and the
    job's own, another test's connection could get one of them.
    """
    above = int(EPHEMERAL.read_text().split()[0])
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(above // 2, above)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
