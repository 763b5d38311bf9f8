"""
Starting ranks for a test.
"""

import os
import subprocess
import sys
from pathlib import Path


def run_on_ranks(world_size: int, script: Path, *args: object) -> None:
    """
    Run a script on several ranks, in fresh processes: forking one that has used threads may hang.

    :raises AssertionError: With the output, if a rank fails.
    """
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(world_size), str(script), *map(str, args)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
