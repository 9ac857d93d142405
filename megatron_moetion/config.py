"""Every ``--moetion-*`` flag, as one frozen dataclass; relations are checked in one place.

argparse gets plain strings, because its own error prints the host's several hundred flags; the
values are read here, and every refusal is one line that says what to change.
"""

import argparse
import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_moetion import faults

Cut = Literal["stage", "shard", "auto"]
WindowPolicy = Literal["auto", "rolling", "tumbling"]
Popularity = Literal["hard-count", "soft-count", "time-decayed", "capacity-aware", "none"]

AUTO_WINDOW = 4
"""What ``--moetion-window auto`` begins with, until enough is measured."""

AUTO_REPLICAS = 2
"""What ``--moetion-replicas auto`` means where there are enough failure domains."""


class ConfigError(ValueError):
    """A flag, or a relation between flags, is wrong; the text is one line with what to change."""


def _flag(name: str, metavar: str, help: str, read: Callable[[str], Any]) -> dict[str, Any]:
    return {"flag": name, "metavar": metavar, "help": help, "read": read}


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < least:
            raise ValueError(f"give a whole number of at least {least}")
        return int(text)

    return read


def _auto_or_whole(least: int) -> Callable[[str], int | Literal["auto"]]:
    def read(text: str) -> int | Literal["auto"]:
        if text == "auto":
            return "auto"
        try:
            return _whole(least)(text)
        except ValueError:
            raise ValueError(f"give 'auto' or a whole number of at least {least}") from None

    return read


def _one_of(choices: Any) -> Callable[[str], str]:
    *most, last = (f"'{choice}'" for choice in get_args(choices))

    def read(text: str) -> str:
        if text not in get_args(choices):
            raise ValueError(f"give {', '.join(most)} or {last}")
        return text

    return read


def _directory(text: str) -> Path:
    path = Path(text)
    if not text:
        raise ValueError("give a directory")
    if path.exists() and not path.is_dir():
        raise ValueError("this is a file; give a directory")
    return path


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds < float("inf"):
        raise ValueError("give seconds, at least 1")
    return seconds


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    # An iteration as long as usual is no hang.
    if factor != 0.0 and not 2.0 <= factor < float("inf"):
        raise ValueError("give 0, or at least 2")
    return factor


def _memory(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0.0 < gib < float("inf"):
        raise ValueError("give 'auto' or GiB, above 0")
    return gib


@dataclass(frozen=True)
class RestartBudget:
    """So many localized recoveries within so long.

    Attributes:
        num: at most.
        seconds: of the window of time that ends now.
    """

    num: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.num}/{self.seconds:g}"


DEFAULT_BUDGET = RestartBudget(100, 3600.0)
"""One in 36 s for an hour: what no job needs whose machines work."""


def _budget(text: str) -> RestartBudget:
    num, _, seconds = text.partition("/")
    try:
        budget = RestartBudget(int(num), float(seconds))
    except ValueError:
        budget = RestartBudget(0, 0.0)
    if budget.num < 1 or not 1.0 <= budget.seconds < float("inf"):
        raise ValueError("give N/SECONDS, both at least 1, for example 100/3600")
    return budget


def _fault(text: str) -> str:
    if text and not _parse_faults(text):
        raise ValueError(
            "give at least one fault, for example kill:global_rank=3,iteration=7,at=end"
        )
    return text


def _parse_faults(text: str) -> tuple[faults.Fault, ...]:
    return faults.parse(text) if text else ()


