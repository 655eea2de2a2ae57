"""Scenarios for two or four gloo ranks: spread models, uneven batches, and local steps."""

import copy
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from layouts import Layout, load_spread, measure_layouts
from references import naive_training
from tiny import set_prices, tiny_batch, tiny_model
from torch.distributed import pipelining
from torch.distributed.fsdp import fully_shard
from torch.utils.data import SequentialSampler
from training import make_trainer, rows
from transformers import AttentionInterface

import hf_phibalance as phb
from hf_phibalance import PhiBalanceConfig


TRAINERS = ("raw loop", "Trainer")
RUNS = {  # number of rows, and arguments; two ranks, two rows per micro-batch
    "repeated": (11, {}),  # accelerate fills up the last batches with rows of the first
    "uneven": (11, {"accelerator_config": {"even_batches": False}}),
    "uneven steps": (13, {"accelerator_config": {"even_batches": False}, "gradient_accumulation_steps": 2}),
    "drop_last": (11, {"dataloader_drop_last": True}),
    "tokens of each device": (11, {"average_tokens_across_devices": False}),
}
LOCAL = PhiBalanceConfig(coef=2.0, bias_coef=0.01)
LOCAL_STEPS, LOCAL_RATE = 3, 0.1


# ---------------------------------------------------------------------- uneven batches


class Noting(torch.optim.SGD):
    """Records the gradients it gets. Changes no weights."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.gradients = model, []

    def step(self, closure=None):
        self.gradients.append(
            {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        )


def train(run, folder, balanced):
    """Returns the gradients, prices and this rank's rows of every step."""
    count, arguments = RUNS[run]
    model = tiny_model("mixtral").train()
    optimizer, seen, prices = Noting(model), [], []
    trainer = make_trainer(
        model, folder, data=rows(count), num_train_epochs=1, **{"gradient_accumulation_steps": 1} | arguments
    )
    trainer.optimizer = optimizer
    trainer._get_train_sampler = lambda *args: SequentialSampler(trainer.train_dataset)
    if balanced:
        phb.patch(model, {"coef": 5.0})
        phb.attach(trainer)
        begin = phb.PhiBalancer.begin_step

        def noting_begin(balancer, batches, **more):
            own = [[ids[m.bool()].tolist() for ids, m in zip(b["input_ids"], b["attention_mask"])] for b in batches]
            seen.append(own)
            prices.append({name: price.numpy() for name, price in balancer.prices().items()})
            return begin(balancer, batches, **more)

        balancer = phb.get_balancer(model)
        balancer.begin_step = noting_begin.__get__(balancer)
    trainer.train()
    return optimizer.gradients, seen, prices


def train_unevenly(folder):
    """Returns, by run and step, what balancing added to the gradient, the prices, and the rows of each micro-batch."""
    found = {}
    for run in RUNS:
        plain, _, _ = train(run, folder, balanced=False)
        balanced, seen, prices = train(run, folder, balanced=True)
        added = [{name: (new[name] - old[name]).numpy() for name in new} for new, old in zip(balanced, plain)]
        assert len(plain) == len(balanced) == len(seen)
        found[run] = list(zip(added, prices, seen))
    return found


# ---------------------------------------------------------------------- local steps


def train_locally():
    """Takes three steps on each rank alone, checks them against the naive loop, then averages both."""
    rank = dist.get_rank()
    model = tiny_model("mixtral").train()
    steps = [[tiny_batch(model, 2 + rank, 8, seed=10 * rank + step)] for step in range(LOCAL_STEPS)]
    naive = copy.deepcopy(model)
    history = naive_training(naive, steps, LOCAL, LOCAL_RATE)
    phb.patch(model, LOCAL)
    balancer = phb.get_balancer(model)
    balancer.process_group = dist.new_subgroups(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=LOCAL_RATE)
    for micro_batches in steps:
        balancer.begin_step(micro_batches)
        for batch in micro_batches:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    far = max((left - right).abs().max().item() for left, right in zip(model.parameters(), naive.parameters()))
    moved = max(
        (left - right).abs().max().item()
        for left, right in zip(naive.parameters(), tiny_model("mixtral").parameters())
    )
    state = balancer.state_dict()
    averaged = {name: _average(value) if value.is_floating_point() else value for name, value in state.items()}
    balancer.load_state_dict(averaged)
    return {
        "far": far,
        "moved": moved,
        "prices": _numpy(history[-1]["prices"]),
        "means": _numpy(history[-1]["means"]["probs"]),
        "biases": _numpy(history[-1]["biases"]),
        "own": {name: value.numpy() for name, value in state.items()},
        "averaged means": _numpy(balancer.means("probs")),
        "averaged prices": _numpy(balancer.prices()),
    }


def _average(value):
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _numpy(by_name):
    return {name: value.numpy() for name, value in by_name.items()}


# ---------------------------------------------------------------------- experts without a token


def sharded_gradient(balanced):
    """
    Returns the gradient of a model with separately sharded experts, where rank 1 has two tokens; the prices; and the
    smallest number of experts in a layer without a token on this rank.
    """
    model = tiny_model("mixtral", **WITH_IDLE_EXPERTS).train()
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts)
        fully_shard(layer)
    fully_shard(model)
    idle = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, _, out: idle.append(gate.num_experts - len(out[2].unique())))
    batch, prices = batches_of_ranks(model)[dist.get_rank()], {}
    if balanced:
        balancer = set_prices(phb.patch(model, {"coef": 5.0}))
        prices = balancer.prices()
    model(**batch).loss.backward()  # one backward per step needs no begin_step(), on several ranks either
    if balanced:
        balancer.step()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, prices, min(idle)


