"""
That what is killed leaves nothing behind.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixture_pretraining_stages.processes import kill_tree

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_children_in_sessions_of_their_own_are_killed_too():
    command = [sys.executable, "-c", PARENT, "import time; time.sleep(60)"]
    # The pipe ends when none of them has it any more.
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert os.getsid(child) == child
    kill_tree(parent.pid)
    _, _ = parent.communicate(timeout=20)
    assert parent.returncode == -9
