"""The leader's decisions, as a pure object: what happened in, what to do out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moetion.agent.decision import (
    AgentJoined,
    AgentLost,
    Command,
    End,
    Event,
    Evict,
    Exited,
    Expel,
    Expired,
    Gather,
    Gathered,
    Json,
    Notify,
    Record,
    Replace,
    Restored,
    Said,
)
from megatron_moetion.agent.doubts import Doubts
from megatron_moetion.agent.escalation import NOTHING_TRIED, Tier, Tried, after_failure
from megatron_moetion.agent.traces import Trace, Traces
from megatron_moetion.config import DEFAULT_BUDGET, Config, RestartBudget
from megatron_moetion.recovery.phase import FINAL, Phase, PhaseMachine, Step
from megatron_moetion.vault.entry import split_key


@dataclass
class _Answers:
    """Who has answered what the current phase waits for."""

    positions: dict[int, Json] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    gathered: dict[int, Gathered] = field(default_factory=dict)
    rebuilt: set[int] = field(default_factory=set)


class Round:
    """The leader's state: who lives, who is to be replaced, which epoch, which phase.

    Args:
        ranks_of_node: global ranks per node rank.
        max_retries: failures of one rank at one iteration after which the job ends.
        fired: scripted faults that were injected before, by index.
        replaces_nodes: what a lost node held is on other nodes, and another may take its place.
        budget: localized recoveries within a time, after which the next tier is tried.
        tried: against failures, before this job started anew from disk.
        distrusted: before that the host had rejected what came of the state.
    """

    def __init__(
        self,
        ranks_of_node: tuple[tuple[int, ...], ...],
        max_retries: int = Config().max_retries,
        fired: Iterable[int] = (),
        replaces_nodes: bool = False,
        budget: RestartBudget = DEFAULT_BUDGET,
        tried: Tried = NOTHING_TRIED,
        distrusted: bool = False,
    ) -> None:
        self.epoch = 0
        self._nodes = ranks_of_node
        self._all = frozenset(rank for ranks in ranks_of_node for rank in ranks)
        self._max_retries = max_retries
        self._machine = PhaseMachine()
        self._dead: set[int] = set()
        self._ready: set[int] = set()
        self._finished: set[int] = set()
        self._exited: set[int] = set()
        self._fired = set(fired)
        self._failures: Counter[tuple[int, int | None]] = Counter()
        self._first_code = 0
        self._answers = _Answers()
        self._committed = self._reached = 0
        self._replaces_nodes = replaces_nodes
        self._lost: set[int] = set()
        self._went_on: list[tuple[int, int]] = []
        self._traces = Traces()
        self._expelled: dict[int, str] = {}
        self._expelled_in: int | None = None
        self._budget, self._tried = budget, tried
        self._restarting: set[int] = set()
        self._rebuilt: set[int] = set()
        self._doubts = Doubts(distrusted)

    @property
    def phase(self) -> Phase:
        """Where the job is."""
        return self._machine.phase

    def feed(self, event: Event) -> list[Command]:
        """Take one event and return what to do, in order."""
        if self.phase in FINAL:
            return []
        match event:
            case Exited():
                return self._exit(event)
            case Said():
                return self._said(event.global_rank, event.message)
            case Gathered():
                return self._gathered(event)
            case AgentLost():
                return self._node_lost(event)
            case AgentJoined():
                return self._node_joined(event.node_rank)
            case Expired():
                return self._expired(event)
            case Restored():
                return self._restored(event)

    def missing(self) -> list[int]:
        """Global ranks (in GATHERING: node ranks) that the current phase still waits for."""
        match self.phase:
            case Phase.PLANNING:
                return sorted(self._survivors - self._answers.positions.keys())
            case Phase.SETTLING:
                return sorted(self._survivors - self._answers.done)
            case Phase.REGROUPING:
                return sorted((self._survivors - self._answers.done) | (self._dead - self._ready))
            case Phase.GATHERING:
                return [n for n in range(len(self._nodes)) if n not in self._answers.gathered]
            case Phase.RESTORING:
                return sorted(self._all - self._answers.done)
            case _:
                return []

    @property
    def _injected(self) -> tuple[int, ...]:
        return tuple(sorted(self._fired))

    @property
    def _survivors(self) -> frozenset[int]:
        return self._all - self._dead

    def _exit(self, event: Exited) -> list[Command]:
        rank = event.global_rank
        self._reached = max(self._reached, (event.position or {}).get("committed", 0))
        if rank in self._finished:
            self._exited.add(rank)
            if self._exited == self._all:
                self._machine.take(Step.ENDED)
                return [End("", 0)]
            return []
        how = f"rank {rank} ended with code {event.code}"
        self._first_code = self._first_code or event.code
        if event.position is None and rank not in self._dead:
            return self._hopeless(f"{how} before its first frame was sealed")
        if self._finished:
            finished = sorted(self._finished)
            return self._hopeless(f"{how} after ranks {finished} had finished", state_lost=True)
        known = event.position or {}
        return self._retry(event, known.get("iteration", known.get("committed")))

    def _retry(self, event: Exited, iteration: int | None) -> list[Command]:
        """Replaces a worker that failed in an iteration, or ends the job if it does so always."""
        rank = event.global_rank
        self._traces.left(rank, iteration)
        rejected = self._doubts.rejected_by(rank)
        if rank in self._restarting:
            # It was killed to be started anew.
            self._restarting.discard(rank)
            return self._freeze(event)
        if rejected:
            return self._distrust(event, iteration or 0)
        self._failures[rank, iteration] += 1
        times = self._failures[rank, iteration]
        if times <= self._max_retries:
            return self._against(event.at, lambda: self._freeze(event))
        expelled, trace = self._expelled.get(rank), self._traces.of(iteration)
        if expelled is not None:
            return self._hopeless(f"{expelled}; that was retry {times - 1}", state_lost=True)
        more = f" (--moetion-max-retries {self._max_retries})"
        if trace is not None:
            who = "" if trace.global_rank == rank else f", rank {trace.global_rank} first"
            more += f"{who}: {trace.last}"
        reason = f"rank {rank} failed {times} times at iteration {iteration}{more}"
        return self._hopeless(reason, trace=trace)

    def _against(self, at: float, begin: Callable[[], list[Command]]) -> list[Command]:
        """What is done against a failure at a time: in training, what the budget says.

        Args:
            begin: begins a round for those that have failed.
        """
        if self.phase is not Phase.TRAINING:
            return begin()
        self._tried, tier = after_failure(self._tried, at, self._budget)
        if tier is Tier.LOCALIZED:
            return begin()
        seconds = f"{self._budget.seconds:g} s (--moetion-restart-budget {self._budget})"
        return self._down(f"more than {self._budget.num} recoveries within {seconds}", tier, begin)

    def _distrust(self, event: Exited, iteration: int) -> list[Command]:
        """The host rejects what comes right out of state that was rebuilt from memory: who was
        rebuilt is rebuilt once more, and what it reads is looked through; where that did not help,
        the next tier is tried.
        """
        tier, trace = self._doubts.raised(iteration), self._traces.of(iteration)
        if tier is None:
            return self._freeze(event)
        reason = "what was rebuilt from memory gives results that the host rejects"
        reason += f": {trace.last}" if trace is not None else ""
        if tier is not Tier.LOCALIZED:
            if tier is Tier.MEMORY:
                self._tried = self._tried.with_step(tier, event.at)
            return self._down(reason, tier, lambda: self._freeze(event), trace)
        suspects = self._rebuilt if self.phase is Phase.TRAINING else set()
        return self._against(event.at, lambda: self._look_through(event, suspects, reason))

    def _look_through(self, event: Exited, suspects: set[int], reason: str) -> list[Command]:
        commands = self._freeze(event)
        self._restarting |= suspects - self._dead
        step = {"epoch": self.epoch, "global_ranks": sorted(self._restarting), "reason": reason}
        looks = f"{reason}; {Tier.LOCALIZED}, and frames are looked through"
        return [
            Record("distrusted", step),
            *commands,
            Expel(tuple(sorted(self._restarting)), looks),
        ]

    def _down(
        self,
        reason: str,
        tier: Tier | None,
        begin: Callable[[], list[Command]],
        trace: Trace | None = None,
    ) -> list[Command]:
        """Tries a tier below, or ends the job if that is nothing that workers could be part of.

        Args:
            tier: None is none that has not been tried.
        """
        if tier is None:
            return self._hopeless(reason, trace=trace)
        step = Record("escalated", {"epoch": self.epoch, "tier": tier, "reason": reason})
        if tier is not Tier.MEMORY:
            return [step, *self._hopeless(reason, state_lost=True, tier=tier, trace=trace)]
        commands = begin()
        self._restarting |= self._survivors | self._ready
        anew = f"{reason}; {tier}: all workers start anew from what memory holds"
        return [step, *commands, Expel(tuple(sorted(self._restarting)), anew)]

    def _freeze(self, event: Exited) -> list[Command]:
        rank = event.global_rank
        self._dead.add(rank)
        self._ready.discard(rank)
        freeze = self._begin()
        failure = {"epoch": self.epoch, "global_rank": rank, "code": event.code}
        return [
            Record("detected", {**failure, "dead": sorted(self._dead)}),
            freeze,
            Replace(rank, self.epoch, self._injected),
            # Without survivors nobody has to be asked.
            *self._advance(),
        ]

    def _node_lost(self, event: AgentLost) -> list[Command]:
        """Its workers are gone, too, and what they had told of themselves."""
        reason = f"the agent of node {event.node_rank} is gone"
        if not self._replaces_nodes:
            return self._hopeless(f"{reason} ({event.why})")
        if self._finished:
            finished = sorted(self._finished)
            return self._hopeless(f"{reason} after ranks {finished} had finished", state_lost=True)
        return self._against(event.at, lambda: self._wait_for_node(event))

    def _wait_for_node(self, event: AgentLost) -> list[Command]:
        node_rank = event.node_rank
        self._lost.add(node_rank)
        ranks = set(self._nodes[node_rank])
        self._dead |= ranks
        self._ready -= ranks
        self._restarting -= ranks
        freeze = self._begin()
        lost = {"epoch": self.epoch, "node_rank": node_rank, "why": event.why}
        return [Record("node-lost", {**lost, "dead": sorted(self._dead)}), freeze, *self._advance()]

    def _node_joined(self, node_rank: int) -> list[Command]:
        self._lost.discard(node_rank)
        ranks = self._nodes[node_rank]
        return [
            Record("node-joined", {"epoch": self.epoch, "node_rank": node_rank}),
            *(Replace(rank, self.epoch, self._injected) for rank in ranks),
        ]

    def _restored(self, event: Restored) -> list[Command]:
        """A cold start is the death of everybody at the spill's iteration."""
        self._dead |= self._all
        self._begin()
        return [
            Record("cold-start", {"epoch": self.epoch, "iteration": event.iteration}),
            *(Replace(rank, self.epoch, self._injected) for rank in sorted(self._all)),
            *self._advance(),
        ]

    def _begin(self) -> Notify:
        """A new round, of a new epoch."""
        self._machine.take(Step.FAILED)
        self.epoch += 1
        self._answers = _Answers()
        live = tuple(sorted(self._survivors | self._ready))
        return Notify(live, {"op": "freeze", "epoch": self.epoch, "dead": sorted(self._dead)})

    def _damaged(self, message: Mapping[str, Any]) -> list[Command]:
        """No copy of what was read for a recovery is sound, and none is listed any more: plan
        again without it.
        """
        key, reason = message["key"], message["reason"]
        if not key.startswith("frame/"):
            return self._hopeless(f"{reason}; there is no other copy of it", state_lost=True)
        if message["epoch"] != self.epoch:
            return []
        return [self._begin(), *self._advance()]

    def _said(self, rank: int, message: Mapping[str, Any]) -> list[Command]:
        match message["op"]:
            case "fired":
                self._fired.add(int(message["index"]))
            case "finished":
                self._finished.add(rank)
            case "failed":
                self._traces.raised(rank, message["trace"], message["echo"])
                self._doubts.told(rank, bool(message.get("rejected")))
            case "damaged":
                return self._damaged(message)
            case "unfit":
                return self._unfit(rank, str(message["reason"]))
            case "hopeless":
                if message.get("epoch") not in (None, self.epoch):
                    # What it missed may have been where a node was lost since.
                    return []
                lost, refused = bool(message.get("state_lost")), bool(message.get("refused"))
                return self._hopeless(str(message["reason"]), state_lost=lost, refused=refused)
            case "ready" if rank in self._dead:
                self._ready.add(rank)
                return self._advance()
            case "report" | "settled" | "quiesced" | "joined" as op:
                return self._answer(rank, op, message)
            case "ready":
                pass
            case other:
                return self._hopeless(f"rank {rank} sent an unknown message {other!r}")
        return []

    def _unfit(self, rank: int, reason: str) -> list[Command]:
        """A replacement was not taken on, as its device is broken."""
        node_rank = next(n for n, ranks in enumerate(self._nodes) if rank in ranks)
        why = f"rank {rank} of node {node_rank}: {reason}"
        if not self._replaces_nodes or node_rank == 0:
            # Node 0 hosts the store.
            return self._hopeless(f"{why}, and no other node can take its place", state_lost=True)
        return [Record("unfit", {"epoch": self.epoch, "why": why}), Evict(node_rank, why)]

    def _answer(self, rank: int, op: str, message: Mapping[str, Any]) -> list[Command]:
        awaited = {
            Phase.PLANNING: "report",
            Phase.SETTLING: "settled",
            Phase.REGROUPING: "quiesced",
            Phase.RESTORING: "joined",
        }
        if message["epoch"] != self.epoch or awaited.get(self.phase) != op:
            return []
        if op == "report":
            self._answers.positions[rank] = dict(message["position"])
        else:
            # Where they go on may be before what counted as committed.
            self._committed = message.get("iteration", self._committed)
            self._answers.done.add(rank)
            if message.get("rebuilt"):
                self._answers.rebuilt.add(rank)
        return self._advance()

    def _gathered(self, event: Gathered) -> list[Command]:
        if event.epoch != self.epoch or self.phase is not Phase.GATHERING:
            return []
        self._answers.gathered[event.node_rank] = event
        return self._advance()

    def _advance(self) -> list[Command]:
        commands: list[Command] = []
        while self.phase is not Phase.TRAINING and not self.missing():
            commands += self._leave_phase()
        return commands

    def _leave_phase(self) -> list[Command]:
        match self.phase:
            case Phase.PLANNING:
                return self._verdict()
            case Phase.SETTLING:
                self._machine.take(Step.SETTLED)
                self._answers.done.clear()
                return [
                    Notify(self._living(), {"op": "abort", "epoch": self.epoch}),
                    Record("settled", {"epoch": self.epoch}),
                ]
            case Phase.REGROUPING:
                self._machine.take(Step.QUIESCED)
                self._answers.done.clear()
                return [Gather(self.epoch), Record("quiesced", {"epoch": self.epoch})]
            case Phase.GATHERING:
                return self._facts()
            case Phase.RESTORING:
                return self._resume()
            case other:
                raise AssertionError(f"{other} is not left by an answer")

    def _living(self) -> tuple[int, ...]:
        return tuple(sorted(self._survivors))

    def _verdict(self) -> list[Command]:
        self._committed = _furthest(self._answers.positions)
        self._reached = max(self._reached, self._committed)
        self._machine.take(Step.REPORTED)
        fields = {"epoch": self.epoch, "committed": self._committed}
        return [Notify(self._living(), {"op": "verdict", **fields}), Record("planned", fields)]

    def _facts(self) -> list[Command]:
        self._machine.take(Step.GATHERED)
        self._doubts.looks_through()
        positions: Json = {}
        for node_rank in sorted(self._answers.gathered):
            told = self._answers.gathered[node_rank].positions
            # One that took the place of a lost node knows of none.
            positions |= {rank: position for rank, position in told.items() if position}
        frames = _anywhere(list(self._answers.gathered.values()), self._counts)
        if not self._answers.positions:
            # Nobody lives; what the dead said last, their agents know.
            self._committed = _furthest(positions)
            self._reached = max(self._reached, self._committed)
        reports = {str(rank): position for rank, position in self._answers.positions.items()}
        known = positions | reports
        facts = {
            "op": "facts",
            "epoch": self.epoch,
            "committed": self._committed,
            "dead": sorted(self._dead),
            "positions": known,
            "frames": frames,
            "starts": self._starts(positions),
            "doubted": self._doubts.any,
            "logged": {
                rank: max(below, known[rank].get("since", 0))
                for answer in self._answers.gathered.values()
                for rank, below in answer.below.items()
                if rank in known
            },
        }
        return [
            Notify(tuple(sorted(self._all)), facts),
            Record(
                "gathered",
                {
                    "epoch": self.epoch,
                    "dead": sorted(self._dead),
                    "committed": self._committed,
                    "newest": {
                        str(rank): _newest(frames.get(str(rank), [])) for rank in self._dead
                    },
                },
            ),
        ]

    def _starts(self, positions: Json) -> Json:
        """The iterations that ranks can begin of which nobody knows how far they were."""
        starts: dict[str, set[int]] = {}
        for answer in self._answers.gathered.values():
            for rank, listed in answer.starts.items():
                if rank not in positions:
                    begun = {split_key(e["key"])[1] for e in listed if self._counts(e)}
                    starts.setdefault(rank, set()).update(begun)
        return {rank: sorted(begun) for rank, begun in starts.items()}

    def _counts(self, entry: Json) -> bool:
        """Whether an entry tells of a state that training has been through, and not of one that was
        given up: a copy on another node outlives the owner's.
        """
        kind, iteration = split_key(entry["key"])
        # A header is of the state that its iteration begins with.
        of, epoch = iteration - (kind == "header"), entry.get("meta", {}).get("epoch", 0)
        return not any(e > epoch and at < of for e, at in self._went_on)

    def _resume(self) -> list[Command]:
        self._machine.take(Step.JOINED)
        recovered = sorted(self._dead)
        self._went_on.append((self.epoch, self._committed))
        self._dead.clear()
        self._ready.clear()
        self._rebuilt = self._answers.rebuilt
        self._expelled.clear()
        self._restarting.clear()
        self._traces.goes_on()
        self._first_code = self._reached = 0
        return [
            Notify(tuple(sorted(self._all)), {"op": "resume", "epoch": self.epoch}),
            Record("resumed", {"epoch": self.epoch, "recovered": recovered}),
        ]

    def _expired(self, event: Expired) -> list[Command]:
        if (event.epoch, event.phase) != (self.epoch, self.phase) or not self.missing():
            return []
        seconds = event.timeout.total_seconds()
        if self._lost:
            return self._hopeless(
                f"no node took the place of nodes {sorted(self._lost)} within {seconds:g} s; raise"
                " --moetion-timeout if it takes longer to start one",
                state_lost=True,
            )
        who = "nodes" if self.phase is Phase.GATHERING else "ranks"
        reason = (
            f"{who} {self.missing()} did not answer within {seconds:g} s in phase"
            f" {self.phase.name} (waiting for {self.phase.value}); raise --moetion-timeout if"
            " they were only slow"
        )
        stuck = [rank for rank in self.missing() if rank in event.stuck] or self.missing()
        if self.phase is Phase.GATHERING or self._expelled_in == self.epoch:
            # An agent cannot be replaced, nor who is still there after it was killed.
            return self._hopeless(reason, state_lost=True)
        self._expelled_in = self.epoch
        self._expelled |= dict.fromkeys(stuck, reason)
        fields = {"epoch": self.epoch, "phase": self.phase.name, "global_ranks": stuck}
        return [Record("expelled", fields), Expel(tuple(stuck), reason)]

    def _hopeless(
        self,
        reason: str,
        *,
        state_lost: bool = False,
        refused: bool = False,
        tier: Tier = Tier.SPILL,
        trace: Trace | None = None,
    ) -> list[Command]:
        tried = None if refused else self._tried
        self._machine.take(Step.HOPELESS)
        newest = self._traces.newest
        if trace is None and newest is not None and not newest.echo:
            trace = newest
        return [
            Record("ended", {"epoch": self.epoch, "reason": reason}),
            End(
                reason,
                self._first_code or 1,
                state_lost,
                self._injected,
                trace,
                tried,
                tier,
                distrusted=self._doubts.any,
                committed=self._reached,
            ),
        ]


