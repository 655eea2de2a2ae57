"""The command `phibalance watch`: one screen, a screen that follows the run, and how it refuses."""

import io
import re

import pytest
import torch
from made_records import write_alert, write_collapse, write_row, write_run
from rich.console import Console

from hf_phibalance import cli
from hf_phibalance.cli import runs
from hf_phibalance.cli.runs import Run, screen
from hf_phibalance.watching import RECORDS_NAME, append_record, read_records


def shown(folder, width=80, height=None):
    """The lines of a screen."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(screen(Run(str(folder)), console, height))
    return console.file.getvalue().splitlines()


def test_one_screen_is_plain_text_of_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    sites = write_run(tmp_path)
    write_row(tmp_path, sites, 10, [[4] * 8] * 2, loss=3.0)
    write_row(tmp_path, sites, 20, [[8, 8, 8, 8, 8, 8, 1, 7], [0, 20, 6, 6, 6, 6, 6, 6]], loss=2.5)
    write_alert(tmp_path, 20, sites[1].name, experts=[0], reason="No token chose it.", remedy="Balance it.")
    assert cli.main(["watch", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    assert ["org/model"] in lines and "step 20, 44 tokens; logged 0 s ago" in text  # 16 and 28 tokens
    assert ["loss", "█▁", "2.5"] in lines
    mean = (8 / 7 - 1 + 20 / 7 - 1) / 2
    assert any(line[:3] == ["MaxVio", "▁█", f"{mean:.3f}"] for line in lines)
    assert ["worst", "layer", "▁█", f"{20 / 7 - 1:.3f}", "(layer", "1)"] in lines
    assert [line[-3:] for line in lines if line[:1] == ["layer"]][1:] == [
        ["0", "1", "▄▄▄▄▄▄▁▄"],
        ["1", "1", "×█▃▃▃▃▃▃"],
    ]
    assert "step 20, layer 1: dead experts\nNo token chose it. Balance it.\n" in re.sub(" +\n", "\n", text)


def test_a_screen_fits_the_terminal_and_shows_what_matters(tmp_path):
    """Of 20 layers, one collapses and one has a dead expert; of 8 alerts, the newest are shown."""
    sites = write_collapse(tmp_path, layers=20, experts=64, rows=60, collapsing=17)
    loads = torch.full((20, 64), 100)
    loads[[3, 4, 5], 0], loads[0, 63], loads[17, 0] = 300, 0, 2000
    write_row(tmp_path, sites, 610, loads, loss=2.0)
    for step in range(1000, 1060, 10):
        write_alert(tmp_path, step, sites[17].name, reason="long " * 30, remedy="more " * 30)
    lines = shown(tmp_path, height=34)
    text = "\n".join(lines)
    assert len(lines) < 34 and max(map(len, lines)) <= 80
    assert re.findall("^layer [0-9]+", text, re.MULTILINE) == ["layer 0", "layer 17"]  # a dead expert, a collapse
    assert "other layers are not shown" in text
    assert "step 1050" in text and "step 1000" not in text and "5 earlier alerts" in text
    whole = "\n".join(shown(tmp_path))
    assert all(f"\nlayer {number} " in whole for number in range(20)) and "step 1000" in whole
    assert len(re.search("^loss +([▁-█]+)", text, re.MULTILINE)[1]) <= 34  # 60 records are joined


def test_chance_a_loss_that_is_no_number_and_odd_names(tmp_path):
    sites = write_run(tmp_path, model="\x1b[31mred[b]")
    write_row(tmp_path, sites, 10, [[4] * 8] * 2, loss=2.0)
    write_row(tmp_path, sites, 20, [[6] * 8] * 2, loss=float("nan"), confidence=None)
    path = tmp_path / RECORDS_NAME
    path.write_text(path.read_text().replace('"tokens": 24, ', ""))  # as where a router is NaN
    text = "\n".join(shown(tmp_path))
    assert "≈0.000" in text and re.search("loss +▁× +nan", text) and "No alerts" in text
    assert "\x1b" not in text and "x1b[31mred[b]" in text and "step 20, 16 tokens" in text


def test_routers_without_tokens_are_left_out(tmp_path):
    """As those for images of ERNIE-VL, on text. In the last step, which a scaler skipped, no router has tokens."""
    parts = [f"{number}.mlp.{kind}_moe.gate" for number in (10, 20) for kind in ("text", "vision")]
    sites = write_run(tmp_path, names=[f"model.language_model.layers.{part}" for part in parts])
    write_row(tmp_path, sites, 10, [[10, 6, 6, 6, 6, 6, 6, 2], [0] * 8, [20, 4, 4, 4, 4, 4, 4, 4], [0] * 8])
    write_row(tmp_path, sites, 20, [[0] * 8] * 4)
    lines = shown(tmp_path)
    text, (worst,) = "\n".join(lines), [line for line in lines if line.startswith("worst layer")]
    assert re.search(r"^MaxVio +█ +1\.500 \(", text, re.MULTILINE)  # the mean of 10 / 6 - 1 and 20 / 6 - 1
    assert worst.rstrip().endswith("2.333 (…rs.20.mlp.text_moe.gate)") and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("…")] == [
        "…rs.10.mlp.text_moe.gate",
        "…rs.20.mlp.text_moe.gate",
    ]
    assert "\n2 routers got no tokens" in text and "not shown" not in text


def test_lines_of_another_model_are_left_out(tmp_path):
    sites = write_run(tmp_path)
    write_row(tmp_path, sites, 10, [[4] * 8] * 2)
    before = shown(tmp_path)[3:-1]
    (tmp_path / "other").mkdir()
    others = write_run(tmp_path / "other", layers=3, experts=4)
    write_row(tmp_path, others, 20, [[4] * 4] * 3)
    write_row(tmp_path, others[2:], 30, [[4] * 4])
    write_alert(tmp_path, 30, others[2].name)
    assert shown(tmp_path)[3:-1] == before and "No alerts" in shown(tmp_path)[-1]
    alert = {"kind": "dead_experts", "layer": sites[0].name, "reason": "why.", "remedy": "do.", "experts": [1]}
    append_record(tmp_path / RECORDS_NAME, {"step": 30, "alert": alert, "time": 3.0})
    assert "step 30, layer 0: dead experts" in "\n".join(shown(tmp_path))


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_it_follows_the_run_until_it_is_interrupted(terminal, tmp_path, capsys, monkeypatch):
    """A dumb terminal, as in an editor, cannot draw over a screen: it gets one after each change."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    monkeypatch.setenv("TERM", terminal)
    sites = write_run(tmp_path)
    seen, reads = [], []

    def pause(seconds):
        """The run goes on, resumes from step 10, does nothing, and is interrupted."""
        seen.append(capsys.readouterr().out)
        if len(seen) == 5:
            raise KeyboardInterrupt
        if len(seen) == 3:
            write_run(tmp_path, step=10)
        elif len(seen) < 3:
            write_row(tmp_path, sites, 10 * len(seen), [[4] * 8] * 2)

    monkeypatch.setattr("time.sleep", pause)
    monkeypatch.setattr(runs, "read_records", lambda path: reads.append(path) or read_records(path))
    assert cli.main(["watch", str(tmp_path)]) == 0
    steps = [re.findall(r"step (\d+),", text) for text in seen]
    last = [] if terminal == "dumb" else ["10"]
    assert "No step is logged yet" in seen[0] and steps == [[], ["10"], ["20"], ["10"], last]
    assert len(reads) == 4  # not again where nothing was written
    assert ("\x1b[1A" in seen[1]) == (terminal == "xterm") and "loss" not in seen[1]


