"""Off == on == killed and recovered, bit for bit, with every rank on the machine's one GPU.

Three runs of the demo's model: without protection, with it, and with it and a killed worker. Ranks
talk through gloo and host memory, since NCCL refuses two ranks on one GPU; kernels, streams,
optimizer and captures are the GPU's own, and deterministic.

Usage: python launch/gpu/identity.py [--platform cpu] [--variant NAME] [--fault SPEC]
           [--results DIR]

Exit code 0 when all three agree; 2 when there is no GPU.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "launch" / "demo"
# Neither folder is a package; a bare checkout is installed nowhere.
sys.path[:0] = [str(Path(__file__).parent), str(DEMO), str(ROOT)]

from model_args import VARIANTS, model_args  # noqa: E402
from results import Outcome, missing_gpu, write  # noqa: E402
from story import NoRecovery, aftermath, timeline, verdict  # noqa: E402

from megatron_moetion import digest, events, faults  # noqa: E402

PP_SIZE = EP_SIZE = DP_SIZE = 2
WORLD_SIZE = PP_SIZE * DP_SIZE
DEFAULT_FAULT = "kill:global_rank=3,iteration=6,at=backward:1"
RUN_LIMIT = timedelta(minutes=6)
"""Of one run, start-up included: a run that hangs must leave time to say so."""
_ITERATION_TIME = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # cuBLAS is deterministic only with a workspace of fixed size.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Compiling takes longer than training here, and needs a C compiler.
    "TORCH_COMPILE_DISABLE": "1",
}


class RunFailed(RuntimeError):
    """A run ended with another code than 0, or not in time; the message ends with its output."""


@dataclass(frozen=True)
class Setting:
    """What is trained, and on what.

    Attributes:
        platform: `shared-gpu`, or `cpu` to try this script without a GPU.
        variant: a variant of the demo's model.
        train_iters: iterations of each run.
        corpus: prefix of the indexed data set.
    """

    platform: str
    variant: str
    train_iters: int
    corpus: Path


@dataclass(frozen=True)
class Run:
    """A run that ended well.

    Attributes:
        directory: its digests, events and output.
        seconds: wall time, start-up included.
        iteration_ms: median over the iterations after the first three.
    """

    directory: Path
    seconds: float
    iteration_ms: float


def train(setting: Setting, directory: Path, *protection: str) -> Run:
    """Trains once.

    Args:
        setting: see there.
        directory: empty or new; gets `output.log`.
        protection: flags on top of the digests, such as `--moetion`.

    Raises:
        RunFailed: with the last lines of the output.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "output.log"
    env = {**os.environ, **ENVIRONMENT, "MOETION_PLATFORM": setting.platform}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    began = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command(setting, directory, *protection),
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=RUN_LIMIT.total_seconds(),
            )
            ended = f"ended with code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"did not end within {RUN_LIMIT}"
    text = log.read_text()
    if ended:
        tail = "\n".join(text.splitlines()[-40:])
        raise RunFailed(f"{tail}\n{directory.name} {ended}; all of its output: {log}")
    times = [float(ms) for ms in _ITERATION_TIME.findall(text)]
    return Run(directory, time.monotonic() - began, statistics.median(times[3:] or times or [0.0]))


def command(setting: Setting, directory: Path, *protection: str) -> list[str]:
    """The command line of one run."""
    words = [sys.executable, "-m", "megatron_moetion.agent"]
    words += ["--nproc-per-node", str(WORLD_SIZE), "--spares", "1" if protection else "0"]
    words += [str(DEMO / "pretrain_moe.py")]
    # The host's own kernels, none of another library's: what a bare machine has.
    words += model_args(
        setting.variant,
        data_prefix=str(setting.corpus),
        train_iters=setting.train_iters,
        pp_size=PP_SIZE,
        ep_size=EP_SIZE,
        dp_size=DP_SIZE,
    )
    if setting.platform != "cpu":
        words += ["--deterministic-mode"]
    words += ["--moetion-digest-interval", "1", "--moetion-dir", str(directory)]
    return [*words, *protection]


def make_corpus(directory: Path) -> Path:
    """Prefix of a data set of this interpreter's own library; made once."""
    prefix = directory / "corpus"
    if not prefix.with_name(prefix.name + ".idx").is_file():
        env = {**os.environ, "MOETION_PLATFORM": "cpu"}
        builder = [sys.executable, str(DEMO / "corpus.py"), "--output", str(prefix)]
        subprocess.run(builder, env=env, check=True, stdout=subprocess.DEVNULL)
    return prefix


def judge(setting: Setting, off: Run, on: Run, failed: Run, fault: str) -> Outcome:
    """Compares three finished runs.

    Raises:
        NoRecovery: the third run went through no failure.
        digest.NoDigest: a run recorded nothing.
    """
    (scripted,) = faults.parse(fault)
    undisturbed = digest.compare(off.directory, on.directory)
    found = verdict(
        digest.compare(off.directory, failed.directory),
        aftermath(failed.directory, WORLD_SIZE),
        num_records=setting.train_iters * WORLD_SIZE,
        failed_rank=scripted.global_rank,
        stage_size=DP_SIZE,
    )
    return Outcome(
        good=found.good and undisturbed.difference is None,
        verdict=found.text,
        off_and_on=str(undisturbed),
        variant=setting.variant,
        fault=fault,
        runs={
            name: {"seconds": round(run.seconds, 1), "iteration_ms": run.iteration_ms}
            for name, run in (("off", off), ("on", on), ("failed", failed))
        },
        recovery_ms={
            row.what: round(row.at_ms, 1) for row in timeline(events.read(failed.directory))
        },
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--platform", default="shared-gpu", choices=["shared-gpu", "cpu"])
    parser.add_argument("--variant", default="demo", choices=sorted(VARIANTS))
    parser.add_argument("--fault", default=DEFAULT_FAULT)
    parser.add_argument("--train-iters", type=int, default=16)
    parser.add_argument("--directory", type=Path, default=ROOT / ".moetion" / "gpu")
    parser.add_argument("--results", type=Path, help="write a JSON and a markdown file there")
    options = parser.parse_args()
    if options.platform == "cpu" and options.results is not None:
        parser.error("--results holds what a GPU showed: drop it, or --platform cpu")
    if options.platform == "shared-gpu" and (missing := missing_gpu()):
        print(f"identity: {missing}", file=sys.stderr)
        return 2
    directory = options.directory.resolve() / time.strftime("%Y%m%d-%H%M%S")
    directory.mkdir(parents=True)
    corpus = make_corpus(directory)
    setting = Setting(options.platform, options.variant, options.train_iters, corpus)
    try:
        off = train(setting, directory / "off")
        on = train(setting, directory / "on", "--moetion")
        protection = ("--moetion", "--moetion-fault", options.fault)
        failed = train(setting, directory / "failed", *protection)
        outcome = judge(setting, off, on, failed, options.fault)
    except (RunFailed, NoRecovery, digest.NoDigest) as error:
        print(f"{error}\nVERDICT: NOT shown, see above")
        return 1
    print(outcome)
    if options.results is not None:
        print(*write([outcome], options.results), sep="\n")
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
