"""Has all ranks agree on the cut, where the user leaves it open (see `cuts`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import batched

import torch
import torch.distributed as dist

from megatron_moetion import probe
from megatron_moetion.claiming import claim_of, logs_of
from megatron_moetion.config import Config
from megatron_moetion.cuts import CUTS, ROW, CutChoice, CutName, Offer, choose_cut, offer
from megatron_moetion.host import Host
from megatron_moetion.schedule import WindowPolicy
from megatron_moetion.steering import Options, Steering
from megatron_moetion.vault.budget import free_bytes
from megatron_moetion.window import Rates, fit


def decide_cut(
    config: Config,
    hosts: Mapping[CutName, Host],
    ruled_out: Mapping[CutName, str],
    num_copies: int,
    replication_rate: float,
    spills: bool,
) -> CutChoice:
    """Measures, tells the others, and chooses; collective over the job, before the first step.

    Args:
        hosts: the same training program, with the operators as each cut captures them.
        ruled_out: see `cuts.choose_cut`; the same on all ranks.
        num_copies: of each frame, on other nodes.
        replication_rate: see `window.Rates`.
        spills: windows are written to disk.
    """
    host = hosts["shard"]
    dtype = host.operators[0].params[0].param.dtype
    seconds = host.iteration_flops() / probe.multiply_rate(host.device, dtype)
    rates = Rates(seconds, probe.copy_rate(host.device), replication_rate)
    row: list[float] = []
    for cut in CUTS:
        options = Options.of(replace(config, cut=cut))
        row += _offer(hosts[cut], options, rates, cut, config, num_copies, spills).to_row()
    told = torch.tensor(row, dtype=torch.float64, device=host.device)
    heard = told.new_empty(dist.get_world_size() * len(row))
    dist.all_gather_into_tensor(heard, told)
    rows = [Offer.from_row(each) for each in batched(heard.tolist(), ROW)]
    offers = {cut: rows[index :: len(CUTS)] for index, cut in enumerate(CUTS)}
    return choose_cut(offers, ruled_out)


def _offer(
    host: Host,
    options: Options,
    rates: Rates,
    cut: CutName,
    config: Config,
    num_copies: int,
    spills: bool,
) -> Offer:
    buffer_bytes = sum(tensor.nbytes for tensor in host.buffers().values())
    copied = num_copies > 0
    steering = Steering(host.operators, buffer_bytes, options, None, copied, host.device)
    logs = logs_of(host, steering, cut == "shard", dist.get_world_size())
    # Of the others there is a bound only, far above what they come to.
    exact = [logs[kind] for kind in ("boundary", "batch") if kind in logs]
    log_bytes = sum(count * nbytes for count, nbytes in exact)
    found = fit(
        steering.units, {operator.name: operator for operator in host.operators}, rates,
        WindowPolicy.ROLLING, buffer_bytes + log_bytes, options.windows, options.split,
    )  # fmt: skip
    claim = claim_of(host, steering, logs, spills)
    # What a node holds for others is about what others hold for it.
    rank_bytes = claim.others.get(found.window, claim.need.total) + num_copies * claim.need.copies
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    free = free_bytes() if config.memory_bytes is None else config.memory_bytes
    return offer(cut, found, rank_bytes * num_local, free)
