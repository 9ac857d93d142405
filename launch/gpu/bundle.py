"""Packs the wheels that a GPU machine with Python 3.12 and torch lacks: `make gpu-bundle`.

Which ones those are is measured: a two-iteration training run on the CPU writes down every file it
imports, the files tell their packages, and what torch itself needs is left out, as is numpy.
pytest comes along. The wheels go to `.gpu-bundle/`, which `launch/gpu/run.sh` installs from without
network.

Usage: python launch/gpu/bundle.py [--output .gpu-bundle]
"""

import argparse
import importlib.metadata as metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch" / "demo"))

from model_args import model_args  # noqa: E402  (the demo's folder is no package)

LIMIT_BYTES = 60 << 20
PLATFORMS = (
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)),
)
"""pip takes a wheel's platform tag literally, so each one that a wheel may carry is named."""
THERE = ("torch", "numpy")
ALSO = ("pytest",)
MANIFEST = "manifest.json"


class BundleError(RuntimeError):
    """The bundle cannot be made; the message says why and what to do."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu-bundle")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="moetion-bundle-") as scratch:
            imported = traced_files(Path(scratch))
        pins = pins_of(needed(owners(imported)))
        download(pins, options.output)
        total_bytes = write_manifest(pins, options.output)
    except BundleError as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {len(pins)} wheels, {total_bytes / (1 << 20):.1f} MiB")
    return 0


def traced_files(scratch: Path) -> list[str]:
    """Every file imported by a training run with protection on, on one CPU process.

    Raises:
        BundleError: when the run fails, with the end of its output.
    """
    prefix, output = scratch / "corpus", scratch / "files.json"
    corpus = [sys.executable, str(ROOT / "launch/demo/corpus.py"), "--max-mebibytes", "1"]
    _run([*corpus, "--output", str(prefix)])
    words = model_args(data_prefix=str(prefix), train_iters=2, pp_size=1, ep_size=1, dp_size=1)
    words += ["--moetion", "--moetion-dir", str(scratch), "--moetion-digest-interval", "1"]
    # One stage that clips is refused, and nothing is to be replayed here.
    words += ["--clip-grad", "0"]
    trace = ["launch/gpu/trace.py", str(output), "launch/demo/pretrain_moe.py", *words]
    # One process needs no launcher, and is traced more easily without.
    _run(["bash", "-c", f". patches/moetion.sh && {shlex.join([sys.executable, *trace])}"])
    files: list[str] = json.loads(output.read_text())
    return files


def _run(command: list[str]) -> None:
    env = {**os.environ, "MOETION_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise BundleError(f"{tail}\n{shlex.join(command)[:200]} ended with {done.returncode}")


def owners(files: Iterable[str]) -> set[str]:
    """Canonical names of the installed packages that these files belong to."""
    owner: dict[str, str] = {}
    for package in metadata.distributions():
        for file in package.files or ():
            owner[os.path.normpath(str(package.locate_file(file)))] = canonical(package.name)
    found = {owner.get(os.path.normpath(file)) for file in files}
    return {name for name in found if name is not None}


def needed(imported: set[str]) -> list[str]:
    """Imported packages and pytest's, without those that come with torch, and without ours."""
    there = requirements(THERE) | {"megatron-moetion"}
    return sorted((imported | requirements(ALSO)) - there)


def requirements(roots: Iterable[str]) -> set[str]:
    """These packages and all that they require here, extras left out; canonical names."""
    found: set[str] = set()
    left = [canonical(root) for root in roots]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            # For another platform or Python.
            continue
        found.add(name)
        left += [_name_of(text) for text in wanted if "extra ==" not in text]
    return found


def _name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return canonical(match[0])


def canonical(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_of(names: Iterable[str]) -> list[str]:
    """`name==version` as installed here."""
    return [f"{name}=={metadata.version(name)}" for name in names]


def download(pins: list[str], output: Path) -> None:
    """Fetches exactly these wheels for CPython 3.12 on x86-64 Linux into an emptied folder.

    Raises:
        BundleError: when pip cannot have one of them.
    """
    output.mkdir(parents=True, exist_ok=True)
    for old in [*output.glob("*.whl"), output / MANIFEST]:
        old.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    command += ["--abi", "cp312", "--abi", "abi3", "--abi", "none", "--dest", str(output)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, *pins], capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"{done.stderr.strip()}\npip cannot fetch the wheels, see above")


def write_manifest(pins: list[str], output: Path) -> int:
    """Says beside the wheels what they are; returns their size in bytes.

    Raises:
        BundleError: when they are too large to be carried.
    """
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(output.glob("*.whl"))}
    total_bytes = sum(sizes.values())
    if total_bytes >= LIMIT_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise BundleError(
            f"{total_bytes >> 20} MiB, the limit is {LIMIT_BYTES >> 20}: add what the host can do"
            f" without to OPTIONAL in launch/gpu/trace.py (largest: {', '.join(largest)})"
        )
    manifest = {"pins": pins, "torch": metadata.version("torch"), "bytes": sizes}
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return total_bytes


if __name__ == "__main__":
    sys.exit(main())
