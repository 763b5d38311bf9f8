"""
The contract table: a row for each catalogue name, and further ones for optimizers inside others.
"""

from typing import Dict

from . import (
    dion_cases,
    elementwise_cases,
    kron_cases,
    muon_cases,
    noise_cases,
    scion_cases,
    soap_cases,
    wrapper_cases,
)
from .case import Case

CASES: Dict[str, Case] = {
    **elementwise_cases.CASES,
    **muon_cases.CASES,
    **dion_cases.CASES,
    **noise_cases.CASES,
    **scion_cases.CASES,
    **soap_cases.CASES,
    **kron_cases.CASES,
    **wrapper_cases.CASES,
}
