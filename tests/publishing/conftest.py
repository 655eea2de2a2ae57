"""What the tests of publishing share: a stub of the Hub, a blocked network, trained models, and a results folder."""

import json
import socket
import time

import huggingface_hub
import pytest
import transformers
from hub_stub import TOKEN, HubStub
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from training import make_trainer, patched, rows

import hf_phibalance as phb
from hf_phibalance.publishing import Run, write_report


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A stub that huggingface_hub takes for the Hub, with its token stored, and no waiting between attempts."""
    with HubStub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach a host fails, and is noted."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("the network is blocked in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the code must not rely on it
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


@pytest.fixture(scope="session")
def trained():
    """A patched model that has taken one balanced step."""
    model = patched(coef=0.5).train()
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    return model.eval()


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    tiny_model("mixtral").save_pretrained(base)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: lab-terms\nlicense_link: LICENSE\n---\n# Base\n"
    )
    model = phb.AutoModelForCausalLM.from_pretrained(base, phi_balance={"coef": 0.5})
    model = phb.patch(get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.train()(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    return model.eval()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The results folder of a short run, beside an unbalanced one, with an evaluation of GSM8K and one of HumanEval."""
    folder = tmp_path_factory.mktemp("results") / "tiny"
    runs = []
    for coef in (0.0, 5.0):
        trainer = make_trainer(patched(coef=coef), folder, eval_dataset=rows(4, seed=1))
        callback = phb.attach(trainer)
        before = trainer.evaluate(metric_key_prefix="untrained")
        trainer.train()
        trainer.evaluate(metric_key_prefix="test")
        figures = {"dataset": "openai/gsm8k", "base_model": "lab/base", "example_prompt": "Question: 1 + 1?\nAnswer:"}
        figures |= {"problems": {"train": 11, "test": 4}, "exact_match": {"untrained": 0.0, "trained": 0.25}}
        balance = phb.get_balancer(trainer.model).config
        runs.append(Run.of(trainer, balance, callback.history, before=before, seconds=1.0, **figures))
    write_report(folder, runs[1], runs[0], dpi=50)
    evaluations = {
        "eval-gsm8k.json": {
            "task": "gsm8k",
            "metrics": {"strict_match": 0.125, "flexible_extract": 0.25},
            "problems": 1319,
            "settings": {"shots": 5, "temperature": 0.0, "model": str(folder)},
            "command": f"{folder}/bin/python recipes/evaluate.py --model {folder} --task gsm8k",
        },
        "eval-humaneval.json": {
            "task": "humaneval",
            "metrics": {"pass@1": 0.5, "verdicts": ["passed"]},
            "problems": 2,
        },
    }
    for name, evaluation in evaluations.items():
        (folder / name).write_text(json.dumps(evaluation))
    return folder
