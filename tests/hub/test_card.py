"""Model cards: what they say of a run, and that no text of others acts in them."""

import ast
import importlib.util
import re
from dataclasses import fields

import pytest
import torch
from hub_stub import REPO, contents
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from matplotlib.image import imread
from paths import ROOT
from training import make_trainer, patched

import hf_phibalance as phb
from hf_phibalance.hub import Run, model_card, push_to_hub
from hf_phibalance.hub.card import as_code, balance_section
from hf_phibalance.hub.pictures import plot_curves


pytestmark = pytest.mark.slow


def test_card_of_a_run(run_folder, trained, stub, tmp_path):
    folder = push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    card.validate()
    data = card.data
    assert (data.base_model, data.datasets, data.license) == ("lab/base", ["openai/gsm8k"], None)
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "tiny")
    assert data.tags == ["mixture-of-experts", "phi-balancing", "mixtral"]
    assert [(found.dataset_type, found.metric_type, found.metric_value) for found in data.eval_results] == [
        ("openai/gsm8k", "exact_match", 0.25),
        ("openai/gsm8k", "exact_match", 0.125),
        ("openai/gsm8k", "exact_match", 0.25),
        ("humaneval", "pass@1", 0.5),
    ]
    assert "exact_match,strict-match (5 shots, 200 of 1319 problems)" in card.content
    run, baseline = Run.load(run_folder), Run.load_baseline(run_folder)
    columns = [*run.measured().values(), baseline.held_out]
    for name in phb.get_balancer(trained).layer_names:
        numbers = " | ".join(f"{column[f'moe/max_vio/{name}']:.3f}" for column in columns)
        assert f"| `{name}` | {numbers} |" in card.text
    for text in (
        "|  | unbalanced | φ-balanced |",
        "| exact match, trained | 25.0% | 25.0% |",
        "| `phb_gsm8k` | `exact_match,strict-match` | 0.1250 | 0.0234 | 5 | 200 of 1319 |",
        "| `phb_gsm8k` | `expert_load,max_vio` | 0.7500 | – | 5 | 200 of 1319 |",
        "| `humaneval` | `pass@1,create_test` | 0.5000 | 0.0100 | 0 | 164 |",
        "Generated code ran in isolation: `bubblewrap`.",
        "](loads.png)", "](curves.png)", "`coef=5.0`", "`learning_rate=0.02`", "Versions: `hf_phibalance ",
    ):  # fmt: skip
        assert text in card.text, text


