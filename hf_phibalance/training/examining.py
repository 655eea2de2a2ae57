"""`doctor` and `attach(verify=True)`: examine a set-up by one optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..balancing import PhiBalancer, RandomState, find_balancer
from ..diagnosis import Check, DoctorReport, StepRecorder, Subject, run_checks
from ..routers import predicts_tokens, unwrap
from .batches import generates, leaving_order, model_inputs
from .callback import PhiBalanceCallback, find_callback


logger = logging.get_logger(__name__)
FAILURES = (ValueError, RuntimeError, TypeError, KeyError)
WORSE = {"ok": 0, "warning": 1, "problem": 2}
ROWS, LONGEST = 4, 32  # of a random batch


def doctor(
    subject: nn.Module | Trainer, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> DoctorReport:
    """
    Checks a set-up before a long training. Runs forward and backward of one step with known prices, measures the
    coefficient that it receives, and lists every problem with its remedy. Restores weights, gradients, random numbers,
    duals, trainer and data. Use `attach(trainer, verify=True)` to measure a real training step, including what the
    trainer's loop does to tokens and gradients.

    ```python
    report = phb.doctor(trainer)  # before trainer.train(); on every rank
    print(report)
    ```

    Args:
        subject (`torch.nn.Module` or `transformers.Trainer`):
            A model is run on `batch`. A trainer's model is run on the first batch of its data, or on random tokens if the model
            does not take this batch as it is.
        batch (`Mapping` or `Sequence[Mapping]`, *optional*):
            For a model: one micro-batch or several, as it receives them; defaults to random tokens.

    Returns:
        `DoctorReport`: `print` it; `report.problems`, `report.coefficient`, `report.to_dict()`.

    Raises:
        ValueError: if `batch` is given with a trainer.
    """
    if isinstance(subject, Trainer):
        if batch is not None:
            raise ValueError(
                "`batch` is for a model; a trainer is examined on the first batch of its own. Leave it out."
            )
        return _examine_trainer(subject)
    found = Subject(unwrap(subject)[-1], find_balancer(subject))
    if found.balancer is not None:
        batches = micro_batches(subject, batch)
        rows = max(next((len(v) for v in each.values() if hasattr(v, "__len__")), 0) for each in batches)
        given = "made tokens" if batch is None else "the given texts"
        what = f"{given}, {counted(len(batches))} of {rows} rows"
        found.seen = try_step(subject, found.balancer, batches, f"one step of the model's loss on {what}")
    return _report(found)


def _report(subject: Subject) -> DoctorReport:
    seen, balancer, config = subject.seen, subject.balancer, getattr(subject.root, "config", None)
    model = {
        "class": type(subject.root).__name__,
        "model_type": getattr(config, "model_type", None),
        "routers": 0 if balancer is None else len(balancer.sites),
        "config": None if balancer is None else balancer.config.to_dict(),
    }
    if seen is None:
        return DoctorReport(run_checks(subject), model=model)
    return DoctorReport(run_checks(subject), seen.what, seen.coefficient, model)


# ---------------------------------------------------------------------- a step of the model's loss


def try_step(model: nn.Module, balancer: PhiBalancer, batches: Sequence[Mapping[str, Any]], what: str) -> StepRecorder:
    """
    Runs the forwards and backwards of one step with known prices, without an optimizer. Restores model, gradients, duals and
    random numbers. All ranks must call it. `model` is the model as a loop calls it, `what` names the step in the report.
    """
    with leaving_no_trace(model), balancer.loop.paused(), eager(model):
        recorder = StepRecorder(balancer, what).start()
        recorder.batches.extend(batches)
        _set_known_prices(balancer)
        try:
            balancer.begin_step(batches)
            for loss in losses(model, batches):
                loss.backward()
        except FAILURES as error:
            recorder.error = f"{type(error).__name__}: {error}"
        finally:
            recorder.stop()
        return recorder.finish()  # after an error too: it communicates with the other ranks


def micro_batches(
    model: nn.Module, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Returns the micro-batches of a step, on the model's device: those in `batch`, or one of random tokens."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    given = [made_batch(model)] if batch is None else [batch] if isinstance(batch, Mapping) else batch
    return [{name: v.to(device) if isinstance(v, Tensor) else v for name, v in each.items()} for each in given]


def losses(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
    """Yields the loss of each micro-batch, divided by their number. A model without a loss gets the mean of its output."""
    model.train()
    for batch in batches:
        output = model(**batch)
        loss = getattr(output, "loss", None)
        yield output[0].float().mean() if loss is None else loss / len(batches)


def counted(number: int, ranks: int = 1) -> str:
    """Returns `number` micro-batches in words."""
    return f"{number} micro-batch{'es' * (number > 1)}" + (f" on each of {ranks} ranks" if ranks > 1 else "")


@torch.no_grad()
def _set_known_prices(balancer: PhiBalancer) -> None:
    """Sets uneven prices, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    for row, site in zip(balancer.duals.price, balancer.sites):
        drawn = torch.randn(site.num_experts, generator=generator)
        row[: site.num_experts] = (drawn - drawn.mean()).to(row.device)


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Context manager: restores random numbers, gradients, buffers (the duals among them), and train and eval modes."""
    random = RandomState()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        random.restore()
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


# ---------------------------------------------------------------------- a trainer


def _examine_trainer(trainer: Any) -> DoctorReport:
    subject = _subject_of(trainer, find_balancer(trainer.model))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        subject.unmeasured = "parameters and gradients will be sharded"
    subject.unmeasured = subject.parallel or subject.unmeasured
    if subject.balancer is not None and not subject.unmeasured:
        batch, error = _first_batch(trainer)
        given = "made tokens" if batch is None else "the first batch"
        ranks = f" on each of {trainer.args.world_size} ranks" if trainer.args.world_size > 1 else ""
        what = f"one step of the model's loss on {given} of {type(trainer).__name__}{ranks}"
        with trainer.accelerator.autocast():
            subject.seen = try_step(trainer.model, subject.balancer, micro_batches(trainer.model, batch), what)
        subject.seen.error = error or subject.seen.error
    return _of_all_ranks(_report(subject))


def _first_batch(trainer: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the first batch of the trainer's data, `None` if the model does not take it; and the error in making it."""
    if generates(trainer) or trainer.train_dataset is None:
        return None, None
    random, prepared = RandomState(), len(trainer.accelerator._dataloaders)
    try:
        loader = trainer.get_train_dataloader()
        with leaving_order(loader):
            batch = trainer._prepare_inputs(next(iter(loader)))
    except FAILURES as failure:
        return None, f"the first batch could not be made: {type(failure).__name__}: {failure}"
    finally:
        random.restore()
        del trainer.accelerator._dataloaders[prepared:]
    if not isinstance(batch, Mapping) or not {"input_ids", "inputs_embeds"} & set(batch):
        return None, None
    return model_inputs(batch, unwrap(trainer.model)[-1]), None


