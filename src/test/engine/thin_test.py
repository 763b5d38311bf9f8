from pathlib import Path
from typing import Callable


def test_thin_factors_are_summed_and_spread(passed_on_ranks: Callable[[str], Path]):
    passed_on_ranks("thin_factors_are_summed_and_spread")
