"""
The report: what is in it, and that a browser opens it.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List

import pytest
from matplotlib.image import imread
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages import extras
from mixture_pretraining_stages.reporting.criteria import check_criteria
from mixture_pretraining_stages.reporting.drawn import draw
from mixture_pretraining_stages.reporting.figures import BASELINE_STYLE, style_of
from mixture_pretraining_stages.reporting.figures_page import to_plotly
from mixture_pretraining_stages.reporting.panels import panels
from mixture_pretraining_stages.reporting.report import Report, write_report
from mixture_pretraining_stages.reporting.results import load_runs
from mixture_pretraining_stages.reporting.statistics import Study, study
from mixture_pretraining_stages.reporting.tables import arm_row

from .synthetic import write_comparison, write_facts, write_run, write_trial

NASTY = 'a<b> & "c" </script><script>alert(1)</script> %{x} $y$'
"""The name of an arm, as a user may choose it."""

FAILED = "optim/failed orthogonalisations/matrix"
RANK = "optim/relative effective rank/matrix"


def losses(arm: str, lr: float) -> float:
    best = {"adamw": (2.0, 0.02), "muon": (1.9, 0.04)}.get(arm, (2.01, 0.02))
    return best[0] + 0.1 * abs(lr - best[1]) / best[1]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """Three arms with three rates and two seeds; muon is best at its highest, where one failed."""
    root = tmp_path_factory.mktemp("reports") / "study"
    lrs = {arm: [0.01, 0.02, 0.04] for arm in ("adamw", "muon", NASTY)}
    write_comparison(root, lrs, [0, 1], tolerance=0.02, criteria=True)
    for index, (arm, rates) in enumerate(lrs.items()):
        for lr in rates:
            for seed in (0, 1):
                folder = f"arm{index}"
                run = write_trial(
                    *(root, folder, lr, seed, losses(arm, lr) + 0.01 * seed),
                    optimizer={"name": "adamw" if index != 1 else "muon", "lr": lr},
                    extra={FAILED: 0.0, RANK: 0.5} if index == 1 else {},
                )
                trial = {"arm": arm, "lr": lr, "seed": seed, "state": "complete", "error": None}
                (run / "trial.json").write_text(json.dumps(trial))
                write_facts(run, state_bytes={"one": 8000 if index != 1 else 4000})
    return root


@pytest.fixture(scope="module")
def report(comparison) -> Report:
    return write_report([comparison])


@pytest.fixture(scope="module")
def html(report) -> str:
    return report.page.read_text(encoding="utf-8")


def embedded(html: str) -> Dict[str, Any]:
    """The figures in a page."""
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', html)
    return json.loads(text)


def test_a_report_is_beside_what_it_is_about_with_a_picture_of_each_figure(report, html):
    assert report.page.parent.name == "report"
    keys = {panel.stem for panel in report.page.parent.glob("*.png")}
    assert keys == embedded(html).keys()
    assert keys == {
        *("validation_tokens", "validation_time", "training_tokens", "training_time"),
        *("learning_rates", "source_0", "source_1", "step_time", "state_bytes", "mixture"),
        *("relative_effective_rank_matrix", "failed_orthogonalisations_matrix"),
    }
    for key in keys:
        assert imread(report.page.parent / f"{key}.png").std() > 0.02, key


def test_names_are_escaped_wherever_they_are(html):
    body = html[html.index("<body>") :]
    assert "<b>" not in body and "<script>alert" not in body
    assert "a&lt;b&gt; &amp; &quot;c&quot; &lt;/script&gt;" in body
    names = {trace.get("meta") for figure in embedded(html).values() for trace in figure["data"]}
    assert names == {"adamw", "muon", NASTY, None}


def test_the_page_loads_nothing(html):
    own = html.replace(re.findall(r"<script>(/\*\*.*?)</script>", html, re.DOTALL)[0], "")
    assert re.findall(r'(?:src|href)="([^"]*)"', own) == ["data:,"]
    assert "http" not in own and "url(" not in own and "@import" not in own


def test_the_page_has_the_exact_configs_and_the_versions(comparison, html):
    import html as escaping

    text = (comparison / "comparison.yaml").read_text()
    assert escaping.escape(text) in html
    best = comparison / "runs" / "arm1" / "lr-0.04" / "seed-0" / "config.yaml"
    assert escaping.escape(best.read_text()) in html
    assert "torch 2.13.0" in html


def test_the_table_says_what_was_written_by_hand(report):
    rows = {arm.name: arm_row(arm) for arm in report.study.arms}
    muon = rows["muon"]
    assert (muon["rate"], muon["final loss"]) == ("0.04", "1.9050 ± 0.0071")
    assert muon["difference"] == "-0.1000 [-0.1000, -0.1000]"
    assert (muon["verdict"], muon["flags"]) == ("needs 5 seeds", "edge")
    assert (muon["optimizer share"], muon["state bytes/param"]) == ("20.0%", "4.00")
    assert rows["adamw"]["steps to baseline"] == "18"
    assert rows[NASTY]["steps to baseline"] == "never"
    assert rows["adamw"]["runs"] == "6 of 6"


def test_the_two_drawings_have_the_same_curves_in_the_same_colours(report):
    figures = {panel.key: panel for panel in panels(draw(report.study))}
    panel = figures["validation_tokens"]
    for series, color in zip(panel.series, (style_of(0).color, BASELINE_STYLE.color)):
        band, trace = [t for t in to_plotly(panel)["data"] if t["meta"] == series.name]
        assert trace["line"]["color"] == series.style.color == color
        assert trace["y"] == list(series.y)
        assert band["y"] == [*(series.high or ()), *reversed(series.low or ())]
    (mixture,) = [figures["mixture"]]
    assert mixture.categories == ["one: first", "one: second", "two: second"]
    assert [list(bar.values) for bar in mixture.bars] == [[0.75, 0.25, 1.0]] * 2


def test_each_arm_is_drawn_alike_in_all_figures_and_35_differ():
    styles = [style_of(index) for index in range(35)]
    assert len({(style.color, style.dash) for style in styles}) == 35
    for a, b in zip(styles, styles[1:]):
        assert a.color != b.color and a.dash != b.dash
    assert BASELINE_STYLE.color not in {style.color for style in styles}


def test_a_sensitivity_marks_the_best_the_edge_and_what_broke(comparison, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(comparison, root, ignore=shutil.ignore_patterns("report"))
    trial = root / "runs" / "arm0" / "lr-0.04" / "seed-1" / "trial.json"
    trial.write_text(json.dumps({"arm": "adamw", "lr": 0.04, "seed": 1, "state": "failed"}))
    (panel,) = [p for p in panels(draw(study(load_runs([root])))) if p.key == "learning_rates"]

    def marked(arm: str) -> Dict[str, List[float]]:
        marks = [s for s in panel.series if s.name == arm and not s.labelled]
        return {s.style.symbol: list(s.x) for s in marks if len(s.x) == 1}

    assert marked("muon") == {"star": [0.04], "circle-open": [0.04]}
    assert marked("adamw") == {"star": [0.02], "x": [0.04]}


def test_the_axis_of_a_sensitivity_is_upright_where_all_ended_above_their_beginning(tmp_path):
    root = write_comparison(tmp_path / "c", {"adamw": [0.1, 0.2]}, [0])
    for lr in (0.1, 0.2):
        write_trial(root, "adamw", lr, 0, losses={step: 5.0 + step for step in range(1, 19)})
    (panel,) = [p for p in panels(draw(study(load_runs([root])))) if p.key == "learning_rates"]
    assert panel.y_range is not None
    low, high = panel.y_range
    assert low < 23.0 < high


def criteria_of(root: Path, **changes: Any) -> Dict[str, Any]:
    found: Study = study(load_runs([root]))
    return {each.name: (each.met, " ".join(each.evidence)) for each in check_criteria(found)}


def test_a_study_is_judged_with_its_evidence(comparison, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(comparison, root, ignore=shutil.ignore_patterns("report"))
    crash, fallback, near = (
        "No crash",
        "No orthogonalisation that fell back",
        "Losses at most 2% above the baseline's",
    )
    met = criteria_of(root)
    assert {name: verdict for name, (verdict, _) in met.items()} == {
        crash: True,
        fallback: True,
        near: True,
    }
    assert "18 of 18 runs are complete" in met[crash][1]
    assert "in 36 steps" in met[fallback][1] and "nothing recorded of adamw" in met[fallback][1]
    assert "muon ends at 1.9050, -4.99%" in met[near][1]

    folder = root / "runs" / "arm1" / "lr-0.01" / "seed-0"
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace(f'"{FAILED}": 0.0', f'"{FAILED}": 2.0', 1))
    assert criteria_of(root)[fallback] == (
        False,
        "muon: 2 failed in 36 steps that were looked at " + met[fallback][1],
    )
    trial = {"arm": "muon", "lr": 0.01, "seed": 0, "state": "failed", "error": "no memory"}
    (folder / "trial.json").write_text(json.dumps(trial))
    verdict, evidence = criteria_of(root)[crash]
    assert verdict is False and "muon at rate 0.01, seed 0: no memory" in evidence
    shutil.rmtree(folder)
    verdict, evidence = criteria_of(root)[crash]
    assert verdict is None and "17 of 18 runs are complete" in evidence

    for seed in (0, 1):
        for lr in (0.01, 0.02, 0.04):
            write_run(root / "runs" / "arm2" / f"lr-{lr}" / f"seed-{seed}", 2.1, seed=seed)
    assert criteria_of(root)[near][0] is False


def test_without_criteria_or_records_nothing_is_claimed_of_them(tmp_path):
    root = write_comparison(tmp_path / "c", {"adamw": [0.1]}, [0], criteria=True)
    write_trial(root, "adamw", 0.1, 0)
    assert criteria_of(root)["No orthogonalisation that fell back"][0] is None
    write_comparison(root, {"adamw": [0.1]}, [0])
    assert criteria_of(root) == {}


def test_a_comparison_that_has_hardly_begun_has_a_report(tmp_path):
    root = write_comparison(tmp_path / "c", {"adamw": [0.1], "muon": [0.1]}, [0])
    (root / "runs" / "muon" / "lr-0.1" / "seed-0").mkdir(parents=True)
    written = write_report([root], tmp_path / "out")
    assert "There is nothing to draw yet." in written.page.read_text()
    assert written.page == tmp_path / "out" / "report.html"
    assert "Without a result: adamw and muon." in written.statement()


def test_without_the_extra_it_says_what_to_install(monkeypatch, comparison):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        OLMoConfigurationError, match=r"plotly and scipy .* pip install 'olmo-optim-ext\[compare\]'"
    ):
        write_report([comparison])


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_opens_it_offline_legends_toggle_and_nothing_is_too_wide(report):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        context = browser.new_context(offline=True)
        page = context.new_page()
        problems: List[str] = []
        page.on("console", lambda m: problems.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(report.page.as_uri())
        page.wait_for_function("document.querySelectorAll('.main-svg').length > 20")
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(
                "[...document.querySelectorAll('.plot')].every(p => "
                "Math.abs(p.querySelector('.main-svg').clientWidth - p.clientWidth) < 2)"
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= width

        drawn = "document.querySelectorAll('#plot-validation_tokens .scatterlayer .trace').length"
        button = page.locator(".legend button[data-arm]").filter(has_text="muon")
        counts = [page.evaluate(drawn)]
        for pressed in ("false", "true"):
            button.click()
            assert button.get_attribute("aria-pressed") == pressed
            counts.append(page.evaluate(drawn))
        assert counts == [6, 4, 6]  # a curve and a band each
        bars = "document.querySelectorAll('#plot-step_time .barlayer .trace').length"
        assert page.evaluate(bars) == 2
        page.locator("#plot-step_time .legendtoggle").first.click()
        page.wait_for_function(f"{bars} === 1")
        assert problems == []
        browser.close()
