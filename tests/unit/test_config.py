"""Flags and their relations."""

import dataclasses
from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_moetion.config import (
    AUTO_WINDOW,
    Config,
    ConfigError,
    add_arguments,
    flag_names,
    from_command_line,
)

FLAGS = [
    "--moetion",
    "--moetion-cut",
    "--moetion-window",
    "--moetion-window-policy",
    "--moetion-split",
    "--moetion-popularity",
    "--moetion-replicas",
    "--moetion-same-domain",
    "--moetion-dir",
    "--moetion-digest-interval",
    "--moetion-fault",
    "--moetion-memory",
    "--moetion-spill-interval",
    "--moetion-export",
    "--moetion-hang-factor",
    "--moetion-max-retries",
    "--moetion-restart-budget",
    "--moetion-timeout",
    "--moetion-lease",
]
"""Frozen: a flag is a promise to users."""


def _config(*tokens: str, **env: str) -> Config:
    return from_command_line(tokens, env)[1]


def test_one_field_is_one_flag_with_help() -> None:
    assert list(flag_names()) == FLAGS
    assert len(dataclasses.fields(Config)) == len(FLAGS)
    text = add_arguments(ArgumentParser()).format_help()
    assert all(flag in text for flag in FLAGS)
    assert all(field.metadata["help"] for field in dataclasses.fields(Config))


def test_defaults_change_nothing() -> None:
    assert _config() == Config()
    assert not Config().active
    assert Config().window_size == AUTO_WINDOW


def test_values_are_read_among_the_hosts_flags() -> None:
    config = _config(
        *("--num-layers", "4", "--moetion", "--moetion-window=3", "--moetion-dir", "out"),
        *("--moetion-window-policy", "tumbling", "--moetion-replicas", "1"),
        *("--moetion-digest-interval", "5", "--moetion-timeout", "90"),
        GROUP_WORLD_SIZE="2",
    )
    assert config == Config(
        moetion=True,
        window=3,
        window_policy="tumbling",
        replicas=1,
        dir=Path("out"),
        digest_interval=5,
        timeout_seconds=90.0,
    )
    assert config.window_size == 3
    assert config.timeout.total_seconds() == 90


def test_digests_work_without_protection() -> None:
    assert _config("--moetion-digest-interval", "1").active


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["--moetion-window", "0"], "--moetion-window '0': give 'auto' or a whole number"),
        (["--moetion-window"], "--moetion-window: expected one argument"),
        (["--moetion-window", "-2"], "--moetion-window '-2': give 'auto' or a whole number"),
        (["--moetion-window", "4.5"], "--moetion-window '4.5': give 'auto' or a whole number"),
        (["--moetion-window-policy", "sliding"], "give 'auto', 'rolling' or 'tumbling'"),
        (["--moetion-digest-interval", "often"], "give a whole number of at least 0"),
        (["--moetion-timeout", "0"], "give seconds, at least 1"),
        (["--moetion-timeout", "nan"], "give seconds, at least 1"),
        (["--moetion-hang-factor", "1.5"], "give 0, or at least 2"),
        (["--moetion-hang-factor", "inf"], "give 0, or at least 2"),
        (["--moetion-hang-factor", "soon"], "give 0, or at least 2"),
        (["--moetion-max-retries", "-1"], "give a whole number of at least 0"),
        (["--moetion-restart-budget", "0/60"], "'0/60': give N/SECONDS, both at least 1"),
        (["--moetion-restart-budget", "5"], "give N/SECONDS, both at least 1"),
        (["--moetion-restart-budget", "5/nan"], "give N/SECONDS, both at least 1"),
        (["--moetion-dir", __file__], "this is a file; give a directory"),
        (["--moetion-replicas", "1"], "needs at least 2 nodes and this job has 1: drop the flag"),
        (["--moetion-replicas", "-1"], "give 'auto' or a whole number of at least 0"),
        (["--moetion-windw", "3"], "unknown flag --moetion-windw: did you mean --moetion-window?"),
        (["--moetion", "--moetion-fault", "kill"], "--moetion-fault: fault 'kill' lacks"),
        (["--moetion", "--moetion-fault", ";"], "give at least one fault"),
        (
            ["--moetion-fault", "kill:global_rank=1,iteration=1,at=end"],
            "--moetion-fault needs --moetion",
        ),
        (["--moetion-spill-interval", "1"], "--moetion-spill-interval needs --moetion"),
        (["--moetion", "--moetion-export", "out"], "give the --moetion-spill-interval of the run"),
        (
            ["--moetion", "--moetion-fault", "kill:global_rank=4,iteration=1,at=end"],
            "names global_rank=4 and this job has 4 ranks",
        ),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_change(tokens: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        _config(*tokens, WORLD_SIZE="4")
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_replicas_must_stay_below_the_nodes() -> None:
    assert _config("--moetion-replicas", "1", GROUP_WORLD_SIZE="2").replicas == 1
    with pytest.raises(
        ConfigError, match="needs at least 3 nodes and this job has 2: give at most 1"
    ):
        _config("--moetion-replicas", "2", GROUP_WORLD_SIZE="2")


def test_the_shard_cut_refuses_windows_that_leave_gradients_out() -> None:
    assert _config("--moetion-cut", "shard", "--moetion-window-policy", "rolling").cut == "shard"
    with pytest.raises(ConfigError, match="drop --moetion-window-policy tumbling"):
        _config("--moetion-cut", "shard", "--moetion-window-policy", "tumbling")
    with pytest.raises(ConfigError, match="give 'stage', 'shard' or 'auto'"):
        _config("--moetion-cut", "rank")
