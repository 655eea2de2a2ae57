"""Tiny training runs: unequal padded batches, trainers over them, what they were fed, and the definition as a plain loop."""

import contextlib
from collections import Counter

import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import FIRST_PLAIN_ID, SHRINK, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hf_phibalance as phb


TRAINERS = [Trainer, SFTTrainer]


def rows(count=11, shortest=3, longest=9, seed=0):
    """Token sequences of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    draw = torch.randint(FIRST_PLAIN_ID, SHRINK["vocab_size"], (count, longest), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": ids[:length]} for ids, length in zip(draw, lengths)])


def pad(examples):
    """Right-padded batch of `examples`, labels -100 on the padding."""
    ids = [torch.as_tensor(example["input_ids"]) for example in examples]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=SHRINK["pad_token_id"])
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def tokenizer():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(FIRST_PLAIN_ID, SHRINK["vocab_size"])}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")), **special)


def patched(model_type="mixtral", seed=0, model_args=None, **config):
    """A patched tiny model with a price gradient strong enough to be seen in every weight."""
    return phb.patch(tiny_model(model_type, seed, **(model_args or {})).train(), {"coef": 5.0, **config})


def make_trainer(model, folder, cls=Trainer, data=None, callbacks=(), eval_dataset=None, **arguments):
    """A quiet CPU trainer: 2 rows a micro-batch, 4 micro-batches a step, 11 rows: the second step of an epoch has two."""
    sft = issubclass(cls, SFTTrainer)
    arguments = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **({"bf16": False} if sft else {}),  # gradient checkpointing is on, as TRL has it
        **arguments,
    }
    args = (SFTConfig if sft else TrainingArguments)(str(folder), **arguments)
    extra = {"processing_class": tokenizer()} if sft else {"data_collator": pad}
    data = rows() if data is None else data
    return cls(model, args, train_dataset=data, eval_dataset=eval_dataset, callbacks=list(callbacks), **extra)


class Recorder(TrainerCallback):
    """The micro-batches of every optimizer step as the model received them, and the duals that the step left."""

    def __init__(self, model):
        self.steps, self.duals = [], []
        self.balancer = phb.get_balancer(model)
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        if module.training:
            self.steps[-1].append({key: kwargs[key].clone() for key in ("input_ids", "attention_mask", "labels")})

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append([])

    def on_step_end(self, args, state, control, **kwargs):
        balancer = self.balancer
        assert balancer.steps == state.global_step
        means = {statistic: balancer.means(statistic) for statistic in balancer.config.statistics}
        self.duals.append({"means": means, "prices": balancer.prices(), "biases": balancer.biases()})


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left, right):
    """Bitwise equality of two (nested) dicts of tensors."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[key])
        else:
            assert torch.equal(value, right[key]), key


# ---------------------------------------------------------------------- naive references, on unpatched models


def routers(model):
    return {
        name: module for name, module in model.named_modules() if type(module).__name__.lower().endswith("topkrouter")
    }


@contextlib.contextmanager
def routed(model):
    """`{router name: [(logits, chosen)]}` of the forwards inside."""
    seen = {name: [] for name in routers(model)}
    handles = [
        router.register_forward_hook(lambda module, args, out, name=name: seen[name].append((out[0], out[2])))
        for name, router in routers(model).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def probabilities(model, logits):
    if model.config.model_type == "deepseek_v3":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)
    return logits.softmax(-1)


def select_with(router, bias):
    """Makes an unpatched router select with `bias`: through its own buffer, or by Mixtral's forward written out."""
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.copy_(bias)
        return

    def forward(hidden):
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
        probs = logits.softmax(-1)
        chosen = (probs + bias).topk(router.top_k).indices
        values = probs.gather(-1, chosen)
        return logits, values / values.sum(-1, keepdim=True), chosen

    router.forward = forward


def naive_training(model, steps, config, lr):
    """
    The definition as a plain SGD loop over an *unpatched* model: the price term is part of the loss, the duals follow
    from the recorded router outputs. Trains `model` in place; returns the duals after each step.
    """
    experts = model.config.num_local_experts
    coef, rate = config.coef, config.ema_rate
    uniform = torch.full((experts,), 1 / experts, dtype=torch.float64)
    means = {name: {"probs": uniform, "load": uniform} for name in routers(model)}
    prices = {name: torch.zeros(experts) for name in means}
    biases = {name: torch.zeros(experts, dtype=torch.float64) for name in means}
    history = []

    def price_of(mean):
        price = (experts * mean).log() + 1  # ∇φ of the negative entropy, at the relative load
        return price - price.mean()

    for micro_batches in steps:
        labels_of_step = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
        tokens_of_step = sum(batch["attention_mask"].sum() for batch in micro_batches)
        statistics = {name: {"probs": 0.0, "load": 0.0} for name in means}
        for batch in micro_batches:
            with routed(model) as seen:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            targets = batch["labels"][:, 1:].reshape(-1)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum") / labels_of_step
            counted = batch["attention_mask"].reshape(-1).bool()
            for name, ((router_logits, chosen),) in seen.items():
                probs = probabilities(model, router_logits)[counted]
                loss = loss + coef * (probs @ prices[name]).sum() / tokens_of_step
                counts = Counter(chosen[counted].flatten().tolist())
                statistics[name]["probs"] += probs.detach().double().sum(0)
                statistics[name]["load"] += torch.tensor([counts[e] for e in range(experts)], dtype=torch.float64)
            loss.backward()
        with torch.no_grad():
            for param in model.parameters():
                if param.grad is not None:
                    param -= lr * param.grad
                    param.grad = None
        for name, sums in statistics.items():
            for kind, total in sums.items():
                means[name] = means[name] | {kind: (1 - rate) * means[name][kind] + rate * total / total.sum()}
            prices[name] = price_of(means[name][config.track]).float()
            if config.bias_coef > 0:
                biases[name] = biases[name] - config.bias_coef * price_of(means[name][config.bias_track])
                select_with(routers(model)[name], biases[name].float())
        kept = {kind: {name: means[name][kind].float() for name in means} for kind in config.statistics}
        history.append({"means": kept, "prices": dict(prices), "biases": {n: b.float() for n, b in biases.items()}})
    return history


def naive_figures(loads):
    """Some of the logged metrics, from `{layer: counts}`, by hand."""
    figures = {"max_vio": [], "cv": [], "gini": []}
    relative = []
    for counts in loads.values():
        share = [count * len(counts) / sum(counts) for count in counts]
        relative += share
        figures["max_vio"].append(max(share) - 1)
        figures["cv"].append((sum((r - 1) ** 2 for r in share) / len(share)) ** 0.5)
        figures["gini"].append(sum(abs(a - b) for a in share for b in share) / (2 * len(share) ** 2))
    worst = max(figures["max_vio"])
    result = {name: sum(values) / len(values) for name, values in figures.items()}
    result |= {"max_vio_worst_layer": worst, "min_relative_load": min(relative), "max_relative_load": max(relative)}
    result |= {"dead_experts": sum(r < 0.05 for r in relative)}
    return result | {f"max_vio/{name}": value for name, value in zip(loads, figures["max_vio"])}
