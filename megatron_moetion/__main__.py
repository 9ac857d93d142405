"""``python -m megatron_moetion``."""

import sys

from megatron_moetion.cli import main

sys.exit(main())
