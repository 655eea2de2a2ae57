"""Exports a φ-balanced checkpoint for engines that do not know this package, and measures the cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import PhiBalancer, fingerprint, get_balancer, patch, read_state, unpatch
from ..files import STATE_NAME, find_state
from ..inspection import Domain, TextStream, padded_batches, padding_of, parse_domains
from ..models import auto_class_name, base_of, check_whole, find_adapter, load_any, register_deepseek_moe
from .folding import Folding, compare
from .writing import ExportReport, check_destination, find_tokenizer, write_plain


VARIANTS = {"fold": "folded", "drop": "dropped", "rebalance": "rebalanced"}  # by `bias`: the name in the report
REBALANCE = 3  # passes
MEASURED = 3  # measure on every third document, fit on the others
FEW = 6  # with fewer documents, measure on the last third of the sequences
EXAMPLE = 32  # tokens whose logits are compared
WITHOUT_LOGITS = ("AutoModelForQuestionAnswering", "AutoModel")


def export(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    texts: str | Sequence[str] = (),
    *,
    bias: str = "fold",
    max_loss_increase: float = 0.01,
    force: bool = False,
    field: str | Sequence[str] = (),
    max_tokens: int = 1 << 16,
    seq_len: int = 512,
    batch_size: int = 8,
    tokenizer: str | os.PathLike | None = None,
    check: bool = True,
    on_report: Callable[[ExportReport], None] | None = None,
    **loading: Any,
) -> ExportReport:
    """
    Writes a φ-balanced checkpoint as an ordinary one, for engines that do not know this package: vLLM, SGLang,
    llama.cpp, plain transformers.

    If the family has a selection bias of its own, it stays in the weights. A bias in `phi_balance.state` would be
    lost, so three replacements are fitted on one part of `texts` and measured on the other. The chosen one is written
    if it does not cost too much. The cost is the increase of the loss. For a classifier it is the cross-entropy of its
    predictions against those with the bias; for a reward model, the squared distance of its scores.

    Tensors that transformers does not load, for example multi-token-prediction layers, are copied unchanged.

    Args:
        source (`str` or `os.PathLike`): folder or name on the Hub. An adapter is merged into its base model.
        destination (`str` or `os.PathLike`): a new or empty folder for the checkpoint, `export.json` and a model card.
        texts (`str` or `Sequence[str]`, *optional*):
            `name=path` or `path`, one or several, as for [`parse_domains`]. Needed if a bias would be lost.
        bias (`str`, *optional*, defaults to `"fold"`):
            What to do with the bias: `"fold"` (into the weights of the routers, see [`fold`]), `"rebalance"` (fold,
            then move the loads nearer to those with the bias) or `"drop"`.
        max_loss_increase (`float`, *optional*, defaults to `0.01`):
            Largest increase of the loss per predicted token or label. Writes nothing if it rises by more.
        force (`bool`, *optional*, defaults to `False`): writes the checkpoint even then.
        field (`str` or `Sequence[str]`, *optional*): fields of rows that hold the text, as for [`parse_domains`].
        max_tokens (`int`, *optional*, defaults to `65536`): tokens to read of each domain, `0` for all.
        seq_len (`int`, *optional*, defaults to `512`): longest sequence, in tokens.
        batch_size (`int`, *optional*, defaults to `8`): sequences of a forward.
        tokenizer (`str` or `os.PathLike`, *optional*): another folder or name to take the tokenizer from.
        check (`bool`, *optional*, defaults to `True`):
            Whether to load the result without this package and compare its logits. Needs memory for a second model.
        on_report (`Callable[[ExportReport], None]`, *optional*):
            Called with the figures before the checkpoint is refused or written.
        loading: passed to `from_pretrained`, for example `dtype`, `device_map`, `revision`, `trust_remote_code`.

    Returns:
        `ExportReport`: what was done, and what it costs.

    Raises:
        ValueError: if it costs too much; if the source was not saved while φ-balanced, is an adapter that cannot be
            merged, or has read-only routers; if texts are missing; or if the reloaded result gives other logits.
    """
    if bias not in VARIANTS:
        raise ValueError(f"`bias` must be one of {', '.join(map(repr, VARIANTS))}, got {bias!r}.")
    if not max_loss_increase >= 0:
        raise ValueError(f"`max_loss_increase` must be a loss per token of 0 or more, got {max_loss_increase!r}.")
    if isinstance(source, nn.Module):
        raise TypeError(
            f"`source` must be the folder of a checkpoint or its name on the Hub, got a {type(source).__name__}. Save it first, by "
            "save_pretrained(folder)."
        )
    source, destination = str(source), Path(destination)
    check_destination(destination)
    domains = parse_domains(texts, field) if texts else []  # before the weights are loaded
    register_deepseek_moe()
    model, report, not_loaded, of_weights = _load(source, loading)
    tokens = find_tokenizer(source, tokenizer, loading, needed=bool(domains))
    report.max_loss_increase, report.forced = max_loss_increase, force
    if report.bias == "ours" and not domains:
        raise ValueError(
            f"{source} has a selection bias beside its weights that other engines do not know. The cost of losing it is measured "
            "on texts: give some that are like what the model will see (`--texts name=path ...`)."
        )
    text_config = model.config.get_text_config()
    if domains:
        longest = min(seq_len, getattr(text_config, "max_position_embeddings", None) or seq_len)
        parts = split_texts(domains, tokens, longest, max_tokens or None)
        fitted, measured = (padded_batches(part, batch_size, padding_of(tokens)) for part in parts)
        example = {name: part[:2, :EXAMPLE] for name, part in measured[0].items()}
        _measure(model, report, bias, fitted, measured)
    else:
        size = text_config.vocab_size
        ids = torch.arange(EXAMPLE)[None] % (size - size // 2) + size // 4
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if on_report is not None:
        on_report(report)
    _refuse_costly(report, bias)
    write_plain(unpatch(model), tokens, report, destination, example, not_loaded, of_weights, check)
    return report


def split_texts(
    domains: Sequence[Domain], tokenizer: Any, seq_len: int, max_tokens: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """
    Splits texts into sequences of token ids to fit on and to measure on. Every domain is split in the same ratio. No
    text is in both parts. Raises `ValueError` if there is too little text.
    """
    fitted: list[list[int]] = []
    measured: list[list[int]] = []
    for domain in domains:
        stream = TextStream(domain, tokenizer, seq_len, max_tokens)
        numbered = [(stream.documents, ids) for ids in stream]
        if stream.documents >= FEW:
            fitted += [ids for number, ids in numbered if number % MEASURED]
            measured += [ids for number, ids in numbered if not number % MEASURED]
        else:
            cut = len(numbered) - len(numbered) // MEASURED
            fitted += [ids for _, ids in numbered[:cut]]
            measured += [ids for _, ids in numbered[cut:]]
    if not fitted or not measured:
        raise ValueError(
            f"`--texts` hold {len(fitted) + len(measured)} sequence(s), too few to fit on some and measure on others: give more "
            "text, or shorter sequences (`--seq_len`)."
        )
    return fitted, measured


def _load(source: str, loading: dict[str, Any]) -> tuple[Any, ExportReport, list[str], dict[str, Any]]:
    """
    Returns the patched model, a report with the kind of its bias, the names of tensors that were not loaded, and the
    arguments that the weights were loaded with (those of the base model, if `source` is an adapter).
    """
    state = find_state(source, loading)
    if state is None:
        raise ValueError(
            f"there is no {STATE_NAME} in {source}: it was not saved while φ-balanced, or the file was lost. A plain "
            "checkpoint needs no export."
        )
    adapter = find_adapter(source, loading)
    model, info = load_any(source, phi_balance=adapter is not None, output_loading_info=True, **loading)
    found = read_state(state)
    if adapter is None:
        check_whole(info, source)
        patch(model, found.config)
    else:
        model = _merged(model, source)
    name = type(model).__name__
    if auto_class_name(model.config.model_type, [cls.__name__ for cls in type(model).__mro__]) in WITHOUT_LOGITS:
        raise ValueError(
            f"{source} is a {name}, which has no logits to check an export by. Load it, then phb.fold(model, batches), "
            "phb.unpatch(model) and model.save_pretrained(folder)."
        )
    balancer = get_balancer(model)
    biases = {name.removesuffix(".bias"): part for name, part in found.tensors.items() if name.endswith(".bias")}
    native = any(site.native_bias for site in balancer.sites)
    if adapter is None:
        if native:
            _check_native(balancer, state, biases)
        now, then = fingerprint(balancer.sites[0]), found.model["weights"]
        if now and then and now != then:
            raise ValueError(
                f"{state} is older than the weights beside it: they were trained since, or its bias was folded into them. Save the "
                "balanced model again, or delete the file if its bias is not meant any more."
            )
        balancer.load(state)
    kind = "native" if native else "ours" if any(bool(bias.any()) for bias in biases.values()) else "none"
    base, of_weights = (None, loading) if adapter is None else base_of(adapter, source, loading)
    is_own_class = name in (model.config.architectures or ())  # else the head of another class is unexpected, too
    not_loaded = sorted(info["unexpected_keys"]) if is_own_class else []
    return model, ExportReport(source, kind, base), not_loaded, of_weights


def _merged(model: Any, source: str) -> Any:
    """Returns the base model of a `PeftModel`, with the adapter merged into its weights."""
    kind = model.peft_config[model.active_adapter].peft_type.value
    try:
        return model.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source} is an adapter of the kind {kind} that PEFT cannot merge into the weights of its base model ({error}). Give "
            "engines the base model and the adapter, or train one that can be merged, e.g. phb.lora_config(model)."
        ) from error


def _check_native(balancer: PhiBalancer, state: str, biases: dict[str, Tensor]) -> None:
    """Raises `ValueError` if the selection bias in the weights differs from the one in `state`."""
    for site in balancer.sites:
        there, wanted = site.read_native_bias(), biases.get(site.name.removeprefix(balancer.prefix))
        if there is None or wanted is None:
            continue
        difference = (there.cpu().float() - wanted.to(there.dtype).float()).abs().max()
        if difference > 0:
            raise ValueError(
                f"the selection bias of {site.name!r} in the weights is not the one in {state} (they "
                f"differ by up to {float(difference):.3g}): these files were not saved at the same step. Save both "
                "again, or load the model with phi_balance=True, which takes the bias of the state, and save that."
            )


def _measure(model: Any, report: ExportReport, bias: str, fitted: list[Any], measured: list[Any]) -> None:
    """Adds measurements of the variants to `report`, and turns the model into the variant `bias`."""
    if report.bias != "ours":
        report.variants = compare(model, measured, {"biased": nullcontext}, with_loss=True)
        return
    folding = Folding(model, fitted, REBALANCE)
    report.variants = compare(model, measured, folding.variants, with_loss=True)
    report.kept, report.r2 = VARIANTS[bias], folding.r2
    report.fitted_tokens = sum(int(batch["attention_mask"].sum()) for batch in fitted)
    folding.keep(report.kept)


def _refuse_costly(report: ExportReport, bias: str) -> None:
    increase = report.loss_increase()
    if increase <= report.max_loss_increase or report.forced:
        return
    others = [f"--bias {name} {report.loss_increase(VARIANTS[name]):+.4f}" for name in VARIANTS if name != bias]
    raise ValueError(
        f"--bias {bias} raises the loss by {increase:.4f}, more than the {report.max_loss_increase:g} that is allowed "
        f"(--max_loss_increase): nothing was written. {', '.join(others)}; or fit on more texts that are "
        "like what the model will see, or --force."
    )
