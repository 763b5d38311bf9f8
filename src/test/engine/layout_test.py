import torch
import torch.nn.functional as F

from olmo_optim_ext.engine.layout import Block, MatrixLayout


def matrix_at(param: torch.Tensor, layout: MatrixLayout, index: int) -> torch.Tensor:
    block = layout.blocks()[index]
    rows = param.reshape(layout.rows, layout.cols)[block.first_row :][: block.n_rows]
    return rows[:, block.first_col :][:, : block.n_cols]


def test_whole_matrix_has_trailing_dimensions_as_columns():
    kernel = torch.randn(6, 4, 2, 3)
    layout = MatrixLayout.whole(kernel.shape)
    assert layout.blocks() == [Block(0, 6, 0, 24)]
    x = torch.randn(1, 4, 2, 3)
    expected = F.conv2d(x, kernel).flatten()
    torch.testing.assert_close(matrix_at(kernel, layout, 0) @ x.flatten(), expected)


def test_stacked_matrices_have_leading_dimensions_as_rows():
    stack = torch.randn(3, 4, 5)
    layout = MatrixLayout.stacked(stack.shape, 3)
    assert (layout.rows, layout.cols) == (12, 5)
    for e in range(3):
        assert torch.equal(matrix_at(stack, layout, e), stack[e])


def test_flat_stack_is_that_of_three_dimensions():
    assert MatrixLayout.stacked((12, 5), 3) == MatrixLayout.stacked((3, 4, 5), 3)


def test_matrices_side_by_side_are_ranges_of_columns():
    param = torch.randn(4, 6)
    layout = MatrixLayout.side_by_side(param.shape, 3)
    assert len(layout.blocks()) == 3
    for e, columns in enumerate(param.chunk(3, dim=1)):
        assert torch.equal(matrix_at(param, layout, e), columns)


def test_blocks_go_row_by_row_and_cover_each_element_once():
    layout = MatrixLayout((2, 3), (4, 1))
    assert layout.blocks() == [
        Block(0, 2, 0, 4),
        Block(0, 2, 4, 1),
        Block(2, 3, 0, 4),
        Block(2, 3, 4, 1),
    ]
    covered = torch.zeros(layout.rows, layout.cols)
    for index in range(4):
        matrix_at(covered, layout, index).add_(1)
    assert torch.equal(covered, torch.ones(5, 5))


def test_outputs_are_rows_unless_these_are_inputs():
    assert MatrixLayout((2, 3), (4,)).out_sizes == (2, 3)
    assert MatrixLayout((2, 3), (4,), in_out=True).out_sizes == (4,)


def test_every_matrix_is_split_along_its_outputs():
    stack = MatrixLayout.stacked((2, 6, 4), 2)
    assert stack.split_outputs([2, 4]) == MatrixLayout((2, 4, 2, 4), (4,))
    transposed = MatrixLayout.stacked((2, 6, 4), 2, in_out=True)
    assert transposed.split_outputs([1, 3]) == MatrixLayout((6, 6), (1, 3), in_out=True)


def test_smallest_dimension_is_that_of_any_matrix():
    assert MatrixLayout((5, 3), (4, 6)).smallest_dim == 3
    assert MatrixLayout((5, 3), (4, 2)).smallest_dim == 2
