"""All checks: name each problem and its remedy. First those of a recorded step, then those of the set-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import PhiBalancer, count_padding, describe_router
from ..compat import dependencies, is_supported
from ..config import PhiBalanceConfig
from ..files import STATE_NAME, state_in
from ..routers import REMOTE_TRAITS, RouterHook, find_routers
from .recorder import LOW, StepRecorder
from .report import PRECISE, Check, Coefficient


VANISHING = 1e-200  # coefficients up to this stand for 0
EVEN, COLLAPSED = 0.9, 0.5  # effective experts, as a share of all
ASSIGNED = 10  # with fewer selections per expert, loads say little
VERIFY = "phb.attach(trainer, verify=True), which measures a step of the training itself"
TRAIN_ROUTERS = (
    "train the routers, e.g. phb.lora_config(model, router='lora') (--lora router=lora of the command), or balance by bias_coef "
    "alone (coef=0), which needs no gradient"
)


@dataclass
class Subject:
    """
    The model, the step and the trainer that are examined.

    Args:
        root (`torch.nn.Module`): the transformers model.
        balancer (`PhiBalancer`, *optional*): `None` if the model is not patched.
        seen (`StepRecorder`, *optional*): a recorded step; `None` if nothing was run.
        trainer (`str`, *optional*): name of the trainer's class.
        is_attached (`bool`): whether the trainer is attached already.
        auxiliary (`float`): coefficient of an auxiliary loss that the trainer adds.
        parallel (`str`): what is wrong with the parallelism of the trainer.
        engine (`str`): name of the engine that gets the weights during training.
        checkpointing (`bool`, *optional*): reentrant (`True`) or non-reentrant (`False`) gradient checkpointing, if any.
        pad_token_id (`int`, *optional*): of the tokenizer.
        unmeasured (`str`): why nothing could be run.
        is_real (`bool`): whether `seen` is a step of the training itself, with the trainer's loss.
    """

    root: nn.Module
    balancer: PhiBalancer | None
    seen: StepRecorder | None = None
    trainer: str | None = None
    is_attached: bool = False
    auxiliary: float = 0.0
    parallel: str = ""
    engine: str = ""
    checkpointing: bool | None = None
    pad_token_id: int | None = None
    unmeasured: str = ""
    is_real: bool = False

    @property
    def batches(self) -> list[Mapping[str, Any]]:
        """The micro-batches of the step that are mappings."""
        return [] if self.seen is None else [batch for batch in self.seen.batches if isinstance(batch, Mapping)]

    @property
    def folder(self) -> Path | None:
        """The folder that the model was loaded from, if it was one."""
        name = getattr(self.root, "name_or_path", "")
        return Path(name) if name and Path(name).is_dir() else None


def run_checks(subject: Subject) -> list[Check]:
    """Returns the findings of all checks that apply."""
    return [check for look in CHECKS for check in look(subject)]


def _problem(name: str, finding: str, remedy: str = "") -> Check:
    return Check(name, "problem", finding, remedy)


def _warning(name: str, finding: str, remedy: str = "") -> Check:
    return Check(name, "warning", finding, remedy)


def _many(names: Sequence[str]) -> str:
    """Returns the first three `names` as text."""
    shown = ", ".join(names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


def coefficient(subject: Subject) -> Iterator[Check]:
    """Compares the received coefficient with the declared one."""
    seen, balancer = subject.seen, subject.balancer
    if balancer is None:
        return
    if balancer.config.coef == 0:
        yield Check("coefficient", "ok", "coef=0: there is no price gradient to measure")
    elif seen is None:
        if subject.unmeasured:
            yield _warning("coefficient", f"not measured: {subject.unmeasured}", VERIFY)
    elif seen.coefficient is not None:
        yield _judge(seen, seen.coefficient)
    elif seen.unmeasured and seen.error is None:
        is_over = balancer.coef == 0
        remedy = f"a later step: {VERIFY}" if seen.is_early else "measure it uncompiled: phb.doctor(model)"
        finding = f"not measured: {seen.unmeasured}"
        yield Check("coefficient", "ok" if is_over else "warning", finding, "" if is_over else remedy)


def _judge(seen: StepRecorder, found: Coefficient) -> Check:
    if not seen.is_finite:
        return _problem(
            "coefficient",
            "the gradients of the step are not finite",
            "lower the learning rate or the loss scale, and check the data",
        )
    if math.isnan(found.ratio):
        return _problem(
            "coefficient",
            f"{found.declared:g} declared, but no gradient comes back through any router",
            TRAIN_ROUTERS,
        )
    bound = found.tolerance
    text = (
        f"{found.declared:g} declared, {found.effective:.6g} received: ratio {found.ratio:.4f}, residual "
        f"{found.residual:.0e}, at {found.parameters}"
    )
    off = {name: ratio for name, ratio in found.by_router.items() if not abs(ratio - 1) <= bound}
    if not off and abs(found.ratio - 1) <= bound and found.residual <= 10 * bound:
        return Check("coefficient", "ok", text)
    is_kept = all(abs(projection - 1) <= bound for projection in seen.kept.values())
    if is_kept and seen.goes_on:
        return _warning(
            "coefficient",
            f"{text}. The step goes on over the end of a pass through the data, so its tokens became known in two parts",
            "other steps are exact; a dataset whose length is known has no such steps",
        )
    if is_kept and seen.announced is None and len(seen.forwards) > 1:
        return _warning(
            "coefficient",
            f"{text}. The micro-batches do not say how many tokens they hold, so each gets its own mean",
            "one micro-batch a step makes it exact; with micro-batches of similar length it is close. In trl's GRPO and RLOO "
            "the tokens are known if steps_per_generation is a multiple of gradient_accumulation_steps",
        )
    if is_kept and seen.by_part and seen.announced != seen.tokens:
        return _warning(
            "coefficient",
            f"{text}. The model saw other tokens than the step was announced with, and each micro-batch gets the share that was "
            "announced",
            "see announced tokens",
        )
    worst = sorted(off, key=lambda name: -abs(off[name] - 1))
    at = f"; {_many([f'{name} {off[name]:.4f}' for name in worst])}" if worst else ""
    return _problem(
        "coefficient",
        f"{text}{at}",
        "something between backward and optimizer changes gradients (a training_step of one's own, hooks on parameters), "
        "or hides tokens or routers from balancing: see the other checks",
    )


def first_step(subject: Subject) -> Iterator[Check]:
    seen = subject.seen
    if seen is not None and seen.error is not None:
        yield _problem("first step", seen.error, "mend that first; what follows could not all be looked at")
    elif seen is not None and not seen.has_run:
        yield _problem(
            "first step",
            f"no training forward of the model was seen in {seen.what}",
            "check that the trainer trains this model and not a copy of it, and that it is in train mode",
        )


def tokens(subject: Subject) -> Iterator[Check]:
    """Looks for padding that counts, attention masks that get lost, and wrong announcements of tokens."""
    seen, balancer = subject.seen, subject.balancer
    if seen is None or balancer is None or not seen.forwards:
        return
    kind, batches = balancer.config.token_mask, subject.batches
    positions, own = seen.count("all"), seen.count("mask")
    labels = [batch["labels"] for batch in batches if isinstance(batch.get("labels"), Tensor)]
    labelled = sum(int((each != -100).sum()) for each in labels) if labels and len(labels) == len(batches) else None
    text = f"token_mask={kind!r}: {own:,} of {positions:,} positions count"
    text += "" if labelled is None else f"; {labelled:,} have labels"
    masks = [batch["attention_mask"] for batch in batches if isinstance(batch.get("attention_mask"), Tensor)]
    masked_out = sum(int((mask == 0).sum()) for mask in masks)
    is_full, is_cut = own == positions, seen.announced not in (None, seen.tokens)
    padding = 0
    if kind != "labels" and is_full:
        padding = sum(_padding(batch.get("input_ids"), subject) for batch in batches)
    if kind == "attention" and masked_out and is_full:
        yield _problem(
            "attention mask",
            f"{text}. The batches have an attention_mask with {masked_out:,} zeros, but the model received none: the "
            "trainer drops it, and padding counts",
            "PhiBalanceConfig(token_mask='labels'), or let the trainer pass the attention_mask on",
        )
    elif padding:
        lost = "an attention_mask of ones" if masks else "no attention_mask"
        lost = f"token_mask={kind!r}" if kind == "all" else lost
        yield Check(
            "attention mask",
            "problem" if kind == "attention" else "warning",
            f"{text}, among them {padding:,} of padding ({lost})",
            "let the collator return an attention_mask, or PhiBalanceConfig(token_mask='labels')",
        )
    elif labelled is not None and own < labelled and kind != "labels" and not is_cut:
        yield _problem(
            "attention mask",
            f"{text}: tokens that are trained on do not count",
            "check the attention_mask of the batches, or PhiBalanceConfig(token_mask='labels')",
        )
    elif own == 0:
        yield _problem("attention mask", f"{text}: there is nothing to balance", "check the batches' masks")
    else:
        packed = "" if masks or not batches or kind != "attention" else ", no attention_mask (packed or unpadded)"
        yield Check("attention mask", "ok", text + packed)
    exact = seen.coefficient is not None and seen.coefficient.residual <= 10 * PRECISE
    if is_cut and not (seen.by_part and exact):
        yield Check(
            "announced tokens",
            "warning" if seen.by_part else "problem",
            f"the step was announced with {seen.announced:,.0f} tokens, the model saw {seen.tokens:,.0f}",
            "give the model the batches as the dataloader makes them, or begin_step() what the model gets",
        )


def _padding(ids: Any, subject: Subject) -> int:
    """Counts padding in `ids (B, S)`."""
    config = getattr(subject.root, "config", None)
    pad = subject.pad_token_id
    if pad is None and config is not None:
        pad = getattr(config.get_text_config(), "pad_token_id", None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[-1] < 2 or not isinstance(pad, int):
        return 0
    return int(count_padding(ids, torch.ones_like(ids, dtype=torch.bool), pad))


def routers_run(subject: Subject) -> Iterator[Check]:
    """Looks for routers that never ran, do not learn, or have no gradient path to a trained parameter."""
    seen, balancer = subject.seen, subject.balancer
    if balancer is None:
        return
    names, is_seen = balancer.layer_names, seen is not None and seen.has_run
    loads = {} if seen is None else seen.loads
    # routers of images, in a step without images
    idle = [site.name for site in balancer.sites if not site.sees_all and not loads.get(site.name)]
    silent = [name for name in names if not loads.get(name) and name not in idle]
    if is_seen and seen is not None and seen.tokens:
        if silent:
            yield _problem(
                "routers that run",
                f"{len(silent)} of {len(names)} routers were never called: {_many(silent)}. Something bypasses them (a fused "
                "kernel, use_kernels=True, layers that are not run)",
                "switch that off, or phb.unpatch(model)",
            )
        else:
            but = f" but {_many(idle)}, which had nothing to route" if idle else ""
            yield Check("routers that run", "ok", f"all {len(names)}{but}")
    rows = [describe_router(name, subject.root) for name in names]
    if balancer.config.rules.freezes or not balancer.config.adds_gradient:
        learning = [row.name for row in rows if row.how != "frozen"]
        if balancer.config.rules.freezes and learning:
            yield _problem(
                "routers that learn",
                f"method='frozen', but {len(learning)} routers are trained: {_many(learning)}",
                "leave the routers out of the adapter, e.g. by phb.lora_config(model, router='frozen'), or choose another method",
            )
        return
    unmoved = [row.name for row in rows if not row.parameters and not row.below]
    reached = names if seen is None or not is_seen else [*seen.added, *unmoved, *idle]
    cut = [name for name in names if name not in reached]
    frozen = [row.name for row in rows if row.how == "frozen"]
    if len(unmoved) == len(names):
        yield _problem("routers that learn", "all routers are frozen, and nothing below them learns", TRAIN_ROUTERS)
    elif cut:
        yield _problem(
            "routers that learn",
            f"no gradient path leads from {len(cut)} of {len(names)} routers: {_many(cut)}",
            "with reentrant gradient checkpointing: use_reentrant=False or model.enable_input_require_grads(); else look for "
            "torch.no_grad() and detach() around these layers",
        )
    elif frozen:
        yield _warning(
            "routers that learn",
            f"{len(frozen)} of {len(names)} routers are frozen ({_many(frozen)}): balancing moves only what lies below them"
            + (f", and there is nothing below {_many(unmoved)}" if unmoved else ""),
            TRAIN_ROUTERS,
        )
    else:
        kinds = sorted({"in full" if row.how == "full" else "by LoRA" for row in rows})
        yield Check("routers that learn", "ok", f"all {len(names)}, {' and '.join(kinds)}")


def balance(subject: Subject) -> Iterator[Check]:
    """Looks for routers with even probabilities and collapsed loads, which a price on probabilities cannot see."""
    seen, balancer = subject.seen, subject.balancer
    if seen is None or balancer is None or not seen.forwards or not balancer.config.is_on:
        return
    config, collapsed = balancer.config, []
    probs_LE, load_LE = seen.sums
    for site, probs, load in zip(balancer.sites, probs_LE, load_LE):
        even, used = (_effective(x) / site.num_experts for x in (probs, load))
        if load.sum() >= ASSIGNED * site.num_experts and even > EVEN and used < COLLAPSED:
            collapsed.append(f"{site.name} (as good as {used * site.num_experts:.1f} of {site.num_experts} experts)")
    if collapsed and config.track == "probs" and config.coef > 0 and config.bias_coef == 0:
        yield _warning(
            "loads",
            f"the probabilities of {len(collapsed)} routers are even, but their loads have collapsed: {_many(collapsed)}. "
            "The price is one of probabilities and does not act on that",
            "track='load', or a selection bias (bias_coef > 0), which is moved by loads",
        )


def _effective(share_E: Tensor) -> float:
    """Returns the effective number of experts, 1 / Σ share²."""
    return float(share_E.sum() ** 2 / share_E.square().sum().clamp(min=1e-30))


def precision(subject: Subject) -> Iterator[Check]:
    """Looks for routers that are quantised, trained in 16 bits, or computed in 16 bits."""
    if subject.balancer is None:
        return
    weights = {
        site.name: parameter
        for site in subject.balancer.sites
        for module in site.modules
        for name, parameter in module.named_parameters()
        if ".lora_" not in f".{name}" and parameter.numel() > 1
    }
    packed = [name for name, p in weights.items() if not p.is_floating_point() or hasattr(p, "quant_state")]
    if packed:
        leaf = packed[0].rpartition(".")[2]
        yield _warning(
            "precision",
            f"{len(packed)} routers are quantised ({_many(packed)}): their choices are rounded, their weights cannot be trained",
            f"leave them out: BitsAndBytesConfig(llm_int8_skip_modules=['{leaf}'])",
        )
        return
    rounded = None if subject.seen is None else subject.seen.rounded
    share = "" if rounded is None else f"; {rounded:.2%} of the choices are others than in fp32"
    trained = [name for name, p in weights.items() if p.dtype in LOW and p.requires_grad]
    if trained:
        dtype = weights[trained[0]].dtype
        step = 2.0 ** -(8 if dtype == torch.bfloat16 else 11)
        yield _warning(
            "precision",
            f"{len(trained)} routers are trained in {str(dtype).removeprefix('torch.')}: a step of less than about {step:.2%} of "
            f"a weight is rounded away{share}",
            "keep their weights in float32: PhiBalanceConfig(fp32_routers=True)",
        )
    elif rounded is not None and rounded > 0.01:
        yield _warning(
            "precision",
            f"routers compute in 16 bits{share}",
            "harmless where training and serving do alike; else compute the router's linear layer in float32",
        )
    else:
        types = sorted({str(p.dtype).removeprefix("torch.") for p in weights.values()})
        yield Check("precision", "ok", f"router weights in {', '.join(types)}{share}")


def patched(subject: Subject) -> Iterator[Check]:
    """Checks that the model is patched, and that its present routers have hooks."""
    if subject.balancer is None:
        yield Check(
            "patch", "problem", f"{type(subject.root).__name__} is not φ-balanced", "phb.patch(model, {'coef': 0.01})"
        )
        return
    here = find_routers(subject.root)
    bare = [
        site.name
        for site in here
        if not all(any(isinstance(hook, RouterHook) for hook in m._forward_hooks.values()) for m in site.modules)
    ]
    if bare:
        yield _problem(
            "patch",
            f"{len(bare)} of {len(here)} routers have no hook: {_many(bare)}. Something removed it, or put another module "
            "there since the patch (an adapter, quantisation, kernels)",
            "phb.unpatch(model), then phb.patch(model, config) as the last thing before training",
        )
    else:
        config = subject.balancer.config
        settings = f"method {config.method!r}, coef={config.coef}, bias_coef={config.bias_coef}"
        yield Check("patch", "ok", f"{len(here)} routers, {settings}")


def wiring(subject: Subject) -> Iterator[Check]:
    if subject.trainer is not None and subject.balancer is not None:
        how = "attached" if subject.is_attached else "not attached yet, which train() does"
        yield Check("trainer", "ok", f"{subject.trainer}: {how}")


def auxiliary_loss(subject: Subject) -> Iterator[Check]:
    """Looks for another auxiliary loss: of the model, of the trainer, or of whoever computes the loss."""
    if subject.balancer is None or not subject.balancer.config.is_on:
        return
    found = list(_built_in(subject.root))
    foreign = None if subject.seen is None else subject.seen.foreign
    if found:
        yield _problem(
            "auxiliary loss",
            f"the model adds its own auxiliary loss to φ-balancing ({_many(found)}); it was switched on after the patch",
            "set output_router_logits=False in the model's config, or call phb.patch(model) again",
        )
    elif subject.auxiliary:
        yield _problem(
            "auxiliary loss",
            f"{subject.trainer} adds an auxiliary loss of its own, router_aux_loss_coef={subject.auxiliary}; it was switched on "
            "after phb.attach(trainer)",
            "set trainer.aux_loss_enabled=False, or router_aux_loss_coef=0.0 in the trainer's arguments",
        )
    elif foreign:
        worst = max(foreign, key=lambda name: foreign[name])
        yield _warning(
            "auxiliary loss",
            f"the loss has a gradient at the logits of {len(foreign)} routers that comes neither from their outputs nor from "
            f"φ-balancing, up to {foreign[worst]:.3g} times that of the prices (at {worst}): an auxiliary loss in compute_loss?",
            "leave one of the two out, unless both are wanted",
        )
    elif foreign is None:
        yield Check(
            "auxiliary loss", "ok", "none of the model or an option; whether the loss adds one was not measured"
        )
    elif subject.is_real:
        yield Check("auxiliary loss", "ok", "none beside φ-balancing")
    else:
        unseen = "" if subject.trainer is None else f"; compute_loss was not run, but is by {VERIFY}"
        yield Check("auxiliary loss", "ok", f"none beside φ-balancing in the model's own loss{unseen}")


def _built_in(root: nn.Module) -> Iterator[str]:
    whole: Any = getattr(root, "config", None)
    for config in {id(c): c for c in (whole, whole.get_text_config())}.values() if whole is not None else ():
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            value = getattr(config, name, 0.0) or 0.0
            if getattr(config, "output_router_logits", False) and value > VANISHING:
                yield f"output_router_logits=True, {name}={value}"
    for name, module in root.named_modules():
        alpha = getattr(module, "alpha", None) or 0.0
        if type(module).__name__ in REMOTE_TRAITS and alpha > VANISHING:
            yield f"alpha={alpha} of {name}"


def parallelism(subject: Subject) -> Iterator[Check]:
    """Reports parallelism in which the coefficient would be wrong."""
    if subject.parallel:
        yield _problem("parallelism", subject.parallel)
    elif subject.balancer is not None:
        ranks = subject.balancer.ranks
        yield Check("parallelism", "ok", "one process" if ranks == 1 else f"{ranks} data-parallel ranks")


def checkpointing(subject: Subject) -> Iterator[Check]:
    if subject.balancer is None:
        return
    kinds = set() if subject.checkpointing is None else {subject.checkpointing}
    for module in subject.root.modules():
        function: Any = vars(module).get("_gradient_checkpointing_func")
        if getattr(module, "gradient_checkpointing", False) and hasattr(function, "keywords"):
            kinds.add(function.keywords.get("use_reentrant") is not False)
    yield Check("checkpointing", "ok", "none" if not kinds else "reentrant" if True in kinds else "non-reentrant")


def selection_bias(subject: Subject) -> Iterator[Check]:
    """Warns if a plain load loses the selection bias, or if an engine does not get it."""
    balancer = subject.balancer
    if balancer is None or not balancer.has_bias:
        return
    if subject.engine and balancer.config.bias_coef > 0:
        yield _warning(
            "selection bias",
            f"{subject.engine} generates with the selection bias of the checkpoint, while the trained one moves: only weights are "
            "handed over to it during training",
            "bias_coef=0, and balance by coef",
        )
        return
    own = [site.name for site in balancer.sites if not site.has_native_bias]
    if not own:
        yield Check("selection bias", "ok", "kept in the weights, by a buffer of the family's own")
        return
    changed = None if subject.seen is None else subject.seen.unbiased
    cost = "" if changed is None else f"; now that would change {changed:.1%} of the choices"
    yield _warning(
        "selection bias",
        f"that of {len(own)} routers is kept in {STATE_NAME} beside the weights, and a plain from_pretrained loses it{cost}",
        "load with hf_phibalance (from_pretrained(..., phi_balance=True)), and serve with it, or balance by coef alone",
    )


def state_file(subject: Subject) -> Iterator[Check]:
    """Looks for a state file that is damaged, of another model, or missing."""
    if subject.balancer is None or subject.folder is None:
        return
    path = state_in(subject.folder)
    if path is None:
        try:
            saved = PhiBalanceConfig.of_checkpoint(subject.folder)
        except ValueError as error:
            yield _problem("state file", str(error), "correct or remove it there")
            return
        if saved is not None:
            yield _warning(
                "state file",
                f"the model was saved while φ-balanced, but there is no {STATE_NAME} beside it: its duals start anew",
                "copy that file from where the model was saved",
            )
        return
    try:
        steps = subject.balancer.check(path)
    except (ValueError, OSError) as error:
        yield Check(
            "state file", "problem", str(error), f"replace {path.name}, or delete it to start with fresh duals"
        )
        return
    yield Check("state file", "ok", f"{path.name} fits, after {steps} steps")


def versions(subject: Subject) -> Iterator[Check]:
    found = dependencies()
    wrong = [(requirement, present) for requirement, present in found if not is_supported(requirement, present)]
    if wrong:
        names = ", ".join(f"{r.name} {present}" for r, present in wrong)
        wanted = " ".join(f'"{r.name}{r.specifier}"' for r, _ in wrong)
        yield _problem("versions", f"{names} is outside the supported range", f"pip install {wanted}")
    elif found:
        yield Check("versions", "ok", ", ".join(f"{r.name} {present}" for r, present in found))


# in the order of the report
CHECKS: tuple[Callable[[Subject], Iterator[Check]], ...] = (
    coefficient,
    first_step,
    patched,
    wiring,
    auxiliary_loss,
    tokens,
    routers_run,
    balance,
    precision,
    checkpointing,
    parallelism,
    selection_bias,
    state_file,
    versions,
)