def _subject_of(trainer: Any, balancer: PhiBalancer | None) -> Subject:
    callback, args, parallel = find_callback(trainer), trainer.args, ""
    is_attached = callback is not None and callback.detach is not None
    adds_loss = is_attached and getattr(trainer, "aux_loss_enabled", False)
    try:
        refuse_unknown_scaling(trainer, None if balancer is None else balancer.process_group)
    except ValueError as error:
        parallel = str(error)
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)  # as transformers 5 does
    return Subject(
        unwrap(trainer.model)[-1],
        balancer,
        trainer=type(trainer).__name__,
        is_attached=is_attached,
        auxiliary=getattr(trainer, "router_aux_loss_coef", 0.0) if adds_loss else 0.0,
        parallel=parallel,
        engine="vLLM" if getattr(args, "use_vllm", False) else "",
        checkpointing=reentrant if args.gradient_checkpointing else None,
        pad_token_id=getattr(getattr(trainer, "processing_class", None), "pad_token_id", None),
    )


def refuse_unknown_scaling(trainer: Any, process_group: dist.ProcessGroup | None) -> None:
    """Raises `ValueError` if the trainer's gradient scaling or its data-parallel ranks are unknown."""
    sizes = (("cp_size", trainer.get_cp_size()), ("sp_size", trainer.get_sp_size()))
    cut = ", ".join(f"{name}={size}" for name, size in sizes if size > 1)
    if cut:
        raise ValueError(
            f"{cut}: ranks hold parts of the same rows, while a Trainer "
            "hands over whole rows to be counted, so the coefficient would be wrong by that factor. Spread the model by "
            "DistributedConfig(fsdp_size=..., tp_size=..., ep_size=...) instead; or write the loop yourself, and give "
            "begin_step() the parts that this rank holds."
        )
    tp_size = trainer.get_tp_size()
    if tp_size > 1 and tp_size != getattr(trainer.model, "tp_size", None) and process_group is None:
        raise ValueError(
            f"tp_size={tp_size}, but not by transformers (from_pretrained(tp_plan=...)): some ranks share tokens, so the "
            "data-parallel ranks cannot be told from the world size. Pass them: phb.attach(trainer, process_group=...)."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"this process drives {trainer.args.n_gpu} GPUs by torch.nn.DataParallel, whose threads would count into the "
            "same statistics. Launch one process per GPU (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES."
        )
    balancer = find_balancer(trainer.model)
    is_on = balancer is not None and balancer.config.is_on
    if is_on and trainer.is_deepspeed_enabled and trainer.args.fp16:
        raise ValueError(
            "DeepSpeed keeps its fp16 loss scale to itself, so the strength of the price gradient would be unknown. "
            "Train with bf16=True."
        )


