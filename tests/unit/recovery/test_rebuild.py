"""Sparse-to-dense conversion on a tiny host: every bit comes back, and wrong frames are noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_host import Run, TinyHost

from megatron_moetion.inbox.key import FrameKey, HeaderKey
from megatron_moetion.parts import Part, complete
from megatron_moetion.recovery.failure import MissingFromInbox, ReplayDiverged
from megatron_moetion.recovery.plan import (
    Facts,
    FrameInfo,
    NothingToRebuildFrom,
    Position,
    Progress,
    StagePlan,
    make_plan,
    make_shard_plan,
)
from megatron_moetion.recovery.rebuild import Frames, Parts, Rebuild, rebuild_shard, same_bits
from megatron_moetion.schedule import Unit, WindowPolicy, generate
from megatron_moetion.snapshot.frame import pieces_of, view
from megatron_moetion.topology import from_pipeline_groups
from megatron_moetion.vault import LocalVault

SHARDS = [(1,), (2,), (3, 1), (0, 4), (5,)]
NUM_OPERATORS = len(SHARDS)


def trained(policy: WindowPolicy, window: int, last: int, split: int = 0) -> Run:
    host = TinyHost(SHARDS)
    units = [Unit(o.name, o.kind, o.numel) for o in host.operators]
    run = Run(host, generate(units, window, policy, split), LocalVault(0))
    run.train(1, last)
    return run


def planned(run: Run, committed: int) -> StagePlan:
    listed = run.vault.inventory(0, "frame/")
    infos = sorted((FrameInfo.from_meta(e.meta) for e in listed), key=lambda f: f.iteration)
    where = Position(committed + 1, Progress.BEFORE_COMMIT, committed, committed)
    facts = Facts(1, committed, (0,), {0: where}, {0: tuple(infos)})
    (stage,) = make_plan(facts, from_pipeline_groups(0, [(0,)])).stages
    return stage


def rebuild(run: Run, plan: StagePlan, frames: Frames | None = None) -> list[int]:
    """Walks the plan as the session does; returns how many operators were frozen in each step."""
    host, frozen = run.host, []
    walk = Rebuild(plan, host, frames or Frames(host, run.vault, 0), run.log, run.capture)
    walk.load_base()
    for iteration in plan.replay:
        walk.start(iteration)
        frozen.append(len(host.frozen))
        host.run_step(iteration)
        walk.stepped(iteration)
    walk.done()
    return frozen


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("policy", list(WindowPolicy))
@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("last", [1, 2, 6, 7, 8, 15])
@pytest.mark.parametrize("split", [0, 9])
def test_every_bit_comes_back_and_training_goes_on_as_if_nothing_had_been(
    policy: WindowPolicy, window: int, last: int, split: int
) -> None:
    run = trained(policy, window, last, split)
    before = run.host.everything()
    run.host.forget_everything()
    rebuild(run, planned(run, last))
    # RNG after the step comes from the header of the next iteration, where nothing was replayed.
    torch.set_rng_state(before["rng"])
    assert same(run.host.everything(), before)
    assert not run.host.in_replay
    run.train(last + 1, last + 4)
    assert same(run.host.everything(), trained(policy, window, last + 4, split).host.everything())


def test_operators_thaw_one_slot_after_the_other_and_weights_are_gathered_each_time() -> None:
    run = trained(WindowPolicy.ROLLING, 3, 9)
    run.host.forget_everything()
    plan = planned(run, 9)
    frozen = rebuild(run, plan)
    assert frozen == sorted(frozen, reverse=True)
    assert NUM_OPERATORS > frozen[0] > frozen[1] > 0
    assert run.host.calls["sync_params"] == 1 + len(plan.replay)


def test_a_rank_that_has_all_it_needs_gathers_with_those_that_do_not() -> None:
    """The gather is collective over ranks whose frames may be in another order."""
    run = trained(WindowPolicy.ROLLING, 3, 9)
    run.host.forget_everything()
    own = planned(run, 8)
    assert (own.base, own.dense_at) == (6, 8)
    rebuild(run, replace(own, dense_at=9, replay=(7, 8, 9)))
    assert run.host.calls["sync_params"] == 1 + 3


def test_a_starting_state_without_optimizer_tensors_clears_those_of_the_worker() -> None:
    run = trained(WindowPolicy.ROLLING, 2, 0)
    before = run.host.everything()
    run.host.step()
    rebuild(run, StagePlan(0, 0, 0, ()))
    torch.set_rng_state(before["rng"])
    assert same(run.host.everything(), before)


def test_a_frame_that_died_with_the_worker_is_captured_again() -> None:
    run = trained(WindowPolicy.ROLLING, 2, 6)
    known, lost = run.vault, LocalVault(0)
    for listing in known.inventory(0, "frame/"):
        entry = known.fetch(0, listing.key)
        assert entry is not None
        if listing.key != str(FrameKey(6)):
            lost.put(listing.key, entry.data, entry.meta)
    run.vault = lost
    plan = planned(run, 5)
    run.host.forget_everything()
    rebuild(run, StagePlan(0, plan.base, plan.dense_at, (*plan.replay, 6)))
    kept, again = (Frames(run.host, vault, 0).read(6) for vault in (known, lost))
    assert kept[1] == again[1]
    for (piece, old), (same_piece, new) in zip(kept[0], again[0], strict=True):
        assert piece == same_piece
        assert same_bits(old, new)


def test_an_operator_takes_part_in_the_steps_as_soon_as_one_of_its_parts_is_in() -> None:
    run = trained(WindowPolicy.ROLLING, 3, 9, split=9)
    run.host.forget_everything()
    plan = planned(run, 9)
    walk = Rebuild(plan, run.host, Frames(run.host, run.vault, 0), run.log, run.capture)
    walk.load_base()
    here = run.schedule_of(plan.base).frame(plan.base)
    assert {part.operator for part in here.full} - complete(here.full), "nothing is split here"
    assert run.host.frozen == {o.name for o in run.host.operators} - {
        part.operator for part in here.full
    }


class TestNegativeControls:
    def test_garbage_in_elements_that_are_not_loaded_yet_is_noticed_if_it_is_used(self) -> None:
        run = trained(WindowPolicy.ROLLING, 3, 9, split=9)
        run.host.forget_everything()
        plan = planned(run, 9)

        class Forgetful(Frames):
            def load(self, iteration: int, loaded: Parts) -> frozenset[Part]:
                self.keep_light = iteration > plan.base
                return super().load(iteration, loaded)

            def load_light(self, pieces: Any, loaded: Parts) -> None:
                if not self.keep_light:
                    super().load_light(pieces, loaded)

        with pytest.raises(ReplayDiverged):
            rebuild(run, plan, Forgetful(run.host, run.vault, 0))

    def test_a_wrong_element_of_a_part_is_noticed(self) -> None:
        run = trained(WindowPolicy.ROLLING, 3, 9, split=9)
        plan = planned(run, 9)
        entry = run.vault.fetch(0, str(FrameKey(plan.base)))
        assert entry is not None
        (piece, *_) = (p for p in pieces_of(entry.meta) if p.stretch and p.tensor == "exp_avg")
        data = entry.data.clone()
        view(piece, data)[-1] += 1
        run.vault.put(str(FrameKey(plan.base)), data, entry.meta)
        run.host.forget_everything()
        with pytest.raises(ReplayDiverged, match=piece.param):
            rebuild(run, plan)

    def test_a_stale_frame_is_noticed_by_name(self) -> None:
        run = trained(WindowPolicy.ROLLING, 3, 8)
        stale = run.vault.fetch(0, str(FrameKey(6)))
        assert stale is not None
        # The same operators as in the frame of iteration 9, one window later.
        run.train(9, 9)
        run.vault.put(str(FrameKey(9)), stale.data.clone(), {**stale.meta, "iteration": 9})
        run.host.forget_everything()
        with pytest.raises(ReplayDiverged, match=r"replay of iteration 9 gave other bits .* of o"):
            rebuild(run, planned(run, 9))

    def test_a_forgotten_buffer_is_noticed(self) -> None:
        run = trained(WindowPolicy.ROLLING, 3, 8)
        run.host.forget_everything()
        frames = Frames(run.host, run.vault, 0)
        frames.load_buffers = lambda iteration: None  # type: ignore[method-assign]  # on purpose
        plan = planned(run, 8)
        walk = Rebuild(plan, run.host, frames, run.log, run.capture)
        walk.load_base()
        walk.start(plan.replay[0])
        run.host.run_step(plan.replay[0])
        with pytest.raises(ReplayDiverged, match="bias"):
            walk.stepped(plan.replay[0])

    def test_a_skipped_iteration_is_noticed(self) -> None:
        run = trained(WindowPolicy.ROLLING, 3, 8)
        run.host.forget_everything()
        plan = planned(run, 8)
        with pytest.raises(ReplayDiverged):
            rebuild(run, StagePlan(0, plan.base, plan.dense_at, plan.replay[1:]))

    def test_a_plan_that_ends_before_it_is_dense_is_refused(self) -> None:
        run = trained(WindowPolicy.ROLLING, 3, 8)
        plan = planned(run, 8)
        with pytest.raises(NothingToRebuildFrom, match="has no full state after the replay"):
            rebuild(run, StagePlan(0, plan.base, plan.dense_at, plan.replay[:-1]))

    def test_a_missing_header_or_frame_is_named(self) -> None:
        run = trained(WindowPolicy.ROLLING, 3, 8)
        with pytest.raises(NothingToRebuildFrom, match="frame of iteration 99 of global rank 0"):
            rebuild(run, StagePlan(0, 99, 99, ()))
        plan = planned(run, 8)
        with pytest.raises(MissingFromInbox, match=f"replay needs {HeaderKey(99)}"):
            rebuild(run, StagePlan(0, plan.base, plan.dense_at, (99,)))


def test_bits_are_compared_not_values() -> None:
    nan = torch.tensor(float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))


def by_updates(window: int, last: int, split: int = 0) -> Run:
    host = TinyHost(SHARDS, gradients=True)
    units = [Unit(o.name, o.kind, o.numel) for o in host.operators]
    run = Run(host, generate(units, window, WindowPolicy.ROLLING, split), LocalVault(0))
    run.train(1, last)
    return run


def shard_base_of(run: Run, at: int) -> int:
    listed = run.vault.inventory(0, "frame/")
    infos = sorted((FrameInfo.from_meta(e.meta) for e in listed), key=lambda f: f.iteration)
    where = Position(at + 1, Progress.BEFORE_COMMIT, at, at)
    plan = make_shard_plan(Facts(1, at, (0,), {0: where}, {0: tuple(infos)}))
    assert plan.committed == at
    ((_, base),) = plan.shards
    return base


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("last", [0, 1, 2, 6, 7, 8, 15])
@pytest.mark.parametrize("split", [0, 9])
def test_every_bit_comes_back_by_updates_alone(window: int, last: int, split: int) -> None:
    run = by_updates(window, last, split)
    before = run.host.everything()
    run.host.forget_everything()
    run.host.calls.clear()
    base = shard_base_of(run, last)
    rebuild_shard(run.host, Frames(run.host, run.vault, 0), run.log, base, last)
    # RNG is in the header of the next iteration.
    torch.set_rng_state(before["rng"])
    assert same(run.host.everything(), before)
    assert run.host.calls["update"] == last - base <= window - 1
    assert run.host.calls["sync_params"] == 0
    run.train(last + 1, last + 4)
    assert same(run.host.everything(), by_updates(window, last + 4, split).host.everything())


def test_a_rank_that_is_further_makes_its_updates_undone() -> None:
    run = by_updates(3, 8)
    before = run.host.everything()
    run.train(9, 10)
    rebuild_shard(run.host, Frames(run.host, run.vault, 0), run.log, shard_base_of(run, 8), 8)
    torch.set_rng_state(before["rng"])
    assert same(run.host.everything(), before)
