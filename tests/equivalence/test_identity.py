"""The headline: off == on without failure == on with failures, on hashes, logged losses and log
lines.

PP2 x EP2 on four processes: ranks 0 and 1 are stage 0, ranks 2 and 3 the last stage. Three
microbatches per iteration, fresh data, gradient clipping, warm-up and decay. Many failures share a
run, seven iterations apart, so that windows of four are hit at each of their frames.
"""

import pytest

from .harness import CUTS, Run, Runner, assert_same_bits, assert_within_claim, kills

PLACES = (
    "forward:1",
    "backward:0",
    "grad-sync",
    "norm",
    "optimizer",
    "param-gather",
    "capture",
    "end",
)
APART = 7
BOTH_STAGES = 2 * len(PLACES) * APART + 3
ONE_EACH = len(PLACES) * APART + 3
MAY_GROW_BYTES = 192 << 20
"""What allocators keep of a recovery's needs: 105 MiB more after seven of them and none in the next
three, when this was written, with nothing there that the collector could have freed.
"""
SPLIT = ["--moetion-window", "3", "--moetion-split", "16"]
"""Three of the operators of every rank are captured in parts, over two frames."""


def everywhere() -> list[tuple[int, int, str]]:
    """Every place on both stages; ranks 0 and 3 print and write, 1 and 2 do not."""
    on_first = [(n % 2, 3 + APART * 2 * n, place) for n, place in enumerate(PLACES)]
    on_last = [(3 - n % 2, 3 + APART * (2 * n + 1), place) for n, place in enumerate(PLACES)]
    return sorted(on_first + on_last, key=lambda k: k[1])


def _alternating() -> list[tuple[int, int, str]]:
    return [((3, 0, 2, 1)[n % 4], 3 + APART * n, place) for n, place in enumerate(PLACES)]


def _check_recoveries(
    run: Run, failures: list[tuple[int, int, str]], bound: dict[str, int]
) -> None:
    """Each failure was recovered; the failed stage replayed no more than `bound`, the other
    nothing.
    """
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in failures], run.tail()
    replayed: dict[int, dict[int, int]] = {}
    for event in run.events("resumed"):
        if event["who"].startswith("rank"):
            rank = int(event["who"].removeprefix("rank"))
            replayed.setdefault(event["epoch"], {})[rank] = event["replayed"]
    for epoch, (rank, iteration, place) in enumerate(failures, start=1):
        stage = {0, 1} if rank < 2 else {2, 3}
        counts = replayed[epoch]
        assert set(counts) == {0, 1, 2, 3}
        assert all(counts[r] == 0 for r in {0, 1, 2, 3} - stage), (
            f"{place} at {iteration}: {counts}"
        )
        assert len({counts[r] for r in stage}) == 1
        assert 0 < counts[rank] <= bound.get(place, bound["else"]), (
            f"{place} at {iteration}: {counts}"
        )


def _check_what_survivors_hold(run: Run, who: str, num_recoveries: int) -> None:
    """One process lived through all recoveries, and holds no more than after the first ones."""
    held = [e for e in run.events("holds") if e["who"] == who]
    # The second failure may come before it is quiet behind the very first one.
    assert held[0]["epoch"] <= 2
    assert held[-1]["epoch"] == num_recoveries
    # How many connections gloo makes anew depends on who was replaced.
    replaced = {e["epoch"]: tuple(e["recovered"]) for e in run.recoveries}
    for name in ("threads", "children", "sockets"):
        counts: dict[tuple[int, ...], set[int]] = {}
        for e in held:
            # A call that gloo forgot keeps its groups until their timeout.
            if not e.get("left_alone"):
                counts.setdefault(replaced[e["epoch"]], set()).add(e[name])
        assert len(counts) < len(held), "nobody was replaced twice"
        assert all(len(found) == 1 for found in counts.values()), (name, held)
    assert held[-1]["resident_bytes"] - held[0]["resident_bytes"] < MAY_GROW_BYTES, held


def test_capture_and_logging_change_nothing(runner: Runner, off: Run) -> None:
    flags = ["--moetion", "--moetion-cut", "auto"]
    on = runner.run("on", iterations=40, flags=flags, afresh=True)
    assert on.code == 0, on.tail()
    # All have come to the same, and say so.
    (cut,) = {e["cut"] for e in on.events("cut")}
    assert len(on.events("cut")) == 4
    assert f"moetion: cut {cut}: a failure costs at least" in on.log
    assert on.recoveries == []
    assert_same_bits(on, off, 40)
    assert_within_claim(on)


