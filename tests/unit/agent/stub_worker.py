"""A worker without Megatron that speaks the agent's protocol and follows a script.

`python stub_worker.py [--moetion] [--moetion-dir DIR] --iterations N [--die RANK:PLACE[:HOW]]...`

PLACE is an iteration ("5") or a notice of the recovery round ("freeze", "abort", "facts"), the
latter with "@EPOCH". HOW is kill (default), exit, raise, stop (SIGSTOP) or spin (an endless loop).
Each death happens once per job. RANK may be "all".
Iterations are in step: all ranks wait for each other through the store, as pipeline stages would.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from megatron_moetion.agent import leaving
from megatron_moetion.agent.link import AgentLink
from megatron_moetion.agent.shelf import agent_vault
from megatron_moetion.events import EventLog
from megatron_moetion.job import take_on
from megatron_moetion.progress import Progress
from megatron_moetion.vault.budget import Claim, Need

RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])
FRAME_BYTES = 300_000


class Worker:
    """The stub's state is one number: the iteration it stands at."""

    def __init__(self, args: argparse.Namespace, link: AgentLink) -> None:
        self.args = args
        self.link = link
        self.notices: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.replacement = int(os.environ["MOETION_EPOCH"]) > 0
        self.log = EventLog(args.moetion_dir, f"rank-{RANK}")
        hello = {"op": "hello", "global_rank": RANK, "pid": os.getpid()}
        self.welcome = link.request({**hello, "replacement": self.replacement})
        self.log.emit(
            "welcome",
            pid=os.getpid(),
            replacement=self.replacement,
            **{key: value for key, value in self.welcome.items() if key not in ("op", "id")},
        )
        broken = self.replacement and args.broken is not None and args.broken.exists()
        if broken:
            # A kind of device that no machine here has.
            args.broken.unlink()
        if self.replacement:
            device = torch.device("ipu" if broken else "cpu")
            take_on(link, device, timedelta(seconds=args.moetion_timeout or 600))
        self.vault = agent_vault(link, RANK)
        self.epoch = self.welcome["epoch"]
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=60),
        )
        if not self.welcome["claimed"]:
            claim = Claim(Need(0, 16 << 20, 0), {}).to_json()
            link.request({"op": "claim", "limit": None, "lag": 1, **claim})
        self.progress = Progress(self.welcome["progress"])
        self.iteration = 0
        link.listen(self.hear)

    def hear(self, notice: dict) -> None:
        # How fast copying is, this worker does not care.
        if notice["op"] not in ("replicated", "release"):
            self.notices.put(notice)

    def frame(self, rank: int, iteration: int) -> torch.Tensor:
        return torch.full((FRAME_BYTES,), (rank * 16 + iteration) % 251, dtype=torch.uint8)

    def save(self) -> None:
        self.vault.put(f"frame/{self.iteration}/all", self.frame(RANK, self.iteration), self.meta())
        spill_at = self.args.spill_at
        if spill_at is not None:
            # What a spill has of each iteration besides the frame.
            for kind in ("header", "result"):
                self.vault.put(f"{kind}/{self.iteration}/x", torch.zeros(8, dtype=torch.uint8), {})
            if self.iteration == spill_at + 1:
                span = {"base": spill_at - 1, "iteration": spill_at}
                self.link.send({"op": "window", "span": span, "kept": True})
        self.vault.drop(self.iteration - 2)
        self.link.send({"op": "position", "position": self.position()})

    def meta(self) -> dict:
        return {"i": self.iteration, "epoch": self.epoch}

    def position(self) -> dict:
        return {"iteration": self.iteration, "committed": self.iteration}

    def maybe_die(self, place: str) -> None:
        for index, spec in enumerate(self.args.die):
            rank, where, how = [*spec.split(":"), "kill"][:3]
            here = rank in ("all", str(RANK)) and where == place
            if here and index not in self.welcome["fired"]:
                if rank != "all":
                    self.link.send({"op": "fired", "index": index})
                self.log.emit("dying", place=place, how=how)
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "exit":
                    os._exit(0)
                if how == "spin":
                    # In C, with the GIL: no handler of Python's ever runs.
                    signal.signal(signal.SIGTERM, lambda *_: None)
                    sum(itertools.repeat(0))
                if how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                raise RuntimeError(f"injected at {place}")

    def reach(self, iteration: int) -> bool:
        """Wait for all ranks at an iteration; False when a notice came instead."""
        if self.args.pace:
            try:
                self.notice(self.notices.get(timeout=self.args.pace))
            except queue.Empty:
                pass
            else:
                return False
        key = f"epoch{self.epoch}/iteration{iteration}"
        self.store.add(key, 1)
        self.progress.waits(1)
        while self.store.add(key, 0) < WORLD_SIZE:
            try:
                notice = self.notices.get(timeout=0.002)
            except queue.Empty:
                continue
            self.progress.waits(0)
            self.notice(notice)
            return False
        self.progress.waits(0)
        return True

    def train(self) -> None:
        if self.replacement:
            self.link.send({"op": "ready", "epoch": self.epoch})
            self.recover({})
        else:
            self.save()
        while self.iteration < self.last():
            if self.progress.begin(self.iteration + 1):
                self.link.send({"op": "steady"})
            self.progress.at("forward", self.iteration + 1, 0)
            self.maybe_die(str(self.iteration + 1))
            if self.reach(self.iteration + 1):
                self.iteration += 1
                self.save()
        self.log.emit("finished", iteration=self.iteration, pid=os.getpid())
        self.link.send({"op": "finished"})

    def last(self) -> int:
        """The last iteration. With --until, rank 0 sees the file and all are told in time."""
        until = self.args.until
        if until is None:
            return self.args.iterations
        if not self.store.check(["over"]):
            if RANK == 0 and until.exists():
                # Nobody is further than one iteration from anybody else.
                self.store.set("over", str(self.iteration + 3))
            return self.iteration + 1
        return int(self.store.get("over"))

    def notice(self, message: dict) -> None:
        assert message["op"] == "freeze", message
        self.progress.recovers()
        self.recover(message)

    def recover(self, message: dict) -> None:
        while message.get("op") != "resume":
            if message:
                op, self.epoch = message["op"], message.get("epoch", self.epoch)
                self.log.emit(f"notice.{op}", epoch=self.epoch)
                self.maybe_die(f"{op}@{self.epoch}")
                answer = getattr(self, f"on_{op}")(message)
                if answer:
                    self.link.send({"epoch": self.epoch, **answer})
            message = self.notices.get()
        self.epoch = message["epoch"]
        self.log.emit("notice.resume", epoch=self.epoch, pid=os.getpid(), iteration=self.iteration)

    def on_freeze(self, message: dict) -> dict | None:
        return None if RANK in message["dead"] else {"op": "report", "position": self.position()}

    def on_verdict(self, message: dict) -> dict:
        if self.iteration < message["committed"]:
            self.iteration = message["committed"]
            self.save()
        return {"op": "settled"}

    def on_abort(self, message: dict) -> dict:
        return {"op": "quiesced"}

    def on_end(self, message: dict) -> dict:
        sys.exit(1)

    def on_facts(self, message: dict) -> dict:
        committed = message["committed"]
        if RANK in message["dead"]:
            newest = max(int(entry["key"].split("/")[1]) for entry in message["frames"][str(RANK)])
            fetched = self.vault.fetch(RANK, f"frame/{newest}/all")
            assert fetched is not None, (newest, message["frames"])
            assert torch.equal(fetched.data, self.frame(RANK, newest))
            self.iteration = committed
            self.save()
            self.log.emit("restored", base=newest, committed=committed)
        # A rank of a node that was lost drops what the copies hold as soon as it has its own.
        lost = message["dead"] if self.args.moetion_cut == "shard" else []
        for rank in [rank for rank in range(WORLD_SIZE) if rank not in lost]:
            other = message["frames"][str(rank)][-1]
            fetched = self.vault.fetch(rank, other["key"])
            iteration = other["meta"]["i"]
            assert fetched is not None, (rank, other)
            assert torch.equal(fetched.data, self.frame(rank, iteration)), (rank, other)
            listed = [entry.key for entry in self.vault.inventory(rank, "frame/")]
            assert other["key"] in listed
        return {"op": "joined", "details": {}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moetion", action="store_true")
    parser.add_argument("--moetion-dir", type=Path)
    parser.add_argument("--moetion-timeout", type=float)
    parser.add_argument("--moetion-lease", type=float)
    parser.add_argument("--moetion-cut")
    parser.add_argument("--moetion-spill-interval")
    parser.add_argument("--spill-at", type=int, help="offer a window that ends there")
    parser.add_argument("--until", type=Path, help="train until there is such a file")
    parser.add_argument("--broken", type=Path, help="the next replacement's device is broken")
    parser.add_argument("--leave-behind", action="store_true", help="a process of its own session")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds for each iteration")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--moetion-replicas", default="auto")
    parser.add_argument("--moetion-hang-factor", type=float)
    parser.add_argument("--moetion-max-retries", type=int)
    parser.add_argument("--moetion-restart-budget")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--die", action="append", default=[])
    args = parser.parse_args()
    if args.leave_behind:
        sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
        (args.moetion_dir.parent / f"left-{RANK}").write_text(str(sleeper.pid))
    if args.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = AgentLink.connect()
    assert link is not None
    try:
        Worker(args, link).train()
    except Exception as error:
        leaving.tell(link, error, echo=False)
        raise


if __name__ == "__main__":
    main()
