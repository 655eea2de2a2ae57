"""Trainers that add the built-in auxiliary loss in ways that were reported: twice, with other counts, or not at all."""

import torch
from transformers import Trainer


COEF = 0.01


def count(logits, mask):
    """Top-k counts (8,) of all layers over the tokens in `mask` (T, 1)."""
    return sum(torch.zeros_like(z).scatter(1, z.topk(2).indices, 1.0).mul(mask).sum(0) for z in logits).detach()


class Extra(Trainer):
    """Adds `extra(outputs, mask)`, with the token mask (T, 1), to the loss."""

    def compute_loss(self, model, inputs, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return loss + self.extra(outputs, inputs["attention_mask"].reshape(-1, 1))

    def loss_of(self, logits, mask, counts, total):
        """COEF times the loss, with `counts` (8,) and the number of rows `total` from elsewhere."""
        probs = sum((z.softmax(-1) * mask).sum(0) for z in logits)
        return COEF * 8 * (counts / total * probs / total).sum()


class OwnLoss(Extra):
    """Adds `args.router_aux_loss_coef` times the model's auxiliary loss, if there is one: ms-swift, and TRL before 1.16."""

    def extra(self, outputs, mask):
        aux_loss = getattr(outputs, "aux_loss", None)
        return 0.0 if aux_loss is None else self.args.router_aux_loss_coef * aux_loss


class CountsOfTheStep(Extra):
    """The counts are those of all micro-batches of the step."""

    divided_by = 1

    def get_batch_samples(self, iterator, number, device):
        batches, items = super().get_batch_samples(iterator, number, device)
        model, self.counts, self.total = self.model.eval(), 0, 0
        for batch in batches:
            with torch.no_grad():
                logits = model(**batch, output_router_logits=True).router_logits
            mask = batch["attention_mask"].reshape(-1, 1)
            self.counts, self.total = self.counts + count(logits, mask), self.total + len(logits) * mask.sum()
        return batches, items

    def extra(self, outputs, mask):
        return self.loss_of(outputs.router_logits, mask, self.counts, self.total) / self.divided_by


class AveragedOnceMore(CountsOfTheStep):
    """Averages over four micro-batches what is normalised by the tokens of all of them."""

    divided_by = 4


class CountsThatStartAnew(Extra):
    """Means to take counts over the step, but its count of micro-batches stays at 1."""

    def extra(self, outputs, mask):
        logits = outputs.router_logits
        loss = self.loss_of(logits, mask, count(logits, mask), len(logits) * mask.sum())
        return loss / self.current_gradient_accumulation_steps


class CountsOfAllRanks(Extra):
    """Megatron-LM's `global_aux_loss`: counts and tokens of all ranks, probabilities of this one."""

    def extra(self, outputs, mask):
        logits = outputs.router_logits
        counts, total = (
            self.accelerator.reduce(part, "sum") for part in (count(logits, mask), len(logits) * mask.sum())
        )
        return self.loss_of(logits, mask, counts, total)


class OnlyLogits(Trainer):
    """Computes its loss from the logits."""

    def compute_loss(self, model, inputs, **kwargs):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class UnusedForward(Trainer):
    """Runs the model a second time, for nothing."""

    def compute_loss(self, model, inputs, **kwargs):
        model(**inputs)
        return super().compute_loss(model, inputs, **kwargs)
