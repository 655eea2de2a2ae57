"""
A selection bias trained with an adapter belongs to that adapter: it is switched, unloaded, merged, saved and loaded
with it. Tested with and without a native bias. Loops are plain and call nothing of ours.
"""

import contextlib
import copy
import pickle

import pytest
import torch
import transformers
from checks import assert_same, assert_same_duals
from datasets import Dataset
from measuring import batches, logits, ordinary, take_steps
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from training import tokenizer
from trl import DPOConfig, DPOTrainer

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


pytestmark = pytest.mark.slow


FAMILIES = pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
CONFIG = {"coef": 0.1, "bias_coef": 2.0}
DATA = batches(6)


def lora(**options):
    return LoraConfig(r=4, target_modules=["o_proj"], target_parameters=["mlp.gate.weight"], **options)


def base(family):
    return phb.patch(ordinary(family), CONFIG)


def adapted(family, name="default"):
    """Returns a patched model with an adapter, after three steps."""
    return take_steps(get_peft_model(base(family), lora(), adapter_name=name))


def two_adapters(family):
    """Returns a model with adapters `first` and `second`, trained one after the other, and the logits with each."""
    model = adapted(family, "first")
    found = {"first": logits(model)}
    model.add_adapter("second", lora())
    model.set_adapter("second")
    found["second"] = logits(take_steps(model, seed=11))
    return model, found


def biases(model):
    return phb.get_balancer(model).biases()


def moved(model):
    return all(bias.abs().max() > 0.02 for bias in biases(model).values())


# ---------------------------------------------------------------------- one adapter, on and off


@FAMILIES
def test_without_its_adapter_the_base_is_back(family):
    """TRL switches the adapter off for its reference; `unload` removes it. The bias comes back with the adapter."""
    of_base, model = logits(ordinary(family)), adapted(family)
    expected, own = logits(model), biases(model)
    assert moved(model) and not torch.equal(expected, of_base)
    with model.disable_adapter():
        assert torch.equal(logits(model), of_base)
        assert not any(bias.any() for bias in biases(model).values())
    assert torch.equal(logits(model), expected)
    assert_same(biases(model), own)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), of_base)
    assert not any(bias.any() for bias in biases(unloaded).values())


def off(model):
    return model.disable_adapter()


@contextlib.contextmanager
def other(model):
    """In TRL the reference can be another adapter."""
    model.set_adapter("reference")
    yield
    model.set_adapter("default")


@pytest.mark.parametrize("reference", [off, other], ids=["disabled", "another adapter"])
@FAMILIES
def test_a_reference_between_forward_and_step_changes_nothing(family, reference):
    """In TRL's DPO, the reference's forward comes between the policy's forward and its backward."""
    runs = []
    for asks_reference in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(base(family), lora())
        model.add_adapter("reference", lora())
        with reference(model):
            before = logits(model)
        model.train()
        trained = [p for name, p in model.named_parameters() if ".default." in name]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for batch in DATA[:3]:
            loss = model(**batch).loss
            if asks_reference:
                with torch.no_grad(), reference(model):
                    model(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert moved(model)
        runs.append((model, logits(model)))
        with reference(model):
            assert torch.equal(logits(model), before)
    assert torch.equal(runs[0][1], runs[1][1])
    assert_same_duals(runs[0][0], runs[1][0])


def test_dpo_with_an_adapter_keeps_its_reference(tmp_path):
    """TRL switches the adapter off for the reference. The first loss is ln 2, and the base stays unchanged."""
    words = ["w64 w65 w66", "w70 w71 w72 w73", "w80 w81"]
    rows = [{"prompt": f"w1{i} w20 w3{i}", "chosen": words[i % 3], "rejected": words[(i + 1) % 3]} for i in range(8)]
    arguments = DPOConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, bf16=False,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        base("mixtral"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=2e-4)
    model = trainer.model
    assert phb.get_balancer(model).steps == 4 and moved(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(ordinary("mixtral")))


# ---------------------------------------------------------------------- two adapters


@FAMILIES
def test_two_adapters_have_a_bias_each(family):
    """Each bias comes back with its adapter. A step with one leaves the other unchanged."""
    model, expected = two_adapters(family)
    assert not torch.equal(expected["first"], expected["second"])
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(ordinary(family)))
    take_steps(model, 1)
    assert not torch.equal(logits(model), expected["first"])
    model.set_adapter("second")
    assert torch.equal(logits(model), expected["second"])


