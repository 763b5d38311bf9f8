import torch

from olmo_optim_ext.engine.factors import FactorPlan
from olmo_optim_ext.engine.layout import MatrixLayout
from olmo_optim_ext.engine.placement import Path, Placing
from olmo_optim_ext.engine.plan import Plan


def test_each_element_is_found_in_its_matrix():
    layout = MatrixLayout((2, 3), (4, 1))
    blocks = list(enumerate(layout.blocks()))
    plan = Plan(layout, Placing(Path.local), blocks, (), FactorPlan([{}] * len(blocks)))
    found = plan.index_at(torch.arange(25)).view(5, 5)
    for index, block in blocks:
        part = found[
            block.first_row : block.first_row + block.n_rows,
            block.first_col : block.first_col + block.n_cols,
        ]
        assert (part == index).all()


def test_the_matrices_of_a_part_are_counted_from_its_first():
    layout = MatrixLayout((2, 3, 4), (2,))
    blocks = list(enumerate(layout.blocks()))[1:]
    plan = Plan(layout, Placing(Path.local), blocks, (), FactorPlan([{}] * 3))
    assert plan.index_at(torch.arange(4, 18)).tolist() == [0] * 6 + [1] * 8
