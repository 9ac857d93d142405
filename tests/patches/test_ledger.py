"""The generated ledger."""

import pytest

pytest.importorskip("megatron.core", reason="the host is not installed")


def test_the_ledger_is_what_the_rows_say() -> None:
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_moetion", "ledger", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
