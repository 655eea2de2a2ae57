"""
A balanced model inside another module, together with another model, or with changed experts: the declared coefficient
arrives, each token counts once, and untrained models do not move.
"""

import copy
import gc

import pytest
import torch
from checks import assert_same, is_patched, ours
from measuring import (
    COEF,
    TOLERANCE,
    Watch,
    assert_declared,
    batches,
    logits,
    ordinary,
    ordinary_scorer,
    priced,
    received,
    take_steps,
)
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.optim import SGD
from training import make_trainer
from transformers import AutoModelForCausalLM

import hf_phibalance as phb


pytestmark = pytest.mark.slow


DATA = batches(4)


def backbone():
    return ordinary().model


def patched(model, **config):
    return priced(phb.patch(model, {"coef": COEF, **config}))


def both(run, build=ordinary):
    """Runs `run(model, watch)` on a balanced and on an ordinary model."""
    watches = []
    for balanced in (True, False):
        model = build().train()
        watch = Watch(patched(model) if balanced else model)
        torch.manual_seed(5)
        run(model, watch)
        watches.append(watch.close())
    return watches


def one_step(trained, loss):
    optimizer = SGD(trained.parameters(), lr=0.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model, folder, accumulation, **options):
    """Takes two steps with a plain `Trainer`. Nothing is attached."""
    options = {"max_steps": 2, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0, **options}
    make_trainer(model, folder, **options).train()


# ---------------------------------------------------------------------- custom modules


class Retriever(nn.Module):
    """Encodes two texts of equal shape. Its arguments are not those of a backbone."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def embed(self, tokens, mask):
        return self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state.pow(2).mean()

    def forward(self, features, batch):
        return self.embed(features["tokens"], features["keep"]) + self.embed(batch["tokens"], batch["keep"])


class ByForward(Retriever):
    """Calls the backbone's `forward` directly, as sentence-transformers does. This skips all hooks."""

    def embed(self, tokens, mask):
        return self.encoder.forward(input_ids=tokens, attention_mask=mask).last_hidden_state.pow(2).mean()


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner.forward(*args)


def texts():
    return [{"tokens": batch["input_ids"], "keep": batch["attention_mask"]} for batch in DATA[:2]]


@pytest.mark.parametrize("wrap", [Retriever, ByForward, lambda model: Outer(Outer(ByForward(model)))])
def test_a_module_with_arguments_of_its_own(wrap):
    """Two forwards of one shape have different masks."""

    def run(model, watch):
        wrapped = wrap(model)
        one_step(wrapped, wrapped(*texts()))
        seen = {"random": torch.get_rng_state()}
        watch.steps[0].forwards = [
            {"inputs": {"input_ids": text["tokens"], "attention_mask": text["keep"]}, **seen} for text in texts()
        ]

    assert_declared(*both(run, backbone), backbone)


def test_patched_inside_and_again_outside():
    """Our messages may ask for this. A router still has one balancer and one set of hooks."""

    def run(model, watch):
        wrapped = Outer(Retriever(model))
        if watch.balancer is not None:
            hooks = len(ours(model))
            for part in (wrapped, wrapped.inner, model):
                phb.patch(part)
                assert phb.get_balancer(part) is watch.balancer
            phb.patch(wrapped, {"coef": COEF})
            assert phb.get_balancer(wrapped) is watch.balancer and len(ours(wrapped)) == hooks
        one_step(wrapped, wrapped(*texts()))

    assert_declared(*both(run, backbone), backbone)


def test_patched_from_outside_only():
    """Routers are named as in the transformers model, whatever contains it."""
    wrapped = phb.patch(Outer(Retriever(backbone())), {"coef": COEF})
    assert phb.get_balancer(wrapped) is phb.get_balancer(wrapped.inner.encoder)
    assert phb.get_balancer(wrapped).layer_names == ["layers.0.mlp.gate", "layers.1.mlp.gate"]
    assert not ours(phb.unpatch(wrapped)) and not is_patched(wrapped)


# ---------------------------------------------------------------------- two models, one backbone


def scorer_on(model, dropped):
    """Returns a reward model on the backbone of `model`, and a list that keeps the causal LM unless `dropped`."""
    scorer = ordinary_scorer().train()
    scorer.model = model.model
    return scorer, [] if dropped else [model]


