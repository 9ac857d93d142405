"""Activation on the real host, as a user's script meets it; one process answers for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_moetion.patch_location import activated

pytest.importorskip("megatron.core", reason="the host is not installed")
# One process answers for all tests, so they are dealt out together.
pytestmark = pytest.mark.xdist_group("host report")

REPORT = Path(__file__).parent / "host_report.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `host_report` found, from a directory that has nothing to do with the checkout."""
    env = activated({k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(REPORT)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_starting_an_interpreter_imports_neither_torch_nor_the_product(
    report: dict[str, Any],
) -> None:
    assert report["early"] == []


def test_every_row_fits_the_installed_host_without_a_warning(report: dict[str, Any]) -> None:
    assert report["targets"]
    assert report["problems"] == []


def test_flag_off_leaves_every_target_the_hosts_own_object(report: dict[str, Any]) -> None:
    assert report["off"] == [0, ""]
    assert report["off_same"]
    assert all(report["flag_rows_on"])


def test_flag_on_patches_every_row_once_the_arguments_are_final(report: dict[str, Any]) -> None:
    assert report["on"] == [0, ""]
    assert report["on_args_final"]
    assert report["on_patched"] == report["on_selected"] != []
    assert not report["group_exists"]


def test_undo_puts_back_the_very_objects(report: dict[str, Any]) -> None:
    assert report["applied"]
    assert report["undone_same"]
    assert report["undone_all"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "unknown value",
            "--moetion-window-policy 'sliding': give 'auto', 'rolling' or 'tumbling'",
        ),
        ("unknown flag", "unknown flag --moetion-widow: did you mean --moetion-window?"),
        ("replicas", "--moetion-replicas 1 needs at least 2 nodes"),
        ("fault", "place 'lunch' is none of start, batch"),
        ("fsdp", "not supported: FSDP, because"),
        ("fsdp digest", "not supported: FSDP, because"),
        ("fp8 parameters", "not supported: FP8 parameters, because"),
        ("cuda graphs", "not supported: CUDA graphs, because"),
        ("in-process restart", "not supported: --inprocess-restart, because"),
        ("muon", "not supported: an optimizer other than Adam and SGD, because"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line(
    report: dict[str, Any], name: str, text: str
) -> None:
    code, errors = report["refused"][name]
    assert code == 2
    assert errors.startswith("moetion: error: ")
    assert errors.count("\n") == 1
    assert text in errors
    assert report["refused_same"]


def test_an_unknown_host_is_refused_with_our_flags_and_left_alone_without(
    report: dict[str, Any],
) -> None:
    code, errors = report["unknown_on"]
    assert code == 2
    assert errors == (
        "moetion: error: megatron-core 0.20.0 is not supported: install one of 0.19.x, "
        "or drop the --moetion flags\n"
    )
    assert report["unknown_off"] == [0, ""]
    assert report["unknown_same"]


def test_a_signature_that_drifted_is_refused_and_names_the_row(report: dict[str, Any]) -> None:
    code, errors = report["drift"]
    assert code == 2
    assert "megatron.training.training:train_step: signature drift" in errors
    assert errors.count("\n") == 1
    assert report["drift_same"]
