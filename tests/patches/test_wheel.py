"""The wheel, installed away from the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the host is not installed")
if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
    pytest.skip("building a wheel needs pip and setuptools", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
# One wheel is built for all tests, so they are dealt out together.
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, since a build leaves files in its source directory."""
    source = tmp_path_factory.mktemp("source")
    for name in ("megatron_moetion", "patches"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "-q", "-w", "dist"], cwd=source, check=True)
    [built] = (source / "dist").glob("megatron_moetion-*.whl")
    return built


def test_the_wheel_holds_every_module_and_the_patches_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, directory in {
        "megatron_moetion": ROOT / "megatron_moetion",
        "megatron_moetion_patches": ROOT / "patches",
    }.items():
        for path in directory.rglob("*"):
            if path.suffix in (".py", ".sh", ".md") and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(directory).as_posix()}" in names


def test_an_installed_wheel_activates_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOETION")}
    env["PYTHONPATH"] = str(site)
    script = tmp_path / "pretrain.py"
    script.write_text(
        "import megatron_moetion, megatron_moetion_patches.activation\n"
        "print(megatron_moetion.__file__, megatron_moetion_patches.activation.__file__)\n"
        "from megatron.training.arguments import parse_and_validate_args\n"
        "parse_and_validate_args()\n"
    )
    shell = (
        'set -e; . "$("$PY" -m megatron_moetion patch-path)"; '
        'exec "$PY" -W ignore pretrain.py --moetion --moetion-window 0'
    )
    done = subprocess.run(
        ["bash", "-c", shell],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env | {"PY": sys.executable},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.splitlines()[0] == (
        f"{site}/megatron_moetion/__init__.py {site}/megatron_moetion_patches/activation.py"
    )
    assert done.stderr.splitlines()[-1].startswith("moetion: error: --moetion-window '0': give")