@pytest.mark.parametrize("policy", ["rolling", "tumbling"])
def test_a_kill_at_any_place_on_either_stage_is_recovered_bit_for_bit(
    runner: Runner, off: Run, policy: str
) -> None:
    # The policies differ in the base; places on both stages are what the other run is for.
    window, both = 4, policy == "rolling"
    failures, last = (everywhere(), BOTH_STAGES) if both else (_alternating(), ONE_EACH)
    flags = ["--moetion", "--moetion-window", str(window), "--moetion-window-policy", policy]
    # A new order of experts would have a failure in a rolling window replay one iteration more.
    flags += ["--moetion-popularity", "none" if policy == "rolling" else "hard-count"]
    run = runner.run(policy, iterations=last, flags=[*flags, *kills(*failures)], afresh=both)
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, last)
    assert_within_claim(run)
    # One more where the frame of the committed iteration was not sealed: that lag is one iteration.
    unsealed = dict.fromkeys(("optimizer", "param-gather", "capture"), window)
    rolling = {**unsealed, "else": window - 1}
    _check_recoveries(run, failures, rolling if policy == "rolling" else {"else": 2 * window})


def test_overlapped_communication_is_recovered_bit_for_bit(runner: Runner, off: Run) -> None:
    failures = _alternating()
    on = runner.run("overlap-on", iterations=20, variant="overlap", flags=["--moetion"])
    assert on.code == 0, on.tail()
    # Only the scheduling of communication differs from the run without the flags, not one bit.
    assert_same_bits(on, off, 20)
    run = runner.run(
        "overlap-killed",
        iterations=ONE_EACH,
        variant="overlap",
        flags=["--moetion", "--moetion-window", "4", *kills(*failures)],
    )
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, ONE_EACH)
    # A frame that is not sealed and a new order of experts add one each.
    _check_recoveries(run, failures, {"else": 5})


def test_a_run_whose_frames_do_not_fit_in_memory_is_refused_in_one_line(runner: Runner) -> None:
    run = runner.run("too-big", iterations=5, flags=["--moetion", "--moetion-memory", "0.01"])
    assert run.code != 0
    assert run.lines == []
    said = [line for line in run.log.splitlines() if "moetion-run: ending the job" in line]
    assert len(said) == 1, run.tail()
    assert "of host memory and 10 MiB may be taken" in said[0]


def test_a_failure_in_iterations_one_and_two_and_any_kind_of_death_is_recovered(
    runner: Runner, off: Run
) -> None:
    faults = (
        "kill:global_rank=3,iteration=1,at=backward:2",
        "kill:global_rank=0,iteration=2,at=forward:2",
        "raise:global_rank=2,iteration=13,at=forward:2",
        "exit:global_rank=1,iteration=24,at=end",
    )
    flags = ["--moetion", *SPLIT, "--moetion-fault", ";".join(faults)]
    run = runner.run("early", iterations=35, flags=[*flags, "--moetion-window-policy", "tumbling"])
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, 35)
    assert_within_claim(run)
    assert [e["recovered"] for e in run.recoveries] == [[3], [0], [2], [1]]
    # What lies on the two edges between the slots: an expert, and the embedding or output head.
    split = {(e["who"], name): n for e in run.events("scheduled") for name, n in e["split"].items()}
    first, last = "chunk0.embedding", "chunk0.output_layer"
    assert split == {
        **{(f"rank{rank}", "chunk0.decoder.layers.0.expert.1"): 5 for rank in range(4)},
        **{(f"rank{rank}", first if rank < 2 else last): 4 for rank in range(4)},
    }


@pytest.mark.parametrize("cut", CUTS)
def test_a_second_failure_in_each_iteration_after_a_recovery_is_recovered(
    runner: Runner, off: Run, cut: str
) -> None:
    window = 2
    failures = []
    for distance in range(1, window + 3):
        first = 3 + (distance - 1) * 2 * APART
        failures += [
            (3, first, "backward:1"),
            ((2, 0)[distance % 2], first + distance, "forward:2"),
        ]
    last = failures[-1][1] + APART
    # In parts under the rolling policy too.
    flags = ["--moetion", "--moetion-window", str(window), "--moetion-split", "16"]
    flags += ["--moetion-cut", cut, *kills(*failures)]
    run = runner.run(f"again-{cut}", iterations=last, flags=flags)
    assert run.code == 0, run.tail()
    assert_same_bits(run, off, last)
    assert [e["recovered"] for e in run.recoveries] == [[rank] for rank, *_ in failures]
    assert any(e["split"] for e in run.events("scheduled")), "nothing was captured in parts"
    _check_what_survivors_hold(run, "rank1", len(failures))
