"""
Measures how much of the declared coefficient an optimizer received.

A run is made twice, with and without balancing. A `Watch` records the gradients of each step. The difference of the
two gradients is compared with the gradient of

    coef * sum over layers of the mean over tokens of <q, p>

which autograd computes on an ordinary model (`charge`) with the same weights, inputs and random numbers, and constant
prices q. Only the prices are read from hf_phibalance. The learning rate is 0, so that the weights of both runs stay
the same.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import FIRST_PLAIN_ID, random_model, set_prices, tiny_config, tiny_model
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_phibalance as phb


COEF = 0.5
TOLERANCE = 1e-3  # of the coefficient, in fp32
TWO_LAYERS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": []},
    "deepseek_v3": {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
}
KEPT = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache")  # inputs of a backbone to keep

# ---------------------------------------------------------------------- models


def sizes(family: str, **fields) -> dict:
    return {"num_hidden_layers": 2, **TWO_LAYERS[family], **fields}


def ordinary(family: str = "mixtral", **fields):
    """Returns a random model of two layers and four experts in eval mode, as `from_pretrained` does."""
    return tiny_model(family, **sizes(family, **fields))


def ordinary_scorer(family: str = "mixtral"):
    """Returns the same with a head of one score, as in reward models."""
    return random_model(AutoModelForSequenceClassification, tiny_config(family, **sizes(family, num_labels=1)), 0)


@functools.lru_cache
def saved(family: str) -> Path:
    """Returns the folder of `ordinary(family)`, saved once."""
    SAVED.append(tempfile.TemporaryDirectory())
    ordinary(family).save_pretrained(SAVED[-1].name)
    return Path(SAVED[-1].name)


SAVED: list[tempfile.TemporaryDirectory] = []


def loaded(family: str, balanced: bool, **config):
    """Returns `ordinary(family)` loaded from its folder, with the flag if `balanced`."""
    if not balanced:
        return AutoModelForCausalLM.from_pretrained(saved(family))
    return priced(phb.AutoModelForCausalLM.from_pretrained(saved(family), phi_balance={"coef": COEF, **config}))


def priced(model):
    """Returns a balanced model with non-zero prices, as after some steps."""
    set_prices(model, seed=1)
    return model


# ---------------------------------------------------------------------- data


def batches(count: int, rows: int = 2, length: int = 10, seed: int = 3) -> list[dict]:
    """Returns batches of right-padded random tokens. Neighbours have unequal numbers of tokens."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids = torch.randint(FIRST_PLAIN_ID, 128, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 1 - number % (length - 3) :] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def tokens_of(inputs: dict) -> Tensor:
    """Returns the token mask `(B, S)`: the attention mask, or else all but the padding token."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"] != 0 if mask is None else mask.bool()


# ---------------------------------------------------------------------- ordinary steps


def take_steps(model, count: int = 3, learning_rate: float = 0.1, seed: int = 3):
    """Trains the trainable parameters of `model` in a plain loop that calls nothing of ours. Returns the model."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for batch in batches(count, seed=seed):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model) -> Tensor:
    """Returns the logits of `model` in eval mode for a batch that nothing else uses."""
    with torch.no_grad():
        return model.eval()(**batches(1, rows=4, seed=7)[0]).logits


# ---------------------------------------------------------------------- what the optimizer got


@dataclasses.dataclass
class Step:
    """One optimizer step: the gradients that the optimizer got, and the forwards, weights and prices behind them."""

    gradients: dict[str, Tensor]
    forwards: list[dict]
    weights: dict[str, Tensor]
    prices: dict[str, Tensor] | None
    logged: float | None = None  # tokens of the step, as the balancer reports them afterwards


class Watch:
    """
    Records the optimizer steps of `model` until it is closed.

    Args:
        by_itself: False if the loop calls `take` when gradients are complete, since its optimizer calls a closure.
    """

    def __init__(self, model, by_itself: bool = True):
        self.model, self.steps = model, []
        self._forwards: list[dict] = []
        self._weights: dict[str, Tensor] = {}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        try:
            self.balancer = phb.get_balancer(model)
        except ValueError:
            self.balancer = None
        self._before = self.balancer.steps if self.balancer else 0
        self._handles = [model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)]
        if by_itself:
            self._handles.append(register_optimizer_step_pre_hook(self._optimizer))

    def _note(self, module, args, kwargs):
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            inputs = dict(zip(KEPT, args)) | {name: kwargs[name] for name in KEPT if kwargs.get(name) is not None}
            inputs = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
            self._forwards.append({"inputs": inputs, "random": torch.get_rng_state()})
            self._weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def _optimizer(self, optimizer, args, kwargs):
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} & self._names.keys()
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer is called even on overflow
        if own and overflow is not None and float(overflow):
            self._read_tokens()
            self.forget()
        elif own:
            self.take(own, getattr(optimizer, "grad_scale", None))

    def take(self, own=None, scale: Tensor | None = None):
        """Records complete gradients, of the parameters with the ids `own` or of all. Divides them by `scale`."""
        gradients = {
            self._names[id(p)]: p.grad.detach().clone() / (1.0 if scale is None else scale)
            for p in self.model.parameters()
            if p.grad is not None and (own is None or id(p) in own)
        }
        if self.steps and not self._forwards and not gradients.keys() & self.steps[-1].gradients.keys():
            self.steps[-1].gradients.update(gradients)  # from another optimizer of the same step
            return
        self._read_tokens()
        prices = None
        if self.balancer is not None:
            prices = {name: price.detach().clone() for name, price in self.balancer.prices().items()}
        self.steps.append(Step(gradients, self._forwards, self._weights, prices))
        self._forwards = []

    def forget(self):
        """Drops the forwards since the last step."""
        self._forwards = []

    def _read_tokens(self):
        if self.balancer is not None and self.balancer.steps and self.steps and self.steps[-1].logged is None:
            self.steps[-1].logged = self.balancer.metrics()["tokens"]

    def close(self) -> "Watch":
        for handle in self._handles:
            handle.remove()
        self._read_tokens()
        return self

    @property
    def moves(self) -> int:
        """Number of times that the duals have moved."""
        return self.balancer.steps - self._before


