"""
The life of a patched model as a hypothesis state machine, compared with a plain model that is never patched.

Everything that happens to the model (adapters, copies, files, types) also happens to the plain one. The expected
effect of balancing is written out: the price term is part of the loss, a router's forward adds the bias
(`references.select_with`), and the duals follow from the recorded choices in float64.
"""

import contextlib
import copy
import gc
import re
import tempfile
import threading
from collections import Counter
from typing import ClassVar

import torch
from charging import collect
from checks import is_patched, ours, rebuilt
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig, get_peft_model
from references import SLOPES, probabilities, routed, routers, select_with, share
from tiny import tiny_batch, tiny_model
from torch.overrides import _get_current_function_mode_stack
from training import Recorder, make_trainer
from transformers import AutoModelForCausalLM, PrinterCallback

import hf_phibalance as phb
from hf_phibalance.config import STATISTICS


CONFIGS = {
    "both": {"coef": 2.0, "bias_coef": 0.02, "ema_rate": 0.5},
    "gradient": {"coef": 1.0, "potential": "l2", "track": "load"},
    "bias": {"coef": 0.0, "bias_coef": 0.05},
    "labels": {"coef": 2.0, "token_mask": "labels"},
    "load only": {"coef": 0.5, "track": "load", "bias_track": "load"},
    "frozen": {"method": "frozen"},
    "none": {"method": "none"},
}
SIZES = {
    "mixtral": {"num_hidden_layers": 2},
    "deepseek_v3": {"num_hidden_layers": 2, "first_k_dense_replace": 0, "mlp_layer_types": ["sparse", "sparse"]},
}
RATE = 0.05
NOT_COMPARED = {"_name_or_path", "transformers_version"}  # of a config: where a model was loaded from


