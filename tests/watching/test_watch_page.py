"""The page of `inspect` about a watched run: stretches of its steps are the domains."""

import re

import pytest
import torch
from made_records import write_alert, write_collapse, write_row, write_run

from hf_phibalance import cli
from hf_phibalance.cli.runs import POINTS, Run
from hf_phibalance.inspection import html_report


def page_of(folder):
    run = Run(str(folder))
    return html_report(run.inspection(), run=run.for_page())


def test_the_inspection_sums_the_records(tmp_path):
    """Three stretches, of which every other record is a half, and means of the confidence over tokens."""
    sites, generator = write_run(tmp_path, experts=4), torch.Generator().manual_seed(0)
    loads, sure = [], [0.5, 0.25, 0.125, 0.75, None, None, 0.5]
    for number, top1 in enumerate(sure, start=1):
        loads.append(2 * torch.randint(0, 50, (2, 4), generator=generator))
        write_row(tmp_path, sites, 5 * number, loads[-1], steps=5, confidence=top1 and (top1, 0.8, 1.0))
    found = Run(str(tmp_path)).inspection()
    stretches = {"steps 1-10": [0, 1], "steps 11-20": [2, 3], "steps 21-35": [4, 5, 6]}
    assert list(found.domains) == list(stretches)
    for domain, (name, rows) in enumerate(stretches.items()):
        tokens = [int(loads[row][0].sum()) // 2 for row in rows]
        assert found.domains[name] == {"tokens": sum(tokens), "steps": 5 * len(rows)}
        for index, layer in enumerate(found.layers):
            assert layer.name == sites[index].name
            halves = [sum(loads[row][index] for row in rows[half::2]) for half in (0, 1)]
            assert torch.equal(layer.halves[:, domain], torch.stack(halves))
            known = [(sure[row], int(loads[row][index].sum())) for row in rows if sure[row]]
            mean = sum(top1 * weight for top1, weight in known) / sum(weight for _, weight in known)
            assert found.layer_figures(layer)[name]["top1_probability"] == pytest.approx(mean, rel=1e-4)
    page = page_of(tmp_path)
    assert (
        "steps 21-35 alone" in page and "Change during the run" in page and "domain" not in page.split("</style>")[1]
    )


def test_the_page_has_the_lines_and_the_alerts(tmp_path, capsys):
    sites = write_collapse(tmp_path, rows=500)
    write_alert(tmp_path, 5000, sites[0].name, reason="<b>why</b>", remedy="do & this")
    out = tmp_path / "new" / "page.html"
    assert cli.main(["watch", str(tmp_path), "--html", str(out)]) == 0
    assert f"HTML report in {out}" in capsys.readouterr().out.replace("\n", "")
    page = out.read_text(encoding="utf-8")
    assert "step 5000, layer 0: dead experts" in page and "&lt;b&gt;why&lt;/b&gt;" in page and "do &amp; this" in page
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(|\bnan\b""", page)
    curves = Run(str(tmp_path)).curves(POINTS)
    assert len(curves["steps"]) == 167 and curves["steps"][-1] == 5000  # 500 records by threes
    first = [row["layers"] for row in Run(str(tmp_path)).rows[:3]]
    max_vios = [layer["max_vio"] for layers in first for layer in layers.values()]
    mean, worst = sum(max_vios) / 6, max(max_vios)
    assert f"30&#10;mean over layers: {mean:.4f}&#10;worst layer: {worst:.4f}" in page.replace('data-tip="', "")
    assert "torch 2.13.0" in page and "transformers 5.20.0" in page  # of the run
    assert str(tmp_path) not in page


def test_what_was_not_recorded_is_left_out(tmp_path):
    """One record, of a loop of one's own without loss; the confidence of one router is not finite."""
    sites = write_run(tmp_path)
    write_row(tmp_path, sites, 10, [[4] * 8, [2, 6] * 4], confidence=(float("nan"),) * 3)
    page = page_of(tmp_path)
    assert "Confidence of the routers" not in page and "top-1" not in page
    assert "<figcaption>loss" not in page and "Change during the run" not in page and "none</dd>" in page
    assert not re.search(r"\bnan\b", page) and "steps 1-10" in page
    (tmp_path / "other").mkdir()
    sites = write_run(tmp_path / "other")
    write_row(tmp_path / "other", sites, 10, [[4] * 8, [2, 6] * 4], loss=1.0)
    page = page_of(tmp_path / "other")
    assert "Confidence of the routers" in page and "top-1" in page and "<figcaption>loss" in page


def test_routers_without_tokens_are_left_out(tmp_path):
    """One router gets tokens in every other record, one only in the first stretch, one never."""
    sites = write_run(tmp_path, layers=4)
    for number in range(1, 13):
        loads = [[4] * 8, [2 * number % 4] * 8, [2 * (number <= 4)] * 8, [0] * 8]
        write_row(tmp_path, sites, 10 * number, loads, loss=2.0)
    found = Run(str(tmp_path)).inspection()
    assert [layer.name for layer in found.layers] == [site.name for site in sites[:2]]
    assert found.layers[1].counts.tolist() == [[4] * 8] * 3 and len(found.domains) == 3
    page = page_of(tmp_path)
    assert "2 routers had stretches without tokens and are left out: layer 2, layer 3." in page
    assert not re.search(r"\bnan\b", page) and "Confidence of the routers" in page
