"""As a program: `srun` with torchrun's command line, four workers on two nodes of a cluster."""

import os
import sys

from tests.ports import free_port

RANKS = (
    "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID"
    " LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_STEP_NUM_NODES)); exec"
)

if __name__ == "__main__":
    *_, script = (i for i, word in enumerate(sys.argv) if word.endswith(".py"))
    steps = ["srun", "--nodes", "2", "--ntasks", "4", "--overcommit", "--kill-on-bad-exit=0"]
    workers = ["bash", "-c", f'{RANKS} "$@"', "worker", sys.executable, "-W", "ignore"]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.execvp(steps[0], [*steps, *workers, *sys.argv[script:]])