class Reference:
    """The expected state of a model balanced by `config` (`None`: not balanced). `model` itself is never patched."""

    def __init__(self, model):
        self.model, self.config, self.steps = model, None, 0
        self.means, self.prices, self.biases = {}, {}, {}
        self.adapter, self.by_adapter = None, {}  # the adapter whose bias is in force, and the biases of the others

    def routers(self):
        """Returns the routers by their names without adapters."""
        return {"model." + re.search(r"layers\.\d+\.mlp\.gate", name)[0]: r for name, r in routers(self.model).items()}

    @property
    def has_native_bias(self):
        return hasattr(next(iter(self.routers().values())), "e_score_correction_bias")

    def patch(self, config):
        """A new configuration continues with the present duals."""
        experts = self.model.config.num_local_experts
        before, self.config = self.config, config
        if before is None:
            uniform = torch.full((experts,), 1 / experts, dtype=torch.float64)
            self.means, self.steps = {kind: dict.fromkeys(self.routers(), uniform) for kind in STATISTICS}, 0
            self.adapter, self.by_adapter = None, {}
            if not self.has_native_bias:
                self.biases = {name: torch.zeros(experts, dtype=torch.float64) for name in self.routers()}
        self.set_prices()

    def unpatch(self):
        """A native bias stays, that of the model itself."""
        self.follow(None)
        self.config, self.biases = None, {}

    def follow(self, adapter):
        """Puts the bias of `adapter` (`None`: the model's) in force. A new adapter starts with the present bias."""
        if self.config is None or adapter == self.adapter:
            return
        native = {
            name: router.e_score_correction_bias for name, router in self.routers().items() if self.has_native_bias
        }
        self.by_adapter[self.adapter] = {name: bias.clone() for name, bias in (native or self.biases).items()}
        biases = self.by_adapter.pop(adapter, self.by_adapter[self.adapter])
        for name, bias in native.items():
            bias.copy_(biases[name])
        self.biases, self.adapter = {} if native else dict(biases), adapter

    def set_prices(self):
        self.prices = {name: self.price_of(mean) for name, mean in self.means[self.config.track].items()}

    def price_of(self, mean):
        slope = SLOPES[self.config.potential]
        price = torch.tensor([slope(len(mean) * m) for m in mean.tolist()], dtype=torch.float64)
        return price - price.mean()

    @contextlib.contextmanager
    def selecting(self):
        """Context manager: routers select with the bias, by a replaced forward in families without a native bias."""
        biased = {} if self.has_native_bias else self.biases
        for name, bias in biased.items():
            select_with(self.routers()[name], bias.float())
        yield
        for name in biased:
            del self.routers()[name].forward

    def step(self, batches):
        """Returns the gradients of an optimizer step by name, and moves the duals."""
        self.model.zero_grad()
        labels, tokens = (sum(int(count(batch)) for batch in batches) for count in (count_labels, count_tokens))
        sums = {name: {"probs": 0.0, "load": 0.0} for name in self.routers()}
        for batch in batches:
            with self.selecting(), routed(self.model) as seen:
                loss = self.model(**batch, num_items_in_batch=torch.tensor(labels)).loss
            counted = batch["attention_mask"].reshape(-1).bool()
            for name, ((logits, _, *_),) in zip(self.routers(), seen.values()):
                probs = probabilities(self.model, logits)[counted]
                if self.config is not None and self.config.coef:
                    loss = loss + self.config.coef * (probs @ self.prices[name].to(probs)).sum() / tokens
                sums[name]["probs"] += probs.detach().double().sum(0)
            for name, ((_, chosen),) in zip(self.routers(), seen.values()):
                counts = Counter(chosen[counted].flatten().tolist())
                sums[name]["load"] += torch.tensor([counts[e] for e in range(len(sums[name]["probs"]))]).double()
            loss.backward()
        if self.config is not None:
            self.move_duals(sums)
        return collect(self.model)

    def move_duals(self, sums):
        rate = self.config.ema_rate
        for kind, by_layer in self.means.items():
            self.means[kind] = {n: (1 - rate) * mean + rate * share(sums[n][kind]) for n, mean in by_layer.items()}
        self.set_prices()
        self.loads, self.steps = {name: total["load"] for name, total in sums.items()}, self.steps + 1
        if self.config.bias_coef > 0:
            for name, router in self.routers().items():
                native = self.has_native_bias
                bias = router.e_score_correction_bias.double() if native else self.biases[name]
                moved = bias - self.config.bias_coef * self.price_of(self.means[self.config.bias_track][name])
                if native:
                    router.e_score_correction_bias.copy_(moved)
                else:
                    self.biases[name] = moved


def count_labels(batch):
    return (batch["labels"][:, 1:] != -100).sum()


def count_tokens(batch):
    return batch["attention_mask"].sum()


def footprint(model):
    """Returns everything a patch could leave behind: attributes, hooks, wrapped methods, config, what is trainable."""
    tables = [f"_{kind}{suffix}" for kind in ("forward_hooks", "forward_pre_hooks") for suffix in ("", "_with_kwargs")]
    modules = {
        name: (type(module), sorted(vars(module)), [len(getattr(module, table)) for table in tables])
        for name, module in model.named_modules()
    }
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_COMPARED}
    return modules, config, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def everything(model):
    """Returns a model's weights, and its duals if it has any."""
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if is_patched(model):
        found |= {f"duals/{name}": value for name, value in phb.get_balancer(model).state_dict().items()}
        found["hooks"] = torch.tensor(len(ours(model)))
    return found


def assert_as_before(model, before):
    now = everything(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in now.items())


def assert_near(found, expected, tolerance):
    """Compares tensors by name, relative to the longest of them, so that expected zeros have a scale."""
    assert found.keys() == expected.keys()
    scale = max([1e-2, *(float(value.abs().max()) for value in expected.values())])
    for name, value in expected.items():
        assert float((found[name].double() - value.double()).abs().max()) <= tolerance * scale, name


