import torch

from olmo_optim_ext.engine.host import HostMirror


def test_a_mirror_shows_what_was_there_at_the_last_update():
    source = torch.tensor([[1.0, 2.0]])
    mirror = HostMirror(source)
    assert mirror.read().tolist() == [[1.0, 2.0]]
    source += 1
    assert mirror.read().tolist() == [[1.0, 2.0]]
    mirror.update(source)
    assert mirror.read().tolist() == [[2.0, 3.0]]


def test_doubles_are_shown_as_floats():
    assert HostMirror(torch.tensor([1 / 3], dtype=torch.float64)).read().dtype == "float32"
