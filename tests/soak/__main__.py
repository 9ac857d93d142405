"""Trains with failures at random instants, and compares every bit with a run that never failed.

Usage: python -m tests.soak [--agents N] [--workers M] [--minutes T] [--failures F] [--seed S]
           [--cut stage|shard|both] [--directory DIR]

Ends with one line, VERDICT: or FAILED, and code 0 only for `VERDICT: bit-identical`. The seed
decides which failures are injected and when; how far the ranks are at such an instant, the machine
decides. It is a rehearsal on CPU: times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from megatron_moetion import events
from tests.equivalence.harness import CUTS, ROOT, Run, Runner

from .inject import Injector
from .plan import Machines, failures, kinds_for
from .report import lost_by_epoch, table
from .same import NotSame, Same, assert_same, newest
from .scene import FOREVER, STEADY, runner, say

LEAVING = Path(__file__).with_name("leaving_pretrain.py")
REFERENCE = "never-failed"
TIMEOUT_SECONDS = 60
"""--moetion-timeout, if it is not given. Twice as long without a word, and the job counts as
hanging."""


class Failed(Exception):
    """A run did not end as it was to."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, default=4, metavar="N")
    parser.add_argument("--workers", type=int, default=2, metavar="M", help="of each agent")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="T", help="of each cut")
    parser.add_argument("--failures", type=int, default=60, metavar="F", help="or so many")
    parser.add_argument("--seed", type=int, default=None, metavar="S")
    parser.add_argument("--cut", choices=(*CUTS, "both"), default="both")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS, metavar="SECONDS")
    parser.add_argument("--plan", action="store_true", help="print the failures, inject none")
    parser.add_argument("--directory", type=Path, default=ROOT / ".moetion" / "soak")
    options = parser.parse_args()
    machines = Machines(options.agents, options.workers)
    if machines.world_size % 4:
        parser.error("agents times workers has to be a multiple of 4: PP2 x EP2")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    shape = f"--agents {options.agents} --workers {options.workers}"
    say(f"soak: to have the same failures again: --seed {seed} {shape}")
    cuts = CUTS if options.cut == "both" else (options.cut,)
    if options.plan:
        for cut in cuts:
            for failure in islice(failures(seed, cut, machines), options.failures):
                say(f"{cut}: {failure}")
        return 0
    try:
        same, count = soak(cuts, seed, machines, options)
    except NotSame as different:
        say(f"VERDICT: NOT bit-identical ({different}; seed {seed})")
        return 1
    except Failed as error:
        say(f"FAILED ({error}; seed {seed})")
        return 2
    compared = f"{same.hashes} hashes over {same.records} digests agree"
    say(f"VERDICT: bit-identical ({compared}; {count} failures survived; seed {seed})")
    return 0


def soak(
    cuts: Sequence[str], seed: int, machines: Machines, options: argparse.Namespace
) -> tuple[Same, int]:
    """Trains with failures under each cut, once without any, and compares; what agreed, and how
    many failures there were.

    Raises:
        NotSame, Failed: it is not as it should be.
    """
    directory: Path = options.directory
    for name in (*CUTS, REFERENCE):
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / f"{name}.code").unlink(missing_ok=True)
    runs = runner(directory)
    say(f"soak: {', '.join(kinds_for(machines))}; all of it in {directory}")
    failed = {cut: _with_failures(runs, cut, seed, machines, options) for cut in cuts}
    lasts = {cut: newest(run.directory, machines.world_size) for cut, (run, _) in failed.items()}
    longest = max(lasts.values())
    say(f"soak: now {longest} iterations without a failure")
    reference = _run(runs, REFERENCE, machines, [*STEADY, "--exit-interval", str(longest)], None)
    if reference.code != 0:
        raise Failed(f"the reference failed: see {reference.directory / 'log'}")
    records = hashes = 0
    for cut, (run, _) in failed.items():
        same = assert_same(run.directory, reference.directory, machines.world_size, lasts[cut])
        records, hashes = records + same.records, hashes + same.hashes
    return Same(records, hashes), sum(count for _, count in failed.values())


def _with_failures(
    runs: Runner, cut: str, seed: int, machines: Machines, options: argparse.Namespace
) -> tuple[Run, int]:
    """A run under a cut, and how many failures it survived: all that it was given.

    Raises:
        Failed: else.
    """
    begin = time.monotonic()
    injector = Injector(
        failures(seed, cut, machines),
        options.failures,
        options.minutes * 60,
        2 * options.timeout,
        lambda line: say(f"{cut}: {line}"),
    )
    protected = ["--moetion", "--moetion-cut", cut, "--moetion-timeout", str(options.timeout)]
    # By itself a model as small as this one is captured in full in every iteration.
    protected += ["--moetion-window", "4"]
    run = _run(runs, cut, machines, [*STEADY, *protected], injector)
    lost = lost_by_epoch(events.read(run.directory))
    for line in table(injector.outcomes, injector.not_survived, lost):
        say(line)
    if injector.why_not:
        raise Failed(f"{cut}: {injector.why_not}; see {run.directory / 'log'}")
    count, seconds = len(injector.outcomes), time.monotonic() - begin
    say(f"{cut}: {count} failures survived in {seconds:.0f} s, start and end included")
    return run, count


def _run(
    runs: Runner, name: str, machines: Machines, flags: list[str], injector: Injector | None
) -> Run:
    layout = {"pp_size": machines.num_stages, "dp_size": machines.world_size // machines.num_stages}
    protected, nodes = injector is not None, [machines.workers] * machines.agents
    return runs.run(
        name,
        iterations=FOREVER,
        flags=flags,
        model=layout,
        launcher_flags=[] if protected else ["--spares", "1"],
        workers_of_node=nodes if protected else [machines.world_size],
        script=LEAVING,
        standbys=int(protected and machines.agents > 1),
        meddle=injector,
        restarts=protected,
        afresh=True,
        limit_seconds=None,
    )


if __name__ == "__main__":
    sys.exit(main())
