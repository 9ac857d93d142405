"""A thread that waits in a gloo receive is woken, on both sides, by one rank's abort."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from megatron_moetion.recovery.abort import cut, open_sockets

# One pair of ranks answers for both files, so their tests are dealt out together.
pytestmark = pytest.mark.xdist_group("two ranks")


def test_one_ranks_abort_wakes_waiting_threads_of_both_ranks(
    two_ranks: list[dict[str, Any]],
) -> None:
    assert [rank["wakes"][:2] for rank in two_ranks] == [["woken", "woken"]] * 2


def test_a_rank_that_makes_groups_whose_peers_never_come_is_woken(
    two_ranks: list[dict[str, Any]],
) -> None:
    assert [rank["wakes"][2] for rank in two_ranks] == ["woken", "woken"]


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


def test_only_sockets_opened_since_are_noted() -> None:
    before = open_sockets()
    client, served = connected()
    with client, served:
        assert {fd for fd, _ in open_sockets() - before} == {client.fileno(), served.fileno()}


def test_cut_ends_a_connection_on_both_sides_but_not_one_to_the_spared_port() -> None:
    before = open_sockets()
    client, served = connected()
    with client, served:
        port = client.getpeername()[1]
        cut([s for s in open_sockets() - before if s[0] == client.fileno()], port)
        served.sendall(b"x")
        assert client.recv(1) == b"x"
        cut(open_sockets() - before, -1)
        assert client.recv(1) == b""
        assert served.recv(1) == b""


def test_a_descriptor_that_was_used_again_is_left_alone() -> None:
    before = open_sockets()
    client, served = connected()
    noted = open_sockets() - before
    client.close()
    served.close()
    again, other = connected()
    with again, other:
        assert {again.fileno(), other.fileno()} & {fd for fd, _ in noted}
        cut(noted, -1)
        other.sendall(b"x")
        assert again.recv(1) == b"x"


def test_listening_and_unix_sockets_and_closed_descriptors_are_passed_over() -> None:
    before = open_sockets()
    a, b = socket.socketpair()
    server = socket.create_server(("127.0.0.1", 0))
    with a, b, server:
        noted = open_sockets() - before
        cut(noted, -1)
        a.sendall(b"x")
        assert b.recv(1) == b"x"
        late = socket.create_connection(server.getsockname())
        late.close()
    # None of them is open any more, which is no error.
    cut(noted, -1)
