"""Sourcing moetion.sh, the start of an interpreter under it, and the way without a shell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moetion.patch_location import activated, patch_directory

PATCHES = patch_directory()
SHOW = 'echo "$MOETION|$PYTHONPATH"'


def _shell(shell: str, script: str, cwd: Path, **env: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    base = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOETION")}
    command = [shell, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=base | env, check=True
    )
    assert done.stderr == ""
    return done.stdout


def _python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    base = activated({k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=base | env,
        check=False,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_sourcing_by_absolute_or_relative_path_sets_two_variables_and_prints_nothing(
    shell: str, tmp_path: Path
) -> None:
    expected = f"1|{PATCHES}/startup\n"
    assert _shell(shell, f"set -eu; . '{PATCHES}/moetion.sh'; {SHOW}", tmp_path) == expected
    relative = f"set -eu; . ./{PATCHES.name}/moetion.sh; cd /; {SHOW}"
    assert _shell(shell, relative, PATCHES.parent) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_sourcing_twice_is_sourcing_once_and_keeps_what_was_on_the_path(
    shell: str, tmp_path: Path
) -> None:
    script = f". '{PATCHES}/moetion.sh'; . '{PATCHES}/moetion.sh'; {SHOW}"
    assert _shell(shell, script, tmp_path, PYTHONPATH="/x:/y") == f"1|{PATCHES}/startup:/x:/y\n"


def test_the_environment_without_a_shell_is_the_same(tmp_path: Path) -> None:
    env = activated({"PYTHONPATH": "/x:/y"})
    assert env == {"PYTHONPATH": f"{PATCHES}/startup:/x:/y", "MOETION": "1"}
    assert activated(env) == env


def test_another_sitecustomize_on_the_path_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')\n")
    path = f"{PATCHES}/startup{os.pathsep}{tmp_path}"
    done = _python("import sitecustomize; print(sitecustomize.__file__)", tmp_path, PYTHONPATH=path)
    assert done.stdout.splitlines() == ["theirs", f"{PATCHES}/startup/sitecustomize.py"]


def test_without_the_variable_nothing_is_armed(tmp_path: Path) -> None:
    code = "import sys; print([f for f in sys.meta_path if 'Sibling' in type(f).__name__])"
    assert _python(code, tmp_path, MOETION="0").stdout == "[]\n"


def test_the_sourced_checkout_is_what_runs_from_anywhere(tmp_path: Path) -> None:
    code = (
        "import megatron_moetion, megatron_moetion_patches.ledger as ledger\n"
        "print(megatron_moetion.__file__); print(ledger.__file__)"
    )
    root = PATCHES.parent
    assert _python(code, tmp_path).stdout.splitlines() == [
        f"{root}/megatron_moetion/__init__.py",
        f"{PATCHES}/ledger.py",
    ]


def test_run_is_the_same_without_the_shell(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        "print(os.environ['MOETION'], sys.argv[1:], __name__, sys.flags.utf8_mode)\n"
        "raise SystemExit(3)\n"
    )
    command = ["-X", "utf8", "-m", "megatron_moetion", "run", "script.py", "--moetion", "-x", "1"]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PATCHES.parent)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (
        3,
        "1 ['--moetion', '-x', '1'] __main__ 1\n",
    )


def test_patch_path_names_the_file_to_source(tmp_path: Path) -> None:
    code = "from megatron_moetion.cli import main; main(['patch-path'])"
    assert _python(code, tmp_path).stdout == f"{PATCHES}/moetion.sh\n"