class Life(RuleBasedStateMachine):
    """Subclasses set `model_type`."""

    model_type: str
    tried: ClassVar[Counter] = Counter()  # number of tries of each event, over all examples

    @initialize(name=st.sampled_from(["both", "both", *sorted(CONFIGS), None]))
    def begin(self, name):
        self.model, plain = (tiny_model(self.model_type, **SIZES[self.model_type]).train() for _ in range(2))
        self.reference = Reference(plain)
        other = tiny_model(self.model_type, seed=1, **SIZES[self.model_type]).train()
        self.other = phb.patch(other, {"coef": 0.5, "bias_coef": 0.01})
        self.other_before, self.left = everything(self.other), None
        self.adapters, self.active, self.seed, self.events = 0, None, 0, 0
        if name is not None:
            self.patch(name)

    # ------------------------------------------------------------------ invariants

    @property
    def plain(self):
        return self.reference.model

    @property
    def has_adapter(self):
        return self.adapters > 0

    def batches(self, count):
        self.seed += count
        return [tiny_batch(self.model, 2, 6, seed=self.seed - i) for i in range(count)]

    def both(self, change):
        """Changes the model and the plain one in the same way."""
        self.model = change(self.model)
        self.reference.model = change(self.plain)

    @invariant()
    def a_step_goes_on_as_it_should(self):
        """Trains a step after two of three events. The others follow each other directly."""
        self.events += 1
        if self.events % 3:
            self.tried["train, afterwards"] += 1
            self.step(self.batches(1))

    @invariant()
    def nothing_is_left_of_a_patch(self):
        assert is_patched(self.model) is (self.reference.config is not None)
        if self.reference.config is None:
            assert not ours(self.model) and footprint(self.model) == footprint(self.plain)
        assert not ours(self.plain) and _get_current_function_mode_stack() == []
        assert torch.is_grad_enabled()

    @invariant()
    def duals_are_those_of_the_reference(self):
        if self.reference.config is None:
            return
        balancer, reference = phb.get_balancer(self.model), self.reference
        assert balancer.config == reference.config and balancer.steps == reference.steps
        for kind, means in reference.means.items():
            assert_near(balancer.means(kind), means, 1e-5)
        assert_near(balancer.prices(), reference.prices, 1e-4)
        biases = reference.biases
        if reference.has_native_bias:
            biases = {name: router.e_score_correction_bias for name, router in reference.routers().items()}
        assert_near(balancer.biases(), biases, 1e-5)

    @invariant()
    def others_are_as_they_were(self):
        assert_as_before(self.other, self.other_before)
        if self.left is not None:
            assert_as_before(*self.left)

    # ------------------------------------------------------------------ patching

    @rule(name=st.sampled_from(sorted(CONFIGS)))
    def patch(self, name):
        self.tried[f"patch, {name}"] += 1
        config = phb.PhiBalanceConfig(**CONFIGS[name])
        assert phb.patch(self.model, config) is self.model
        if self.reference.config != config:
            self.reference.patch(config)
            self.reference.follow(self.active)

    @precondition(lambda self: is_patched(self.model))
    @rule()
    def unpatch(self):
        self.tried["unpatch"] += 1
        phb.unpatch(self.model)
        self.reference.unpatch()

    # ------------------------------------------------------------------ training

    @rule(parts=st.integers(1, 2))
    def train(self, parts):
        self.tried["train"] += 1
        self.step(self.batches(parts))

    @rule(parts=st.integers(1, 2), between=st.sampled_from(["evaluate", "generate", "copy", "served"]))
    def train_while(self, parts, between):
        if self.has_adapter and between == "served":
            between = "generate"  # PEFT changes a module's class in all threads while it computes an adapted parameter
        self.tried[f"train, {between}"] += 1
        self.step(self.batches(parts), between)

    @rule(
        error=st.sampled_from([KeyboardInterrupt, ValueError]),
        place=st.sampled_from(["self_attn", "mlp.gate", "mlp.experts"]),
    )
    def train_after(self, error, place):
        """Gives up a step, then trains another one."""
        self.tried[f"train, {error.__name__}"] += 1
        self.fail(self.batches(2), error, place)
        self.step(self.batches(1))

    def step(self, batches, between="nothing"):
        """Checks that gradients and loads match the reference, whatever happens in between."""
        labels = torch.tensor(sum(int(count_labels(batch)) for batch in batches))
        self.model.zero_grad()
        patched = is_patched(self.model)
        if patched:
            phb.get_balancer(self.model).begin_step(batches)
        with self.served() if between == "served" else contextlib.nullcontext():
            for batch in batches:
                loss = self.model(**batch, num_items_in_batch=labels).loss
                if between == "evaluate":
                    self.evaluate()
                elif between == "generate":
                    self.generate()
                loss.backward()
        if between == "copy":  # the copy has no open step
            twin = copy.deepcopy(self.model)
            assert not patched or not phb.get_balancer(twin).is_open
        found = collect(self.model)
        self.check_gradients(found, self.reference.step(batches))
        with torch.no_grad():
            for model in (self.model, self.plain):
                for name, parameter in model.named_parameters():
                    if name in found:
                        parameter -= RATE * found[name]
        if patched:
            phb.get_balancer(self.model).step()
            assert_near(phb.get_balancer(self.model).loads(), self.reference.loads, 0.0)

    def check_gradients(self, found, expected):
        if self.reference.config is None:
            assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
            return
        assert_near(found, {n: gradient for n, gradient in expected.items() if not self.is_frozen(n)}, 1e-4)

    def is_frozen(self, name):
        """True if the method freezes this parameter: a router, but not an adapter on it (a trainer refuses that)."""
        config = self.reference.config
        return config is not None and config.method == "frozen" and ".mlp.gate." in name and "lora_" not in name

    def fail(self, batches, error, place):
        """Gives up a step in the middle of its forward."""

        def stop(*_):
            raise error("stopped")

        target = next(module for name, module in self.model.named_modules() if f"layers.1.{place}" in name)
        handle = target.register_forward_hook(stop)
        if is_patched(self.model):
            phb.get_balancer(self.model).begin_step(batches)
        with contextlib.suppress(error):
            self.model(**batches[0])
            raise AssertionError(f"{place} was never called")
        handle.remove()
        if is_patched(self.model):
            phb.get_balancer(self.model).discard_step()

    @contextlib.contextmanager
    def served(self):
        stop = threading.Event()

        def serve():
            while not stop.is_set():
                self.generate()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        stop.set()
        thread.join()

    def generate(self):
        with torch.no_grad():
            prompt = torch.arange(5, 9).view(1, -1)
            made = self.model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert made.shape[1] > 4

    @rule()
    def evaluate(self):
        """Checks that logits match the plain model's, and that only this batch is counted."""
        self.tried["evaluate"] += 1
        batch = tiny_batch(self.model, 3, 5, seed=1000)
        opened = phb.get_balancer(self.model).evaluation() if is_patched(self.model) else contextlib.nullcontext()
        with torch.no_grad(), opened, self.reference.selecting():
            found, expected = self.model.eval()(**batch).logits, self.plain.eval()(**batch).logits
            if is_patched(self.model):
                assert phb.get_balancer(self.model).eval_metrics()["tokens"] == count_tokens(batch)
        for model in (self.model, self.plain):
            model.train()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @precondition(
        lambda self: is_patched(self.model) and not (self.has_adapter and self.reference.config.method == "frozen")
    )
    @rule()
    def trainer_twice(self):
        """Calls `train()` twice, for one optimizer step each."""
        self.tried["trainer twice"] += 1
        recorder = Recorder(self.model)
        with tempfile.TemporaryDirectory() as folder:
            settings = {"num_train_epochs": 1, "max_steps": 1, "learning_rate": RATE, "gradient_accumulation_steps": 2}
            settings["logging_strategy"] = "no"
            trainer = make_trainer(self.model, folder, **settings)
            trainer.remove_callback(PrinterCallback)
            phb.attach(trainer)
            for time in range(2):
                recorder.steps.append([])
                trainer.train()
                expected = self.reference.step(recorder.steps[-1])
                plain, now = dict(self.plain.named_parameters()), dict(self.model.named_parameters())
                moved = {n: plain[n].detach() - RATE * g for n, g in expected.items()}
                moved = {n: value for n, value in moved.items() if not self.is_frozen(n)}
                assert_near({name: now[name].detach() for name in moved}, moved, 1e-5)
                with torch.no_grad():
                    for name, parameter in now.items():
                        plain[name].copy_(parameter)
                assert phb.get_balancer(self.model).steps == self.reference.steps, time
            # let a trainer leave its own traces on the plain model, too
            still = make_trainer(self.plain, folder, **{**settings, "learning_rate": 0.0})
            still.remove_callback(PrinterCallback)
            still.train()
        self.model._forward_pre_hooks.popitem()  # the recorder's
        self.model._forward_pre_hooks_with_kwargs.popitem()
        for model in (self.model, self.plain):
            model.zero_grad()

    # ------------------------------------------------------------------ adapters

    @precondition(lambda self: self.adapters < 2)
    @rule()
    def add_adapter(self):
        self.tried["add adapter"] += 1
        self.adapters += 1
        name = f"adapter{self.adapters}"
        config = LoraConfig(target_modules=["o_proj"], target_parameters=["mlp.gate.weight"], r=2, lora_alpha=8)

        def add(model):
            if self.adapters == 1:
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
                model.set_adapter(name)
            generator = torch.Generator().manual_seed(self.adapters)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if name in parameter_name:
                        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            return model.train()

        self.both(add)
        self.active = name
        self.reference.follow(name)

    @precondition(lambda self: self.adapters == 2)
    @rule(number=st.integers(1, 2))
    def switch_adapter(self, number):
        self.tried["switch adapter"] += 1
        self.both(lambda model: model.set_adapter(f"adapter{number}") or model)
        self.active = f"adapter{number}"
        self.reference.follow(self.active)

    @precondition(lambda self: self.has_adapter)
    @rule()
    def disable_adapter(self):
        self.tried["disable adapter"] += 1
        with self.model.disable_adapter(), self.plain.disable_adapter():
            self.reference.follow(None)
            self.evaluate()
        self.reference.follow(self.active)

    @precondition(lambda self: self.has_adapter)
    @rule(keep=st.booleans())
    def end_adapters(self, keep):
        """Merges or removes the adapters. Then trains the whole model except frozen routers."""
        self.tried["end adapters"] += 1
        if not keep:
            self.reference.follow(None)
        self.adapters, self.active, self.reference.adapter, self.reference.by_adapter = 0, None, None, {}

        def end(model):
            is_plain = model is self.plain
            model = model.merge_and_unload() if keep else model.unload()
            for name, parameter in model.named_parameters():
                if is_plain or not self.is_frozen(name):
                    parameter.requires_grad_(True)
            return model.train()

        self.both(end)

    # ------------------------------------------------------------------ copies, types, files

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how):
        self.tried["go on with a copy"] += 1

        self.left = self.model, everything(self.model)
        self.both(lambda model: rebuilt(model, how))

    @rule(dtype=st.sampled_from([torch.float16, torch.bfloat16]))
    def to_another_type_and_back(self, dtype):
        self.tried["to another type and back"] += 1
        self.both(lambda model: model.to(dtype))
        self.generate()
        self.both(lambda model: model.to(torch.float32))

    @precondition(lambda self: not self.has_adapter)
    @rule()
    def save_and_load(self):
        self.tried["save and load"] += 1
        with tempfile.TemporaryDirectory() as folder:
            for kind, model in (("model", self.model), ("plain", self.plain)):
                model.save_pretrained(f"{folder}/{kind}")
            self.model = phb.AutoModelForCausalLM.from_pretrained(f"{folder}/model").train()
            self.reference.model = AutoModelForCausalLM.from_pretrained(f"{folder}/plain").train()

    @rule()
    def the_other_model_trains(self):
        self.tried["the other model trains"] += 1
        balancer = phb.get_balancer(self.other)
        before = everything(self.model)
        self.other(**tiny_batch(self.other, 2, 6)).loss.backward()
        balancer.step()
        self.other.zero_grad()
        assert_as_before(self.model, before)
        self.other_before = everything(self.other)

    def teardown(self):
        if hasattr(self, "model"):
            self.unpatch()
            self.nothing_is_left_of_a_patch()
        gc.collect()
