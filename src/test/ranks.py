"""
Starting ranks for a test.
"""

import os
import subprocess
import sys
from pathlib import Path


def run_on_ranks(world_size: int, script: Path, *args: object) -> None:
    """
    Run a file of the tests as a module on several ranks, in fresh processes: forking one that has
    used threads may hang.

    :raises AssertionError: With the output, if a rank fails.
    """
    root = Path(__file__).parents[2]
    module = ".".join(script.resolve().relative_to(root).with_suffix("").parts)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(world_size), "-m", module, *map(str, args)),
        ],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
