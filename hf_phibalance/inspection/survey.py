"""Running a model over domains of text and counting where its tokens go, without training or patching it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..balancing import evaluating, refuse_virtual_tokens
from ..files import STATE_NAME, printable
from .census import RouterCensus
from .findings import Inspection, Layer
from .texts import Domain, TextStream


DEFAULT_MAX_TOKENS = 1 << 16
DEFAULT_SEQ_LEN = 512
SHORT = 4  # sequences are short if they would have room for so many of their mean length


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    tokenizer: Any,
    domains: Sequence[Domain],
    *,
    seq_len: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    packing: bool = False,
    on_batch: Callable[[TextStream], None] | None = None,
) -> Inspection:
    """
    Runs `model` over texts and counts what its routers do. The model is left as it was.

    Args:
        model (`torch.nn.Module`): A MoE model of transformers, possibly wrapped, or patched by [`patch`]: then the
            selection bias that is in force is part of what is seen.
        tokenizer: Its tokenizer.
        domains (`Sequence[Domain]`): The texts, as [`parse_domains`] makes them.
        seq_len (`int`, *optional*): Longest sequence; 512 tokens, or what the model can take, if not said.
        batch_size (`int`, *optional*, defaults to `8`): Sequences of one forward.
        max_tokens (`int`, *optional*, defaults to `65536`): Tokens of text of each domain; `None` reads everything.
        packing (`bool`, *optional*, defaults to `False`): Whether the texts of a domain are joined by line ends and share
            sequences. Otherwise each row, and each file of plain text, is cut into sequences of its own.
        on_batch (`Callable[[TextStream], None]`, *optional*): Called after each batch, to show progress.

    Returns:
        `Inspection`: what was counted.

    Raises:
        ValueError: if the model has no routers, a setting or the tokenizer does not fit it, or PEFT puts virtual tokens in front
            of its batches.
    """
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}: choose at least 1.")
    refuse_virtual_tokens(model)
    census = RouterCensus(model, len(domains))
    seq_len = _checked_length(census, seq_len)
    read: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    with census.attached(), evaluating(census.root):
        for index, domain in enumerate(domains):
            stream = TextStream(domain, tokenizer, seq_len, max_tokens, packing)
            _count(census, index, stream, batch_size, on_batch)
            read[domain.name] = {
                "tokens": stream.tokens,
                "sequences": stream.sequences,
                "documents": stream.documents,
                "files": len(domain.files),
                "files_read": stream.files,
            }
            notes += _remarks(stream)
    if stream.prefix:
        notes.append("The special tokens that start a sequence were fed to the model, but not counted.")
    empty = [name for name, entry in read.items() if not entry["tokens"]]
    if empty:
        raise ValueError(f"there is no text in domain {', '.join(empty)}. {' '.join(notes)}")
    layers = _checked_layers(census)
    if uncalled := census.uncalled():
        notes.append(f"{len(uncalled)} routers were never called and are left out: {', '.join(uncalled[:4])}.")
    settings = {"seq_len": seq_len, "batch_size": batch_size, "max_tokens": max_tokens, "packing": packing}
    return Inspection(_describe(census, layers), settings, read, layers, notes)


def _checked_length(census: RouterCensus, seq_len: int | None) -> int:
    """The longest sequence to feed: `seq_len` if the model takes it, or else what it takes, up to a default."""
    config = cast(Any, census.root.config).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    seq_len = seq_len or min(DEFAULT_SEQ_LEN, limit)
    if seq_len > limit and hasattr(config, "max_position_embeddings"):
        raise ValueError(f"`seq_len` is {seq_len}, but the model takes at most {limit} tokens: choose no more.")
    return seq_len


def _count(
    census: RouterCensus,
    index: int,
    stream: TextStream,
    batch_size: int,
    on_batch: Callable[[TextStream], None] | None,
) -> None:
    """Runs the model over the texts of domain number `index`."""
    embedding = cast(Any, census.backbone).get_input_embeddings()
    device = next((p.device for p in embedding.parameters() if p.device.type != "meta"), torch.device("cpu"))
    config = cast(Any, census.root.config).get_text_config()
    vocabulary = getattr(embedding, "num_embeddings", None) or config.vocab_size
    done = 0  # sequences
    for sequences in stream.batches(batch_size):
        highest = max(map(max, sequences))
        if highest >= vocabulary:
            raise ValueError(
                f"the tokenizer makes token {highest}, but the model has a vocabulary of {vocabulary}: give the "
                "tokenizer of this model by `--tokenizer`."
            )
        ids_BS = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
        lengths_B1 = torch.tensor([[len(ids)] for ids in sequences])
        position_S = torch.arange(ids_BS.shape[1])
        attended_BS = position_S < lengths_B1
        counted_BS = attended_BS & (position_S >= len(stream.prefix))
        half_B = (torch.arange(done, done + len(sequences)) % 2).to(device)
        done += len(sequences)
        with census.counting(index, counted_BS.to(device), half_B):
            census.backbone(input_ids=ids_BS.to(device), attention_mask=attended_BS.long().to(device), use_cache=False)
        if on_batch is not None:
            on_batch(stream)


def _checked_layers(census: RouterCensus) -> list[Layer]:
    """What has been counted, if there is anything and it means something."""
    layers = census.layers()
    if not layers:
        raise ValueError(
            f"none of the {len(census.sites)} routers was called, e.g. {census.sites[0].name!r}: something bypasses them "
            "(a fused kernel?). Load the model with use_kernels=False."
        )
    for layer in layers:
        if not torch.isfinite(layer.confidence).all():
            raise ValueError(
                f"the logits of router {layer.name!r} are not finite, so its choices mean nothing: load the model in "
                "another dtype (`--dtype float32`)."
            )
    return layers


def _remarks(stream: TextStream) -> list[str]:
    """Returns what a reader of the figures has to know of how a domain was read."""
    notes, name = [], stream.domain.name
    if stream.skipped:
        notes.append(
            f"{stream.skipped} rows of {name} were skipped: no text in the field, or no messages that the template takes."
        )
    if stream.undecodable:
        notes.append(
            f"{len(stream.undecodable)} files of {name} are not all UTF-8, e.g. {printable(min(stream.undecodable))}; what could "
            "not be read was replaced."
        )
    if stream.tokens * SHORT < stream.sequences * stream.room:
        notes.append(
            f"Sequences of {name} are short: {stream.tokens / stream.sequences:.0f} tokens on average, of at most {stream.room}. "
            "Routers may choose otherwise in longer ones, so compare only texts of similar length, or join them (--packing)."
        )
    return notes


def _describe(census: RouterCensus, layers: list[Layer]) -> dict[str, Any]:
    config: Any = census.root.config
    balancer = census.balancer
    native = any(site.native_bias for site in census.sites)
    own = "the family's own" if native else "none"
    return {
        "name": getattr(config, "_name_or_path", "") or type(census.root).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in census.root.parameters()),
        "dtype": str(next(census.root.parameters()).dtype).removeprefix("torch."),
        "routers": len(layers),
        "experts": sorted({layer.experts for layer in layers}),
        "top_k": sorted({layer.top_k for layer in layers}),
        "selection_bias": STATE_NAME if balancer is not None and balancer.has_bias and not native else own,
    }
