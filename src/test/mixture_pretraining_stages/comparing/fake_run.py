"""
``fake_run.py pretrain SPEC`` stands for a run in tests of how runs are started, stopped and
counted: it makes no steps, but their metrics, in the same folder and under the same lock, continues
where it was stopped, and ends with its parent. Needs only what imports quickly.

The loss is lowest at a learning rate of 0.01. Arms called ``broken``, ``dying`` and ``diverging``
do what they are called.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import yaml

EVERY, STEPS = 4, 18


def loss_of(lr: float, seed: int, step: int) -> float:
    """Of a run's evaluation after a step."""
    return 1 + math.log2(lr / 0.01) ** 2 / 10 + seed / 1000 + (STEPS - step) / 10


def end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted(*_: object) -> None:
    print("Interrupted at step 3; saved. Resume with: nothing", flush=True)
    os._exit(1)


def main(path: Path) -> int:
    spec = yaml.safe_load(path.read_text())
    lr, seed, folder = spec["optimizer"]["lr"], spec["seed"], Path(spec["output"])
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"output: another process is running in {folder}, allowed is one at a time")
        return 2
    with open(folder / "starts", "a") as starts:
        starts.write("x")
    if "-broken-" in spec["name"]:
        print("The run failed: RuntimeError: broken. Resume with: nothing")
        return 1
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for step in range(len(lines) + 1, STEPS + 1):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0")))
        if "-dying-" in spec["name"] and step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        row = {"step": step, "stage": "one", "tokens": 256 * step, "train/CE loss": 1.0}
        if step % EVERY == 0 or step == STEPS:
            loss = math.nan if "-diverging-" in spec["name"] else loss_of(lr, seed, step)
            row |= {f"eval/validation/{source}/CE loss": loss for source in spec["sources"]}
        with open(metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupted)
    Thread(target=end_with_parent, daemon=True).start()
    sys.exit(main(Path(sys.argv[2])))