def test_errors_name_the_folder_and_the_remedy(tmp_path, capsys):
    def error(*words):
        assert cli.main(["watch", str(tmp_path), *words]) == 1
        return capsys.readouterr().err

    assert f"there is no watched run in {str(tmp_path)!r} ({RECORDS_NAME}): name the output_dir" in error()
    (tmp_path / RECORDS_NAME).write_text('{"run": {"step"')  # killed at once
    assert "there is no watched run" in error()
    (tmp_path / RECORDS_NAME).write_text('{"run": 3}\n{"run": {"name": "x"}}\n{"step": 1}\n')  # another program's
    assert "there is no watched run" in error()
    write_run(tmp_path)
    page = tmp_path / "page.html"
    assert "no step is in" in error("--html", str(page)) and not page.exists()
    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    assert "No step is logged yet" in capsys.readouterr().out


@pytest.mark.parametrize("layers, experts", [(1, 8), (61, 384)])
def test_any_size(tmp_path, layers, experts):
    write_collapse(tmp_path, layers=layers, experts=experts, rows=2, collapsing=0)
    for height in (None, 24):
        text = "\n".join(lines := shown(tmp_path, height=height))
        assert max(map(len, lines)) <= 80
        strip = re.search("^layer 0 (.*?)(^layer|^▄ is)", text, re.MULTILINE | re.DOTALL)[1]
        assert len(re.findall("[▁-█×]", strip)) == experts  # one sign for each expert
