import pytest
import torch

from olmo_optim_ext.linalg.precision import BACKENDS, full_precision


@pytest.fixture(autouse=True)
def put_back():
    before = [backend.fp32_precision for backend in BACKENDS]
    yield
    for backend, precision in zip(BACKENDS, before):
        backend.fp32_precision = precision


@pytest.mark.parametrize("chosen", ["none", "ieee", "tf32"])
def test_what_the_process_chose_is_put_back(chosen):
    for backend in BACKENDS:
        backend.fp32_precision = chosen
    with full_precision():
        assert [backend.fp32_precision for backend in BACKENDS] == ["ieee"] * len(BACKENDS)
        with full_precision():
            torch.ones(2, 2) @ torch.ones(2, 2)
    assert [backend.fp32_precision for backend in BACKENDS] == [chosen] * len(BACKENDS)


def test_an_error_puts_it_back_too():
    before = [backend.fp32_precision for backend in BACKENDS]
    with pytest.raises(ValueError):
        with full_precision():
            raise ValueError
    assert [backend.fp32_precision for backend in BACKENDS] == before
