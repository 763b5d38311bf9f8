"""
The contract table: a row for each catalogue name, and further ones for optimizers inside others.
"""

from typing import Dict

from . import (
    classics_cases,
    dion_cases,
    elementwise_cases,
    kron_cases,
    layerwise_cases,
    momentum_cases,
    muon_cases,
    noise_cases,
    scion_cases,
    soap_cases,
    wrapper_cases,
)
from .case import Case

CASES: Dict[str, Case] = {
    **elementwise_cases.CASES,
    **classics_cases.CASES,
    **momentum_cases.CASES,
    **layerwise_cases.CASES,
    **muon_cases.CASES,
    **dion_cases.CASES,
    **noise_cases.CASES,
    **scion_cases.CASES,
    **soap_cases.CASES,
    **kron_cases.CASES,
    **wrapper_cases.CASES,
}
