"""What is claimed at the start is never exceeded, and a claim that does not fit says what would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.operators import Kind, Operator, ParamState, StateAccess
from megatron_moetion.schedule import FramePlan, Schedule, Unit, WindowPolicy, generate
from megatron_moetion.snapshot.frame import layout, sources
from megatron_moetion.vault import LocalVault
from megatron_moetion.vault.budget import (
    Claim,
    Need,
    free_bytes,
    need_of,
    refusal,
    table,
)

MIB = 1 << 20


def operator(index: int, numel: int) -> Operator:
    main = torch.empty(numel, device="meta")
    light = torch.empty(numel, dtype=torch.bfloat16, device="meta")
    moments = {name: torch.empty(numel, device="meta") for name in ("exp_avg", "exp_avg_sq")}
    state = StateAccess({main: {**moments, "step": torch.zeros(())}}, main)
    param = torch.nn.Parameter(light)
    return Operator(f"o{index}", Kind.EXPERT, [ParamState(f"w{index}", param, light, main, state)])


def train(
    vault: LocalVault,
    schedule: Schedule,
    operators: list[Operator],
    inbox: dict[str, tuple[int, int]],
    spill_lasts: int,
    kept_longer: int,
) -> None:
    """The vault's part of many iterations.

    Args:
        spill_lasts: iterations for which each window that is kept for a spill stays; 0 keeps none.
        kept_longer: frames and logs beyond the schedule's.
    """
    by_name = {o.name: o for o in operators}

    def capture(iteration: int, plan: FramePlan) -> None:
        _, nbytes = layout(list(sources(plan, by_name, {})))
        vault.reserve(f"frame/{iteration}", nbytes)
        vault.seal(f"frame/{iteration}", {})

    capture(0, schedule.dense)
    kept = range(0)
    for iteration in range(1, 4 * schedule.window + 6):
        vault.drop(iteration - schedule.frames_kept - kept_longer)
        ended = iteration - 2
        if spill_lasts and ended and ended % schedule.window == 0:
            wanted = range(ended - schedule.window + 1, ended + 2)
            kept = wanted if vault.keep(wanted) else kept
        if kept and iteration == kept.stop + spill_lasts:
            vault.release(kept)
        for kind, (count, nbytes) in inbox.items():
            for ordinal in range(count):
                key = f"{kind}/{iteration}/{ordinal}"
                vault.reserve(key, nbytes)
                vault.seal(key, {})
        capture(iteration, schedule.frame(iteration))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_memory_of_a_run_stays_below_what_was_claimed(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 600_000), min_size=1, max_size=6))
    operators = [operator(i, numel) for i, numel in enumerate(sizes)]
    policy = data.draw(st.sampled_from(list(WindowPolicy)))
    window = data.draw(st.integers(1, 5))
    units = [Unit(o.name, o.kind, n) for o, n in zip(operators, sizes, strict=True)]
    schedule = generate(units, window, policy, data.draw(st.integers(0, 8)))
    entries = st.tuples(st.integers(0, 6), st.integers(1, 3 * MIB))
    inbox = data.draw(st.dictionaries(st.sampled_from(["boundary", "batch"]), entries))
    vault = LocalVault(0)
    spill_lasts = data.draw(st.integers(0, 20))
    kept_longer = data.draw(st.integers(0, 3))
    train(vault, schedule, operators, inbox, spill_lasts, kept_longer)
    need = need_of(schedule, operators, 0, inbox, spill_lasts > 0, kept_longer)
    assert vault.usage().reserved_bytes <= need.total


def test_spills_and_copies_that_lag_need_what_both_need_together() -> None:
    units = [Unit("o0", Kind.EXPERT, 300_000)]
    schedule = generate(units, 3, WindowPolicy.ROLLING)
    operators, inbox = [operator(0, 300_000)], {"batch": (2, MIB)}
    neither = need_of(schedule, operators, 0, inbox)
    spills = need_of(schedule, operators, 0, inbox, spills=True)
    longer = need_of(schedule, operators, 0, inbox, kept_longer=2)
    both = need_of(schedule, operators, 0, inbox, spills=True, kept_longer=2)
    assert neither.total < min(spills.total, longer.total)
    assert both.total - neither.total == spills.total + longer.total - 2 * neither.total
    # A holder keeps nothing for the spills of others.
    assert both.copies == longer.copies


def claim(total: int, **others: int) -> Claim:
    return Claim(Need(total, 0, 0), {int(k.removeprefix("w")): v for k, v in others.items()})


def test_claims_that_fit_are_not_refused() -> None:
    assert refusal({0: claim(3 * MIB), 1: claim(4 * MIB)}, 7 * MIB) is None


def test_a_refusal_names_the_window_that_would_fit() -> None:
    claims = {0: claim(6 * MIB, w1=9 * MIB, w3=3 * MIB), 1: claim(6 * MIB, w3=4 * MIB, w5=4 * MIB)}
    assert refusal(claims, 8 * MIB) == (
        "frames and logs need 12 MiB of host memory and 8 MiB may be taken:"
        " --moetion-window 3 would need 7 MiB"
    )
    assert "raise --moetion-memory" in str(refusal(claims, 5 * MIB))


def test_the_table_adds_the_ranks_of_a_node() -> None:
    lines = table({1: Need(MIB, 2 * MIB, 3 * MIB), 0: Need(MIB, 0, 0)}, 90 * MIB).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["rank", "0"],
        ["rank", "1"],
        ["this", "node"],
    ]
    assert lines[-1].endswith(" 7 MiB of 90 MiB that may be taken")


def test_a_claim_survives_its_json_form() -> None:
    there = claim(5, w1=3, w2=4)
    assert Claim.from_json(there.to_json()) == there


CGROUPS = {
    "none": ({}, 8 * MIB),
    "version 2": (
        {
            "sys/fs/cgroup/memory.max": str(5 * MIB),
            "sys/fs/cgroup/memory.current": str(3 * MIB),
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {MIB}\nactive_file 0\n",
        },
        3 * MIB,
    ),
    "version 2, no limit": (
        {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "1"},
        8 * MIB,
    ),
    "version 1": (
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(5 * MIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * MIB),
        },
        2 * MIB,
    ),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_free_is_what_the_kernel_and_the_cgroup_leave(tmp_path: Path, name: str) -> None:
    files, expected = CGROUPS[name]
    meminfo = f"MemTotal: 99999 kB\nMemAvailable: {8 * 1024} kB\n"
    for path, text in {"proc/meminfo": meminfo, **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert free_bytes(tmp_path) == expected


def test_this_machine_has_some() -> None:
    assert free_bytes() > 0
