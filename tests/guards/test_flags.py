"""The flags are a promise to users: a frozen list, and one table of the README per flag."""

from __future__ import annotations

import dataclasses
import re

import pytest
from source_files import ROOT

from megatron_moetion.config import Config

FLAGS = {
    "--moetion": "",
    "--moetion-cut": "stage|shard|auto",
    "--moetion-window": "auto|N",
    "--moetion-window-policy": "auto|rolling|tumbling",
    "--moetion-split": "auto|N",
    "--moetion-popularity": "hard-count|soft-count|time-decayed|capacity-aware|none",
    "--moetion-replicas": "auto|N",
    "--moetion-same-domain": "",
    "--moetion-dir": "DIR",
    "--moetion-digest-interval": "N",
    "--moetion-fault": "SPEC",
    "--moetion-memory": "auto|GIB",
    "--moetion-spill-interval": "N",
    "--moetion-export": "DIR",
    "--moetion-hang-factor": "FACTOR",
    "--moetion-max-retries": "N",
    "--moetion-restart-budget": "N/SECONDS",
    "--moetion-timeout": "SECONDS",
    "--moetion-lease": "SECONDS",
}
README = ROOT / "README.md"


def declared() -> dict[str, str]:
    fields = dataclasses.fields(Config)
    return {f.metadata["flag"]: f.metadata["metavar"] for f in fields}


def test_the_list_of_flags_is_frozen() -> None:
    assert declared() == FLAGS


def test_every_flag_says_in_a_sentence_what_it_does() -> None:
    for field in dataclasses.fields(Config):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.skipif(not README.exists(), reason="no README.md yet")
def test_the_readme_lists_exactly_the_flags_there_are() -> None:
    rows = re.findall(r"^\|\s*`(--moetion[\w-]*)", README.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(FLAGS)
