"""Checks of the set-up, for which nothing needs to run: each problem by name, with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..balancing import find_patch
from ..compat import dependencies, is_supported
from ..routers import REMOTE_TRAITS, RouterHook, find_routers
from ..sidecar import STATE_NAME, state_in
from .report import Check
from .subject import Subject, many
from .trial import CHECKPOINTING, is_reentrant


VANISHING = 1e-200  # a coefficient that stands for 0


def versions(subject: Subject) -> Iterator[Check]:
    found = dependencies()
    if not found:
        return
    wrong = [(requirement, present) for requirement, present in found if not is_supported(requirement, present)]
    if wrong:
        names = ", ".join(f"{r.name} {present}" for r, present in wrong)
        wanted = " ".join(f'"{r.name}{r.specifier}"' for r, _ in wrong)
        yield Check("versions", "problem", f"{names} is outside the supported range", f"pip install {wanted}")
    else:
        yield Check("versions", "ok", ", ".join(f"{r.name} {present}" for r, present in found))


def patched(subject: Subject) -> Iterator[Check]:
    """A patch, one, and its hooks where the routers now are."""
    if subject.balancer is None:
        yield Check(
            "patch", "problem", f"{type(subject.root).__name__} is not φ-balanced", "phb.patch(model, {'coef': 0.01})"
        )
        return
    again = [name for name, module in subject.root.named_modules() if name and find_patch(module) is not None]
    here = find_routers(subject.root)
    hooks = {site.name: [_hooks(module) for module in site.modules] for site in here}
    if again or any(len(found) > 1 for each in hooks.values() for found in each):
        yield Check(
            "patch",
            "problem",
            f"the model is patched twice: as a whole, and its part {many(again) or 'of the same routers'}; both charge",
            "phb.unpatch that part (a backbone, a copy in a wrapper) and keep the patch of the whole model",
        )
        return
    bare = [name for name, each in hooks.items() if not all(each)]
    if bare:
        yield Check(
            "patch",
            "problem",
            f"{len(bare)} of {len(here)} routers have no hook: {many(bare)}. Something removed it, or put another module "
            "there since the patch (an adapter, quantisation, kernels)",
            "phb.unpatch(model), then phb.patch(model, config) as the last thing before training",
        )
        return
    config = subject.balancer.config
    yield Check(
        "patch",
        "ok",
        f"{len(here)} routers, method {config.method!r}, coef={config.coef}, bias_coef={config.bias_coef}",
    )


def _hooks(module: nn.Module) -> list[RouterHook]:
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, RouterHook)]


def wiring(subject: Subject) -> Iterator[Check]:
    if subject.trainer is None or subject.balancer is None or subject.wiring is None:
        return
    if subject.wiring == "none":
        yield Check(
            "trainer",
            "problem",
            f"{subject.trainer} knows nothing of the balancer: no step would be closed, the prices would never move",
            "phb.attach(trainer) before trainer.train()",
        )
    elif subject.wiring == "callback":
        yield Check(
            "trainer",
            "warning",
            f"{subject.trainer} has PhiBalanceCallback but is not attached: each micro-batch is charged its own mean",
            "phb.attach(trainer), which counts the tokens of the whole step",
        )
    else:
        yield Check("trainer", "ok", f"attached to {subject.trainer}")


def auxiliary_loss(subject: Subject) -> Iterator[Check]:
    """A second auxiliary loss, of the model or of the trainer."""
    if subject.balancer is None or not subject.balancer.config.is_on:
        return
    found = list(_built_in(subject.root))
    if found:
        yield Check(
            "auxiliary loss",
            "problem",
            f"the model adds its own auxiliary loss to φ-balancing ({many(found)}); it was switched on after the patch",
            "set output_router_logits=False in the model's config, or call phb.patch(model) again",
        )
    elif subject.auxiliary:
        yield Check(
            "auxiliary loss",
            "problem",
            f"{subject.trainer} adds an auxiliary loss of its own, router_aux_loss_coef={subject.auxiliary}",
            "set router_aux_loss_coef=0.0 in the trainer's arguments, or phb.attach(trainer), which switches it off",
        )
    else:
        yield Check("auxiliary loss", "ok", "none beside φ-balancing")


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
    """Ways of training in which the data-parallel ranks are not simply all."""
    if subject.balancer is None:
        return
    if subject.parallel:
        yield Check("parallelism", "problem", subject.parallel)
        return
    ranks = subject.balancer.ranks
    yield Check("parallelism", "ok", "one process" if ranks == 1 else f"{ranks} data-parallel ranks")


def checkpointing(subject: Subject) -> Iterator[Check]:
    functions = [
        vars(module).get(CHECKPOINTING)
        for module in subject.root.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    kinds = {is_reentrant(function) for function in functions if function is not None}
    if True not in kinds:
        yield Check("checkpointing", "ok", "none" if not kinds else "non-reentrant")
        return
    several = subject.seen is not None and len(subject.seen.forwards) > max(len(subject.batches), 1)
    yield Check(
        "checkpointing",
        "warning" if several else "ok",
        "reentrant: exact as long as each forward has its backward before the next one",
        "gradient_checkpointing_kwargs={'use_reentrant': False}" if several else "",
    )


def selection_bias(subject: Subject) -> Iterator[Check]:
    """What a plain load loses of the selection bias."""
    balancer = subject.balancer
    if balancer is None or not balancer.has_bias:
        return
    own = [site.name for site in balancer.sites if not site.native_bias]
    if not own:
        yield Check("selection bias", "ok", "kept in the weights, by a buffer of the family's own")
        return
    changed = None if subject.seen is None else subject.seen.unbiased
    cost = "" if changed is None else f"; now that would change {changed:.1%} of the choices"
    yield Check(
        "selection bias",
        "warning",
        f"that of {len(own)} routers is kept in {STATE_NAME} beside the weights, and a plain from_pretrained loses it{cost}",
        "load with hf_phibalance (from_pretrained(..., phi_balance=True)), and serve with it, or balance by coef alone",
    )


def state_file(subject: Subject) -> Iterator[Check]:
    """The state beside the checkpoint: damaged, of another model, or missing."""
    if subject.balancer is None or subject.folder is None or not subject.folder.is_dir():
        return
    path = state_in(subject.folder)
    if path is None:
        saved = subject.folder / "config.json"
        if saved.is_file() and '"phi_balance"' in saved.read_text(encoding="utf-8", errors="replace"):
            yield Check(
                "state file",
                "warning",
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
