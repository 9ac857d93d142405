"""Fault scripts: what they mean, what is refused, and that each fires once, at its place."""

import os
import signal
import subprocess
import sys

import pytest

from megatron_moetion.agent.hangs import STOPPED
from megatron_moetion.agent.watch import state_of
from megatron_moetion.faults import (
    COUNTED,
    KINDS,
    PLACES,
    Fault,
    InjectedFault,
    Injector,
    Scripted,
    parse,
)


def test_a_script_is_several_faults_joined_by_semicolons() -> None:
    script = "kill:global_rank=3,iteration=7,at=backward:1; exit:at=end,iteration=2,global_rank=0;"
    assert parse(script) == (Fault("kill", 3, 7, "backward", 1), Fault("exit", 0, 2, "end", None))
    assert parse("") == ()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("corrupt", "poison")])
@pytest.mark.parametrize("place", PLACES)
def test_every_kind_of_death_goes_with_every_place(kind: str, place: str) -> None:
    count = ":0" if place in COUNTED else ""
    (fault,) = parse(f"{kind}:global_rank=1,iteration=1,at={place}{count}")
    assert (fault.kind, fault.place) == (kind, place)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "boom:global_rank=3,iteration=7,at=end",
            "kind 'boom' is none of kill, raise, exit, exit0, oom, stop, spin, hold, corrupt",
        ),
        ("corrupt:global_rank=3,iteration=7,at=end", "'end' is none of capture, transfer, stored"),
        ("corrupt:global_rank=3,iteration=7,at=stored", "take copy=K, and need it"),
        ("corrupt:global_rank=3,iteration=7,at=capture,copy=0", "take copy=K, and need it"),
        ("corrupt:global_rank=3,iteration=7,at=transfer,copy=0", "begin at 1"),
        ("corrupt:global_rank=3,iteration=7,at=stored,copy=-1", "begin at 1"),
        ("corrupt:global_rank=3,iteration=7,at=stored,copy=x", "copies are integers"),
        ("kill:global_rank=3,iteration=7,at=end,copy=1", "has unknown copy"),
        ("kill:iteration=7,at=end", "lacks global_rank; write e.g."),
        ("kill:global_rank=,iteration=7,at=end", "lacks global_rank"),
        ("kill:global_rank=1,iteration=7", "lacks at"),
        ("kill:global_rank=1,iteration=7,at=lunch", "place 'lunch' is none of start"),
        ("kill:global_rank=1,iteration=7,at=forward", "take a number, as in forward:0"),
        ("kill:global_rank=1,iteration=7,at=end:1", "need it; no other place does"),
        ("kill:global_rank=x,iteration=7,at=end", "are integers"),
        ("kill:global_rank=1,iteration=0,at=end", "iteration >= 1"),
        ("kill:global_rank=-1,iteration=1,at=end", "global_rank >= 0"),
        ("kill:global_rank=1,iteration=1,at=end,when=now", "has unknown when"),
        ("kill", "lacks global_rank, iteration, at"),
    ],
)
def test_a_bad_script_is_refused_in_one_line_that_says_why(script: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("(", r"\(")) as caught:
        parse(script)
    assert "\n" not in str(caught.value)


def test_a_frame_is_damaged_once_and_its_rank_lives_on() -> None:
    fired = []
    script = parse("corrupt:global_rank=1,iteration=2,at=capture")
    injector = Injector(script, 1, (), lambda index, fault: fired.append(index))
    injector.reach("capture", 2)
    assert not injector.corrupts(1)
    assert [injector.corrupts(2), injector.corrupts(2)] == [True, False]
    assert fired == [0]


