"""
The entry point of ``olmo-optim``.
"""

import logging
import sys


def main() -> int:
    # Before the imports: OLMo-core logs what it does not find while it is imported.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        from mixture_pretraining_stages.launch import launched_by_torchrun, leave
        from olmo_optim_ext.cli import main as cli

        code = cli()
    except KeyboardInterrupt:
        print("Interrupted; nothing had started.", file=sys.stderr)
        return 1
    if launched_by_torchrun():
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