def _newest(frames: Sequence[Json]) -> int:
    """The iteration of the newest of these frames; -1 if there is none."""
    return max((split_key(entry["key"])[1] for entry in frames), default=-1)


def _furthest(positions: Mapping[Any, Json]) -> int:
    """A rank that passed the barrier of iteration t proves that everybody may finish t."""
    return max((position["committed"] for position in positions.values()), default=0)


def _anywhere(gathered: Sequence[Gathered], counts: Callable[[Json], bool]) -> Json:
    """What can be read of each rank's frames: its own, and copies of those that it lacks.

    One sound copy on a node that lives is enough to rebuild from. What the owner has dropped does
    not count, as a holder hears of that a moment later and the logs are gone; nor does what was
    given up, which the owner has until the same iteration is captured again.
    """
    frames: Json = {}
    below: dict[str, int] = {}
    for answer in gathered:
        frames |= {rank: list(filter(counts, listed)) for rank, listed in answer.frames.items()}
        below |= answer.below
    for answer in gathered:
        for rank, listed in answer.copies.items():
            own = frames.setdefault(rank, [])
            known = {entry["key"] for entry in own}
            own += [
                entry
                for entry in listed
                if entry["key"] not in known
                and split_key(entry["key"])[1] >= below.get(rank, 0)
                and counts(entry)
            ]
    return frames