@dataclass(frozen=True)
class Config:
    """What the user asked for. One field is one flag; its help is the field's documentation."""

    moetion: bool = field(
        default=False,
        metadata=_flag(
            "--moetion",
            "",
            "Protect this run: capture frames and logs, recover failures.",
            bool,
        ),
    )
    cut: Cut = field(
        default="stage",
        metadata=_flag(
            "--moetion-cut",
            "stage|shard|auto",
            "What is rebuilt after a failure. stage: the pipeline stage, by replaying what entered "
            "it. shard: the optimizer shards, by the updates that were made to them; nothing is "
            "replayed, and frames hold gradients in place of weights. auto: what costs less after "
            "a failure of those that fit memory, copying and replication, as measured before the "
            "first step.",
            _one_of(Cut),
        ),
    )
    window: int | Literal["auto"] = field(
        default="auto",
        metadata=_flag(
            "--moetion-window",
            "auto|N",
            f"Frames that rebuild a full state. auto: begins with {AUTO_WINDOW} and takes the "
            "fewest that capture and replication keep up with, as measured while training.",
            _auto_or_whole(1),
        ),
    )
    window_policy: WindowPolicy = field(
        default="auto",
        metadata=_flag(
            "--moetion-window-policy",
            "auto|rolling|tumbling",
            "rolling: any W consecutive frames are a base. tumbling: only whole windows are. auto: "
            "begins with rolling and takes what replays less of those that keep up.",
            _one_of(WindowPolicy),
        ),
    )
    split: int | Literal["auto"] = field(
        default="auto",
        metadata=_flag(
            "--moetion-split",
            "auto|N",
            "Operators with more than 1/N of the parameters that a rank has operators of are "
            "captured in parts no larger than that, over several frames. 0 splits none. auto: "
            "splits where whole operators do not let capture keep up.",
            _auto_or_whole(0),
        ),
    )
    popularity: Popularity = field(
        default="hard-count",
        metadata=_flag(
            "--moetion-popularity",
            "hard-count|soft-count|time-decayed|capacity-aware|none",
            "How the popularity of experts is measured; the least popular are captured first. "
            "none keeps the order that the run begins with.",
            _one_of(Popularity),
        ),
    )
    replicas: int | Literal["auto"] = field(
        default="auto",
        metadata=_flag(
            "--moetion-replicas",
            "auto|N",
            "Copies of every frame on other nodes, each in a failure domain of its own. auto: "
            f"{AUTO_REPLICAS}, or as many as there are failure domains for.",
            _auto_or_whole(0),
        ),
    )
    same_domain: bool = field(
        default=False,
        metadata=_flag(
            "--moetion-same-domain",
            "",
            "Let copies of a frame lie in one failure domain where there are too few.",
            bool,
        ),
    )
    dir: Path = field(
        default=Path("moetion"),
        metadata=_flag(
            "--moetion-dir",
            "DIR",
            "Directory for events, digests, spilled windows and reports.",
            _directory,
        ),
    )
    digest_interval: int = field(
        default=0,
        metadata=_flag(
            "--moetion-digest-interval",
            "N",
            "Every N iterations record a hash of every tensor and the loss; 0 is never. Works "
            "without --moetion too.",
            _whole(0),
        ),
    )
    fault: str = field(
        default="",
        metadata=_flag(
            "--moetion-fault",
            "SPEC",
            "Inject failures, for example 'kill:global_rank=3,iteration=7,at=backward:1'; several "
            "are joined by ';'.",
            _fault,
        ),
    )
    memory_gib: float | Literal["auto"] = field(
        default="auto",
        metadata=_flag(
            "--moetion-memory",
            "auto|GIB",
            "Host memory for frames and logs on each node. auto: what the machine and its cgroup "
            "have free at the start. A run that needs more is refused.",
            _memory,
        ),
    )
    spill_interval: int = field(
        default=0,
        metadata=_flag(
            "--moetion-spill-interval",
            "N",
            "Every N windows write all that a rebuild needs to --moetion-dir, and start from the "
            "newest such spill there; 0 does neither.",
            _whole(0),
        ),
    )
    export: Path | None = field(
        default=None,
        metadata=_flag(
            "--moetion-export",
            "DIR",
            "Start from the newest spill, write an ordinary Megatron checkpoint of it to DIR, and "
            "end.",
            _directory,
        ),
    )
    hang_factor: float = field(
        default=10.0,
        metadata=_flag(
            "--moetion-hang-factor",
            "FACTOR",
            "When no rank has made progress for so many times a usual iteration, the rank that "
            "stopped first is killed and replaced; 0 detects no hang.",
            _factor,
        ),
    )
    max_retries: int = field(
        default=3,
        metadata=_flag(
            "--moetion-max-retries",
            "N",
            "A rank that fails more often than that at one iteration ends the job.",
            _whole(0),
        ),
    )
    restart_budget: RestartBudget = field(
        default=DEFAULT_BUDGET,
        metadata=_flag(
            "--moetion-restart-budget",
            "N/SECONDS",
            "When more than N recoveries begin within SECONDS, all workers start anew from memory; "
            "when that happens again, from the newest spill; then from the Megatron checkpoint "
            "that --load names; then the job ends.",
            _budget,
        ),
    )
    timeout_seconds: float = field(
        default=600.0,
        metadata=_flag(
            "--moetion-timeout",
            "SECONDS",
            "The one time limit; every other one is derived from it and printed at the start.",
            _seconds,
        ),
    )
    lease_seconds: float = field(
        default=4.0,
        metadata=_flag(
            "--moetion-lease",
            "SECONDS",
            "How long a node may be silent before it counts as lost; each node checks that it is "
            "heard, and ends its workers when it is not.",
            _seconds,
        ),
    )

    @property
    def timeout(self) -> timedelta:
        """The one time limit."""
        return timedelta(seconds=self.timeout_seconds)

    @property
    def memory_bytes(self) -> int | None:
        """The limit for each node; None takes what is free."""
        return None if self.memory_gib == "auto" else int(self.memory_gib * 2**30)

    @property
    def window_size(self) -> int:
        """W, with ``auto`` resolved."""
        return AUTO_WINDOW if self.window == "auto" else self.window

    @property
    def active(self) -> bool:
        """Whether anything beyond the flags themselves is to be patched."""
        return self.moetion or self.digest_interval > 0


