"""Who may import whom: the core never Megatron, patches no algorithm, the core in one direction."""

from __future__ import annotations

import pytest
from source_files import CORE, PATCHES, Source, both, sources

HOSTS = ("megatron", "transformer_engine", "apex", "modelopt")

PIPE = (
    "parts",
    "operators",
    "schedule",
    "snapshot",
    "vault",
    "inbox",
    "recovery",
    "job",
    "worker",
    "standing",
    "capturing",
    "replaying",
    "recovering",
    "updating",
    "session",
)
"""The pipe of design section 3: a module imports only what stands before it."""

AGAINST_THE_PIPE = {
    # The cursor of the taps says how far inside an iteration a rank is; the plan defines that.
    ("megatron_moetion.inbox.tap", "megatron_moetion.recovery.plan"),
    # A tap must tell a lost peer from an unknown error, and names what replay lacks.
    ("megatron_moetion.inbox.tap", "megatron_moetion.recovery.failure"),
    # A call that was paused translates its group to that of the new epoch.
    ("megatron_moetion.inbox.tap", "megatron_moetion.recovery.regroup"),
    # A tap knows whether what it waits for crosses stages, which decides when that is called off.
    ("megatron_moetion.inbox.tap", "megatron_moetion.recovery.waiting"),
}

HOST_FILES = {"patches/core_0_19/"}
"""Folders whose modules are imported only after the host's version is known."""


def top(module: str) -> str:
    return module.split(".")[0]


def stage_of(module: str) -> int | None:
    """A module's place in the pipe; None for what stands beside it."""
    parts = module.split(".")
    if top(module) != CORE or len(parts) < 2 or parts[1] not in PIPE:
        return None
    return PIPE.index(parts[1])


def core_modules() -> set[str]:
    return {s.module for s in sources(CORE)}


@pytest.mark.parametrize("source", sources(CORE), ids=lambda s: s.name)
def test_the_core_never_imports_the_host_or_the_patches(source: Source) -> None:
    bad = (*HOSTS, PATCHES, "megatron_moetion_patches")
    found = [f"{source.name}:{line}: {name}" for name, line in source.imports() if top(name) in bad]
    assert found == []


@pytest.mark.parametrize("source", sources(CORE), ids=lambda s: s.name)
def test_imports_go_down_the_pipe(source: Source) -> None:
    here = stage_of(source.module)
    if here is None:
        return
    known = core_modules()
    found = {
        (source.module, name)
        for name, _ in source.imports()
        if name in known and (stage_of(name) or 0) > here
    }
    assert found <= AGAINST_THE_PIPE


def test_every_exception_to_the_pipe_is_still_needed() -> None:
    made = {(s.module, name) for s in sources(CORE) for name, _ in s.imports()}
    assert made >= AGAINST_THE_PIPE


def test_what_stands_beside_the_pipe_does_not_import_its_end() -> None:
    """Whatever the end of the pipe is made of works without a worker, too."""
    late = {f"{CORE}.{name}" for name in PIPE[PIPE.index("job") :]}
    found = [
        f"{s.name}:{line}: {name}"
        for s in sources(CORE)
        for name, line in s.imports()
        if s.module not in late and name in late
    ]
    assert found == []


@pytest.mark.parametrize("source", sources(PATCHES), ids=lambda s: s.name)
def test_only_the_folder_of_a_host_version_imports_the_host(source: Source) -> None:
    if any(source.name.startswith(folder) for folder in HOST_FILES):
        return
    found = [
        f"{source.name}:{line}: {name}" for name, line in source.imports() if top(name) in HOSTS
    ]
    assert found == []


@pytest.mark.parametrize("source", sources(PATCHES), ids=lambda s: s.name)
def test_patches_take_decisions_from_the_core_and_make_none(source: Source) -> None:
    """What decides (plans, rounds, stores) is only reached through the session and the job."""
    deciding = (
        f"{CORE}.recovery.rebuild",
        f"{CORE}.recovery.phase",
        f"{CORE}.agent.round",
        f"{CORE}.agent.decision",
        f"{CORE}.vault.store",
    )
    found = [f"{source.name}:{line}: {name}" for name, line in source.imports() if name in deciding]
    assert found == []


def test_the_start_up_files_import_no_torch() -> None:
    startup = [s for s in sources(PATCHES) if s.name.startswith("patches/startup/")]
    assert startup
    found = [
        f"{s.name}:{line}: {name}"
        for s in startup
        for name, line in s.imports()
        if top(name) in ("torch", "numpy", *HOSTS)
    ]
    assert found == []


def test_the_guard_sees_imports_inside_functions_and_relative_ones() -> None:
    names = {name for s in both() if s.name.endswith("training.py") for name, _ in s.imports()}
    assert "patches.core_0_19.host" in names
    assert "megatron_moetion.job" in names
