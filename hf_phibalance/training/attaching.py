"""Wires φ-balancing into a trainer: exact token counts, metrics in every reporter, state in checkpoints."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..balancing import PhiBalancer, announce_switched_off, find_balancers, get_balancer, on_train, patch
from ..compat import stop_if_done
from ..files import quoted
from ..hub import complete_card
from .batches import CalibrateFirst, generated_step, generates, number_to_calibrate
from .callback import PhiBalanceCallback, find_callback
from .checkpoints import complete_checkpoint, marked_step, save_in_order
from .examining import refuse_unknown_scaling, verifying


logger = logging.get_logger(__name__)


def attach(
    trainer: Trainer,
    process_group: dist.ProcessGroup | None = None,
    verify: bool = False,
    calibrate: int = 0,
    fresh_duals: bool = False,
    per_layer: int = 0,
) -> PhiBalanceCallback:
    """
    Wires φ-balancing into `trainer`, whose model must be patched: exact token counts, metrics in every reporter and in
    `log_history`, expert load in evaluations, state in checkpoints. A run that is killed at any moment resumes from
    its newest complete checkpoint. Works with any subclass of `Trainer`. `train()` calls this with the defaults if the
    model is patched, so call it only for its options. Calling it again returns the same callback.

    Args:
        trainer (`transformers.Trainer`): the trainer, before `train()`.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The data-parallel ranks, if they are not all ranks (tensor, context or sequence parallelism).
        verify (`bool`, *optional*, defaults to `False`):
            Whether to measure the first optimizer step with prices as [`doctor`] does. Training stops after this step
            if there is a problem. The report is logged, and kept in `callback.report`.
        calibrate (`int`, *optional*, defaults to `0`):
            Number of first batches (`True`: 8) from which [`calibrate`] computes the initial means, which are
            otherwise uniform. Use it for routers that are already trained. Training sees the same batches in the same
            order. Skipped if duals are loaded.
        fresh_duals (`bool`, *optional*, defaults to `False`):
            Whether to start with fresh duals if the checkpoint to resume from has no state of φ-balancing. Otherwise
            this is an error.
        per_layer (`int`, *optional*, defaults to `0`): at most this many layers, evenly spaced, get a MaxVio of their own in the log.

    Returns:
        `PhiBalanceCallback`: the callback in use. Its `history` holds the loads at each logging step; its `detach()` removes
        φ-balancing from the trainer.

    Raises:
        ValueError: if the model is not patched, or if the coefficient would not be exact with this trainer.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"`trainer` must be a transformers.Trainer, got a {type(trainer).__name__}. Give the patched model to a Trainer, and that "
            "to attach; a loop of your own needs neither."
        )
    for name, value in (("verify", verify), ("fresh_duals", fresh_duals)):
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False, got {quoted(value)}.")
    if isinstance(per_layer, bool) or not isinstance(per_layer, int) or per_layer < 0:
        raise ValueError(f"`per_layer` must be a number of layers, 0 for none, got {quoted(per_layer)}.")
    callback = find_callback(trainer)
    is_attached = callback is not None and callback.detach is not None
    if is_attached and (calibrate or process_group is not None):
        raise ValueError(
            "`calibrate` and `process_group` are for the first attach(trainer), but this trainer is attached already. Take that "
            "back, by callback.detach(), or give them there."
        )
    if callback is None or not is_attached:
        get_balancer(trainer.model)  # type: ignore[arg-type]
        refuse_unknown_scaling(trainer, process_group)
        batches = number_to_calibrate(trainer, calibrate) if calibrate else 0
        added: list[Any] = []
        if callback is None:
            callback = PhiBalanceCallback()
            added.append(callback)
        if batches:
            added.append(CalibrateFirst(trainer, batches))
        for each in added:
            trainer.add_callback(each)
        Attachment(trainer, callback, process_group, added)
    callback.verifies |= verify
    callback.fresh_duals |= fresh_duals
    callback.per_layer = per_layer or callback.per_layer
    return callback


