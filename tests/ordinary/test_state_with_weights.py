"""
Means, prices and selection bias go with the weights into a state dict, copy, average or checkpoint, and back.
Otherwise there is a warning. A balanced model also works under unusual conditions: other default dtypes, inference
mode, routers that start even. If nothing can move, there is a warning.
"""

import copy

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from checks import assert_same, assert_same_duals, is_patched
from measuring import Watch, batches, charge, logits, ordinary, priced, received, take_steps, tokens_of
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import make_trainer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_phibalance as phb


pytestmark = pytest.mark.slow


FAMILIES = pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
CONFIG = {"coef": 0.1, "bias_coef": 2.0}
DATA = batches(4)


def patched(family="mixtral", **config):
    return phb.patch(ordinary(family), {**CONFIG, **config})


def trained(family="mixtral", steps=3):
    """Returns a model whose selection bias changes its choices."""
    model = take_steps(patched(family), steps)
    assert all(bias.abs().max() > 0.02 for bias in phb.get_balancer(model).biases().values())
    return model


# ---------------------------------------------------------------------- state dicts and averages


@FAMILIES
def test_the_best_weights_come_back_with_their_bias(family):
    """`best = deepcopy(model.state_dict())`, a bad training, then `load_state_dict(best)`."""
    model = trained(family)
    best, expected, biases = copy.deepcopy(model.state_dict()), logits(model), phb.get_balancer(model).biases()
    assert not torch.equal(logits(take_steps(model, seed=11)), expected)
    model.load_state_dict(best)
    assert torch.equal(logits(model), expected)
    assert_same(phb.get_balancer(model).biases(), biases)


@FAMILIES
def test_each_fold_of_a_cross_validation_begins_alike(family):
    """Loads the initial weights and calls `reset()` for the means. The second fold then ends like the first."""
    model = patched(family)
    balancer, initial, found = phb.get_balancer(model), copy.deepcopy(model.state_dict()), []
    for _ in range(2):
        take_steps(model)
        found.append((logits(model), balancer.state_dict()))
        model.load_state_dict(initial)
        balancer.reset()
        assert balancer.steps == 0 and torch.equal(logits(model), logits(ordinary(family)))
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("inside", [False, True])
def test_weights_without_a_bias_leave_none(inside, warned):
    """Loads an ordinary model's weights into the model, or into a module that contains it. Warns."""
    model, state = trained(), ordinary().state_dict()
    if inside:
        nn.ModuleDict({"policy": model}).load_state_dict({f"policy.{name}": value for name, value in state.items()})
    else:
        model.load_state_dict(state)
    assert torch.equal(logits(model), logits(ordinary()))
    assert not any(bias.any() for bias in phb.get_balancer(model).biases().values())
    assert warned.about("no selection bias of φ-balancing")


@pytest.mark.parametrize("use_buffers", [True, False])
@FAMILIES
def test_an_average_has_the_bias_of_its_weights(family, use_buffers):
    """An EMA with decay 0 equals the model. It is not a second model to balance, and never moves by itself."""
    model = trained(family, 1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=use_buffers)
    steps = phb.get_balancer(average.module).steps
    for seed in (11, 12):
        take_steps(model, 1, seed=seed)
        average.update_parameters(model)
    own = use_buffers or family == "mixtral"  # otherwise a native buffer, which `use_buffers=False` leaves out
    assert torch.equal(logits(average.module), logits(model)) or not own
    assert phb.get_balancer(average.module).steps == steps == 1 and phb.get_balancer(model).steps == 3


