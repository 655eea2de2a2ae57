"""Runs one optimizer step of a model's loss and restores everything, for a set-up that does not train yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import PhiBalancer, RandomState
from ..routers import predicts_tokens, unwrap
from .recorder import StepRecorder


ROWS, LONGEST = 4, 32  # of a made batch
FAILURES = (ValueError, RuntimeError, TypeError, KeyError)


def try_step(model: nn.Module, balancer: PhiBalancer, batches: Sequence[Mapping[str, Any]], what: str) -> StepRecorder:
    """
    Runs the forwards and backwards of one step with known prices, without an optimizer. Restores model, gradients, duals and
    random numbers. All ranks must call it. `model` is the model as a loop calls it, `what` names the step in the report.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    batches = [{name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()} for batch in batches]
    with _leaving_no_trace(model, balancer), eager(model):
        recorder = StepRecorder(balancer, what).start()
        recorder.batches.extend(batches)
        model.train()
        _set_known_prices(balancer)
        try:
            balancer.begin_step(batches)
            for batch in batches:
                output = model(**batch)
                loss = getattr(output, "loss", None)
                (output[0].float().mean() if loss is None else loss / len(batches)).backward()
        except FAILURES as error:
            recorder.error = f"{type(error).__name__}: {error}"
        return recorder.finish()  # after an error too: it communicates with the other ranks


@torch.no_grad()
def _set_known_prices(balancer: PhiBalancer) -> None:
    """Sets uneven prices, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    for row, site in zip(balancer.duals.price, balancer.sites):
        drawn = torch.randn(site.num_experts, generator=generator)
        row[: site.num_experts] = (drawn - drawn.mean()).to(row.device)


@contextmanager
def _leaving_no_trace(model: nn.Module, balancer: PhiBalancer) -> Iterator[None]:
    """Restores random numbers, gradients, buffers (the duals among them), train and eval modes, and the current step."""
    random = RandomState()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with balancer.loop.step_aside():
            yield
    finally:
        random.restore()
        balancer.forwards.recorder = balancer.forwards.watch = None
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Context manager: runs compiled models uncompiled, since the recorder cannot see compiled routers."""
    modules = [*unwrap(model), *model.modules()]
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def made_batch(model: nn.Module) -> dict[str, Tensor]:
    """Returns a batch of random tokens, rows of unequal length padded on the right. Leaves the process's random numbers alone."""
    root: Any = unwrap(model)[-1]
    config = root.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    first = min(3, config.vocab_size - 1)
    ids = torch.randint(first, config.vocab_size, (ROWS, LONGEST), generator=generator)
    mask = torch.arange(LONGEST) < LONGEST - 5 * torch.arange(ROWS)[:, None]
    values = vars(root.config).items()
    special = [v for name, v in values if name.endswith(("_token_id", "_token_index")) and isinstance(v, int)]
    plain = next(i for i in range(first, config.vocab_size) if i not in special)
    ids[torch.isin(ids, torch.tensor(special, dtype=ids.dtype))] = plain  # no placeholders, since there are no images
    pad = getattr(config, "pad_token_id", None)
    filler = pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0
    batch = {"input_ids": ids.masked_fill(~mask, filler), "attention_mask": mask.long()}
    return batch | {"labels": ids.masked_fill(~mask, -100)} if predicts_tokens(root) else batch
