"""What the leader says of hangs: lines for the user, events for the timeline."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import timedelta

from megatron_moetion.agent.hangs import Observation
from megatron_moetion.agent.vigil import Alarm, Deaf, Inquired, Learned, Stubborn, Vigil
from megatron_moetion.events import EventLog


class Alarms:
    """Says what a vigil has found.

    Args:
        vigil: what finds it.
        log: for the timeline.
        timeout: of --moetion-timeout.
    """

    def __init__(self, vigil: Vigil, log: EventLog, timeout: timedelta) -> None:
        self.vigil, self._log, self._timeout = vigil, log, timeout
        self._begun = False

    def begin(self) -> None:
        """The first worker is there: says what holds before anything is learned."""
        if not self._begun:
            self._begun = True
            _print(f"hangs are detected {self.vigil.rule}")

    def say(self, found: Alarm | Learned | Deaf) -> None:
        """A line or more, and an event."""
        match found:
            case Learned(limit):
                _print(f"hangs are detected after: {limit}")
                self._log.emit("hang-limit", seconds=limit.seconds, step=limit.step)
            case Deaf(nodes):
                _print(f"no rank makes progress, and the agents of nodes {list(nodes)} do not say")
                self._log.emit("deaf", node_ranks=list(nodes))
            case Alarm():
                self._alarm(found)

    def _alarm(self, alarm: Alarm) -> None:
        verdict = alarm.verdict
        if not verdict.told:
            _print("all ranks wait for each other; the one that has come least far is replaced:")
            _table(alarm.seen)
        for each in verdict.culprits:
            where = f"in iteration {each.iteration} at {each.place} ({each.how})"
            _print(
                f"global rank {each.global_rank} stopped {where}, {verdict.seconds:.1f} s without"
                f" progress ({alarm.limit}); it is killed"
            )
        self._log.emit(
            "hang",
            culprits=[each.to_json() for each in verdict.culprits],
            told=verdict.told,
            seconds=verdict.seconds,
            limit=alarm.limit.seconds,
            step=alarm.limit.step,
        )

    def inquired(self, found: Inquired) -> None:
        """A phase of a recovery has taken too long."""
        _print("a recovery does not go on; where the ranks are:")
        _table(found.seen)
        self._log.emit("stuck", culprits=[each.to_json() for each in found.culprits])

    def stubborn(self, found: Stubborn) -> str:
        """What is to be said of those that cannot be killed."""
        ranks = [each.global_rank for each in found.culprits]
        return f"ranks {ranks} hang and do not end when they are killed"


def _table(seen: Iterable[Observation]) -> None:
    for each in sorted(seen, key=lambda each: each.global_rank):
        _print(f"  {each.line}")


def _print(line: str) -> None:
    print(f"moetion-run: {line}", file=sys.stderr)