# ---------------------------------------------------------------------- what it should have got


def charge(
    model, task: Step, prices: dict[str, Tensor], counts: Callable = tokens_of, evenly: bool = False, autocast=None
) -> dict[str, Tensor]:
    """
    Returns the gradient of `sum over layers of the mean over tokens of <q, p>` in step `task`, by autograd on `model`.

    Args:
        model: an ordinary model of the same architecture.
        counts: makes the mask of the tokens that count from the inputs of a forward.
        evenly: weights forwards equally, instead of tokens.
        autocast: data type of the forwards.
    """
    assert not [hook for module in model.modules() for hook in module._forward_hooks.values()], "not an ordinary model"
    model.train().requires_grad_(True)
    model.load_state_dict(task.weights, strict=False)
    scoring = torch.sigmoid if model.config.model_type == "deepseek_v3" else functools.partial(torch.softmax, dim=-1)
    logits: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: logits.__setitem__(name, output[0])
        )
        for name in prices
    ]
    sums, tokens = [], []
    for forward in task.forwards:
        torch.set_rng_state(forward["random"])
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            model.base_model(**forward["inputs"])
        keep = counts(forward["inputs"]).reshape(-1)
        total = torch.zeros(())
        for name, price in prices.items():
            scores = scoring(logits[name].reshape(-1, len(price)).float())
            total = total + ((scores / scores.sum(-1, keepdim=True))[keep] @ price).sum()
        sums.append(total)
        tokens.append(int(keep.sum()))
    for handle in handles:
        handle.remove()
    mean = sum(s / n for s, n in zip(sums, tokens)) / len(sums) if evenly else sum(sums) / sum(tokens)
    model.zero_grad(set_to_none=True)
    mean.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def received(balanced: dict, plain: dict, right: dict) -> tuple[float, float]:
    """
    Returns the multiple of `right` that balancing has added to the gradient, and the length of the rest of what it
    added, relative to `right`.
    """
    assert balanced.keys() == plain.keys() and plain.keys() >= right.keys()
    added = torch.cat([(balanced[name] - plain[name]).reshape(-1).double() for name in plain])
    wanted = torch.cat([right.get(name, torch.zeros_like(plain[name])).reshape(-1).double() for name in plain])
    ratio = float(added @ wanted / (wanted @ wanted))
    return ratio, float((added - ratio * wanted).norm() / wanted.norm())


def coefficients(balanced: Watch, plain: Watch, build: Callable = ordinary, **how) -> list[tuple[float, float]]:
    """Returns, for each step, the received share of COEF and the relative length of the rest."""
    assert len(balanced.steps) == len(plain.steps) > 0
    model, found = build(), []
    state = torch.get_rng_state()
    for step, task in zip(balanced.steps, plain.steps):
        right = {name: COEF * value for name, value in charge(model, task, step.prices, **how).items()}
        found.append(received(step.gradients, task.gradients, right))
    torch.set_rng_state(state)
    return found


def assert_declared(
    balanced: Watch,
    plain: Watch,
    build: Callable = ordinary,
    tolerance: float = TOLERANCE,
    counts: Callable = tokens_of,
    moves: int | None = None,
    rest: float | None = None,
    **how,
):
    """
    Asserts that in every step the declared coefficient arrived, each token counted once, and the duals moved.

    Args:
        tolerance: of the coefficient.
        rest: largest relative length of the rest; by default five times the tolerance.
        moves: number of moves of the duals; by default one for each recorded step.
    """
    found = coefficients(balanced, plain, build, counts=counts, **how)
    allowed = 5 * tolerance if rest is None else rest
    told = "; ".join(f"{ratio:.5f} (rest {other:.1e})" for ratio, other in found)
    for ratio, other in found:
        assert abs(ratio - 1) <= tolerance and other <= allowed, f"coefficient received / declared: {told}"
    expected = [sum(int(counts(f["inputs"]).sum()) for f in task.forwards) for task in plain.steps]
    assert [step.logged for step in balanced.steps] == expected, "tokens of each step"
    assert balanced.moves == (len(plain.steps) if moves is None else moves), "moves of the duals"
