"""`audit`: the coefficient of the built-in loss that a step receives, measured on unpatched models."""

import gc
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import stock
import torch
import transformers
from accelerate.state import GradientState
from invariance import in_ranks
from paths import ROOT
from stock_losses import COEF, CountsOfAllRanks, CountsOfTheStep, UnusedForward
from tiny import MODEL_TYPES, tiny_batch, tiny_model
from training import make_trainer, pad, rows
from transformers import Trainer, TrainerCallback
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTTrainer

import hf_phibalance as phb
from hf_phibalance.diagnosis import REASONS


NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage():
    """Each trainer collects garbage, which takes long with many objects in memory."""
    gc.freeze()
    yield
    gc.unfreeze()


def build(model_type="mixtral", coef=COEF, **overrides):
    return tiny_model(model_type, output_router_logits=True, router_aux_loss_coef=coef, **overrides).train()


def has_loss(model_type):
    """Whether the family computes an auxiliary loss, by its source. The routers of doge cannot be read."""
    name = model_type_to_module_name(model_type)
    path = Path(transformers.__file__).parent / "models" / name / f"modeling_{name}.py"
    return path.is_file() and "aux_loss = load_balancing_loss_func(" in path.read_text() and model_type != "doge"


WITH_LOSS = list(filter(has_loss, MODEL_TYPES))


def statuses(report):
    return {check.name: check.status for check in report.checks}


def finding(report, name):
    return next(check for check in report.checks if check.name == name)


# ---------------------------------------------------------------------- what is received


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation(cls, accumulation, tmp_path):
    """The stock Trainer adds the loss of each micro-batch in full. SFTTrainer divides by their number."""
    report = phb.audit(make_trainer(build(), tmp_path, cls, gradient_accumulation_steps=accumulation))
    ratio = accumulation if cls is Trainer else 1
    assert report.declared == COEF and report.received == pytest.approx(COEF * ratio, rel=1e-3)
    assert report.ratio == pytest.approx(ratio, rel=1e-3) and report.coefficient.residual < 1e-2
    assert statuses(report)["coefficient"] == ("ok" if ratio == 1 else "problem")
    if ratio > 1:
        assert finding(report, "accumulation and ranks").finding.startswith("times 4:")
    assert report.exit_status() == (2 if ratio > 1 else 0)


def gradients(trainer):
    """The gradients of the trainer's first optimizer step."""
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update((name, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None)
            control.should_training_stop = True

    trainer.add_callback(Keep())
    trainer.train()
    return found


def test_it_is_what_the_loss_adds_to_the_gradient(tmp_path):
    """All gradients with the loss, minus those without it, are the received coefficient times the loss's own gradient."""
    on, off = build(), build(coef=0.0)
    report = phb.audit(make_trainer(on, tmp_path))
    batches = []
    on.register_forward_pre_hook(lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True)
    added, plain = gradients(make_trainer(on, tmp_path)), gradients(make_trainer(off, tmp_path))
    twin = build()
    for batch in batches[:4]:
        (twin(**batch).aux_loss / 4).backward()
    for name, parameter in twin.named_parameters():
        if "mlp.gate." in name:
            torch.testing.assert_close(
                added[name] - plain[name], report.received * parameter.grad, atol=2e-6, rtol=1e-3
            )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WITH_LOSS)
def test_each_family_with_a_loss(model_type):
    """Declared and received agree in the plain case."""
    model = tiny_model(model_type).train()
    model.config.get_text_config().output_router_logits = True
    report = phb.audit(model, [tiny_batch(model, seed=seed) for seed in range(2)])
    assert report.declared > 0 and report.ratio == pytest.approx(1, abs=1e-3), str(report)
    assert statuses(report)["coefficient"] == "ok" and report.coefficient.residual < 0.01


def test_the_list_of_families():
    assert len(WITH_LOSS) >= 25 and {"mixtral", "dbrx", "jetmoe", "gpt_oss"} <= set(WITH_LOSS)
    assert "deepseek_v3" not in WITH_LOSS


@pytest.mark.parametrize("model_type, coef", [("mixtral", 1e-4), ("deepseek_v3", 0.0)])
def test_other_precision(model_type, coef, tmp_path):
    """A coefficient whose gradient at the logits is lost in the rounding of bf16; and rounding where there is no loss."""
    model = tiny_model(model_type, dtype=torch.bfloat16).train()
    model.config.output_router_logits, model.router_aux_loss_coef = True, coef
    model.config.router_aux_loss_coef = coef
    report = phb.audit(make_trainer(model, tmp_path, gradient_accumulation_steps=4, bf16=True))
    assert report.received == pytest.approx(4 * coef, rel=1e-3), str(report)
    assert "other losses" not in statuses(report)


