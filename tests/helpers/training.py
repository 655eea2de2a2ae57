"""Tiny training runs: unequal padded batches, trainers for them, and a recorder of their inputs."""

import torch
from datasets import Dataset
from tiny import FIRST_PLAIN_ID, SHRINK, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hf_phibalance as phb


TRAINERS = [Trainer, SFTTrainer]


def rows(count=11, shortest=3, longest=9, seed=0):
    """Returns token sequences of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    draw = torch.randint(FIRST_PLAIN_ID, SHRINK["vocab_size"], (count, longest), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": ids[:length]} for ids, length in zip(draw, lengths)])


def pad(examples):
    """Returns a right-padded batch of `examples`, with labels -100 on the padding."""
    ids = [torch.as_tensor(example["input_ids"]) for example in examples]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=SHRINK["pad_token_id"])
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def tokenizer():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(FIRST_PLAIN_ID, SHRINK["vocab_size"])}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<pad>")), **special)


def patched(model_type="mixtral", seed=0, model_args=None, **config):
    """Returns a patched tiny model with a price gradient strong enough to show in every weight."""
    return phb.patch(tiny_model(model_type, seed, **(model_args or {})).train(), {"coef": 5.0, **config})


def make_trainer(model, folder, cls=Trainer, data=None, callbacks=(), eval_dataset=None, **arguments):
    """Returns a quiet CPU trainer: 11 rows, 2 a micro-batch, 4 micro-batches a step. An epoch's second step has 2."""
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
        **({"bf16": False} if sft else {}),  # TRL turns gradient checkpointing on
        **arguments,
    }
    args = (SFTConfig if sft else TrainingArguments)(str(folder), **arguments)
    extra = {"processing_class": tokenizer()} if sft else {"data_collator": pad}
    data = rows() if data is None else data
    return cls(model, args, train_dataset=data, eval_dataset=eval_dataset, callbacks=list(callbacks), **extra)


class Recorder(TrainerCallback):
    """Records the micro-batches of every optimizer step as the model received them, and the duals after it."""

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
        read = balancer.config.track, balancer.config.bias_track
        means = {statistic: balancer.means(statistic) for statistic in read}
        self.duals.append({"means": means, "prices": balancer.prices(), "biases": balancer.biases()})


def weights(model):
    """Returns the weights without the selection bias, which belongs to the duals."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "phi_balance." not in name}
