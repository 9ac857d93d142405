"""Leases: how long an agent that is not heard of still counts as there, and may still act.

An agent sends a *beat* several times within a lease and the leader answers it, over a connection
and in threads that do nothing else: neither a busy main loop nor a big message is silence. Each
side looks at its own clock only. The leader counts from when it heard a beat, the agent from when
it sent the last one that was answered, which is earlier: by the time the leader gives its place
away, the agent has ended its workers, or will before it does anything else (`Pulse.check`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from megatron_moetion.agent.wire import Channel

BEATS = 8
"""Per lease."""
BULK = 4
"""Leases that a connection for frames may make no headway: who reads them may be a busy worker, and
that its agent is gone is told by the lease.
"""

Lapsed = Callable[[float | None], None]
"""See `Pulse`."""


def now() -> float:
    """Seconds on a clock that is never set, and goes on while a machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def bulk(lease: timedelta | None) -> timedelta | None:
    """How long a connection for frames may be silent."""
    return None if lease is None else BULK * lease


@dataclass
class Table:
    """Who was heard when; all times are the caller's, in seconds.

    Attributes:
        lease: in seconds.
    """

    lease: float
    _heard: dict[str, float] = field(default_factory=dict)
    _over: set[str] = field(default_factory=set)

    def grant(self, agent: str, at: float) -> bool:
        """An agent is there; its first lease begins. False when its last one is over."""
        if agent not in self._over:
            self._heard.setdefault(agent, at)
        return agent not in self._over

    def renew(self, agent: str, at: float) -> bool:
        """It was heard; False when it has no lease any more, or never had one."""
        if agent not in self._heard:
            return False
        self._heard[agent] = at
        return True

    def end(self, agent: str) -> None:
        """It is gone; no-op if that is known."""
        self._heard.pop(agent, None)
        self._over.add(agent)

    def excuse(self, seconds: float, at: float) -> None:
        """For so long nobody could have been heard here. To wait longer is always safe: an agent
        ends by its own clock.
        """
        for agent, heard in self._heard.items():
            self._heard[agent] = min(heard + seconds, at)

    def take_silent(self, at: float) -> list[str]:
        """Whose lease is over; they have none any more."""
        silent = [agent for agent, heard in self._heard.items() if at - heard >= self.lease]
        for agent in silent:
            self.end(agent)
        return silent

    def left(self, at: float) -> float | None:
        """Until the next lease is over; None when there is none."""
        heard = min(self._heard.values(), default=None)
        return None if heard is None else max(0.0, heard + self.lease - at)


class Leases:
    """The leader's side.

    Args:
        lease: of every agent.
        silent: told the name of one that was not heard for that long; in a thread of this.
    """

    def __init__(self, lease: timedelta, silent: Callable[[str], None]) -> None:
        self._seconds = lease.total_seconds()
        self._table = Table(self._seconds)
        self._silent = silent
        self._changed = threading.Condition()
        self._stopped = False

    def start(self) -> None:
        """Look after the leases until `stop`."""
        threading.Thread(target=self._watch, name="moetion-leases", daemon=True).start()

    def stop(self) -> None:
        """The job ends: whoever is not heard any more has ended, too."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def grant(self, agent: str) -> bool:
        """See `Table.grant`."""
        with self._changed:
            self._changed.notify()
            return self._table.grant(agent, now())

    def end(self, agent: str) -> None:
        """See `Table.end`."""
        with self._changed:
            self._table.end(agent)

    def serve(self, channel: Channel, agent: str) -> None:
        """Answer beats until the connection ends, or the lease has; in the caller's thread."""
        # It may come before the main loop has heard of the agent.
        self.grant(agent)
        try:
            while True:
                channel.receive()
                with self._changed:
                    if not self._table.renew(agent, now()):
                        return
                channel.send({"op": "heard", "lease": self._seconds})
        except (EOFError, OSError):
            # The control connection tells that an agent is gone.
            return

    def _watch(self) -> None:
        longest = self._seconds / BEATS
        while True:
            with self._changed:
                began, left = now(), self._table.left(now())
                asked = longest if left is None else min(left, longest)
                self._changed.wait(asked)
                overslept = now() - began - asked
                if overslept > longest:
                    # This process was stopped, and what was sent meanwhile is still to be read.
                    self._table.excuse(overslept, now())
                if self._stopped:
                    return
                silent = self._table.take_silent(now())
            for agent in silent:
                self._silent(agent)


class Pulse:
    """An agent's side: beats, and whether they are answered.

    Args:
        channel: to the leader, for this alone.
        agent: the name under which the leader knows this one.
        lapsed: called once, in any thread, when the lease is over, with the seconds for which this
            process had been stopped, or None if it was not; it ends the process. It may be set
            anew, see `on_lapse`.
    """

    def __init__(self, channel: Channel, agent: str, lapsed: Lapsed) -> None:
        self._channel, self._lapsed = channel, lapsed
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._renewed = self._looked = now()
        self._channel.send({"op": "pulse", "agent": agent})
        self._lease = float("inf")
        self._beat()
        for target in (self._send, self._watch):
            threading.Thread(target=target, name="moetion-pulse", daemon=True).start()

    @property
    def lease(self) -> timedelta:
        """As the leader has it."""
        return timedelta(seconds=self._lease)

    def on_lapse(self, lapsed: Lapsed) -> None:
        """What to call from now on."""
        with self._lock:
            self._lapsed = lapsed

    def stop(self) -> None:
        """The job ends: nobody has to be heard any more."""
        self._over.set()

    def check(self) -> None:
        """To be called before anything is handled that may have waited for long."""
        if self._left() > 0:
            return
        with self._lock:
            # Whoever comes second waits here for the end of the process.
            if not self._over.is_set():
                slept = now() - self._looked
                self._lapsed(slept if slept > 2 * self._interval else None)
                self._over.set()

    @property
    def _interval(self) -> float:
        return self._lease / BEATS

    def _left(self) -> float:
        return self._renewed + self._lease - now()

    def _beat(self) -> None:
        sent = now()
        self._channel.send({"op": "beat"})
        self._lease = self._channel.receive()["lease"]
        self._renewed = sent

    def _send(self) -> None:
        try:
            while not self._over.wait(self._interval):
                self.check()
                self._beat()
        except (EOFError, OSError):
            # The control connection tells that the leader is gone; if it does not, the lease will.
            return

    def _watch(self) -> None:
        while not self._over.wait(min(max(self._left(), 0.0), self._interval)):
            self.check()
            self._looked = now()
