"""Uploads of `Trainer(push_to_hub=True)`: the duals at every push, and a card that says how the model was balanced."""

import pytest
import torch
from hub_stub import REPO, contents
from huggingface_hub import ModelCard
from training import make_trainer, patched
from transformers import Trainer
from trl import SFTTrainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_trainer_uploads_duals_and_says_how_it_balanced(cls, strategy, stub, tmp_path):
    trainer = make_trainer(
        patched(), tmp_path / "out", cls, push_to_hub=True, hub_model_id=REPO, hub_strategy=strategy,
        save_strategy="steps", save_steps=1, max_steps=2,
    )  # fmt: skip
    history = phb.attach(trainer).history
    trainer.train()
    trainer.push_to_hub()
    in_progress = [changed for _, message, changed in stub.commits if message.startswith("Training in progress")]
    assert "phi_balance.state" in in_progress[0] and in_progress[0].keys() & {"model.safetensors"}
    state = trainer.model.state_dict()
    files = stub.files[REPO]
    local = contents(tmp_path / "out")
    assert files["phi_balance.state"] == local["phi_balance.state"]
    assert ("last-checkpoint/phi_balance.state" in files) == (strategy == "checkpoint")
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert {"mixture-of-experts", "phi-balancing"} <= set(card.data.tags)
    assert "generated" in card.content.lower() or "trl" in card.content.lower()  # the trainer's own draft
    assert "## Expert balance" in card.text and "`coef=5.0`" in card.text
    name = phb.get_balancer(trainer.model).layer_names[0]
    assert f"{max(history[-1]['load'][name]) - 1:.3f} |" in card.text
    saved = tmp_path / "received"
    for path, content in files.items():
        (saved / path).parent.mkdir(parents=True, exist_ok=True)
        (saved / path).write_bytes(content)
    loaded = phb.AutoModelForCausalLM.from_pretrained(saved, phi_balance=True)
    assert phb.get_balancer(loaded).steps == 2
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_trainer_keeps_a_report(stub, trained_run, tmp_path):
    trainer = make_trainer(patched(), tmp_path / "out", hub_model_id=REPO)
    phb.attach(trainer)
    written = (trained_run / "README.md").read_text()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text(written)
    trainer.push_to_hub()
    assert stub.files[REPO]["README.md"].decode() == written
    assert "phi_balance.state" in stub.files[REPO]
