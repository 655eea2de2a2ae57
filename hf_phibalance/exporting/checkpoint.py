"""From a checkpoint that was saved while φ-balanced to one that any engine loads, at a cost that is measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import PhiBalancer, get_balancer, patch, read_state, unpatch
from ..files import STATE_NAME, find_state
from ..inspection import padded_batches, padding_of, parse_domains
from ..models import auto_class_name, base_of, find_adapter, load_any, load_tokenizer, register_deepseek_moe
from .comparison import compare
from .folding import Folding
from .report import VARIANTS, ExportReport
from .texts import split_texts
from .writing import check_destination, write_plain


REBALANCE = 3  # passes
EXAMPLE = 32  # tokens whose logits are compared
WITHOUT_LOGITS = ("AutoModelForQuestionAnswering", "AutoModel")


def export(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    texts: Sequence[str] = (),
    *,
    bias: str = "fold",
    max_loss_increase: float = 0.01,
    force: bool = False,
    field: Sequence[str] = (),
    max_tokens: int = 1 << 16,
    seq_len: int = 512,
    batch_size: int = 8,
    tokenizer: str | os.PathLike | None = None,
    check: bool = True,
    on_report: Callable[[ExportReport], None] | None = None,
    **loading: Any,
) -> ExportReport:
    """
    Writes a checkpoint that was saved while φ-balanced as one that engines load which know nothing of that: vLLM, SGLang,
    llama.cpp, plain transformers.

    Nothing changes for families with a selection bias of their own, and where there is no bias. Elsewhere the bias of
    `phi_balance.state` would be lost; so three ways of doing without are measured on a part of `texts`, having been fitted
    on the other, and the one that was asked for is written, if it does not cost too much. For a classifier or reward model
    the loss is the cross-entropy of its predictions against those with the bias, or the squared distance of its scores.

    Tensors that transformers does not load, for instance layers that predict several tokens ahead, are copied as they are.

    Args:
        source (`str` or `os.PathLike`): folder or Hub name. An adapter is merged into its base model.
        destination (`str` or `os.PathLike`): a new or empty folder. It gets an ordinary checkpoint, `export.json`, a model card.
        texts (`Sequence[str]`, *optional*): as for [`parse_domains`], `name=path` or `path`; needed where a bias would be lost.
        bias (`str`, *optional*, defaults to `"fold"`):
            What becomes of the bias: `"fold"` (into the routers' weights, see [`fold`]), `"rebalance"` (the same, and loads nearer
            to those with the bias) or `"drop"`.
        max_loss_increase (`float`, *optional*, defaults to `0.01`):
            refuse to write what has so much more loss per predicted token or label.
        force (`bool`, *optional*, defaults to `False`): write it all the same.
        field (`Sequence[str]`, *optional*): fields of rows that are the text, as for [`parse_domains`].
        max_tokens (`int`, *optional*, defaults to `65536`): tokens of each domain, `0` for all.
        seq_len (`int`, *optional*, defaults to `512`): longest sequence.
        batch_size (`int`, *optional*, defaults to `8`): sequences of a forward.
        tokenizer (`str` or `os.PathLike`, *optional*): of another folder or name than the model's.
        check (`bool`, *optional*, defaults to `True`):
            Whether the result is loaded in a process without this package and its logits are compared, which needs the memory of
            the model once more.
        on_report (`Callable[[ExportReport], None]`, *optional*): called with the figures before anything is refused or written.
        loading: handed to `from_pretrained`, e.g. `dtype`, `device_map`, `revision`, `trust_remote_code`.

    Returns:
        `ExportReport`: what was done, and what it costs.

    Raises:
        ValueError: if it costs too much, the source was not saved while φ-balanced or is an adapter that cannot be merged, its
            routers cannot be written to, texts are missing, or the result is not the same model where it is loaded.
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
    tokens = _tokenizer(source, tokenizer, loading, needed=bool(domains))
    report.max_loss_increase, report.forced = max_loss_increase, force
    if report.bias == "ours" and not domains:
        raise ValueError(
            f"{source} has a selection bias beside its weights that other engines do not know; what it costs to do "
            "without is measured on texts: give some, as the model will see them (`--texts name=path ...`)."
        )
    example = _made_example(model)
    if domains:
        fitted, measured = split_texts(domains, tokens, _checked_length(model, seq_len), max_tokens or None)
        batches = [padded_batches(part, batch_size, padding_of(tokens)) for part in (fitted, measured)]
        example = {name: part[:2, :EXAMPLE] for name, part in batches[1][0].items()}
        _measure(model, report, bias, *batches)
    if on_report is not None:
        on_report(report)
    _refuse_costly(report)
    write_plain(unpatch(model), tokens, report, destination, example, not_loaded, of_weights, check)
    return report