@pytest.mark.parametrize("kind, ratio", [(NON_REENTRANT, 1), (REENTRANT, 0)], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_checkpointing(kind, ratio, cls, tmp_path):
    report = phb.audit(make_trainer(build(), tmp_path, cls, gradient_accumulation_steps=1, **kind))
    assert report.ratio == pytest.approx(ratio, abs=1e-3)
    assert ("checkpointing" in statuses(report)) == (ratio == 0)
    assert ratio or "use_reentrant" in finding(report, "checkpointing").remedy


def test_checkpointing_of_routers_that_return_no_selection(tmp_path):
    """The audit computes their selection, in the recomputation as in the forward."""
    report = phb.audit(make_trainer(tiny_model("llama4_text").train(), tmp_path, **NON_REENTRANT))
    assert report.received == 0 and len(report.layers) == 3


def test_padding_that_counts(tmp_path):
    """A collator that pads without an attention mask lets padding count. The coefficient is exact all the same."""
    trainer = make_trainer(build(), tmp_path, gradient_accumulation_steps=1)
    assert statuses(phb.audit(trainer))["padding"] == "ok"
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "attention_mask"}
    report = phb.audit(trainer)
    assert statuses(report)["padding"] == "warning" and "11.1% of the positions" in finding(report, "padding").finding
    assert report.ratio == pytest.approx(1, abs=1e-3)


def test_pooled_layers():
    """Opposite collapses of two layers cancel in the pooled loss. The figures are those of the family's function."""
    model, logits = build(num_hidden_layers=2), []
    batch = tiny_batch(model, padded=False)
    with torch.no_grad():
        for layer, expert in zip(model.model.layers, (0, 4)):
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.register_forward_hook(lambda _, args, out: logits.append(out[0]))
            layer.mlp.gate.weight[[expert, expert + 1, expert + 2, expert + 3]] = 0.001
    report = phb.audit(model, batch)
    alone = [float(load_balancing_loss_func((z.detach(),), 8, 2)) for z in logits]
    assert list(report.layers.values()) == pytest.approx(alone, rel=1e-5)
    assert report.pooled == pytest.approx(float(load_balancing_loss_func(tuple(logits), 8, 2)), rel=1e-5)


def test_a_loss_of_the_whole_step(tmp_path):
    """If the counts are those of the step, the report says so, and measures the coefficient by them."""
    report = phb.audit(make_trainer(build(coef=0.0), tmp_path, CountsOfTheStep))
    assert finding(report, "counts").finding == "taken from the whole step, 4 micro-batches", str(report)
    assert report.received == pytest.approx(COEF, rel=1e-3) and report.coefficient is None


def test_a_forward_that_is_not_trained_on(tmp_path):
    report = phb.audit(make_trainer(build(), tmp_path, UnusedForward, gradient_accumulation_steps=1))
    assert report.ratio == pytest.approx(1, rel=1e-3) and "1 micro-batch" in report.measured, str(report)


def test_a_model_alone():
    """Without a trainer: the model's own loss, which is switched off by default."""
    report = phb.audit(tiny_model("mixtral", router_aux_loss_coef=COEF))
    assert report.declared == COEF and report.received == 0 and report.status == "warning"
    assert "output_router_logits=True" in finding(report, "switched off").remedy


def test_a_coefficient_of_zero():
    report = phb.audit(build(coef=0.0))
    assert report.received == 0 and report.ratio is None
    assert statuses(report) == {"declared": "ok", "coefficient": "ok"}, str(report)


def test_nothing_that_learns():
    model = build().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert "train the routers" in finding(phb.audit(model), "gradient path").remedy


def test_the_report():
    report = phb.audit(build())
    figures = report.to_dict()
    assert figures["ratio"] == report.ratio and figures["sources"] == {"config.router_aux_loss_coef": COEF}
    assert set(figures["layers"]) == {f"model.layers.{i}.mlp.gate" for i in range(3)}
    assert "0.01 received of 0.01 declared, ratio 1.0000" in str(report) and "torch" in figures["versions"]


