"""All checks, listed in `CHECKS`. Each returns status, finding and remedy, or `None` if it does not apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import count_padding, describe_router
from ..compat import dependencies
from ..config import PhiBalanceConfig
from ..files import STATE_NAME, state_in
from ..routers import REMOTE_TRAITS, RouterHook, find_routers
from .recorder import LOW
from .report import PRECISE, Check, Status


Result = tuple[Status, str, str]
VANISHING = 1e-200  # coefficients up to this count as 0
EVEN, COLLAPSED = 0.9, 0.5  # effective experts, as a share of all
ASSIGNED = 10  # with fewer selections per expert, loads say little
ENOUGH = 1000  # with fewer selections in the step, the share that rounding changes is noise
VERIFY = "phb.attach(trainer, verify=True), which measures a step of the training itself"
TRAIN_ROUTERS = (
    "phb.lora_config(model, router='lora') (--lora router=lora), or coef=0 and bias_coef, which needs no gradient"
)


@dataclass
class Subject:
    """The model, the recorded step and the trainer to check."""

    root: nn.Module  # the transformers model
    balancer: Any = None  # a `PhiBalancer`; `None` if the model is not patched
    seen: Any = None  # a `StepRecorder`; `None` if nothing was run
    is_real: bool = False  # `seen` is a step of the training itself, with the trainer's loss
    unmeasured: str = ""  # why nothing could be run
    trainer: str | None = None  # name of its class
    is_attached: bool = False
    auxiliary: float = 0.0  # coefficient of an auxiliary loss that the trainer adds
    parallel: str = ""  # what is wrong with the parallelism of the trainer
    engine: str = ""  # name of the engine that gets the weights during training
    checkpointing: bool | None = None  # reentrant gradient checkpointing, non-reentrant, or none
    pad_token_id: int | None = None  # of the tokenizer

    @property
    def batches(self) -> list[Mapping[str, Any]]:
        """The micro-batches of the step that are mappings."""
        return [batch for batch in self.seen.batches if isinstance(batch, Mapping)]

    @property
    def idle(self) -> list[str]:
        """Image routers that received no tokens."""
        loads = {} if self.seen is None else self.seen.loads
        return [site.name for site in self.balancer.sites if not site.sees_all and not loads.get(site.name)]


def run_checks(subject: Subject) -> list[Check]:
    """Returns the results of all checks that apply."""
    found = []
    for name, check, needs in CHECKS:
        result = None if any(getattr(subject, need) is None for need in needs) else check(subject)
        if result is not None:
            found.append(Check(name, *result))
    return found


def _ok(finding: str) -> Result:
    return "ok", finding, ""


def _warning(finding: str, remedy: str) -> Result:
    return "warning", finding, remedy


def _problem(finding: str, remedy: str = "") -> Result:
    return "problem", finding, remedy


def _first_three(names: Sequence[str]) -> str:
    """Returns the first three `names` as text."""
    shown = ", ".join(names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


# ---------------------------------------------------------------------- the step


def _coefficient(subject: Subject) -> Result | None:
    """Compares the received coefficient with the declared one."""
    seen, balancer = subject.seen, subject.balancer
    if balancer.config.coef == 0:
        return _ok("coef=0: there is no price gradient to measure")
    if seen is None:
        return _warning(f"not measured: {subject.unmeasured}", VERIFY) if subject.unmeasured else None
    if seen.coefficient is not None:
        return _judge(seen)
    if not seen.unmeasured or seen.error is not None:
        return None
    if balancer.coef == 0:  # its schedule is over
        return _ok(f"not measured: {seen.unmeasured}")
    remedy = f"a later step: {VERIFY}" if seen.is_early else "measure it uncompiled: phb.doctor(model)"
    return _warning(f"not measured: {seen.unmeasured}", remedy)


def _judge(seen: Any) -> Result:
    found = seen.coefficient
    if not seen.is_finite:
        return _problem(
            "the gradients of the step are not finite", "lower the learning rate or loss scale, check the data"
        )
    if math.isnan(found.ratio):
        return _problem(f"{found.declared:g} declared, but no gradient comes back through any router", TRAIN_ROUTERS)
    bound = found.tolerance
    text = (
        f"{found.declared:g} declared, {found.effective:.6g} received: ratio {found.ratio:.4f}, residual "
        f"{found.residual:.0e}, at {found.parameters}"
    )
    off = {name: ratio for name, ratio in found.by_router.items() if not abs(ratio - 1) <= bound}
    if not off and abs(found.ratio - 1) <= bound and found.residual <= 10 * bound:
        return _ok(text)
    if all(abs(kept - 1) <= bound for kept in seen.kept.values()):  # the training loop is not the cause
        if seen.goes_on:
            return _warning(
                f"{text}. The step goes on over the end of a pass through the data, so its tokens were counted in two parts",
                "none needed: other steps are exact. A dataset of known length has no such steps",
            )
        if seen.announced is None and len(seen.forwards) > 1:
            return _warning(
                f"{text}. The micro-batches do not say how many tokens they hold, so each gets its own mean",
                "one micro-batch a step; in trl's GRPO and RLOO, steps_per_generation a multiple of gradient_accumulation_steps",
            )
        if seen.by_part and seen.is_cut:
            return _warning(
                f"{text}. The model saw other tokens than the step was announced with", "see announced tokens"
            )
    worst = sorted(off, key=lambda name: -abs(off[name] - 1))
    at = f"; {_first_three([f'{name} {off[name]:.4f}' for name in worst])}" if worst else ""
    return _problem(
        f"{text}{at}",
        "look for code that changes gradients (your own training_step, hooks on parameters), and at the other checks",
    )


def _first_step(subject: Subject) -> Result | None:
    seen = subject.seen
    if seen.error is not None:
        return _problem(seen.error, "correct that first; the other checks are incomplete until then")
    if not seen.has_run:
        return _problem(
            f"no training forward of the model was seen in {seen.what}",
            "check that the trainer trains this model, not a copy, and in train mode",
        )
    return None


def _attention_mask(subject: Subject) -> Result | None:
    """Checks that padding does not count, and that all tokens with labels do."""
    seen, kind, batches = subject.seen, subject.balancer.config.token_mask, subject.batches
    if not seen.forwards:
        return None
    text = f"token_mask={kind!r}: {seen.counted:,} of {seen.positions:,} positions count"
    labels = [batch["labels"] for batch in batches if isinstance(batch.get("labels"), Tensor)]
    labelled = None
    if labels and len(labels) == len(batches):
        labelled = sum(int((each != -100).sum()) for each in labels)
        text += f"; {labelled:,} have labels"
    masks = [batch["attention_mask"] for batch in batches if isinstance(batch.get("attention_mask"), Tensor)]
    masked_out = sum(int((mask == 0).sum()) for mask in masks)
    all_count, padding = seen.counted == seen.positions, 0
    if kind != "labels" and all_count:
        padding = sum(_padding(batch.get("input_ids"), subject) for batch in batches)
    if kind == "attention" and masked_out and all_count:
        return _problem(
            f"{text}. The batches have an attention_mask with {masked_out:,} zeros, but the model received none, so padding counts",
            "PhiBalanceConfig(token_mask='labels'), or let the trainer pass the attention_mask on",
        )
    if padding:
        lost = "an attention_mask of ones" if masks else "no attention_mask"
        return (
            "problem" if kind == "attention" else "warning",
            f"{text}, among them {padding:,} of padding ({f'token_mask={kind!r}' if kind == 'all' else lost})",
            "let the collator return an attention_mask, or PhiBalanceConfig(token_mask='labels')",
        )
    if labelled is not None and seen.counted < labelled and kind != "labels" and not seen.is_cut:
        return _problem(
            f"{text}: tokens that are trained on do not count",
            "check the attention_mask of the batches, or PhiBalanceConfig(token_mask='labels')",
        )
    if seen.counted == 0:
        return _problem(f"{text}: there is nothing to balance", "check the batches' masks")
    packed = batches and not masks and kind == "attention"
    return _ok(f"{text}, no attention_mask (packed or unpadded)" if packed else text)


def _padding(ids: Any, subject: Subject) -> int:
    """Counts padding in `ids (B, S)`."""
    config, pad = getattr(subject.root, "config", None), subject.pad_token_id
    if pad is None and config is not None:
        pad = getattr(config.get_text_config(), "pad_token_id", None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[-1] < 2 or not isinstance(pad, int):
        return 0
    return int(count_padding(ids, torch.ones_like(ids, dtype=torch.bool), pad))


def _announced_tokens(subject: Subject) -> Result | None:
    seen = subject.seen
    is_exact = seen.coefficient is not None and seen.coefficient.residual <= 10 * PRECISE
    if not seen.forwards or not seen.is_cut or (seen.by_part and is_exact):
        return None
    return (
        "warning" if seen.by_part else "problem",
        f"the step was announced with {seen.announced:,.0f} tokens, the model saw {seen.tokens:,.0f}",
        "give the model the batches as the dataloader makes them, or begin_step() what the model gets",
    )


# ---------------------------------------------------------------------- the routers


def _routers_that_run(subject: Subject) -> Result | None:
    seen, names, idle = subject.seen, subject.balancer.layer_names, subject.idle
    if not seen.has_run or not seen.tokens:
        return None
    silent = [name for name in names if not seen.loads.get(name) and name not in idle]
    if silent:
        return _problem(
            f"{len(silent)} of {len(names)} routers were never called: {_first_three(silent)}",
            "switch off fused kernels (use_kernels=True) and skipped layers, or phb.unpatch(model)",
        )
    return _ok(f"all {len(names)}" + (f" but {_first_three(idle)}, which had nothing to route" if idle else ""))


def _routers_that_learn(subject: Subject) -> Result | None:
    """Looks for routers that do not learn, or have no gradient path to a trained parameter."""
    seen, balancer = subject.seen, subject.balancer
    names = balancer.layer_names
    rows = [describe_router(name, subject.root) for name in names]
    learning = [row.name for row in rows if row.how != "frozen"]
    if balancer.config.rules.freezes and learning:
        return _problem(
            f"method='frozen', but {len(learning)} routers are trained: {_first_three(learning)}",
            "leave the routers out of the adapter: phb.lora_config(model, router='frozen'), or choose another method",
        )
    if balancer.config.rules.freezes or not balancer.config.adds_gradient:
        return None
    unmoved = [row.name for row in rows if not row.parameters and not row.below]
    if len(unmoved) == len(names):
        return _problem("all routers are frozen, and nothing below them learns", TRAIN_ROUTERS)
    if seen is not None and seen.has_run:
        cut = [name for name in names if name not in (*seen.added, *unmoved, *subject.idle)]
        if cut:
            return _problem(
                f"no gradient path leads from {len(cut)} of {len(names)} routers: {_first_three(cut)}",
                "use_reentrant=False or model.enable_input_require_grads(); else look for torch.no_grad() and detach()",
            )
    frozen = [name for name in names if name not in learning]
    if frozen:
        return _warning(
            f"{len(frozen)} of {len(names)} routers are frozen ({_first_three(frozen)}): balancing moves only what lies below them"
            + (f", and there is nothing below {_first_three(unmoved)}" if unmoved else ""),
            TRAIN_ROUTERS,
        )
    kinds = sorted({"in full" if row.how == "full" else "by LoRA" for row in rows})
    return _ok(f"all {len(names)}, {' and '.join(kinds)}")


def _loads(subject: Subject) -> Result | None:
    """Looks for even probabilities with collapsed loads, which a price on probabilities cannot see."""
    seen, balancer, config, collapsed = subject.seen, subject.balancer, subject.balancer.config, []
    if not seen.forwards or not (config.track == "probs" and config.coef > 0 and config.bias_coef == 0):
        return None
    for site, probs_E, load_E in zip(balancer.sites, *seen.sums):
        even, used = _effective(probs_E), _effective(load_E)
        experts, has_enough = site.num_experts, load_E.sum() >= ASSIGNED * site.num_experts
        if has_enough and even > EVEN * experts and used < COLLAPSED * experts:
            collapsed.append(f"{site.name} (as good as {used:.1f} of {experts} experts)")
    if not collapsed:
        return None
    return _warning(
        f"the probabilities of {len(collapsed)} routers are even, but their loads have collapsed: {_first_three(collapsed)}",
        "track='load', or a selection bias (bias_coef > 0): the price follows probabilities, not loads",
    )


def _effective(share_E: Tensor) -> float:
    """Returns the effective number of experts, 1 / Σ share²."""
    return float(share_E.sum() ** 2 / share_E.square().sum().clamp(min=1e-30))


def _precision(subject: Subject) -> Result:
    """Looks for routers that are quantised, trained in 16 bits, or computed in 16 bits."""
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
        return _warning(
            f"{len(packed)} routers are quantised ({_first_three(packed)}): their choices are rounded, their weights cannot be trained",
            f"leave them out: BitsAndBytesConfig(llm_int8_skip_modules=['{leaf}'])",
        )
    rounded = None if subject.seen is None else subject.seen.rounded
    share = "" if rounded is None else f"; {rounded:.2%} of the choices are others than in fp32"
    trained = [name for name, p in weights.items() if p.dtype in LOW and p.requires_grad]
    if trained:
        dtype = weights[trained[0]].dtype
        step = 2.0 ** -(8 if dtype == torch.bfloat16 else 11)
        return _warning(
            f"{len(trained)} routers are trained in {str(dtype).removeprefix('torch.')}: a step of less than about {step:.2%} of "
            f"a weight is rounded away{share}",
            "keep their weights in float32: PhiBalanceConfig(fp32_routers=True)",
        )
    if rounded is not None and rounded > 0.01 and sum(subject.seen.loads.values()) >= ENOUGH:
        return _warning(
            f"routers compute in 16 bits{share}",
            "none needed if training and serving do the same; else compute the router's linear layer in float32",
        )
    types = sorted({str(p.dtype).removeprefix("torch.") for p in weights.values()})
    return _ok(f"router weights in {', '.join(types)}{share}")


# ---------------------------------------------------------------------- the set-up


def _patch(subject: Subject) -> Result:
    """Checks that the model is patched, and that its present routers have hooks."""
    if subject.balancer is None:
        return _problem(f"{type(subject.root).__name__} is not φ-balanced", "phb.patch(model, {'coef': 0.01})")
    sites = find_routers(subject.root)
    bare = [
        site.name
        for site in sites
        if not all(any(isinstance(hook, RouterHook) for hook in m._forward_hooks.values()) for m in site.modules)
    ]
    if bare:
        return _problem(
            f"{len(bare)} of {len(sites)} routers have no hook: {_first_three(bare)}. They were replaced, or lost it, after the patch",
            "phb.unpatch(model), then phb.patch(model, config) as the last thing before training",
        )
    config = subject.balancer.config
    return _ok(f"{len(sites)} routers, method {config.method!r}, coef={config.coef}, bias_coef={config.bias_coef}")


def _trainer(subject: Subject) -> Result:
    return _ok(f"{subject.trainer}: {'attached' if subject.is_attached else 'not attached yet, which train() does'}")


def _auxiliary_loss(subject: Subject) -> Result | None:
    """Looks for another auxiliary loss, added by the model, by the trainer or by `compute_loss`."""
    if not subject.balancer.config.is_on:
        return None
    found = list(_built_in(subject.root))
    foreign = None if subject.seen is None else subject.seen.foreign
    if found:
        return _problem(
            f"the model adds its own auxiliary loss, switched on after the patch ({_first_three(found)})",
            "output_router_logits=False in the model's config, or phb.patch(model) again",
        )
    if subject.auxiliary:
        return _problem(
            f"{subject.trainer} adds its own auxiliary loss, router_aux_loss_coef={subject.auxiliary}",
            "trainer.aux_loss_enabled=False, or router_aux_loss_coef=0.0 in the trainer's arguments",
        )
    if foreign is None:
        return _ok("none of the model or an option; whether the loss adds one was not measured")
    if foreign:
        worst = max(foreign, key=lambda name: foreign[name])
        return _warning(
            f"the loss has a gradient at the logits of {len(foreign)} routers that comes neither from their outputs nor from "
            f"φ-balancing, up to {foreign[worst]:.3g} times that of the prices (at {worst}): an auxiliary loss in compute_loss?",
            "leave one of the two out, unless both are wanted",
        )
    if subject.is_real:
        return _ok("none beside φ-balancing")
    unseen = "" if subject.trainer is None else f"; compute_loss was not run, but is by {VERIFY}"
    return _ok(f"none beside φ-balancing in the model's own loss{unseen}")


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


def _checkpointing(subject: Subject) -> Result:
    kinds = {subject.checkpointing} - {None}
    for module in subject.root.modules():
        function: Any = vars(module).get("_gradient_checkpointing_func")
        if getattr(module, "gradient_checkpointing", False) and hasattr(function, "keywords"):
            kinds.add(function.keywords.get("use_reentrant") is not False)
    return _ok("none" if not kinds else "reentrant" if True in kinds else "non-reentrant")


def _parallelism(subject: Subject) -> Result | None:
    if subject.parallel:
        return _problem(subject.parallel)
    if subject.balancer is None:
        return None
    ranks = subject.balancer.ranks
    return _ok("one process" if ranks == 1 else f"{ranks} data-parallel ranks")


def _selection_bias(subject: Subject) -> Result | None:
    """Warns if plain `from_pretrained` loses the selection bias, or if an engine does not get it."""
    balancer = subject.balancer
    if not balancer.has_bias:
        return None
    if subject.engine and balancer.config.bias_coef > 0:
        return _warning(
            f"{subject.engine} generates with the selection bias of the checkpoint: during training it gets only the weights",
            "bias_coef=0, and balance by coef",
        )
    own = [site.name for site in balancer.sites if not site.has_native_bias]
    if not own:
        return _ok("kept in the weights, by a buffer of the family's own")
    changed = None if subject.seen is None else subject.seen.unbiased
    cost = "" if changed is None else f"; now that would change {changed:.1%} of the choices"
    return _warning(
        f"that of {len(own)} routers is kept in {STATE_NAME} beside the weights, and a plain from_pretrained loses it{cost}",
        "load and serve with hf_phibalance: from_pretrained(..., phi_balance=True); or balance by coef alone",
    )


def _state_file(subject: Subject) -> Result | None:
    """Looks for a state file that is damaged, of another model, or missing."""
    folder = getattr(subject.root, "name_or_path", "")
    if not folder or not Path(folder).is_dir():
        return None
    path = state_in(folder)
    try:
        if path is not None:
            return _ok(f"{path.name} fits, after {subject.balancer.check(path)} steps")
        saved = PhiBalanceConfig.of_checkpoint(folder)
    except (ValueError, OSError) as error:
        return _problem(
            str(error), "correct it there" if path is None else "replace it, or delete it to start with fresh duals"
        )
    if saved is None:
        return None
    return _warning(
        f"the model was saved while φ-balanced, but there is no {STATE_NAME} beside it: its duals start anew",
        "copy that file from where the model was saved",
    )


def _versions(subject: Subject) -> Result | None:
    found = dependencies()
    wrong = [(r, present) for r, present in found if not r.specifier.contains(present, prereleases=True)]
    if wrong:
        names = ", ".join(f"{r.name} {present}" for r, present in wrong)
        wanted = " ".join(f'"{r.name}{r.specifier}"' for r, _ in wrong)
        return _problem(f"{names} is outside the supported range", f"pip install {wanted}")
    return _ok(", ".join(f"{r.name} {present}" for r, present in found)) if found else None


# Name, check, and the fields of `Subject` that it needs; in the order of the report.
CHECKS: tuple[tuple[str, Callable[[Subject], Result | None], tuple[str, ...]], ...] = (
    ("coefficient", _coefficient, ("balancer",)),
    ("first step", _first_step, ("seen",)),
    ("patch", _patch, ()),
    ("trainer", _trainer, ("balancer", "trainer")),
    ("auxiliary loss", _auxiliary_loss, ("balancer",)),
    ("attention mask", _attention_mask, ("balancer", "seen")),
    ("announced tokens", _announced_tokens, ("balancer", "seen")),
    ("routers that run", _routers_that_run, ("balancer", "seen")),
    ("routers that learn", _routers_that_learn, ("balancer",)),
    ("loads", _loads, ("balancer", "seen")),
    ("precision", _precision, ("balancer",)),
    ("checkpointing", _checkpointing, ("balancer",)),
    ("parallelism", _parallelism, ()),
    ("selection bias", _selection_bias, ("balancer",)),
    ("state file", _state_file, ("balancer",)),
    ("versions", _versions, ()),
)
