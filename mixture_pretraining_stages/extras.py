"""
Packages that only some commands need.
"""

import importlib.util

from olmo_core.exceptions import OLMoConfigurationError

__all__ = ["require"]


def require(extra: str, *packages: str) -> None:
    """
    Check that the packages of an optional part of the installation are there.

    :raises OLMoConfigurationError: Names those that are missing, and how to install them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise OLMoConfigurationError(
            f"{' and '.join(missing)} is not installed; allowed is pip install "
            f"'olmo-optim-ext[{extra}]'"
        )
