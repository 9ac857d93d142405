"""What a GPU run showed, on which card and with which versions, as JSON and as markdown."""

import importlib.metadata as metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NOTE = (
    "All ranks share one GPU and talk through gloo and host memory, with deterministic kernels: "
    "these times show what ran, they are no performance."
)


@dataclass(frozen=True)
class Outcome:
    """Three runs compared.

    Attributes:
        good: whether all three are bit-identical and only the failed stage replayed.
        verdict: of the run with a failure against the one without protection.
        off_and_on: of protection without a failure against none.
        variant: of the demo's model.
        fault: what was scripted.
        runs: by run: wall seconds, median milliseconds per iteration.
        recovery_ms: by phase: milliseconds after the fault fired.
    """

    good: bool
    verdict: str
    off_and_on: str
    variant: str
    fault: str
    runs: Mapping[str, Mapping[str, float]]
    recovery_ms: Mapping[str, float]

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {at_ms:.0f}" for name, at_ms in self.recovery_ms.items())
        return (
            f"{self.variant}, {self.fault}\nrecovery in ms: {phases}\n"
            f"off and on: {self.off_and_on}\n{self.verdict}"
        )


def missing_gpu() -> str:
    """What keeps this machine from running on a GPU; empty when nothing does."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build"
    if torch.cuda.device_count() == 0:
        return "no CUDA device is visible: run it on a machine with an NVIDIA GPU and its driver"
    return ""


def machine() -> dict[str, Any]:
    """Card, driver and versions, as they are here."""
    import torch

    cuda = torch.cuda.is_available()
    versions = {name: metadata.version(name) for name in ("torch", "megatron-core", "numpy")}
    return {
        "card": torch.cuda.get_device_name(0) if cuda else "none",
        "capability": list(torch.cuda.get_device_capability(0)) if cuda else [],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **versions,
    }


def write(outcomes: Sequence[Outcome], directory: Path) -> tuple[Path, Path]:
    """Writes `gpu-<date>.json` and `.md`; an earlier result of the same day is replaced.

    Returns:
        Both paths.
    """
    directory.mkdir(parents=True, exist_ok=True)
    date, where = datetime.now(UTC).date().isoformat(), machine()
    record = {"date": date, "machine": where, "outcomes": [asdict(o) for o in outcomes]}
    path = directory / f"gpu-{date}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    page = path.with_suffix(".md")
    page.write_text(_page(outcomes, date, where))
    return path, page


def _page(outcomes: Sequence[Outcome], date: str, where: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in where.items() if name != "capability")
    lines = [f"# One GPU, {date}", "", f"{facts}.", "", NOTE, ""]
    lines += ["| model | failure | identical | iteration ms off / on | resumed after ms |"]
    lines += ["|---|---|---|---|---|"]
    for outcome in outcomes:
        pair = " / ".join(f"{outcome.runs[name]['iteration_ms']:.1f}" for name in ("off", "on"))
        resumed = outcome.recovery_ms.get("resumed", float("nan"))
        lines.append(
            f"| {outcome.variant} | `{outcome.fault}` | {'yes' if outcome.good else 'NO'} "
            f"| {pair} | {resumed:.0f} |"
        )
    lines += ["", *(f"- {outcome.verdict}" for outcome in outcomes)]
    return "\n".join([*lines, "", "Command: `make gpu`", ""])
