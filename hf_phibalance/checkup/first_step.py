"""Checks of the step that was tried out: each problem by name, with its remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..balancing import describe_router
from .observation import labels_in
from .report import Check, Coefficient
from .subject import Subject, many


PRECISE, ROUGH = 1e-3, 2e-2  # how far the coefficient may be from the declared one in fp32, and in less
REMEASURE = "measure it in one process: phibalance doctor, or the same trainer without sharding"


def step_runs(subject: Subject) -> Iterator[Check]:
    seen = subject.seen
    if seen is not None and seen.error is not None:
        yield Check("first step", "problem", seen.error, "mend that first; what follows could not all be looked at")
    elif seen is not None and not seen.forwards:
        yield Check(
            "first step",
            "problem",
            f"no training forward of the model was seen in {seen.what}",
            "check that the trainer trains this model and not a copy of it, and that it is in train mode",
        )


def coefficient(subject: Subject) -> Iterator[Check]:
    """The effective coefficient against the declared one."""
    if subject.balancer is None:
        return
    declared = subject.balancer.config.coef
    if declared == 0:
        yield Check("coefficient", "ok", "coef=0: there is no price gradient to measure")
        return
    found = None if subject.seen is None else subject.seen.coefficient
    if found is None:
        if subject.unmeasured:
            yield Check("coefficient", "warning", f"not measured: {subject.unmeasured}", REMEASURE)
        return
    yield _judge(subject, found)


def _judge(subject: Subject, found: Coefficient) -> Check:
    seen = subject.seen
    assert seen is not None
    if math.isnan(found.ratio):
        return Check(
            "coefficient",
            "problem",
            f"{found.declared:g} declared: the definition reaches none of {found.parameters}, or gradients are not finite",
            "train the routers, e.g. phb.lora_config(model, router='lora'), or balance by bias_coef alone (coef=0)",
        )
    bound = PRECISE if found.precise else ROUGH
    scaled = " (measured at a lower loss scale, since gradients overflowed)" if seen.lowered else ""
    text = (
        f"{found.declared:g} declared, {found.effective:.6g} received: ratio {found.ratio:.4f}, residual "
        f"{found.residual:.0e}, at {found.parameters}{scaled}"
    )
    off = {name: ratio for name, ratio in found.by_router.items() if not abs(ratio - 1) <= bound}
    if not off and abs(found.ratio - 1) <= bound and found.residual <= 10 * bound:
        return Check("coefficient", "ok", text)
    if seen.announced is None and len(seen.forwards) > 1:
        return Check(
            "coefficient",
            "warning",
            f"{text}. The micro-batches do not say how many tokens they hold, so each is charged its own mean",
            "one micro-batch a step makes it exact; with micro-batches of similar length it is close. phb.attach(trainer) "
            "knows their tokens, in trl's GRPO and RLOO if steps_per_generation is a multiple of gradient_accumulation_steps",
        )
    worst = sorted(off, key=lambda name: -abs(off[name] - 1))
    at = f"; {many([f'{name} {off[name]:.4f}' for name in worst])}" if worst else ""
    return Check(
        "coefficient",
        "problem",
        f"{text}{at}",
        "something between backward and optimizer changes gradients (a training_step of one's own, hooks on parameters), "
        "or hides tokens or routers from balancing: see the other checks",
    )


def tokens(subject: Subject) -> Iterator[Check]:
    """Which tokens count: padding, masks that get lost, announced and seen ones."""
    seen, balancer = subject.seen, subject.balancer
    if seen is None or balancer is None or not seen.forwards:
        return
    kind = balancer.config.token_mask
    positions = sum(forward.mask.numel() for forward in seen.forwards)
    own = sum(int(forward.mask.sum()) for forward in seen.forwards)
    labelled = labels_in(subject.batches)
    trained = "" if labelled is None else f"; {labelled:,} have labels"
    text = f"token_mask={kind!r}: {own:,} of {positions:,} positions count{trained}"
    given = [batch["attention_mask"] for batch in subject.batches if isinstance(batch.get("attention_mask"), Tensor)]
    masked_out = sum(int((mask == 0).sum()) for mask in given)
    blind = [forward for forward in seen.forwards if kind != "labels" and bool(forward.mask.all())]
    padding = sum(_padding(forward.kwargs.get("input_ids"), subject) for forward in blind)
    if kind == "attention" and masked_out and not any(forward.masked for forward in seen.forwards):
        yield Check(
            "attention mask",
            "problem",
            f"{text}. The batches have an attention_mask with {masked_out:,} zeros, but the model received none: the "
            "trainer drops it, and padding counts",
            "PhiBalanceConfig(token_mask='labels'), or let the trainer pass the attention_mask on",
        )
    elif padding:
        masked = any(forward.masked for forward in blind)
        lost = (
            f"token_mask={kind!r}" if kind == "all" else "an attention_mask of ones" if masked else "no attention_mask"
        )
        yield Check(
            "attention mask",
            "problem" if kind == "attention" else "warning",
            f"{text}, among them {padding:,} of padding ({lost})",
            "let the collator return an attention_mask, or PhiBalanceConfig(token_mask='labels')",
        )
    elif labelled is not None and own < labelled and kind != "labels":
        yield Check(
            "attention mask",
            "problem",
            f"{text}: tokens that are trained on do not count",
            "check the attention_mask of the batches, or PhiBalanceConfig(token_mask='labels')",
        )
    elif own == 0:
        yield Check("attention mask", "problem", f"{text}: there is nothing to balance", "check the batches' masks")
    else:
        packed = "" if any(forward.masked for forward in seen.forwards) else ", no attention_mask (packed or unpadded)"
        yield Check("attention mask", "ok", text + (packed if kind == "attention" else ""))
    if seen.announced is not None and seen.announced != seen.tokens:
        yield Check(
            "announced tokens",
            "problem",
            f"the step was announced with {seen.announced:,.0f} tokens, the model saw {seen.tokens:,.0f}: the coefficient is "
            "scaled by their ratio",
            "give the model the batches as the dataloader makes them, or begin_step() what the model gets",
        )


def _padding(ids: Any, subject: Subject) -> int:
    """Padding among `ids (B, S)`: runs of the padding token at the ends of rows; a single one may end a text as well."""
    pad = subject.pad_token_id
    if pad is None:
        config = getattr(subject.root, "config", None)
        pad = None if config is None else getattr(config.get_text_config(), "pad_token_id", None)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[-1] < 2 or not isinstance(pad, int):
        return 0
    is_pad = (ids == pad).long()
    runs = is_pad.cumprod(-1).sum(-1), is_pad.flip(-1).cumprod(-1).sum(-1)
    return sum(int(run[run >= 2].sum()) for run in runs)


def routers_run(subject: Subject) -> Iterator[Check]:
    """Routers that never ran, do not learn, or from which no gradient path leads anywhere."""
    seen, balancer = subject.seen, subject.balancer
    if balancer is None:
        return
    names = balancer.layer_names
    # those for images only, if there was none
    idle = [] if seen is None else [s.name for s in balancer.sites if not s.sees_all and not seen.loads.get(s.name)]
    if seen is not None and seen.forwards and seen.tokens:
        silent = [name for name in names if not seen.loads.get(name) and name not in idle]
        if silent:
            yield Check(
                "routers that run",
                "problem",
                f"{len(silent)} of {len(names)} routers were never called: {many(silent)}. Something bypasses them (a fused "
                "kernel, use_kernels=True, layers that are not run)",
                "switch that off, or phb.unpatch(model)",
            )
        else:
            but = f" but {many(idle)}, which had nothing to route" if idle else ""
            yield Check("routers that run", "ok", f"all {len(names)}{but}")
    rows = [describe_router(name, subject.root) for name in names]
    if balancer.config.rules.freezes or not balancer.config.charges:
        learning = [row.name for row in rows if row.how != "frozen"]
        if balancer.config.rules.freezes and learning:
            yield Check(
                "routers that learn",
                "problem",
                f"method='frozen', but {len(learning)} routers are trained: {many(learning)}",
                "leave the routers out of the adapter, e.g. by phb.lora_config(model, router='frozen'), or choose another method",
            )
        return
    unmoved = [row.name for row in rows if not row.parameters and not row.below]
    cut = [] if seen is None or not seen.forwards else [n for n in names if n not in (*seen.charged, *unmoved, *idle)]
    frozen = [row.name for row in rows if row.how == "frozen"]
    remedy = "phb.lora_config(model, router='lora') or 'full', or coef=0 and bias_coef > 0, which needs no gradient"
    if len(unmoved) == len(names):
        yield Check("routers that learn", "problem", "all routers are frozen, and nothing below them learns", remedy)
    elif cut:
        yield Check(
            "routers that learn",
            "problem",
            f"no gradient path leads from {len(cut)} of {len(names)} routers: {many(cut)}",
            "with reentrant gradient checkpointing: use_reentrant=False or model.enable_input_require_grads(); else look for "
            "torch.no_grad() and detach() around these layers",
        )
    elif frozen:
        yield Check(
            "routers that learn",
            "warning",
            f"{len(frozen)} of {len(names)} routers are frozen ({many(frozen)}): balancing moves only what lies below them"
            + (f", and there is nothing below {many(unmoved)}" if unmoved else ""),
            remedy,
        )
    else:
        kinds = sorted({"in full" if row.how == "full" else "by LoRA" for row in rows})
        yield Check("routers that learn", "ok", f"all {len(names)}, {' and '.join(kinds)}")


def precision(subject: Subject) -> Iterator[Check]:
    """Quantised routers, routers trained in 16 bits, routers that compute in 16 bits."""
    if subject.balancer is None:
        return
    weights = {
        site.name: parameter
        for site in subject.balancer.sites
        for module in site.modules
        for name, parameter in module.named_parameters()
        if ".lora_" not in f".{name}" and parameter.numel() > 1
    }
    packed = [
        name for name, weight in weights.items() if not weight.is_floating_point() or hasattr(weight, "quant_state")
    ]
    if packed:
        leaf = packed[0].rpartition(".")[2]
        yield Check(
            "precision",
            "warning",
            f"{len(packed)} routers are quantised ({many(packed)}): their choices are rounded, their weights cannot be trained",
            f"leave them out: BitsAndBytesConfig(llm_int8_skip_modules=['{leaf}'])",
        )
        return
    rounded = None if subject.seen is None else subject.seen.rounded
    share = "" if rounded is None else f"; {rounded:.2%} of the choices are others than in fp32"
    low = {name: w.dtype for name, w in weights.items() if w.dtype in (torch.bfloat16, torch.float16)}
    trained = [name for name in low if weights[name].requires_grad]
    if trained:
        dtype = low[trained[0]]
        step = 2.0 ** -(8 if dtype == torch.bfloat16 else 11)
        yield Check(
            "precision",
            "warning",
            f"{len(trained)} routers are trained in {str(dtype).removeprefix('torch.')}: a step of less than about {step:.2%} of "
            f"a weight is rounded away{share}",
            "keep the weights in float32 and compute in bf16 (bf16=True and from_pretrained(dtype=torch.float32)), or train "
            "the routers by LoRA, which PEFT keeps in float32",
        )
    elif rounded is not None and rounded > 0.01:
        yield Check(
            "precision",
            "warning",
            f"routers compute in 16 bits{share}",
            "harmless where training and serving do alike; else compute the router's linear layer in float32",
        )
    else:
        types = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
        yield Check("precision", "ok", f"router weights in {', '.join(types)}{share}")
