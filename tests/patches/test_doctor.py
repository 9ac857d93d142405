"""The doctor on the real host, and the table of what is refused against the host's parser."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="the host is not installed")
# One process answers for all tests, so they are dealt out together.
pytestmark = pytest.mark.xdist_group("doctor")

ROOT = Path(__file__).resolve().parents[2]

# Optional packages add the first four; the host's own validation sets the others. None of them
# is a flag of the plain parser.
NOT_FLAGS = {
    "export_kd_teacher_load",
    "export_kd_cfg",
    "kitchen_config_file",
    "kitchen_recipe_number",
    "gtp_weight_remat_size",
    "expert_gtp_weight_remat_size",
    "use_layer_wise_distributed_optimizer",
}

CODE = """
import argparse, inspect, json, re, sys
from megatron_moetion import patch_location
doctor = patch_location.load_patches("doctor")
codes = [doctor.run(line.split()) for line in sys.argv[1:]]
from megatron.training import arguments
parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
flags = [flag for action in parser._actions for flag in action.option_strings]
names = [action.dest for action in parser._actions]
support = patch_location.load_patches("core_0_19.support")
asked = set()
class Asking:
    def __getattr__(self, name):
        asked.add(name)
        return None
for row in support.TABLE:
    row.used(Asking())
text = " ".join(row.feature + " " + row.instead for row in support.TABLE)
named = re.findall(r"--[a-z0-9-]+", text)
defaults = parser.parse_args([])
print(json.dumps({
    "codes": codes,
    "unknown_names": sorted(asked - set(names)),
    "unknown_flags": sorted(set(named) - set(flags)),
    "by_default": [row.feature for row in support.unsupported(defaults)],
}))
"""

LINES = (
    "moetion-run --nproc-per-node 4 pretrain_gpt.py --num-layers 4 --moetion --clip-grad 0",
    "torchrun --nproc-per-node 4 pretrain_gpt.py --moetion --use-megatron-fsdp",
    "moetion-run --nnodes 2 pretrain_gpt.py --moetion --moetion-replicas 2",
    "torchrun pretrain_gpt.py --num-layers 4",
)


@pytest.fixture(scope="module")
def output() -> list[str]:
    """All that was printed; the last line is a JSON object."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, *LINES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def found(output: list[str]) -> dict[str, Any]:
    """The JSON object."""
    result: dict[str, Any] = json.loads(output[-1])
    return result


def test_the_table_asks_only_for_names_that_the_host_has(found: dict[str, Any]) -> None:
    assert set(found["unknown_names"]) <= {*NOT_FLAGS, "moetion_cut"}


def test_the_table_names_only_flags_that_the_host_has(found: dict[str, Any]) -> None:
    assert set(found["unknown_flags"]) <= {"--export-kd-teacher-load", "--moetion-cut"}


def test_the_hosts_defaults_are_supported_but_for_one_stage(found: dict[str, Any]) -> None:
    clips = "gradient clipping in a single pipeline stage under the stage cut"
    assert found["by_default"] == [clips]


def test_the_exit_code_says_whether_the_command_line_is_accepted(found: dict[str, Any]) -> None:
    assert found["codes"] == [0, 1, 1, 1]


def test_the_report_shows_versions_rows_and_what_the_launcher_can_do(output: list[str]) -> None:
    text = "\n".join(output)
    assert "megatron-core" in text
    assert "megatron.training.arguments:parse_args" in text
    assert "localized recovery: single workers only under moetion-run" in text
    assert "command line: accepted" in text
    assert "command line: not supported: FSDP, because" in text
    assert "command line: no localized recovery without moetion-run as the launcher" in text
    assert "command line: --moetion-replicas 2 needs at least 3 nodes" in text
    assert "nothing would be patched" in text
