"""
The entry point of ``olmo-optim``.
"""

import logging
import sys


def main() -> int:
    # Before the imports: OLMo-core logs what it does not find while it is imported.
    logging.getLogger().addHandler(logging.NullHandler())
    from olmo_optim_ext.cli import main as cli

    return cli()


if __name__ == "__main__":
    sys.exit(main())