def _load(source: str, loading: dict[str, Any]) -> tuple[Any, ExportReport, list[str], dict[str, Any]]:
    """
    Returns the patched model, a report that says what kind of bias it has, names of tensors that were not loaded, and the
    arguments that the weights were loaded with: those of the base model, if `source` is an adapter.
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
        balancer.load(state)
    ours = not native and any(bool(bias.any()) for bias in biases.values())
    base, of_weights = (None, loading) if adapter is None else base_of(adapter, source, loading)
    report = ExportReport(source, "native" if native else "ours" if ours else "none", base)
    is_own_class = name in (model.config.architectures or ())  # else the head of another is not missed
    return model, report, sorted(info["unexpected_keys"]) if is_own_class else [], of_weights


def _merged(model: Any, source: str) -> Any:
    """Returns the base model of a `PeftModel` with the adapter in its weights."""
    kind = model.peft_config[model.active_adapter].peft_type.value
    try:
        return model.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source} is an adapter of the kind {kind} that PEFT cannot merge into the weights of its base model ({error}). Give "
            "engines the base model and the adapter, or train one that can be merged, e.g. phb.lora_config(model)."
        ) from error


def _check_native(balancer: PhiBalancer, state: str, biases: dict[str, Tensor]) -> None:
    """Refuses weights whose own selection bias is not the one that training left."""
    for site in balancer.sites:
        there, wanted = site.read_native_bias(), biases.get(site.name.removeprefix(balancer.prefix))
        if there is None or wanted is None:
            continue
        difference = (there.cpu().float() - wanted.to(there.dtype).float()).abs().max()
        if difference > 0:
            raise ValueError(
                f"the selection bias of {site.name!r} in the weights is not the one in {state} (they "
                f"differ by up to {float(difference):.3g}): these files are of different moments of a training. Save both "
                "again, or load the model with phi_balance=True, which takes the bias of the state, and save that."
            )


def _tokenizer(source: str, named: str | os.PathLike | None, loading: dict[str, Any], needed: bool) -> Any:
    try:
        return load_tokenizer(source, named, loading)
    except ValueError:
        if needed or named is not None:
            raise
        return None


def _checked_length(model: Any, seq_len: int) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or seq_len
    return min(seq_len, limit)


def _made_example(model: Any) -> dict[str, Tensor]:
    """Some tokens, where there is no text."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[i % (vocabulary - vocabulary // 2) + vocabulary // 4 for i in range(EXAMPLE)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _measure(model: Any, report: ExportReport, bias: str, fitted: list[Any], measured: list[Any]) -> None:
    """Puts figures into `report`, and leaves the model as the variant that was asked for."""
    if report.bias != "ours":
        report.variants = compare(model, measured, {"biased": nullcontext}, with_loss=True)
        return
    folding = Folding(model, fitted, REBALANCE)
    report.variants = compare(model, measured, folding.variants, with_loss=True)
    report.kept, report.r2 = VARIANTS[bias], folding.r2
    report.fitted_tokens = sum(int(batch["attention_mask"].sum()) for batch in fitted)
    folding.keep(report.kept)


def _refuse_costly(report: ExportReport) -> None:
    increase = report.loss_increase()
    if not increase <= report.max_loss_increase and not report.forced:
        word = next(word for word, variant in VARIANTS.items() if variant == report.kept)
        others = [
            f"--bias {other} {report.loss_increase(variant):+.4f}"
            for other, variant in VARIANTS.items()
            if variant != report.kept
        ]
        raise ValueError(
            f"--bias {word} raises the loss by {increase:.4f}, more than the {report.max_loss_increase:g} that is allowed "
            f"(--max_loss_increase): nothing was written. {', '.join(others)}; or fit on more texts that are "
            "like what the model will see, or --force."
        )
