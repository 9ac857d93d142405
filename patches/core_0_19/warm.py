"""What a warm spare does ahead, by importing this: it looks for the sources of all that rows name.

Each worker compares them with its rows before it trains, a replacement while all others wait.
"""

from contextlib import suppress

from megatron_moetion.fingerprint import source_digest
from megatron_moetion.interception import InterceptionError, locate

from .rows import ROWS

for row in ROWS:
    # A row that does not fit is the worker's to refuse.
    with suppress(InterceptionError):
        source_digest(locate(row.target))