@FAMILIES
def test_two_adapters_are_loaded_one_after_the_other(family, tmp_path):
    """Loading the second adapter leaves the first one in use and unchanged."""
    model, expected = two_adapters(family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family), tmp_path / "first", adapter_name="first")
    assert torch.equal(logits(loaded), expected["first"])
    loaded.load_adapter(str(tmp_path / "second"), "second")
    assert torch.equal(logits(loaded), expected["first"])
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected["second"])


def test_an_adapter_that_is_not_saved_keeps_its_file(tmp_path):
    model, _ = two_adapters("mixtral")
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name / STATE_NAME).read_bytes() for name in ("first", "second")}
    take_steps(model, 1)  # of the second adapter, the active one
    model.set_adapter("first")
    take_steps(model, 1)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    after = {name: (tmp_path / name / STATE_NAME).read_bytes() for name in before}
    assert after["first"] == before["first"] and after["second"] != before["second"]


# ---------------------------------------------------------------------- merged


def as_it_is(model):
    pass


def after_a_reference(model):
    with model.disable_adapter():
        logits(model)


def after_another_adapter(model):
    """The adapter to merge is set again, but has had no forward since."""
    model.add_adapter("other", lora())
    model.set_adapter("other")
    take_steps(model, 2, seed=11)
    model.set_adapter("default")


def in_a_copy(model):
    after_another_adapter(model)
    return copy.deepcopy(model)


@pytest.mark.parametrize("before", [as_it_is, after_a_reference, after_another_adapter, in_a_copy])
@FAMILIES
def test_a_merged_model_has_the_bias_of_its_adapter(family, before, tmp_path):
    """The last forward does not matter. Saved and loaded with the flag, the model keeps its bias and duals."""
    model = adapted(family)
    expected, own = logits(model), biases(model)
    merged = (before(model) or model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert_same(biases(merged), own)
    merged.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged)) and moved(loaded)
    assert phb.get_balancer(loaded).steps == phb.get_balancer(merged).steps >= 3


def test_an_unpickled_model_says_what_to_do_before_it_is_merged():
    model = adapted("mixtral")
    expected = logits(model)
    loaded = pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match=r"Call phb.get_balancer\(model\) before its adapter is merged"):
        loaded.merge_and_unload()
    phb.get_balancer(loaded)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- saved and loaded


@FAMILIES
def test_an_adapter_added_after_the_balancer_was_taken_is_saved_with_its_bias(family, tmp_path):
    """The order is `get_balancer(model)`, LoRA, PEFT's `save_pretrained`. The state is saved with the adapter."""
    model = base(family)
    balancer = phb.get_balancer(model)
    model = take_steps(get_peft_model(model, lora()))
    assert phb.get_balancer(model) is balancer and balancer.steps == 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(family), tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and moved(loaded)
    assert_same_duals(loaded, model)


def test_a_plain_base_loses_the_bias_and_that_is_said(tmp_path, warned):
    """Warns when the adapter is saved, and when PEFT loads it on an unbalanced base. Our own class loads the bias."""
    ordinary().save_pretrained(tmp_path / "base")
    model = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "base", phi_balance=CONFIG)
    model = take_steps(get_peft_model(model, lora()))
    model.save_pretrained(tmp_path / "adapter")
    assert len(warned.about("PeftModel on a base that was loaded without phi_balance=True")) == 1
    loads = {
        "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        "PeftModel": lambda: PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ),
    }
    for load in loads.values():
        warned.lines.clear()
        assert not torch.equal(logits(load()), logits(model))
        assert len(warned.about("is lost on this base. Load the base with phi_balance=True")) == 1
    warned.lines.clear()
    assert torch.equal(logits(phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
    assert not warned.about("is lost")


# ---------------------------------------------------------------------- whole routers as an adapter


@FAMILIES
def test_whole_routers_added_after_the_first_step(family, tmp_path):
    """PEFT copies whole routers, native bias included. The copy in use gets the updated bias."""
    model = take_steps(base(family), 1)
    config = LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["gate"])
    before, start = logits(model), biases(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model = take_steps(get_peft_model(model, config), 2, seed=11)
    balancer, own = phb.get_balancer(model), biases(model)
    assert balancer.steps == 3 and balancer.metrics()["tokens"] == batches(2, seed=11)[1]["attention_mask"].sum()
    assert all((own[name] - start[name]).abs().max() > 0.02 for name in own)
    copies = {name: b for name, b in model.named_buffers() if "e_score" in name and "modules_to_save" in name}
    assert len(copies) == (2 if family == "deepseek_v3" else 0)
    for copied, bias in zip(copies.values(), own.values()):
        assert torch.equal(copied, bias)
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    again = base(family)
    again.load_state_dict(weights)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path)), expected)