def _of_all_ranks(report: DoctorReport) -> DoctorReport:
    """Returns the worst result of each check over the ranks, on all of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return report
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, report.checks)
    worst: dict[str, Check] = {}
    for rank, checks in enumerate(gathered):
        for check in checks:
            if check.name not in worst or WORSE[check.status] > WORSE[worst[check.name].status]:
                where = f"rank {rank}: " if rank else ""
                worst[check.name] = dataclasses.replace(check, finding=where + check.finding)
    return dataclasses.replace(report, checks=list(worst.values()))


@contextmanager
def verifying(trainer: Any, callback: PhiBalanceCallback, balancer: PhiBalancer | None, inputs: Any) -> Iterator[None]:
    """
    Context manager around one micro-batch of training. Records the first steps, uncompiled, until one has prices and
    finite gradients. After that step's last micro-batch, before the optimizer, sets `callback.report`, or raises
    `ValueError` if there is a problem.
    """
    if balancer is not None and callback.report is None and not balancer.is_trained_on:  # the step begins
        StepRecorder(balancer, f"optimizer step {trainer.state.global_step + 1} of {type(trainer).__name__}").start()
    recorder: StepRecorder | None = None if balancer is None else balancer.forwards.recorder
    if balancer is None or recorder is None:
        yield
        return
    recorder.batches.append(inputs)
    try:
        with eager(trainer.model_wrapped):
            yield
    except BaseException:
        recorder.stop()
        raise
    if not trainer.accelerator.sync_gradients:
        return
    recorder.what += f", {counted(len(recorder.batches), trainer.args.world_size)}"
    scaler: Any = getattr(trainer.accelerator, "scaler", None)
    scales = scaler is not None and scaler.is_enabled()
    recorder.finish(scaler.get_scale() if scales else None)
    is_last = trainer.state.global_step + 1 >= trainer.state.max_steps
    if not is_last and scales and not recorder.is_finite:
        return  # the optimizer will skip this step
    subject = _subject_of(trainer, balancer)
    subject.seen, subject.is_real = recorder, True
    report = _of_all_ranks(_report(subject))
    if report.problems:
        callback.report = report
        balancer.discard_step()
        raise ValueError(f"verify=True found what makes this training go wrong. {report}")
    if is_last or not recorder.is_early:
        callback.report = report
        if trainer.is_world_process_zero():
            (logger.info if report.status == "ok" else logger.warning)(str(report))
