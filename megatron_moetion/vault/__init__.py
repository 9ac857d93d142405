"""The host-memory store of frames and logs.

Memory lies in memfds that the node agent owns, so it outlives the worker that wrote it. `entry`
holds the types that travel, `arena` the memory, `store` the agent's index of it, `client` what a
worker sees.
"""

from megatron_moetion.vault.client import CorruptEntry, Fetched, LocalVault, Vault, VaultUsage
from megatron_moetion.vault.entry import Entry, Listing
from megatron_moetion.vault.shelf import Unreachable

__all__ = [
    "CorruptEntry",
    "Entry",
    "Fetched",
    "Listing",
    "LocalVault",
    "Unreachable",
    "Vault",
    "VaultUsage",
]