def test_a_fault_fires_once_and_only_on_its_rank_iteration_place_and_microbatch() -> None:
    script = parse("raise:global_rank=1,iteration=2,at=forward:1")
    fired: list[int] = []
    mine = Injector(script, 1, (), lambda index, fault: fired.append(index))
    other = Injector(script, 0, (), lambda index, fault: fired.append(index))
    other.reach("forward", 2, 1)
    for place, iteration, microbatch in [("forward", 1, 1), ("forward", 2, 0), ("backward", 2, 1)]:
        mine.reach(place, iteration, microbatch)
    assert fired == []
    with pytest.raises(InjectedFault, match="global_rank=1, iteration=2"):
        mine.reach("forward", 2, 1)
    mine.reach("forward", 2, 1)
    assert fired == [0]


def test_a_replacement_does_not_fire_what_has_fired_but_the_rest_of_the_script() -> None:
    script = parse("raise:global_rank=1,iteration=2,at=end;raise:global_rank=1,iteration=3,at=end")
    replacement = Injector(script, 1, [0], lambda index, fault: None)
    replacement.reach("end", 2)
    with pytest.raises(InjectedFault):
        replacement.reach("end", 3)


@pytest.mark.parametrize(("kind", "code"), [("kill", -9), ("exit", 3), ("exit0", 0)])
def test_a_process_ends_at_once_and_the_report_comes_first(kind: str, code: int) -> None:
    process = firing(kind)
    output, errors = process.communicate()
    assert (process.returncode, output) == (code, "fired 0\n"), errors


def firing(kind: str) -> subprocess.Popen[str]:
    program = (
        "from megatron_moetion.faults import *\n"
        f"script = parse('{kind}:global_rank=0,iteration=1,at=end')\n"
        "Injector(script, 0, (), lambda i, f: print('fired', i, flush=True)).reach('end', 1)\n"
        "print('still here')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_stopped_process_goes_on_if_somebody_has_it_go_on() -> None:
    process = firing("stop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert state_of(process.pid) == STOPPED
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, "fired 0\nstill here\n"), errors


def test_a_process_that_spins_burns_its_processor_and_ends_by_a_signal_alone() -> None:
    process = firing("spin")
    assert process.stdout is not None
    assert process.stdout.readline() == "fired 0\n"
    assert process.poll() is None
    assert state_of(process.pid) in "RS"
    process.kill()
    output, _ = process.communicate()
    assert (process.returncode, output) == (-9, "")


def test_agents_damage_the_copies_that_the_script_names_once_each() -> None:
    script = parse(
        "corrupt:global_rank=1,iteration=2,at=stored,copy=0;"
        "corrupt:global_rank=1,iteration=2,at=transfer,copy=1;"
        "corrupt:global_rank=1,iteration=2,at=capture"
    )
    fired: list[tuple[int, Fault]] = []
    scripted = Scripted(script, (), lambda index, fault: fired.append((index, fault)))
    damaged: list[str] = []
    for place, iteration, copy in [
        ("stored", 1, 0),
        ("stored", 2, 1),
        ("stored", 2, 0),
        ("stored", 2, 0),
        ("transfer", 2, 1),
        ("capture", 2, 0),
    ]:
        scripted.strike(place, 1, iteration, copy, lambda p=place: damaged.append(p))
    assert damaged == ["stored", "transfer"]
    assert fired == [(0, script[0]), (1, script[1])]
    again = Scripted(script, [1], lambda index, fault: fired.append((index, fault)))
    again.strike("transfer", 1, 2, 1, lambda: damaged.append("again"))
    assert damaged == ["stored", "transfer"]
    injector = Injector(script, 1, (), lambda index, fault: None)
    assert injector.corrupts(2)
    assert not injector.corrupts(2)


def test_a_frame_is_poisoned_once_where_it_is_captured_and_nowhere_else() -> None:
    fired = []
    script = parse("poison:global_rank=1,iteration=2,at=capture")
    injector = Injector(script, 1, (), lambda index, fault: fired.append(index))
    injector.reach("capture", 2)
    assert not injector.corrupts(2)
    assert [injector.poisons(2), injector.poisons(2)] == [True, False]
    assert fired == [0]
    with pytest.raises(ValueError, match="place 'end' is none of capture"):
        parse("poison:global_rank=1,iteration=2,at=end")