def test_card_without_a_run_claims_nothing(trained, tmp_path):
    folder = push_to_hub(trained, REPO, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    assert "Nothing was measured on held-out data" in card.text
    assert not card.data.eval_results and "Results" not in card.text and ".png" not in card.text
    assert not {"license", "datasets", "base_model"} & card.data.to_dict().keys()


def test_a_card_names_the_method(tmp_path):
    model = patched()
    phb.patch(model, {"method": "loss_free"})
    card = ModelCard.load(push_to_hub(model, REPO, dry_run=tmp_path / "dry") / "README.md")
    assert "routers balanced by the method `loss_free` (arXiv 2408.15664" in card.text
    assert "φ-balanced" not in card.text and "phi-balancing" not in card.data.tags


PLAIN = "gives the same outputs"


def biased(model_type="mixtral", **config):
    """Returns a model that is trained without `bias_coef`, but routes with a bias from before."""
    model = patched(model_type, bias_coef=0.1)
    balancer = phb.get_balancer(model)
    balancer.set_biases({site.name: torch.linspace(-1, 1, site.num_experts) for site in balancer.sites})
    return phb.patch(model, {"coef": 0.01, "bias_coef": 0.0, **config})


@pytest.mark.parametrize("with_run", [False, True])
def test_a_bias_of_an_earlier_training_is_said(with_run, run_folder, tmp_path):
    options = {"run_folder": run_folder} if with_run else {}
    text = (push_to_hub(biased(), REPO, **options, dry_run=tmp_path / "dry") / "README.md").read_text()
    assert "the model sends some tokens to other experts" in text and PLAIN not in text
    assert "The selection bias of an earlier training was in force" in text
    text = (push_to_hub(patched(bias_coef=0.1), REPO, **options, dry_run=tmp_path / "zero") / "README.md").read_text()
    assert PLAIN in text and "selection bias" not in text  # it is still 0


def test_a_plain_load_keeps_the_bias_of_the_family(tmp_path):
    model = biased("deepseek_v3", bias_coef=0.1)
    text = (push_to_hub(model, REPO, dry_run=tmp_path / "dry") / "README.md").read_text()
    assert PLAIN in text and "selection bias" not in text


def test_a_run_without_balancing_says_which_bias_routes(tmp_path):
    trainer = make_trainer(biased(coef=0.0), tmp_path)
    section = balance_section(Run.of(trainer, phb.PhiBalanceConfig(coef=0.0), []))
    assert "The load of the experts was counted. The selection bias of an earlier training was in force" in section


HOSTILE = (
    "**bold** <img src=x onerror=alert(1)> [link](http://evil.example) ![i](http://evil.example/i.png)",
    "`` ` `` <b>x</b> ``` </code>",
    "a | <script>x</script> | b \\| <i>c</i>",
    "x\n\n# heading\n\n```\n<script>x</script>\n---\nlicense: evil\n---\n",
    "{{ 7 * 7 }} <!-- www.evil.example &amp; https://evil.example",
)


def shapes(text):
    """Returns the elements of a Markdown text as a renderer sees them, without their texts."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    return [token.type for token in tokens for token in (token, *(token.children or ())) if token.type != "text"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_does_not_act(hostile, run_folder):
    """The card has the same elements as with harmless text, wherever the text stands."""

    def card(text):
        run, baseline = Run.load(run_folder), Run.load_baseline(run_folder)
        for entry in fields(run):
            if entry.type == str | None or entry.name in ("model_type", "task"):
                setattr(run, entry.name, text)
        run.versions, run.hyperparameters = {text: text}, {text: text}
        run.before = baseline.held_out = run.held_out = {"moe/max_vio": 0.5, f"moe/max_vio/{text}": 0.5}
        for score in run.evaluations["phb_gsm8k"]:
            score.task = score.dataset = score.isolation = text
            score.metric = f"{text},x"
        return model_card(run, baseline, title=text, base_model=text)

    card, harmless = card(hostile), card("harmless")
    assert shapes(card.text) == shapes(harmless.text)
    assert "html_inline" not in shapes(card.text) and "49" not in card.text.split("## Use")[0]
    assert card.data.license is None and card.data.base_model is None and card.data.datasets is None
    assert card.data.model_name.split() == hostile.split()


@pytest.mark.parametrize("text", ["", " ", "`", "a``b", "a\nb", "x|y", "\\", "<!--"])
def test_code_span_is_all_there_is(text):
    _, inline, _ = MarkdownIt().parse(f"{as_code(text)}.")
    code, dot = inline.children
    assert (code.type, dot.content) == ("code_inline", ".")


@pytest.mark.parametrize("prompt", ['two """ quotes', "a fence\n```\nin it", r"a\nb", "a\r\tb\x00", "plain\n“text”"])
def test_any_prompt_in_the_code_of_the_card(prompt, run_folder):
    run = Run.load(run_folder)
    run.example_prompt = prompt
    (block,) = re.findall(r"^```python\n(.*?)^```$", model_card(run, title="x").text, re.MULTILINE | re.DOTALL)
    found = {node.targets[0].id: node.value for node in ast.parse(block).body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(found["prompt"]) == prompt


def test_cards_are_rendered_by_a_command(run_folder, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("render_cards", ROOT / "recipes" / "render_cards.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    monkeypatch.chdir(run_folder)
    recipe.main(recipe.make_parser().parse_args([".", "--target", str(tmp_path), "--prefix", "a-"]))
    files = contents(tmp_path / "a-tiny")
    assert sorted(files) == ["README.md", "curves.png", "loads.png"]
    assert len(files["curves.png"]) < 60_000 > len(files["loads.png"])
    assert ModelCard(files["README.md"].decode()).data.eval_results


def test_exact_match_is_drawn_only_if_it_was_measured(run_folder, tmp_path):
    run = Run.load(run_folder)
    run.log_history = [{"step": 1, "loss": 2.0, "moe/max_vio": 0.5, "eval_exact_match": 0.1}]
    widths = []
    for entry in run.log_history * 2:
        plot_curves([run], tmp_path / "curves.png")
        widths.append(imread(tmp_path / "curves.png").shape[1])
        entry.pop("eval_exact_match", None)
    assert widths[1] < 0.7 * widths[0]


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_committed_card_is_valid(path, stub):
    card = ModelCard.load(path)
    card.validate()
    assert card.data.eval_results and "held-out data, before | " in card.text
    assert all((path.parent / name).is_file() for name in ("loads.png", "curves.png"))