def test_refusals(tmp_path, monkeypatch):
    model = build()
    with pytest.raises(ValueError, match="`batch` is for a model"):
        phb.audit(make_trainer(model, tmp_path), tiny_batch(model))
    trainer = make_trainer(model, tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard the model"):
        phb.audit(trainer)
    with pytest.raises(ValueError, match="no router ran in a training step"):
        bypassed = tiny_model("mixtral")
        for layer in bypassed.model.layers:
            layer.mlp.forward = lambda hidden: hidden
        phb.audit(bypassed)
    with pytest.raises(ValueError, match="a batch has no `labels`"):
        phb.audit(model, {"input_ids": tiny_batch(model)["input_ids"]})
    with pytest.raises(ValueError, match="Linear has no router"):
        phb.audit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a Stream, cannot be copied"):
        phb.audit(make_trainer(model, tmp_path, data=Stream(iter(rows())), max_steps=1))
    with pytest.raises(ValueError, match="the model is φ-balanced"):
        phb.audit(phb.patch(model))


# ---------------------------------------------------------------------- the page


def test_the_page_shows_a_real_report(tmp_path):
    page = (ROOT / "recipes/guides/AUDIT.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    report = str(phb.audit(make_trainer(build(), tmp_path)))
    assert report.startswith(shown.rstrip("\n")), report


def test_the_page_explains_each_finding():
    """The table of findings has all of them, and no others."""
    page = (ROOT / "recipes/guides/AUDIT.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `([a-z ]+)` \|", page, re.MULTILINE))
    assert shown == set(REASONS)


def test_the_table_follows_from_the_committed_figures():
    page = (ROOT / "recipes/guides/AUDIT.md").read_text(encoding="utf-8")
    cells = json.loads(stock.RESULTS.read_text(encoding="utf-8"))["cells"]
    assert stock.updated(page, cells) == page
    assert stock.table(cells) in page and stock.defaults_table(cells) in page
    assert {(cell["tool"], cell["family"]) for cell in cells} == {*stock.ROWS, *stock.DEFAULTS}


ALONE = [setting for setting in stock.SETTINGS if setting != "2 ranks"]
AGAIN = [("Trainer", "qwen3_moe"), ("SFTTrainer", "mixtral")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool, family, setting",
    [
        *((tool, family, setting) for tool, family in AGAIN for setting in ALONE),
        ("SFTTrainer, published", "gpt_oss", "non-reentrant"),
    ],
)
def test_cells_of_the_table(tool, family, setting):
    """Two rows, and a coefficient that TRL takes from a checkpoint, measured again, have the committed figures."""
    cells = json.loads(stock.RESULTS.read_text(encoding="utf-8"))["cells"]
    (known,) = (c for c in cells if (c["tool"], c["family"], c["setting"]) == (tool, family, setting))
    found = stock.measure(tool, family, setting)
    assert found.get("error") == known.get("error")
    assert found.get("received", 0) == pytest.approx(known.get("received", 0), rel=1e-3)


# ---------------------------------------------------------------------- no trace


def snapshot(trainer, folder):
    """Everything that training could leave behind, as comparable values."""
    model = trainer.model

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, set)) else repr(value)

    kept = ("_parameters", "_buffers", "_modules")
    return {
        "weights": {
            name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()
        },
        "gradients": [p.grad for p in model.parameters()],
        "modules": [plain({k: v for k, v in vars(m).items() if k not in kept}) for m in model.modules()],
        "trainer": plain(vars(trainer)),
        "args": plain(vars(trainer.args)),
        "accelerator": plain(vars(trainer.accelerator)),
        "gradient state": plain(GradientState._shared_state),
        "random": [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()],
        "files": sorted(map(str, folder.rglob("*"))),
        "modules loaded": {name for name in sys.modules if name.startswith("hf_phibalance")},
        "patches": [Trainer.train, torch.Tensor.backward, load_balancing_loss_func, torch.is_grad_enabled()],
    }


