"""The vault of a worker that has an agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_moetion.agent.link import AgentLink
from megatron_moetion.vault import Entry, Listing, Vault
from megatron_moetion.vault.arena import map_private
from megatron_moetion.vault.shelf import Found


class AgentShelf:
    """Chunks and index live in the agent and survive this worker.

    Args:
        link: a link whose `hello` has been answered.
    """

    def __init__(self, link: AgentLink) -> None:
        self._link = link

    def chunk(self, nbytes: int) -> tuple[int, str, int]:
        """Ask the agent for memory."""
        reply = self._link.request({"op": "chunk", "nbytes": nbytes})
        return reply["chunk"], reply["path"], reply["nbytes"]

    def discard(self, number: int) -> None:
        """One-way, in order with `drop`."""
        self._link.send({"op": "discard", "chunk": number})

    def publish(self, entry: Entry) -> None:
        """One-way: what was sent reaches the agent even if this worker dies now."""
        # Not `asdict`: that copies all of `meta`, for something that is written out at once.
        self._link.send({"op": "entry", **vars(entry)})

    def drop(self, below: int) -> None:
        """One-way, in order with `publish`."""
        self._link.send({"op": "drop", "below": below})

    def find(self, global_rank: int, key: str) -> Found | None:
        """Map the entry when it lies on this node, else receive it through the agent."""
        reply, payload = self._link.request_payload(
            {"op": "fetch", "global_rank": global_rank, "key": key}
        )
        if reply["op"] == "missing":
            return None
        if payload is None:
            data = map_private(reply["path"], reply["offset"], reply["nbytes"])
        elif payload:
            data = torch.frombuffer(payload, dtype=torch.uint8)
        else:
            data = torch.empty(0, dtype=torch.uint8)
        return Found(data, reply["checksum"], reply["parts"], reply["meta"], reply["node_rank"])

    def quarantine(
        self, global_rank: int, key: str, found: Found, distrusted: str | None = None
    ) -> str | None:
        """Ask the agent, which asks the copy's own agent if need be."""
        about: dict[str, Any] = {"global_rank": global_rank, "key": key}
        about["checksum"] = found.checksum
        about["distrusted"] = distrusted
        reply = self._link.request({"op": "quarantine", "node_rank": found.node_rank, **about})
        reason = reply["reason"]
        assert reason is None or isinstance(reason, str)
        return reason

    def inventory(self, global_rank: int, prefix: str) -> list[Listing]:
        """Ask the agent, which asks the rank's own agent if need be."""
        reply = self._link.request(
            {"op": "inventory", "global_rank": global_rank, "prefix": prefix}
        )
        return [Listing(e["key"], e["nbytes"], e["meta"]) for e in reply["entries"]]


def agent_vault(
    link: AgentLink,
    global_rank: int,
    on_map: Callable[[torch.Tensor], None] | None = None,
    on_unmap: Callable[[torch.Tensor], None] | None = None,
) -> Vault:
    """The vault of this worker, kept by its agent. Say `hello` first; see `Vault` for the rest."""
    return Vault(AgentShelf(link), global_rank, on_map, on_unmap)