@pytest.mark.parametrize("dropped", [True, False])
def test_a_reward_model_on_a_patched_backbone(dropped, tmp_path):
    """It trains, saves its state, and can be unpatched."""
    watches = []
    for balanced in (False, True):
        scorer, kept = scorer_on(patched(ordinary()) if balanced else ordinary(), dropped)
        gc.collect()
        watch = Watch(scorer.train())
        inputs = {name: DATA[0][name] for name in ("input_ids", "attention_mask")}
        one_step(scorer, scorer(**inputs).logits.sum())
        watches.append(watch.close())
    assert_declared(*reversed(watches), ordinary_scorer)

    balancer = phb.get_balancer(scorer)
    assert all(phb.get_balancer(model) is balancer for model in kept)
    scorer.save_pretrained(tmp_path)
    loaded = phb.patch(ordinary_scorer(), {"coef": COEF})
    phb.get_balancer(loaded).load(tmp_path)
    assert_same(phb.get_balancer(loaded).state_dict(), balancer.state_dict())
    assert not ours(phb.unpatch(scorer)) and not is_patched(scorer)


@pytest.mark.parametrize("dropped", [True, False])
def test_what_is_saved_of_that_reward_model(dropped, tmp_path):
    """Any engine can load the weights: they hold no bias of ours. The config has the flag."""
    scorer, kept = scorer_on(take_steps(phb.patch(ordinary(), {"coef": COEF, "bias_coef": 0.5})), dropped)
    gc.collect()
    assert phb.get_balancer(scorer).steps == 3 and len(kept) == 1 - dropped
    scorer.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "phi_balance" in name]  # noqa: SIM118, it is no dict
    assert '"phi_balance"' in (tmp_path / "config.json").read_text()


class Distiller(nn.Module):
    """A student with its teacher. With `looks`, the teacher's forward keeps a graph."""

    def __init__(self, student, teacher, looks=False):
        super().__init__()
        self.student, self.teacher, self.looks = student, teacher.requires_grad_(False), looks

    def forward(self, **inputs):
        with torch.set_grad_enabled(self.looks):
            wanted = self.teacher(**inputs).logits
        found = self.student(**inputs)
        return {"loss": found.loss + (found.logits - wanted).pow(2).mean()}


def make_teacher():
    """Returns a balanced teacher with a bias, which routes differently from the student."""
    teacher = ordinary()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return take_steps(phb.patch(teacher, {"coef": 0.1, "bias_coef": 0.5}))


@pytest.mark.parametrize("loop", ["raw", "raw, teacher with a graph", "Trainer"])
def test_a_distiller_trains_its_student_only(loop, tmp_path):
    """A Trainer announces accumulated steps to the trained model only. Nothing is attached by hand."""
    teacher = make_teacher()
    said, state = logits(teacher), phb.get_balancer(teacher).state_dict()

    def run(model, watch):
        distiller = Distiller(model, teacher, looks="graph" in loop).train()
        if watch.balancer is not None:
            assert phb.get_balancer(distiller) is watch.balancer
        if loop == "Trainer":
            train(distiller, tmp_path / str(watch.balancer is None), 2, remove_unused_columns=False)
        else:
            for batch in DATA[:2]:
                one_step(model, distiller(**batch)["loss"])

    assert_declared(*both(run))
    assert torch.equal(logits(teacher), said)
    assert_same(phb.get_balancer(teacher).state_dict(), state)


def test_a_gradient_through_a_frozen_model_moves_nothing_of_it():
    """For example a judge, or a soft prompt: the optimizer has no parameter of the balanced model."""
    judge = make_teacher().requires_grad_(False).train()
    state, generator = phb.get_balancer(judge).state_dict(), nn.Linear(4, 32)
    for number in range(3):
        made = generator(torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(number)))
        one_step(generator, judge(inputs_embeds=made).logits.pow(2).mean())
    assert_same(phb.get_balancer(judge).state_dict(), state)


def test_one_config_for_two_models(tmp_path):
    """The other model is saved as an ordinary one. tests/balancing/test_process.py checks that its loss stays."""
    model = ordinary()
    other = type(model)(model.config)
    phb.patch(model, {"coef": COEF})
    other.save_pretrained(tmp_path)
    assert not is_patched(phb.AutoModelForCausalLM.from_pretrained(tmp_path))


# ---------------------------------------------------------------------- virtual tokens

PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=16),
}


def with_prompt(kind, balanced):
    model = patched(ordinary()) if balanced else ordinary()
    torch.manual_seed(1)
    return get_peft_model(model, copy.deepcopy(PROMPTS[kind])).train()


