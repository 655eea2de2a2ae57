"""`moe.jsonl` can be read at any moment, and a resumed run replaces what it does again."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from hf_phibalance.watching import append_record, layer_figures, read_records


def line(step, **more):
    return {"step": step, "layers": {}, **more}


def run(step, routers=("a",)):
    return {"run": {"step": step, "routers": list(routers)}}


def test_an_unfinished_line_is_ignored_and_ended(tmp_path):
    path = tmp_path / "out" / "moe.jsonl"
    append_record(path, run(0))
    append_record(path, line(10))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):  # killed at any moment
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_records(path).rows] == ([10] if cut >= len(whole) - 1 else [])
        append_record(path, line(20))
        assert read_records(path).rows[-1]["step"] == 20
        assert len(read_records(path).rows) == 1 + (cut >= len(whole) - 1)


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    records = [run(0), line(10), line(20), line(20, alert={}), line(30), run(10), line(20)]
    for record in records:
        append_record(tmp_path / "moe.jsonl", record)
    found = read_records(tmp_path)
    assert [row["step"] for row in found.rows] == [10, 20] and not found.alerts and found.run["step"] == 10


def test_lines_of_other_models_and_programs_are_no_part_of_a_run(tmp_path):
    path = tmp_path / "moe.jsonl"
    for record in (
        run(0),
        line(2),
        line(2, alert={}),
        run(4, "b"),
        line(6),
        {"run": 3},
        {"run": {}},
        {"step": 7},
        [1],
    ):
        append_record(path, record)
    found = read_records(path)
    assert found.run["routers"] == ["b"] and [row["step"] for row in found.rows] == [6] and not found.alerts


def test_numbers_are_short_and_json(tmp_path):
    append_record(tmp_path / "moe.jsonl", line(1, values=[1 / 3, math.nan, math.inf, 12345678]))
    text = (tmp_path / "moe.jsonl").read_text()
    assert json.loads(text)["values"] == [0.33333, None, None, 12345678]


def test_figures_of_a_layer():
    sites = [SimpleNamespace(name="a", num_experts=8, top_k=2), SimpleNamespace(name="b", num_experts=4, top_k=1)]
    load = torch.tensor([[60, 20, 10, 10, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    probs, confidence = torch.full((2, 8), 5.0), torch.tensor([[5.0, 8, 20, 10], [0, 0, 0, 0]])
    found = layer_figures(sites, load, probs, confidence)
    a, b = found["a"], found["b"]
    assert a["load"] == [60, 20, 10, 10, 0, 0, 0, 0] and a["probs"] == [0.125] * 8
    assert (a["max_vio"], a["dead"], a["cold"]) == pytest.approx((60 / 12.5 - 1, 0.5, 0.5))
    assert a["percentiles"] == pytest.approx([0, 0, 0.4, 1.0, 3.68])
    assert a["busiest_rank_of_8"] == pytest.approx(4.8)
    assert a["confidence"] == {"top1_probability": 0.5, "chosen_probability": 0.8, "entropy_bits": 2.0}
    assert b["max_vio"] == 0 and b["entropy"] == 1 and "confidence" not in b and "busiest_rank_of_8" not in b
