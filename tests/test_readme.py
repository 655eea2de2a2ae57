"""What README.md shows is current and runs."""

import importlib.util
import re

from datasets import Dataset
from paths import ROOT
from tiny import tiny_model

from hf_phibalance.models import train_tokenizer
from hf_phibalance.tasks import make_splits


README = (ROOT / "README.md").read_text()


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_families_is_current():
    script = load_script(ROOT / "recipes" / "families_table.py")
    assert script.updated(README) == README, "run: python recipes/families_table.py"
    assert "`mixtral`" in script.table()


def test_files_that_it_names_exist():
    paths = re.findall(r"`((?:hf_phibalance|recipes|tests|model_cards)/[\w./-]*)`", README)
    paths += re.findall(r"\]\(((?!http)[\w./-]+)\)", README) + re.findall(r"(recipes/[\w./-]+\.(?:py|yaml))", README)
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), path


def test_quick_start_runs(tmp_path):
    """The code block as it stands, but for the model, the number of steps and the output folder."""
    rows = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in make_splits(16)["train"]
    ]
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows], vocab_size=300)
    model = tiny_model("qwen2_moe", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = re.search(r"## Quick start\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    arguments = "max_steps=2, logging_steps=1, report_to=[], use_cpu=True, bf16=False"
    for shown, used in (
        ('"Qwen/Qwen1.5-MoE-A2.7B"', repr(str(tmp_path / "model"))),
        ('SFTConfig("out", max_steps=100)', f'SFTConfig("{tmp_path}/out", {arguments})'),
    ):
        assert shown in code
        code = code.replace(shown, used)
    names = {"dataset": Dataset.from_list(rows)}
    exec(code, names)
    assert "moe/max_vio" in names["trainer"].state.log_history[0]
    assert (tmp_path / "out" / "phi_balance.state").is_file()