@FAMILIES
def test_what_accelerate_saves_of_a_model_has_the_bias(family, tmp_path):
    """`save_model` writes a state dict. `save_state` with a registered balancer restores everything."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(trained(family))
    expected, balancer = logits(model), phb.get_balancer(model)
    accelerator.save_model(model, str(tmp_path / "weights"))
    other = patched(family)
    load_checkpoint_in_model(other, str(tmp_path / "weights"))
    assert torch.equal(logits(other), expected)

    accelerator.register_for_checkpointing(balancer)
    accelerator.save_state(str(tmp_path / "state"))
    state = balancer.state_dict()
    assert not torch.equal(logits(take_steps(model, 1, seed=11)), expected)
    accelerator.load_state(str(tmp_path / "state"))
    accelerator.free_memory()
    assert torch.equal(logits(model), expected)
    assert_same(balancer.state_dict(), state)


# ---------------------------------------------------------------------- files


@FAMILIES
def test_a_language_model_and_its_backbone_share_their_state(family, tmp_path):
    """`AutoModel` loads what a causal LM saved, and the other way round, as transformers does with the weights."""
    model = trained(family)
    model.save_pretrained(tmp_path / "whole")
    phb.enable()
    try:
        body = AutoModel.from_pretrained(tmp_path / "whole", phi_balance=True)
        body.save_pretrained(tmp_path / "body")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "body", phi_balance=True)
    finally:
        phb.disable()
    for other in (body, again):
        assert_same_duals(other, model)
    inputs = {name: DATA[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model.eval().model(**inputs).last_hidden_state
        assert torch.equal(body.eval()(**inputs).last_hidden_state, expected)
        assert torch.equal(again.eval().model(**inputs).last_hidden_state, expected)


def test_a_plain_load_trained_on_and_saved_over_is_said(tmp_path, warned):
    """The state is then older than the weights. No warning if they belong together."""
    trained().save_pretrained(tmp_path)
    phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not warned.about("are not those")
    plain = take_steps(AutoModelForCausalLM.from_pretrained(tmp_path), 1)
    plain.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(warned.about("were trained since, without φ-balancing")) == 1
    assert phb.get_balancer(loaded).steps == 3
    phb.get_balancer(loaded).reset()  # the remedy of the message
    loaded.save_pretrained(tmp_path)
    phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(warned.about("were trained since")) == 1


def test_patching_a_plain_load_is_said(tmp_path, warned):
    """A plain load ignores the saved bias and means. `phi_balance=True` loads them."""
    model = trained()
    model.save_pretrained(tmp_path)
    warned.lines.clear()
    plain = phb.patch(AutoModelForCausalLM.from_pretrained(tmp_path), CONFIG)
    assert phb.get_balancer(plain).steps == 0 and len(warned.about("it begins with fresh duals")) == 1
    warned.lines.clear()
    assert phb.get_balancer(phb.AutoModelForCausalLM.from_pretrained(tmp_path)).steps == 3
    assert not warned.about("fresh duals")


def test_a_config_makes_a_new_model_with_new_duals(tmp_path, warned):
    """`from_config` of a balanced checkpoint. If the model is saved unpatched, loading it warns."""
    trained().save_pretrained(tmp_path / "trained")
    config = AutoConfig.from_pretrained(tmp_path / "trained")
    model = phb.AutoModelForCausalLM.from_config(config)
    balancer = phb.get_balancer(model)
    assert balancer.steps == 0 and balancer.config.bias_coef == CONFIG["bias_coef"]
    assert not any(bias.any() for bias in balancer.biases().values())
    off = phb.AutoModelForCausalLM.from_config(config, phi_balance=False)
    off.save_pretrained(tmp_path / "off")
    assert not is_patched(phb.AutoModelForCausalLM.from_pretrained(tmp_path / "off"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    phb.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert len(warned.about("start anew")) == 1


# ---------------------------------------------------------------------- checkpoints of a Trainer


def run(folder, config, steps, resume=None, model=None, **attached):
    model = ordinary() if model is None else model
    if config is not None:
        phb.patch(model, config)
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    trainer = make_trainer(model, folder, learning_rate=0.1, **options)
    if attached:
        phb.attach(trainer, **attached)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_balancing_begins_on_the_checkpoint_of_an_unbalanced_run(tmp_path):
    """Raises an error with a remedy, and the remedy works."""
    run(tmp_path, None, 2)
    with pytest.raises(FileNotFoundError, match=r"phb\.attach\(trainer, fresh_duals=True\)"):
        run(tmp_path, {"coef": 0.5}, 4, resume=True)
    trainer = run(tmp_path, {"coef": 0.5}, 4, resume=True, fresh_duals=True)
    assert phb.get_balancer(trainer.model).steps == 2 and trainer.state.global_step == 4


@pytest.mark.parametrize("first", [{"method": "switch"}, {"method": "pooled"}, {"track": "load"}], ids=str)
def test_resumed_with_another_method(first, tmp_path):
    """Every method keeps both means. φ continues with them, and its price comes from the mean of the probabilities."""
    earlier = phb.get_balancer(run(tmp_path, first, 2).model)
    trainer = run(tmp_path, {"coef": 0.5, "ema_rate": 0.01}, 4, resume=True)
    balancer = phb.get_balancer(trainer.model)
    assert balancer.steps == 4
    for name, mean in balancer.means("probs").items():
        torch.testing.assert_close(mean, earlier.means("probs")[name], rtol=0, atol=0.03)
        price = (mean * len(mean)).log()
        torch.testing.assert_close(balancer.prices()[name], price - price.mean(), rtol=1e-4, atol=1e-5)


def test_trained_again_in_the_same_folder(tmp_path):
    """`train()`, `train(resume_from_checkpoint="checkpoint-2")`, `train()`: the third call rewrites checkpoint-2."""
    folder = tmp_path / "checkpoint-2"
    model = ordinary()
    trainer = run(tmp_path, {"coef": 0.5}, 4, model=model)
    first = (folder / "phi_balance.state").read_bytes()
    trainer.train(resume_from_checkpoint=str(folder))
    balancer = phb.get_balancer(model)
    assert balancer.steps == 4 and (folder / "phi_balance.state").read_bytes() == first
    trainer.train()
    assert balancer.steps == 8
    for number, steps in ((2, 6), (4, 8)):
        folder = tmp_path / f"checkpoint-{number}"
        other = phb.patch(AutoModelForCausalLM.from_pretrained(folder), {"coef": 0.5})
        phb.get_balancer(other).load(folder)
        assert phb.get_balancer(other).steps == steps
    assert torch.equal(logits(other), logits(model))


# ---------------------------------------------------------------------- dtypes and modes


@pytest.fixture
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


TYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize("default_dtype, dtype", TYPES, indirect=["default_dtype"], ids=str)
@pytest.mark.parametrize("bias_coef", [0.0, 0.1])
def test_another_default_type(default_dtype, dtype, bias_coef):
    """Equals the result under float32. In 16 bits the coefficient is large, with the tolerance of the gradients."""
    coef, watches = 20.0, []

    def build():
        return ordinary(experts_implementation="eager").to(dtype).train()  # the grouped kernel has no float64

    for balanced in (True, False):
        model = build()
        if balanced:
            priced(phb.patch(model, {"coef": coef, "bias_coef": bias_coef}))
        watch = Watch(model)
        take_steps(model, 1 if bias_coef else 2, learning_rate=0.0)  # a bias that has moved changes the task
        watches.append(watch.close())
    balanced, plain = watches
    assert balanced.moves == len(plain.steps)
    for step, task in zip(balanced.steps, plain.steps):
        right = {name: coef * value.float() for name, value in charge(build(), task, step.prices).items()}
        found = ({name: value.float() for name, value in one.gradients.items()} for one in (step, task))
        ratio, rest = received(*found, right)
        assert abs(ratio - 1) < 0.02 and rest < 0.1, f"{ratio:.4f} (rest {rest:.1e})"
        assert step.logged == sum(int(tokens_of(forward["inputs"]).sum()) for forward in task.forwards)
    biases = phb.get_balancer(balanced.model).biases().values()
    assert all(bias.dtype == torch.float32 and bool(bias.any()) == (bias_coef > 0) for bias in biases)


def evaluated(model):
    with phb.get_balancer(model).evaluation():
        model.eval()(**DATA[0])
        phb.get_balancer(model).eval_metrics()
    model.generate(DATA[1]["input_ids"], attention_mask=DATA[1]["attention_mask"], max_new_tokens=3)


def calibrated(model):
    phb.calibrate(model, DATA)


@pytest.mark.parametrize("config", [CONFIG, {"method": "quantile"}], ids=["phi", "quantile"])
@pytest.mark.parametrize("first", [evaluated, calibrated])
@pytest.mark.parametrize("patched_inside", [False, True])
def test_inference_mode_before_the_first_step(patched_inside, first, config):
    """Inference mode, common in scripts, leaves nothing that a step cannot change, and the same as `no_grad`."""
    models = []
    for mode in (torch.inference_mode(), torch.no_grad()):
        model = ordinary()
        if not patched_inside:
            phb.patch(model, config)
        with mode:
            first(phb.patch(model, config))
        models.append(take_steps(model))
    assert phb.get_balancer(models[0]).steps == 3
    assert_same_duals(*models)


# ---------------------------------------------------------------------- warnings about what cannot work


def even(**config):
    """Returns a model whose experts have equal router rows, as after upcycling."""
    model = ordinary(num_local_experts=8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight[:1].expand(8, -1).clone())
    return phb.patch(model, {"coef": 0.5, "ema_rate": 1.0, **config})


def test_routers_that_start_even_are_said(warned):
    """Records the balancer's step count and state after each step."""
    balancer = phb.get_balancer(take_steps(even(), 2, learning_rate=0.0))
    (line,) = warned.about("are even")
    assert "track='load'" in line and "bias_coef" in line
    assert balancer.metrics()["max_vio"] == pytest.approx(3.0)
    assert all(price.abs().max() < 1e-5 for price in balancer.prices().values())

    warned.lines.clear()
    balancer = phb.get_balancer(take_steps(even(track="load"), 2, learning_rate=0.0))
    assert all(price.max() - price.min() > 1 for price in balancer.prices().values())
    model, total = even(bias_coef=0.003), 0
    for _ in range(8):
        total = total + torch.stack(list(phb.get_balancer(take_steps(model, 1, learning_rate=0.0)).loads().values()))
    assert bool((total > 0).all())
    assert not warned.about("are even")


class ByHand:
    """An optimizer outside torch."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def step(self):
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


def in_eval_mode(model):
    model.eval()
    return SGD(model.parameters(), lr=0.01)


def frozen(model):
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return SGD(model.lm_head.parameters(), lr=0.01)


def not_torchs(model):
    return ByHand(model.parameters())


SILENT = {
    in_eval_mode: "nothing is balanced: it is in eval mode: call model.train()",
    frozen: "nothing is balanced: its routers are frozen",
    not_torchs: "no optimizer of torch's has stepped, so the prices never move. Call phb.get_balancer(model).step()",
}


@pytest.mark.parametrize("bias_coef", [0.0, 0.1])
@pytest.mark.parametrize("prepare", SILENT)
def test_a_loop_in_which_nothing_moves_is_told_why(prepare, bias_coef, warned):
    """Warns once, after eight steps."""
    model = phb.patch(ordinary(), {"coef": 0.5, "bias_coef": bias_coef}).train()
    optimizer, said = prepare(model), []
    for _ in range(4):
        for batch in DATA:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            said.append(len(warned.about(SILENT[prepare])))
    assert phb.get_balancer(model).steps == 0
    assert said[-1] == 1 and 4 <= said.index(1) <= 9