@pytest.mark.parametrize(
    "cls, arguments",
    [
        (Trainer, {"neftune_noise_alpha": 5.0, **NON_REENTRANT}),
        pytest.param(
            Trainer,
            {"bf16": True, "eval_strategy": "steps", "eval_on_start": True, **REENTRANT},
            marks=pytest.mark.slow,
        ),
        pytest.param(SFTTrainer, {"max_grad_norm": 1.0, "optim": "adamw_torch"}, marks=pytest.mark.slow),
    ],
    ids=["checkpointing, NEFTune", "bf16, evaluation", "TRL"],
)
def test_no_trace(cls, arguments, tmp_path):
    """Audited or not: the same trainer, and afterwards the same training, bit for bit."""
    results = []
    for is_audited in (True, False):
        torch.manual_seed(1)
        data = {"eval_dataset": None} if "eval_strategy" not in arguments else {"eval_dataset": rows(4)}
        trainer = make_trainer(build(attention_dropout=0.3), tmp_path, cls, max_steps=3, **data, **arguments)
        trainer.model.get_input_embeddings().weight.grad = torch.ones_like(trainer.model.get_input_embeddings().weight)
        if is_audited:
            audit = phb.audit  # imports its module
            before = snapshot(trainer, tmp_path)
            audit(trainer)
            after = snapshot(trainer, tmp_path)
            for name in before:
                assert str(before[name]) == str(after[name]), name
        trainer.train()
        logged = [
            {k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k}
            for row in trainer.state.log_history
        ]
        results.append(({k: v.clone() for k, v in trainer.model.state_dict().items()}, logged))
    (one, logs), (other, others) = results
    assert all(torch.equal(one[name], other[name]) for name in one) and logs == others


class Stream(torch.utils.data.IterableDataset):
    """A stream that goes on where it was left."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        while self.rows:
            yield self.rows.pop(0) if isinstance(self.rows, list) else next(self.rows)


def test_a_stream_keeps_its_first_rows(tmp_path):
    data = Stream(list(rows()))
    phb.audit(make_trainer(build(), tmp_path, data=data, max_steps=1))
    assert data.rows == list(rows())


class Drawing(torch.utils.data.Dataset):
    """Rows and a collator that draw from generators of their own, the collator's made when it is first called."""

    def __init__(self, make):
        self.rows, self.make, self.rng, self.data_collator = rows(), make, make(), self
        self.generator = None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index] | {"weight": self.rng.random()}

    def __call__(self, examples):
        self.generator = self.generator or self.make()
        self.drawn = [*(example["weight"] for example in examples), self.generator.random()]
        return pad(examples)


@pytest.mark.parametrize("make", [lambda: np.random.default_rng(0), lambda: random.Random(0)], ids=["numpy", "python"])
def test_generators_of_the_data(make, tmp_path):
    """An audited trainer draws the same rows as another."""
    first = []
    for is_audited in (True, False):
        collator = Drawing(make)
        trainer = make_trainer(build(), tmp_path, data=Drawing(make), remove_unused_columns=False, max_steps=1)
        trainer.data_collator = collator
        if is_audited:
            phb.audit(trainer)
            assert collator.generator is None
        next(iter(trainer.get_train_dataloader()))
        first.append(collator.drawn)
    assert first[0] == first[1]


# ---------------------------------------------------------------------- ranks


def audited_on_ranks(folder):
    """The report of each trainer on this rank, and whether training is the same after an audit."""
    gc.freeze()
    trained, options = [], {"gradient_checkpointing": False, "gradient_accumulation_steps": 2, "max_steps": 2}
    for is_audited in (True, False):
        torch.manual_seed(1)
        trainer = make_trainer(build(), folder, **options)
        if is_audited:
            stock_report = phb.audit(trainer)
        trainer.train()
        trained.append(torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]))
    sft_report = phb.audit(make_trainer(build(), folder, SFTTrainer, **options))
    trainer = make_trainer(build(coef=0.0), folder, CountsOfAllRanks, gradient_accumulation_steps=1)
    trainer.args.router_aux_loss_coef = COEF
    return *map(str, (stock_report, sft_report, phb.audit(trainer))), torch.equal(*trained)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """The stock Trainer multiplies by the ranks, too. Megatron-LM#3769 divides by them."""
    for stock_report, sft_report, megatron, is_same in in_ranks(audited_on_ranks, 2, str(tmp_path)):
        assert "ratio 4.0000" in stock_report and "2 micro-batches and 2 ranks" in stock_report and is_same
        assert "2 micro-batches on each of 2 ranks" in stock_report
        assert "ratio 1.0000" in sft_report and "accumulation and ranks" not in sft_report, sft_report
        assert "ratio 0.5000" in megatron and "divided by 2: the loss is averaged once more over 2 ranks" in megatron
        assert "from the whole step, 2 micro-batches" in megatron
