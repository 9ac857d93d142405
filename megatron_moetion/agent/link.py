"""A worker's connection to the agent of its node."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NoReturn

from megatron_moetion.agent.wire import Channel, Message
from megatron_moetion.vault.shelf import Unreachable

ORPHAN_EXIT_CODE = 70
Notice = Callable[[Message], None]


class _Arriving:
    """A reply whose payload comes in pieces."""

    def __init__(self, message: Message) -> None:
        self.message, self.left = message, message["nbytes"]
        self.payload = bytearray(self.left)

    def take(self, nbytes: int) -> memoryview:
        """Where the next piece goes."""
        start = len(self.payload) - self.left
        self.left -= nbytes
        return memoryview(self.payload)[start : start + nbytes]


class AgentLink:
    """Requests, one-way messages and notices between one worker and its agent.

    Any thread may send. Notices are delivered in order, by one listener thread of the link; those
    that arrive before `listen` wait for it. The end of the agent is the end of this process: an
    orphan must not write on. A process forked off the worker (a data loader) has no link.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[tuple[Message, bytearray | None]]] = {}
        self._arriving: dict[int, _Arriving] = {}
        self._on_notice: Notice | None = None
        self._early: list[Message] = []
        self._closed = False
        self._pid = os.getpid()
        self._listener = threading.Thread(target=self._listen, name="moetion-agent", daemon=True)
        self._listener.start()
        os.register_at_fork(after_in_child=channel.close)

    @classmethod
    def connect(cls, on_notice: Notice | None = None) -> AgentLink | None:
        """Connect to the agent named in the environment.

        Args:
            on_notice: see `listen`.

        Returns:
            The link, or None when this process was not started by moetion-run.
        """
        address = os.environ.get("MOETION_AGENT")
        if not address:
            return None
        link = cls(Channel.to_agent(address, bytes.fromhex(os.environ["MOETION_SECRET"])))
        if on_notice is not None:
            link.listen(on_notice)
        return link

    def listen(self, on_notice: Notice) -> None:
        """Deliver notices from now on, those that waited first.

        Args:
            on_notice: called with each notice, one at a time. It must be quick and must not call
                `request`. If it raises, the process ends: a notice that is lost is a hang later.
        """
        with self._lock:
            for notice in self._early:
                on_notice(notice)
            self._early.clear()
            self._on_notice = on_notice

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a one-way message. Once this returns the agent will get it, even if we die."""
        self._check_process()
        try:
            self._channel.send(message)
        except OSError:
            self._orphaned()

    def request(self, message: Mapping[str, Any]) -> Message:
        """Send a request and wait for its reply."""
        return self.request_payload(message)[0]

    def request_payload(self, message: Mapping[str, Any]) -> tuple[Message, bytearray | None]:
        """Send a request and wait for its reply and the bytes that came with it, if any.

        Raises:
            Unreachable: the agent could not ask all that it has to.
            RuntimeError: the agent refused the request; called from a notice.
        """
        if threading.current_thread() is self._listener:
            raise RuntimeError("a request inside a notice would wait for itself: do it elsewhere")
        request_id = next(self._ids)
        future: Future[tuple[Message, bytearray | None]] = Future()
        with self._lock:
            self._waiting[request_id] = future
        self.send({**message, "id": request_id})
        reply, payload = future.result()
        if reply["op"] == "refused":
            raise RuntimeError(f"the node agent refused {message.get('op')}: {reply['reason']}")
        if reply["op"] == "unreachable":
            raise Unreachable(reply["reason"])
        return reply, payload

    def close(self) -> None:
        """End the link; the agent's end no longer ends this process. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._channel.stop_reading()
        self._listener.join()
        self._channel.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("the link to the node agent belongs to the parent process")

    def _listen(self) -> None:
        try:
            while True:
                try:
                    whole = self._receive()
                except (EOFError, OSError):
                    if not self._closed:
                        self._orphaned()
                    return
                if whole is not None:
                    self._deliver(*whole)
        except BaseException:
            # Whatever it was: going on without notices would be a hang.
            traceback.print_exc()
            os._exit(ORPHAN_EXIT_CODE)

    def _receive(self) -> tuple[Message, bytearray | None] | None:
        """The next message, with its payload; None if there is more to come of that."""
        message = self._channel.receive()
        match message["op"]:
            case "piece":
                arriving = self._arriving[message["id"]]
                self._channel.receive_raw(arriving.take(message["nbytes"]))
            case "broken":
                # Who sent it is gone; another answer follows.
                del self._arriving[message["id"]]
                return None
            case _ if message.get("inline"):
                arriving = _Arriving(message)
                self._arriving[message["id"]] = arriving
            case _:
                return message, None
        if arriving.left:
            return None
        del self._arriving[arriving.message["id"]]
        return arriving.message, arriving.payload

    def _deliver(self, message: Message, payload: bytearray | None) -> None:
        if message["op"] == "ping":
            # Nothing but this thread is asked: it answers as long as it gets the GIL.
            self.send({"op": "pong", "number": message["number"]})
            return
        if "id" in message:
            with self._lock:
                future = self._waiting.pop(message["id"])
            future.set_result((message, payload))
            return
        with self._lock:
            if self._on_notice is None:
                self._early.append(message)
                return
            on_notice = self._on_notice
        on_notice(message)

    def _orphaned(self) -> NoReturn:
        rank = os.environ.get("RANK", "?")
        line = f"moetion: rank {rank}: the node agent is gone; this worker ends"
        print(line, file=sys.stderr, flush=True)
        os._exit(ORPHAN_EXIT_CODE)
