"""`recipes/render_cards.py`, which makes cards from results folders."""

import importlib.util

from hub_stub import contents
from huggingface_hub import ModelCard
from paths import ROOT


def test_cards_are_rendered_by_a_command(run_folder, tmp_path):
    script = ROOT / "recipes" / "render_cards.py"
    spec = importlib.util.spec_from_file_location("render_cards", script)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.main(recipe.make_parser().parse_args([str(run_folder), "--target", str(tmp_path), "--prefix", "a-"]))
    folder = tmp_path / "a-tiny"
    assert sorted(contents(folder)) == ["README.md", "curves.png", "loads.png"]
    assert all((folder / name).stat().st_size < 60_000 for name in ("curves.png", "loads.png"))
    assert ModelCard.load(folder / "README.md").data.eval_results