class Attachment:
    """Wraps each trainer method in `WRAPPED` by the method of the same name. [`attach`] made the `added` callbacks."""

    WRAPPED = (
        "train",
        "get_batch_samples",
        "_prepare_inputs",
        "training_step",
        "log",
        "evaluate",
        "_load_optimizer_and_scheduler",
        "_save_checkpoint",
        "create_model_card",
    )

    def __init__(self, trainer: Any, callback: PhiBalanceCallback, process_group: Any, added: list[Any]) -> None:
        self._trainer, self._added = weakref.ref(trainer), added
        self.callback, self.process_group = callback, process_group
        self._micro_batch = 0  # of the current optimizer step
        self._is_generated = generates(trainer)
        self._restore: list[Callable[[], None]] = []
        self._switch_off_trainer_loss()
        patch(trainer.model)
        self._give_reference_its_bias()
        self._warn_about_engine()
        for name in self.WRAPPED:
            self._wrap(name, getattr(self, name))
        callback.detach = self.detach

    @property
    def trainer(self) -> Any:
        return self._trainer()

    def _wrap(self, name: str, outer: Callable) -> None:
        """Replaces `trainer.name(...)` by `outer(inner, ...)`, until [`~Attachment.detach`]."""
        trainer, own = self.trainer, vars(self.trainer).get(name)
        inner = getattr(trainer, name)
        wrapper = functools.wraps(inner)(functools.partial(outer, inner))
        setattr(trainer, name, wrapper)

        def restore() -> None:
            if vars(self.trainer).get(name) is wrapper:
                setattr(self.trainer, name, own) if own is not None else delattr(self.trainer, name)

        self._restore.append(restore)

    def detach(self) -> None:
        """Removes everything from the trainer; its model stays patched."""
        while self._restore:
            self._restore.pop()()
        for callback in self._added:
            self.trainer.remove_callback(callback)
        self.callback.detach = None

    def balancers(self) -> list[PhiBalancer]:
        """Returns the balancers of all patched models in the trainer's present model."""
        found = find_balancers(self.trainer.model)
        for balancer in found:
            balancer.process_group = self.process_group
        return found

    def current(self) -> PhiBalancer | None:
        """Returns the balancer of the trained model; `None` if it was unpatched."""
        found = self.balancers()
        trained = [b for b in found if any(p.requires_grad for p in b.root.parameters())]
        return next(iter(trained or found), None)

    # ------------------------------------------------------------------ the wrapped methods

    def train(self, inner: Callable, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.callback.resumed_from = None
        try:
            return inner(complete_checkpoint(self.trainer, resume_from_checkpoint), *args, **kwargs)
        except BaseException:
            for balancer in self.balancers():
                balancer.discard_step()  # another loop may go on with the model
            raise

    def get_batch_samples(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Draws the batches of an optimizer step, and announces their tokens."""
        trainer = self.trainer
        if stop_if_done(trainer):
            return [], None
        batches, items = inner(*args, **kwargs)
        if self.process_group is None:  # with a custom process group the model may be unwrapped
            _refuse_ranks_apart(trainer)
        self._micro_batch = 0
        wanted = kwargs.get("num_batches", args[1] if len(args) > 1 else len(batches))
        share = 1.0
        if 0 < len(batches) < wanted:  # the epoch ends, and the step continues with batches of the next one
            share = len(batches) / (len(batches) + trainer.args.gradient_accumulation_steps)
        for balancer in self.balancers() if batches else ():
            micro_batches = len(batches) if self._is_generated else batches
            balancer.begin_step(micro_batches, by_part=True, share=share)
        return batches, items

    def _prepare_inputs(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """
        In trl's GRPO and RLOO, announces the step's tokens when its first micro-batch is prepared. The whole step has
        been generated by then, and the model has not seen it.
        """
        inputs = inner(*args, **kwargs)
        balancer = self.current() if self._is_generated and self.trainer.model.training else None
        if balancer is not None and balancer.is_open and balancer.now.tokens is None and not balancer.is_trained_on:
            micro_batches = generated_step(self.trainer)
            if micro_batches is not None:
                balancer.begin_step(micro_batches, by_part=True)
            else:
                logger.warning_once(
                    "Not all that an optimizer step trains on has been generated when it begins, so each micro-batch gets its own "
                    "mean instead of its exact share of the step's tokens. In trl's GRPOTrainer and RLOOTrainer it has, if "
                    "steps_per_generation is a multiple of gradient_accumulation_steps (the default)."
                )
        return inputs

    def training_step(self, inner: Callable, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains on a micro-batch. Passes its labels and its index to the balancers."""
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
        number, self._micro_batch = self._micro_batch, self._micro_batch + 1
        with ExitStack() as stack:
            for balancer in self.balancers():
                stack.enter_context(balancer.forwards.labels_of(labels, number))
            if self.callback.verifies:
                stack.enter_context(verifying(self.trainer, self.callback, self.current(), inputs))
            return inner(model, inputs, *args, **kwargs)

    def log(self, inner: Callable, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        trainer, balancer = self.trainer, self.current()
        if balancer is not None and balancer.forwards.evaluation is not None:
            prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "eval")
            values = balancer.eval_metrics(self.callback.per_layer)
            logs.update({f"{prefix}_moe/{key}": value for key, value in values.items()})
        elif balancer is not None and "loss" in logs and trainer.is_world_process_zero():
            logs.update(self.callback.training_metrics(trainer.state.global_step))
        return inner(logs, *args, **kwargs)

    def evaluate(self, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for balancer in self.balancers():
                stack.enter_context(balancer.evaluation())
            return inner(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, inner: Callable, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        """Records the checkpoint that training begins from, if any."""
        self.callback.resumed_from = checkpoint
        try:
            return inner(checkpoint, *args, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"{error}\nThe optimizer of {checkpoint} trained other parameters than this run: was one of the two balanced with "
                "method='frozen'? Load the model from that folder and train it without resume_from_checkpoint."
            ) from error

    def _save_checkpoint(self, inner: Callable, model: Any, trial: Any = None) -> Any:
        """Writes a checkpoint in the order that `checkpoints` describes."""
        trainer, balancer, source = self.trainer, self.current(), self.callback.resumed_from
        if balancer is None:
            return inner(model, trial)
        step = trainer.state.global_step
        folder = Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if source and folder.resolve() == Path(source).resolve() and marked_step(folder) == step:
            return None  # it already holds this state, and during a rewrite no checkpoint would be complete
        return save_in_order(trainer, balancer, folder, functools.partial(inner, model, trial))

    def create_model_card(self, inner: Callable, *args: Any, **kwargs: Any) -> None:
        complete_card(self.trainer, self.callback.history, functools.partial(inner, *args, **kwargs))

    # ------------------------------------------------------------------ once, in `attach`

    def _switch_off_trainer_loss(self) -> None:
        """Switches off the auxiliary loss that TRL's trainers add to any MoE."""
        trainer = self.trainer
        if getattr(trainer, "aux_loss_enabled", False) and get_balancer(trainer.model).config.is_on:
            announce_switched_off()
            trainer.aux_loss_enabled = False
            trainer.router_aux_loss_coef = 0.0

    def _give_reference_its_bias(self) -> None:
        """Gives the policy's selection bias to a reference model that TRL itself has loaded from the policy's checkpoint."""
        reference, policy = getattr(self.trainer, "ref_model", None), self.current()
        if reference is None or policy is None or not policy.duals.own_bias or find_balancers(reference):
            return
        biases = policy.biases()
        if not any(bool(bias.any()) for bias in biases.values()) or not _has_same_routers(reference, policy):
            return
        patch(reference, {"method": "none"})
        get_balancer(reference).set_biases(biases)
        logger.warning(
            f"The reference model of {type(self.trainer).__name__} has the weights of the policy, but not its selection bias: it has "
            "been given that bias. A ref_model that was loaded with phi_balance=True is left as it is."
        )

    def _warn_about_engine(self) -> None:
        balancer = self.current()
        if getattr(self.trainer.args, "use_vllm", False) and balancer is not None and balancer.duals.own_bias:
            logger.warning(
                "use_vllm=True hands the weights over to vLLM during training, but not the selection bias: completions are generated "
                "with the bias that the checkpoint had, while the trained one moves. Set bias_coef=0 and balance by coef."
            )


def _has_same_routers(reference: Any, policy: PhiBalancer) -> bool:
    """True if the routers of `reference` and `policy` have equal weights."""
    theirs, layers = dict(reference.named_parameters()), tuple(f"{layer}." for layer in policy.layer_names)
    own = {name: p for name, p in policy.root.named_parameters() if name.startswith(layers)}
    return bool(own) and all(
        name in theirs and theirs[name].shape == p.shape and torch.equal(theirs[name].detach().to(p), p.detach())
        for name, p in own.items()
    )


def _refuse_ranks_apart(trainer: Any) -> None:
    """Raises if the `Trainer` evaluated before training. It then does not use `DistributedDataParallel`."""
    kind = trainer.accelerator.distributed_type
    if getattr(trainer.model, "is_distributed_loading_by_transformers", False):
        return  # the model averages its gradients itself
    if trainer.args.world_size > 1 and kind.value.startswith("MULTI_") and trainer.model_wrapped is trainer.model:
        raise RuntimeError(
            f"{trainer.args.world_size} processes train without exchanging gradients, since trainer.evaluate() ran before "
            "trainer.train() (transformers then skips DistributedDataParallel). Evaluate with another Trainer, or after "
            "training."
        )


def _attach_when_training(trainer: Any) -> None:
    """Attaches to any trainer with a patched model when training begins, so that the flag is enough."""
    callback = find_callback(trainer)
    is_attached = callback is not None and callback.detach is not None
    if is_attached or trainer.model is None or not (callback or find_balancers(trainer.model)):
        return
    attach(trainer)
    config = get_balancer(trainer.model).config
    strengths = f"method={config.method!r}, coef={config.coef}, bias_coef={config.bias_coef}"
    if config.is_on:
        logger.warning_once(f"φ-balancing is on in {type(trainer).__name__}: {strengths}.")
    else:
        logger.warning_once(
            f"Nothing is balanced in {type(trainer).__name__}, only the loads are counted: {strengths}."
        )


on_train.append(_attach_when_training)