WITH_IDLE_EXPERTS = {"num_local_experts": 8}  # each token chooses two of them


def batches_of_ranks(model):
    return tiny_batch(model, 3, 8, padded=False), tiny_batch(model, 1, 2, padded=False, seed=1)


def train_with_idle_experts():
    plain, _, idle = sharded_gradient(balanced=False)
    balanced, prices, _ = sharded_gradient(balanced=True)
    added = {name: (balanced[name] - plain[name]).numpy() for name in balanced}
    return {"added": added, "prices": _numpy(prices), "idle": idle}


# ---------------------------------------------------------------------- parts of rows


class Gather(torch.autograd.Function):
    """Concatenates the parts of all ranks. Each part gets the sum of its gradients on all ranks."""

    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]


def attend_to_all_parts(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal attention of this rank's queries to the keys of all ranks, as in context parallelism."""
    key, value = (Gather.apply(part.contiguous()) for part in (key, value))
    start, width = dist.get_rank() * query.shape[2], key.shape[2]
    queries = torch.arange(start, start + query.shape[2])
    hidden = query @ key.transpose(2, 3) * scaling + torch.where(
        queries[:, None] >= torch.arange(width), 0.0, -torch.inf
    )
    return (hidden.softmax(-1) @ value).transpose(1, 2), None


def gradient_of_parts(balanced):
    """Returns the gradient averaged over ranks, each with half of the batch's columns; the prices; the balancer."""
    AttentionInterface.register("parts", attend_to_all_parts)
    model = tiny_model("mixtral", num_key_value_heads=4).train()
    model.set_attn_implementation("parts")
    balancer, prices = None, {}
    if balanced:
        balancer = set_prices(phb.patch(model, {"coef": 5.0}))
        prices = balancer.prices()
    ids = whole_rows(model)
    columns = torch.arange(ids.shape[1]).chunk(dist.get_world_size())[dist.get_rank()]
    part = {"input_ids": ids[:, columns], "attention_mask": torch.ones_like(ids[:, columns])}
    if balancer is not None:
        balancer.begin_step([part])
    model(**part, position_ids=columns[None], use_cache=False).logits.square().mean().backward()
    if balancer is not None:
        balancer.step()
    return {name: _average(p.grad) for name, p in model.named_parameters() if p.grad is not None}, prices, balancer


def whole_rows(model):
    return tiny_batch(model, 3, 12, padded=False)["input_ids"]


def train_on_parts():
    plain, *_ = gradient_of_parts(balanced=False)
    balanced, prices, balancer = gradient_of_parts(balanced=True)
    added = {name: (balanced[name] - plain[name]).numpy() for name in balanced}
    return {"added": added, "prices": _numpy(prices), "tokens": balancer.metrics()["tokens"]}


# ---------------------------------------------------------------------- what is refused


def refusal(function, *args):
    try:
        function(*args)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def patch_stage_of_transformers(folder):
    model = load_spread(Layout("pipeline", {"pp_size": 2}), Path(folder) / "mixtral")
    phb.patch(model)


class Stage(torch.nn.Module):
    """Some layers of a model, called one by one."""

    def __init__(self, model, first):
        super().__init__()
        self.first, self.rope = first, model.model.rotary_emb
        self.embed = model.model.embed_tokens if first else torch.nn.Identity()
        self.layers = torch.nn.ModuleList(model.model.layers[:1] if first else model.model.layers[1:])

    def forward(self, hidden):
        hidden = self.embed(hidden)
        positions = torch.arange(hidden.shape[1])[None]
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=self.rope(hidden, positions), attention_mask=None)
        return hidden


def train_in_a_pipeline(steps=8):
    """Returns the logged messages, and the number of steps that moved the duals."""
    rank, model = dist.get_rank(), tiny_model("mixtral").train()
    phb.patch(model, {"coef": 1.0})
    optimizer, said = torch.optim.SGD(model.parameters(), lr=1e-3), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hf_phibalance").addHandler(handler)
    stage = pipelining.PipelineStage(Stage(model, first=rank == 0), rank, 2, torch.device("cpu"))
    schedule = pipelining.ScheduleGPipe(stage, 2, loss_fn=lambda hidden, target: hidden.square().mean())
    ids = tiny_batch(model, 4, 8, padded=False)["input_ids"]
    for _ in range(steps):
        schedule.step(ids) if rank == 0 else schedule.step(target=ids.float())
        assert any(p.grad is not None for p in model.parameters())  # training works without our step
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("hf_phibalance").removeHandler(handler)
    return said, phb.get_balancer(model).steps


def train_different_models(other_coef, layers):
    """Trains with another configuration, or with fewer layers, on rank 1."""
    rank = dist.get_rank()
    model = tiny_model("mixtral").train()
    if rank == 1:
        del model.model.layers[layers:]
    phb.patch(model, {"coef": other_coef if rank == 1 else 1.0})
    balancer = phb.get_balancer(model)
    batch = tiny_batch(model)
    balancer.begin_step([batch])
    model(**batch).loss.backward()
    balancer.step()


def on_two_ranks(names, folder):
    return {
        "layouts": measure_layouts(names, TRAINERS, folder, "mixtral"),
        "uneven": train_unevenly(folder),
        "local": train_locally(),
        "idle experts": train_with_idle_experts(),
        "parts": train_on_parts(),
        "stage of transformers": refusal(patch_stage_of_transformers, folder),
        "pipelining": train_in_a_pipeline(),
        "other strength": refusal(train_different_models, 2.0, 3),
        "other layers": refusal(train_different_models, 1.0, 2),
    }
