"""Fixtures: a stub of the Hub, a blocked network, trained models, and a results folder."""

import json
import shutil
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from hub_stub import TOKEN, HubStub
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from training import make_trainer, patched, rows

import hf_phibalance as phb
from hf_phibalance.hub import Run, write_report


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A stub that huggingface_hub takes for the Hub. Its token is stored, and attempts do not wait."""
    with HubStub() as server:
        settings = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        for name, value in {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
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


@pytest.fixture(scope="module")  # tests of other files unpatch all models
def trained():
    """A patched model that has taken one balanced step."""
    model = patched(coef=0.5).train()
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    return model.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A patched model with a LoRA adapter on a base from a local folder."""
    base = tmp_path_factory.mktemp("base")
    tiny_model("mixtral").save_pretrained(base)
    model = phb.AutoModelForCausalLM.from_pretrained(base, phi_balance={"coef": 0.5})
    model = phb.patch(get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.train()(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    return model.eval()


EVALUATIONS = {
    "eval/first/results_2026-01-01T10-00-00.000000.json": {
        "results": {"phb_gsm8k": {"exact_match,strict-match": 0.9}}
    },
    "eval/lab__model/results_2026-01-02T10-00-00.000000.json": {
        "results": {
            "phb_gsm8k": {
                "alias": "phb_gsm8k",
                "sample_len": 200,
                "exact_match,strict-match": 0.125,
                "exact_match_stderr,strict-match": 0.0234,
                "exact_match,flexible-extract": 0.25,
                "exact_match_stderr,flexible-extract": "N/A",
            }
        },
        "n-shot": {"phb_gsm8k": 5},
        "n-samples": {"phb_gsm8k": {"original": 1319, "effective": 200}},
        "configs": {"phb_gsm8k": {"dataset_path": "openai/gsm8k"}},
        "config": {"model_args": {"pretrained": "/home/me/model"}},
        "expert_load": {"max_vio": 0.75, "tokens": 9},
    },
    "eval/lab__model/results_2026-01-03T10-00-00.000000.json": {
        "results": {"humaneval": {"pass@1,create_test": 0.5, "pass@1_stderr,create_test": 0.01}},
        "n-shot": {"humaneval": 0},
        "n-samples": {"humaneval": {"original": 164, "effective": 164}},
        "isolation": "bubblewrap",
    },
    "unbalanced/eval/results_2026-01-09T10-00-00.000000.json": {"results": {"humaneval": {"pass@1,create_test": 0.1}}},
}


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The results folder of a short run beside an unbalanced one, with evaluations of two tasks. Read only."""
    folder = tmp_path_factory.mktemp("results") / "tiny"
    runs = []
    for coef in (0.0, 5.0):
        trainer = make_trainer(patched(coef=coef), folder, eval_dataset=rows(4, seed=1))
        callback = phb.attach(trainer, per_layer=16)
        before = trainer.evaluate(metric_key_prefix="untrained")
        trainer.train()
        trainer.evaluate(metric_key_prefix="test")
        figures = {"dataset": "openai/gsm8k", "base_model": "lab/base", "example_prompt": "Question: 1 + 1?\nAnswer:"}
        figures |= {"problems": {"train": 11, "test": 4}, "exact_match": {"untrained": 0.0, "trained": 0.25}}
        balance = phb.get_balancer(trainer.model).config
        runs.append(Run.of(trainer, balance, callback.history, before=before, **figures))
    runs[0].save(folder / "unbalanced")
    write_report(folder, runs[1], runs[0], dpi=50)
    for name, evaluation in EVALUATIONS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def run_folder(trained_run, tmp_path):
    """A copy of `trained_run` that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "tiny"))
