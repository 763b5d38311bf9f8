"""
The picture of a run.
"""

from pathlib import Path
from typing import Any, Dict, List

from matplotlib.image import imread

from mixture_pretraining_stages.summary import _of_roles, draw_curves
from olmo_optim_ext.training import matrix_metric


def rows_with(*measures: str) -> List[Dict[str, Any]]:
    """Two roles, reported at the second and the fourth step."""
    rows: List[Dict[str, Any]] = [
        {"step": step, "tokens": 100 * step, "stage": "one", "train/CE loss": 1 / step}
        for step in range(1, 5)
    ]
    for row in rows[1::2]:
        for measure in measures:
            row[matrix_metric(measure, "matrix")] = row["step"] / 10
            row[matrix_metric(measure, "experts")] = row["step"] / 20
            row[matrix_metric(measure, "blocks.0.w.weight")] = 9.0
    return rows


def height(rows: List[Dict[str, Any]], path: Path) -> int:
    draw_curves(rows, [("one", 400)], ["first"], "tiny", path)
    return imread(path).shape[0]


def test_what_was_recorded_of_an_optimizer_has_a_panel_each(tmp_path):
    path = tmp_path / "curves.png"
    plain = height(rows_with(), path)
    assert plain == 6 * 130
    assert height(rows_with("update RMS"), path) == plain + 195
    all_measures = ("relative effective rank", "orthogonality error", "update RMS", "noise scale")
    assert height(rows_with(*all_measures), path) == plain + 4 * 195


def test_a_panel_has_a_curve_for_each_role():
    curves = _of_roles(rows_with("update RMS"), "update RMS")
    assert curves == {"matrix": [(200, 0.2), (400, 0.4)], "experts": [(200, 0.1), (400, 0.2)]}
    assert _of_roles(rows_with("update RMS"), "noise scale") == {}
