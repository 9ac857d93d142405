"""The smallest window that capture keeps up with, and the policy that replays less."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil, inf
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.bench.policies import replays
from megatron_moetion.operators import Kind, Operator, ParamState, StateAccess
from megatron_moetion.schedule import Unit, WindowPolicy, generate, order
from megatron_moetion.window import (
    ENOUGH,
    FINENESS,
    ROW,
    Fit,
    Pace,
    Rates,
    choose,
    fit,
    predicted_replay,
    price,
)

FAST = settings(max_examples=40, deadline=None)
ROLLING, TUMBLING = WindowPolicy.ROLLING, WindowPolicy.TUMBLING
POLICIES = st.sampled_from([ROLLING, TUMBLING])
MILLION = 1_000_000


def operator(name: str, numel: int) -> Operator:
    main = torch.empty(numel, device="meta")
    light = torch.empty(numel, dtype=torch.bfloat16, device="meta")
    param = torch.nn.Parameter(light)
    state = ParamState(f"{name}.w", param, light, main, StateAccess({}, main))
    return Operator(name, Kind.EXPERT, [state], numel)


def model(*numels: int) -> tuple[tuple[Unit, ...], dict[str, Operator]]:
    found = [operator(f"o{i:03}", numel) for i, numel in enumerate(numels)]
    return order([Unit(o.name, o.kind, o.numel) for o in found]), {o.name: o for o in found}


MODELS = st.lists(st.integers(1_000, MILLION), min_size=1, max_size=8).map(lambda n: model(*n))


@FAST
@given(MODELS, POLICIES, st.floats(2.2, 14.0), st.floats(1.2, 14.0))
def test_every_frame_fits_and_no_smaller_window_would_do(
    made: tuple[tuple[Unit, ...], dict[str, Operator]],
    policy: WindowPolicy,
    copied_per_parameter: float,
    replicated_per_parameter: float,
) -> None:
    units, operators = made
    total = sum(u.numel for u in units)
    rates = Rates(1.0, copied_per_parameter * total, replicated_per_parameter * total)
    found = fit(units, operators, rates, policy, windows=range(1, 13))

    def fits(window: int, split: int) -> bool:
        cost = price(generate(units, window, policy, split), operators)
        return cost.largest <= rates.copy_bytes and cost.mean <= rates.replication_bytes

    assert (found.overrun <= 1) == fits(found.window, found.split)
    smaller = range(1, found.window if found.overrun <= 1 else 13)
    assert not any(fits(w, split) for w in smaller for split in (0, FINENESS * w))
    if found.split and found.overrun <= 1:
        assert not fits(found.window, 0)


def test_the_largest_frame_decides_not_the_first() -> None:
    units, operators = model(*[MILLION] * 3, 4 * MILLION)
    sizes = [
        price(generate(units[:n], 1, ROLLING), {u.name: operators[u.name] for u in units[:n]})
        for n in (3, 4)
    ]
    # All but the last, large operator would fit in one frame.
    found = fit(units, operators, Rates(1.0, 1.1 * sizes[0].largest), ROLLING)
    assert found.window > 1
    assert found.price.largest <= found.rates.copy_bytes < sizes[1].largest


def test_an_operator_that_no_frame_has_room_for_is_split() -> None:
    units, operators = model(*[MILLION] * 4, 20 * MILLION)
    # The light weights of everything and a quarter of the large operator.
    rates = Rates(1.0, 2 * 24 * MILLION + 12 * 5 * MILLION)
    found = fit(units, operators, rates, ROLLING)
    assert found.overrun <= 1
    schedule = generate(units, found.window, ROLLING, found.split)
    assert set(schedule.split) == {"o004"}
    whole = [price(generate(units, w, ROLLING), operators).largest for w in range(1, 65)]
    assert min(whole) > rates.copy_bytes


@pytest.mark.parametrize("b", [2.4, 2.6, 3.0, 3.5, 4.0, 4.5, 6.0, 8.0, 11.0])
def test_replication_alone_needs_the_windows_of_the_formulas(b: float) -> None:
    # Equal operators, a number of them that many windows divide.
    units, operators = model(*[MILLION] * 120)
    rates = Rates(0.5, inf, b * 2 * 120 * MILLION)
    found = {p: fit(units, operators, rates, p).window for p in WindowPolicy}
    assert ceil(10 / (b - 2)) <= found[ROLLING] <= ceil(10 / (b - 2)) + 1
    assert ceil(11 / (b - 1)) <= found[TUMBLING] <= ceil(11 / (b - 1)) + 1


def test_neither_policy_wins_everywhere() -> None:
    units, operators = model(*[MILLION] * 120)

    def taken(copied: float, replicated: float) -> tuple[WindowPolicy, int]:
        rates = Rates(1.0, copied * 120 * MILLION, replicated * 120 * MILLION)
        choice = choose([fit(units, operators, rates, p) for p in WindowPolicy])
        return choice.policy, choice.window

    # Where copying to the host is the limit, both need the same window.
    assert taken(4.6, inf) == (ROLLING, 4)
    # Where the network is, rolling frames come to 2 bytes per parameter however long the window.
    assert taken(inf, 2.3) == (TUMBLING, 9)
    assert taken(inf, 9.0) == (ROLLING, 2)


@FAST
@given(st.integers(1, 9), POLICIES, st.integers(0, 12))
def test_the_prediction_is_what_the_real_plan_replays(
    window: int, policy: WindowPolicy, split: int
) -> None:
    units, _ = model(*[MILLION] * 9)
    found = replays(generate(units, window, policy, split))
    expected = predicted_replay(policy, window)
    assert (Fraction(mean(found)), max(found)) == (expected.mean, expected.worst)


def test_what_never_fits_is_said_with_numbers_and_the_closest_window_taken() -> None:
    units, operators = model(*[MILLION] * 4)
    # Less than the light weights alone.
    rates = Rates(0.2, 4 * MILLION / 0.2)
    fits = [fit(units, operators, rates, p) for p in WindowPolicy]
    choice = choose(fits)
    assert not choice.fits
    closest = min(fits, key=lambda f: f.overrun)
    assert (choice.policy, choice.window) == (closest.policy, closest.window)
    assert "no window lets capture keep up" in choice.reason
    assert "in an iteration of 200 ms 4 MiB can be copied" in choice.reason
    assert "training waits about" in choice.reason


def test_a_replication_that_is_too_slow_is_said_as_such() -> None:
    units, operators = model(*[MILLION] * 4)
    choice = choose([fit(units, operators, Rates(1.0, inf, 2 * MILLION), ROLLING)])
    assert not choice.fits
    assert "can be replicated" in choice.reason
    assert "about one frame in 4." in choice.reason


def some_fit(policy: WindowPolicy, window: int, overrun: float = 0.5, split: int = 0) -> Fit:
    units, operators = model(MILLION)
    cost = price(generate(units, 1, policy), operators)
    return Fit(policy, window, split, cost, Rates(1.0, cost.largest / overrun))


def test_all_ranks_take_the_longest_window_and_split_when_one_must() -> None:
    fits = [some_fit(ROLLING, 2), some_fit(ROLLING, 5), some_fit(ROLLING, 3, split=12)]
    choice = choose(fits)
    assert (choice.window, choice.split, choice.fits) == (5, FINENESS * 5, True)
    assert choose(fits[::-1]) == choice


def test_the_policy_that_replays_less_on_the_slowest_rank_is_taken_and_says_why() -> None:
    fits = [some_fit(ROLLING, 9), some_fit(ROLLING, 2), some_fit(TUMBLING, 4)]
    choice = choose(fits)
    assert (choice.policy, choice.window) == (TUMBLING, 4)
    assert choice.reason.endswith(
        "a rebuild covers 4.5 iterations on average, 8 with rolling ones of 9"
    )
    equal = choose([some_fit(ROLLING, 4), some_fit(TUMBLING, 3)])
    assert equal.policy is ROLLING, "equal on average, better at worst"


def test_a_rank_that_keeps_up_with_no_window_speaks_for_all() -> None:
    choice = choose([some_fit(ROLLING, 4, overrun=1.5), some_fit(ROLLING, 9)])
    assert (choice.window, choice.fits) == (9, False)
    other = choose([some_fit(ROLLING, 4, overrun=1.5), some_fit(TUMBLING, 9)])
    assert (other.policy, other.fits) == (TUMBLING, True)
    assert other.reason.endswith("rolling ones would not keep up")


def test_a_choice_is_news_once() -> None:
    choice = choose([some_fit(ROLLING, 4, overrun=1.5)])
    assert choice.news(None) == choice.reason
    assert choice.news(replace(choice, reason="other numbers")) is None
    assert choice.news(replace(choice, fits=True)) == choice.reason


@pytest.mark.parametrize("replicated", [3.0, inf])
def test_a_fit_survives_its_way_to_other_ranks(replicated: float) -> None:
    found = replace(some_fit(TUMBLING, 1, split=16), rates=Rates(1.5, 2.5, replicated))
    row = torch.tensor(found.to_row(), dtype=torch.float64)
    assert len(row) == ROW
    assert Fit.from_row(row.tolist()) == found


def test_medians_are_over_the_newest_measurements() -> None:
    pace = Pace(size=ENOUGH)
    pace.copied(100, 2.0)
    for seconds in [9.0] * ENOUGH:
        assert pace.rates() is None
        pace.iterated(seconds)
    assert pace.rates() == Rates(9.0, 50.0, inf)
    for seconds in [1.0] * (ENOUGH // 2 - 1) + [50.0, 2.0, 2.0] + [50.0] * (ENOUGH // 2 - 2):
        pace.iterated(seconds)
    assert pace.rates() == Rates(2.0, 50.0, inf)
    pace.replicated(30, 1.0)
    pace.replicated(10, 1.0)
    assert pace.rates() == Rates(2.0, 50.0, 20.0)


@pytest.mark.parametrize(
    ("now", "drifted"), [(1.0, False), (1.09, False), (1.11, True), (0.89, True)]
)
def test_iterations_that_take_a_tenth_longer_or_shorter_have_drifted(
    now: float, drifted: bool
) -> None:
    assert Rates(1.0, 1.0).drifted(Rates(now, 5.0)) is drifted