def price_of_prompt(kind, data, prices):
    """Returns the gradient of the mean of <q, p> over virtual and real tokens, by autograd on the unbalanced model."""
    model, found, total, tokens = with_prompt(kind, False), {}, torch.zeros(()), 0
    for name in prices:
        router = model.get_base_model().get_submodule(name)
        router.register_forward_hook(lambda module, args, output, name=name: found.__setitem__(name, output[0]))
    for batch in data:
        model(**batch)
        mask = batch["attention_mask"]
        keep = torch.cat([torch.ones(len(mask), 20), mask], dim=1).reshape(-1).bool()
        total = total + sum((found[name].softmax(-1)[keep] @ price).sum() for name, price in prices.items())
        tokens += int(keep.sum())
    (COEF * total / tokens).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, tokens


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loop", ["raw", "Trainer"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_count(kind, loop, accumulation, tmp_path):
    """PEFT adds them to each row after `Trainer` or `begin_step` has counted the batch."""
    watches, data = [], []
    for balanced in (True, False):
        model, data = with_prompt(kind, balanced), []
        model.register_forward_pre_hook(lambda module, args, kwargs, data=data: data.append(kwargs), with_kwargs=True)
        watch = Watch(model)
        if loop == "Trainer":
            train(model, tmp_path / str(balanced), accumulation)
        else:
            optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
            for start in (0, accumulation):
                own = DATA[start : start + accumulation]
                if balanced and accumulation > 1:
                    watch.balancer.begin_step(own)
                for batch in own:
                    (model(**batch).loss / accumulation).backward()
                optimizer.step()
                optimizer.zero_grad()
        watches.append(watch.close())
    balanced, plain = watches
    names = ("input_ids", "attention_mask")
    data = [{name: value for name, value in batch.items() if name in names} for batch in data]
    assert balanced.moves == len(plain.steps) == 2 and len(data) == 2 * accumulation
    for number, (step, task) in enumerate(zip(balanced.steps, plain.steps)):
        own = data[number * accumulation : (number + 1) * accumulation]
        right, tokens = price_of_prompt(kind, own, step.prices)
        ratio, rest = received(step.gradients, task.gradients, right)
        assert abs(ratio - 1) < TOLERANCE and rest < 5 * TOLERANCE, f"{ratio:.5f} (rest {rest:.1e})"
        assert step.logged == tokens


# ---------------------------------------------------------------------- changed experts


def pruned(model, kept=(0, 2, 3)):
    """Removes all other experts of `model` in place."""
    for layer in model.model.layers:
        gate, experts = layer.mlp.gate, layer.mlp.experts
        for owner, name in ((gate, "weight"), (experts, "gate_up_proj"), (experts, "down_proj")):
            setattr(owner, name, nn.Parameter(getattr(owner, name).detach()[list(kept)].clone()))
        gate.num_experts = experts.num_experts = len(kept)
    model.config.num_local_experts = len(kept)
    return model


def stacked(model):
    """Repeats the layers of `model` as copies, as in depth up-scaling."""
    layers = nn.ModuleList([*model.model.layers, *(copy.deepcopy(layer) for layer in model.model.layers)])
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = layers
    model.config.num_hidden_layers = len(layers)
    return model


@pytest.mark.parametrize("change", [pruned, stacked])
def test_experts_or_layers_changed_after_patching(change, tmp_path, warned):
    """Patching again notices it and warns. Each router counts once, and the saved model loads."""
    watches = []
    for balanced in (True, False):
        model = ordinary().train()
        if balanced:
            patched(model, bias_coef=0.5)
            change(model)
            phb.patch(model)
            assert warned.about("balancing begins anew") and phb.get_balancer(model).config.bias_coef == 0.5
            patched(model)
        else:
            change(model)
        watch = Watch(model)
        one_step(model, model(**DATA[0]).loss)
        watches.append(watch.close())
        if balanced:
            model.save_pretrained(tmp_path)
            loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(logits(loaded), logits(model))
            assert_same(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
            loads = phb.get_balancer(model).loads()
            assert len(loads) == len(model.model.layers)
            assert all(load.sum() == 2 * DATA[0]["attention_mask"].sum() for load in loads.values())
    assert_declared(*watches, lambda: change(ordinary()))


def test_pruned_and_saved_without_patching_again(tmp_path):
    model = pruned(take_steps(phb.patch(ordinary(), {"coef": COEF, "bias_coef": 0.5})))
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert take_steps(loaded, 1) is loaded and phb.get_balancer(loaded).steps == 1


def test_fewer_experts_for_each_token_than_it_was_saved_with(tmp_path):
    model = take_steps(phb.patch(ordinary(), {"coef": COEF}))
    model.save_pretrained(tmp_path)
    watches = []
    for load in (phb.AutoModelForCausalLM, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path, num_experts_per_tok=1).train()
        watch = Watch(loaded)
        if watch.balancer is not None:
            assert_same(watch.balancer.state_dict(), phb.get_balancer(model).state_dict())
        one_step(loaded, loaded(**DATA[0]).loss)
        watches.append(watch.close())
    assert_declared(*watches, lambda: ordinary(num_experts_per_tok=1))
    assert all(load.sum() == DATA[0]["attention_mask"].sum() for load in watches[0].balancer.loads().values())