def flag_names() -> dict[str, str]:
    """Returns every flag and the name of its `Config` field."""
    return {entry.metadata["flag"]: entry.name for entry in dataclasses.fields(Config)}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds one flag per field to ``parser``, as an own group, and returns the parser."""
    group = parser.add_argument_group("moetion")
    for entry in dataclasses.fields(Config):
        details = entry.metadata
        destination = _destination(details["flag"])
        if entry.type is bool:
            group.add_argument(
                details["flag"], dest=destination, action="store_true", help=details["help"]
            )
        else:
            group.add_argument(
                details["flag"],
                dest=destination,
                metavar=details["metavar"],
                default=None if entry.default is None else str(entry.default),
                help=f"{details['help']} Default: {entry.default or '(none)'}.",
            )
    return parser


def from_namespace(args: argparse.Namespace, env: Mapping[str, str] = os.environ) -> Config:
    """Reads the flags that `add_arguments` added, and checks how they go together.

    Raises:
        ConfigError: one line saying what to change.
    """
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(Config):
        details = entry.metadata
        value = getattr(args, _destination(details["flag"]), entry.default)
        if isinstance(value, str):
            try:
                value = details["read"](value)
            except ValueError as error:
                given = "" if str(error).startswith("fault ") else f" {value!r}"
                raise ConfigError(f"{details['flag']}{given}: {error}") from error
        values[entry.name] = value
    config = Config(**values)
    _check_relations(config, env)
    return config


def from_command_line(
    tokens: Sequence[str], env: Mapping[str, str] = os.environ
) -> tuple[argparse.Namespace, Config]:
    """Reads only our flags out of a whole command line.

    Raises:
        ConfigError: as `from_namespace`, or as `check_spelling`.
    """
    check_spelling(tokens)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    try:
        args, _ = add_arguments(parser).parse_known_args(list(tokens))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from error
    return args, from_namespace(args, env)


def check_spelling(tokens: Sequence[str]) -> None:
    """Refuses a ``--moetion...`` flag that does not exist, naming the nearest one.

    Raises:
        ConfigError: for the first such token.
    """
    known = flag_names()
    for token in tokens:
        name = token.partition("=")[0]
        if name.startswith("--moetion") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown flag {name}: {hint}")


def _destination(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _check_relations(config: Config, env: Mapping[str, str]) -> None:
    if config.fault and not config.moetion:
        raise ConfigError("--moetion-fault needs --moetion: add --moetion or drop the fault")
    if config.spill_interval and not config.moetion:
        raise ConfigError("--moetion-spill-interval needs --moetion: add it or drop the spills")
    if config.export is not None and not config.spill_interval:
        raise ConfigError(
            "--moetion-export starts from a spill: give the --moetion-spill-interval of the run"
        )
    if config.cut == "shard" and config.window_policy == "tumbling":
        raise ConfigError(
            "--moetion-cut shard needs the gradients of every iteration, which tumbling windows "
            "leave out: drop --moetion-window-policy tumbling"
        )
    nodes = int(env.get("GROUP_WORLD_SIZE") or env.get("SLURM_NNODES") or 1)
    if config.replicas != "auto" and config.replicas >= max(nodes, 1):
        change = f"give at most {nodes - 1}" if nodes > 1 else "drop the flag or add nodes"
        raise ConfigError(
            f"--moetion-replicas {config.replicas} needs at least {config.replicas + 1} nodes "
            f"and this job has {nodes}: {change}"
        )
    world_size = int(env.get("WORLD_SIZE") or 0)
    for fault in _parse_faults(config.fault):
        if world_size and fault.global_rank >= world_size:
            raise ConfigError(
                f"--moetion-fault names global_rank={fault.global_rank} and this job has "
                f"{world_size} ranks: name one below {world_size}"
            )
