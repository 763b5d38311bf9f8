"""
A command of ``olmo-optim`` that does not outlive the process that started it:
``python -m mixture_pretraining_stages.comparing.child pretrain ...`` gets SIGTERM, on which a run
saves and ends, once its standard input is closed. That happens however the parent dies, as it has
the other end of the pipe.
"""

import os
import signal
import sys
from threading import Thread


def _end_with_parent() -> None:
    # Not sys.stdin, whose lock a waiting thread would keep at the interpreter's end.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    Thread(target=_end_with_parent, daemon=True).start()

    from mixture_pretraining_stages.__main__ import main

    sys.exit(main())
