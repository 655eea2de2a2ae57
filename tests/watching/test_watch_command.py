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
from hf_phibalance.watching import RECORDS_NAME, read_records


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


def test_it_follows_the_run_until_it_is_interrupted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
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
    assert "No step is logged yet" in seen[0] and steps == [[], ["10"], ["20"], ["10"], ["10"]]
    assert len(reads) == 4  # not again where nothing was written
    assert "\x1b" in seen[1] and "loss" not in seen[1]


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
