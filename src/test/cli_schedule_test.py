"""
``olmo-optim schedule``, as a user types it.
"""

from functools import partial
from pathlib import Path

import pytest
from olmo_core.optim import Scheduler

from .mixture_pretraining_stages.spec import tiny_spec, write_spec


@pytest.fixture
def call(call):
    return partial(call, "schedule")


def test_list_has_every_scheduler_and_where_it_is_from(call):
    code, out, _ = call("list")
    assert code == 0
    rows = {line.split()[1]: line for line in out.splitlines() if "olmo_" in line and "│" in line}
    assert set(rows) == set(Scheduler.get_registered_names())
    assert "olmo_optim_ext" in rows["one_cycle"] and "olmo_core" in rows["wsd"]


def test_plot_draws_and_prints_what_is_scheduled(call, tmp_path):
    path = str(write_spec(tmp_path / "spec.yaml", tiny_spec(tmp_path)))
    picture = tmp_path / "some.png"
    code, out, err = call("plot", path, "scheduler={type: one_cycle}", "--output", str(picture))
    assert code == 0, out + err
    assert picture.stat().st_size > 10_000
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["learning", "momentum"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["plot", "--output", "{tmp}/a.pdf"], "ends in .png"),
        (["plot", "--output", "{tmp}/nowhere/a.png"], "a folder that exists"),
        (["plot", "scheduler={{type: cylic}}", "--output", "{tmp}/a.png"], "did you mean cyclic"),
        (["plot", "nowhere.yaml", "--output", "{tmp}/a.png"], "nowhere.yaml"),
        (["draw"], "draw"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments, message, call, tmp_path: Path):
    code, out, err = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert message in out + err
    assert len((out + err).strip().splitlines()) == 1
