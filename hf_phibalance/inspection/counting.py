"""
Runs a model over texts and counts which experts its routers choose, without training or patching it.

Shapes: B sequences of a batch, S long; D domains, E experts, T = B x S tokens, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..balancing import evaluating, find_balancer, refuse_virtual_tokens
from ..files import STATE_NAME, printable
from ..maths import routing_probs
from ..routers import RouterSite, find_backbone, find_routers, reading, unwrap
from .results import CONFIDENCE, Example, Inspection, Layer
from .texts import Domain, TextStream, padded_batches, token_texts


DEFAULT_MAX_TOKENS = 1 << 16
DEFAULT_SEQ_LEN = 512
EXAMPLES = 3  # texts per domain that are shown token by token
EXAMPLE_TOKENS = 200
SHORT = 4  # a mean length below 1/4 of `seq_len` is reported


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
    examples: int = EXAMPLES,
    keep_choices: bool = False,
    on_batch: Callable[[TextStream], None] | None = None,
) -> Inspection:
    """
    Runs `model` over texts and counts which experts its routers choose. The model stays unchanged.

    Args:
        model (`torch.nn.Module`):
            A MoE model of transformers, possibly wrapped. If it was patched by [`patch`], its selection bias is in force.
        tokenizer: The model's tokenizer.
        domains (`Sequence[Domain]`): The texts, from [`parse_domains`].
        seq_len (`int`, *optional*): Longest sequence in tokens. Defaults to 512, or less if the model takes less.
        batch_size (`int`, *optional*, defaults to `8`): Sequences per forward.
        max_tokens (`int`, *optional*, defaults to `65536`): Tokens of text to read per domain. `None` reads everything.
        packing (`bool`, *optional*, defaults to `False`):
            Whether to join the texts of a domain by line ends and fill sequences with them. Otherwise no sequence holds two texts.
        examples (`int`, *optional*, defaults to `3`):
            Texts per domain to keep token by token, the first 200 tokens of each. [`html_report`] shows them.
        keep_choices (`bool`, *optional*, defaults to `False`):
            Whether to keep the experts of every token, for a [`Comparison`]. A token takes k bytes per layer, or 2 k with more
            than 256 experts.
        on_batch (`Callable[[TextStream], None]`, *optional*): Called after each batch, to show progress.

    Returns:
        `Inspection`: counts and figures.

    Raises:
        ValueError: if the model has no routers, if a setting or the tokenizer does not fit the model, or if PEFT puts virtual
            tokens in front of its batches.
    """
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}: choose at least 1.")
    refuse_virtual_tokens(model)
    counter = RouterCounter(model, len(domains), keep_choices)
    seq_len = _checked_length(counter, seq_len)
    streams = [TextStream(domain, tokenizer, seq_len, max_tokens, packing) for domain in domains]
    with reading(counter), evaluating(counter.root):
        for index, stream in enumerate(streams):
            _count(counter, index, stream, batch_size, on_batch)
        notes = [note for stream in streams for note in _notes(stream)]
        if streams and streams[0].prefix:
            notes.append("The special tokens that start a sequence were fed to the model, but not counted.")
        empty = [stream.domain.name for stream in streams if not stream.tokens]
        if empty:
            raise ValueError(f"there is no text in domain {', '.join(empty)}. {' '.join(notes)}")
        layers = _checked_layers(counter)
        shown = [example for stream in streams for example in _examples(counter, stream, examples)]
    if uncalled := [site.name for site, layer in zip(counter.sites, counter.layers) if layer is None]:
        notes.append(f"{len(uncalled)} routers were never called and are left out: {', '.join(uncalled[:4])}.")
    read = {
        stream.domain.name: {
            "tokens": stream.tokens,
            "sequences": stream.sequences,
            "documents": stream.documents,
            "files": len(stream.domain.files),
            "files_read": stream.files,
            "checksum": stream.checksum,
        }
        for stream in streams
    }
    settings = {"seq_len": seq_len, "batch_size": batch_size, "max_tokens": max_tokens, "packing": packing}
    return Inspection(_describe(counter, layers), settings, read, layers, notes, shown)


class RouterCounter:
    """
    A [`RouterReader`] that counts which experts the routers of `model` choose in each of `domains` domains, and how confident
    they are. It uses the hooks of balancing, so in every family it reads what balancing would read. The counts stay on the
    device, and do not grow with the text. Choices that are kept go to the CPU.
    """

    is_idle = True  # whether the hooks ignore the current forward

    def __init__(self, model: nn.Module, domains: int, keep_choices: bool = False) -> None:
        self.root = unwrap(model)[-1]
        try:
            self.sites: list[RouterSite] = find_routers(self.root)
        except ValueError as error:
            raise ValueError(f"There is nothing to inspect: {error}") from error
        self.backbone = find_backbone(self.root, self.sites)
        self.balancer = find_balancer(model)
        self.owner = self.root
        self.layers: list[Layer | None] = [None] * len(self.sites)
        self.choices: list[list[Tensor]] | None = [[] for _ in self.sites] if keep_choices else None  # (N, k) each
        self._shown: dict[int, tuple[Tensor, Tensor]] | None = None  # of the current forward, if it is an example
        self._domains, self._domain = domains, 0
        self._mask = self._half = torch.zeros(0)  # (T,) each, of the current forward

    @contextmanager
    def counting(self, domain: int, mask_BS: Tensor, half_B: Tensor) -> Iterator[None]:
        """
        Context manager: inside it forwards are counted for domain number `domain`. `mask_BS (B, S)` is true for the tokens to count,
        `half_B (B,)` is the half of each sequence, 0 or 1.
        """
        self._domain, self._mask, self.is_idle = domain, mask_BS.reshape(-1), False
        self._half = half_B.unsqueeze(-1).expand_as(mask_BS).reshape(-1)
        try:
            yield
        finally:
            self.is_idle = True

    @contextmanager
    def showing(self, tokens: int) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """
        Context manager: inside it a forward of `tokens` tokens is not counted. Yields a dictionary that gets, for each router, the
        experts and their weights, as in [`Example`].
        """
        self._mask, self.is_idle = torch.ones(tokens, dtype=torch.bool), False
        self._shown = {}
        try:
            yield self._shown
        finally:
            self._shown, self.is_idle = None, True

    def choice_bias(self, index: int) -> Tensor | None:
        """Returns the selection bias in force at router `index`, for routers that do not return their selection."""
        if self.balancer is not None:
            return self.balancer.forwards.choice_bias(index)
        bias = self.sites[index].read_native_bias()
        if bias is None and self.sites[index].native_bias:
            raise ValueError(
                f"the choice of router {self.sites[index].name!r} cannot be told while its selection bias is offloaded: "
                "load the model without offloading to CPU or disk."
            )
        return bias

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """Counts one call of router `index` with `logits (T, E)` and `selected (..., k)`. Returns `carrier` unchanged."""
        site, mask_T = self.sites[index], self._mask.to(logits.device)
        if logits.shape != (mask_T.numel(), site.num_experts):
            raise ValueError(
                f"router {site.name!r} returned logits of shape {tuple(logits.shape)}, but {mask_T.numel()} tokens and "
                f"{site.num_experts} experts were expected: this model does not route its tokens one by one."
            )
        chosen_Tk = selected.reshape(mask_T.numel(), -1)
        probs_TE = routing_probs(logits, site.scoring)
        probs_Tk = probs_TE.gather(-1, chosen_Tk)
        if self._shown is not None:
            weights_Tk, order_Tk = (probs_Tk / probs_Tk.sum(-1, keepdim=True)).sort(-1, descending=True)
            self._shown[index] = chosen_Tk.gather(-1, order_Tk).cpu(), weights_Tk.cpu()
            return carrier
        if self.choices is not None:
            self.choices[index].append(
                chosen_Tk[mask_T].to(torch.uint8 if site.num_experts <= 256 else torch.int16).cpu()
            )
        layer = self.layers[index]
        if layer is None:
            exact = torch.float32 if logits.device.type == "mps" else torch.float64
            halves = logits.new_zeros(2, self._domains, site.num_experts, dtype=torch.int64)
            sums = logits.new_zeros(self._domains, len(CONFIDENCE), dtype=exact)
            layer = self.layers[index] = Layer(site.name, chosen_Tk.shape[-1], site.scoring, halves, sums)
        cell_Tk = chosen_Tk + (site.num_experts * self._half.to(logits.device)).unsqueeze(-1)
        counted_Tk = mask_T.long().unsqueeze(-1).expand_as(cell_Tk)
        added = torch.zeros(2 * site.num_experts, dtype=torch.int64, device=logits.device)
        added.scatter_add_(0, cell_Tk.reshape(-1), counted_Tk.reshape(-1))
        layer.halves[:, self._domain] += added.view(2, -1)
        bits_T = torch.special.entr(probs_TE).sum(-1) / math.log(2)
        confidence_3T = torch.stack([probs_TE.amax(-1), probs_Tk.sum(-1), bits_T])
        layer.confidence[self._domain] += torch.where(mask_T, confidence_3T, 0.0).to(layer.confidence.dtype).sum(-1)
        return carrier


def _checked_length(counter: RouterCounter, seq_len: int | None) -> int:
    """Returns `seq_len`, by default the smaller of 512 and the model's limit. Raises if it exceeds the limit."""
    config = cast(Any, counter.root.config).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if seq_len is not None and limit and seq_len > limit:
        raise ValueError(f"`seq_len` is {seq_len}, but the model takes at most {limit} tokens: choose no more.")
    return seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)


def _count(
    counter: RouterCounter,
    index: int,
    stream: TextStream,
    batch_size: int,
    on_batch: Callable[[TextStream], None] | None,
) -> None:
    """Runs the model over the texts of domain number `index`."""
    done = 0  # sequences
    for sequences in stream.batches(batch_size):
        inputs = _inputs(counter, sequences)
        counted_BS = inputs["attention_mask"].bool()
        counted_BS[:, : len(stream.prefix)] = False
        half_B = (torch.arange(done, done + len(sequences)) % 2).to(counted_BS.device)
        done += len(sequences)
        with counter.counting(index, counted_BS, half_B):
            counter.backbone(**inputs)
        if on_batch is not None:
            on_batch(stream)


def _examples(counter: RouterCounter, stream: TextStream, count: int) -> Iterator[Example]:
    """Yields the first texts of a domain with the experts of their tokens. Each text is a forward of its own."""
    called = [index for index, layer in enumerate(counter.layers) if layer is not None]
    for ids in stream.first_texts(count, EXAMPLE_TOKENS):
        inputs = _inputs(counter, [[*stream.prefix, *ids]])
        with counter.showing(inputs["input_ids"].numel()) as shown:
            counter.backbone(**inputs)
        choices, weights = zip(*([part[len(stream.prefix) :] for part in shown[index]] for index in called))
        yield Example(stream.domain.name, token_texts(stream.tokenizer, ids), list(choices), list(weights))


def _inputs(counter: RouterCounter, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns the arguments of a forward of `sequences`. Raises if the model's vocabulary lacks a token."""
    embedding = cast(Any, counter.backbone).get_input_embeddings()
    device = next((p.device for p in embedding.parameters() if p.device.type != "meta"), torch.device("cpu"))
    config = cast(Any, counter.root.config).get_text_config()
    vocabulary, highest = getattr(embedding, "num_embeddings", None) or config.vocab_size, max(map(max, sequences))
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer makes token {highest}, but the model has a vocabulary of {vocabulary}: name the model's own "
            "tokenizer with `--tokenizer`."
        )
    (batch,) = padded_batches(sequences, len(sequences), pad=0)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")} | {"use_cache": False}


def _checked_layers(counter: RouterCounter) -> list[Layer]:
    """Returns the layers that were called, on the CPU. Raises if routers were bypassed or logits are not finite."""
    kept = counter.choices or [[]] * len(counter.sites)
    layers = [
        replace(
            layer,
            halves=layer.halves.cpu(),
            confidence=layer.confidence.double().cpu(),
            choices=torch.cat(choices) if choices else None,
        )
        for layer, choices in zip(counter.layers, kept)
        if layer is not None
    ]
    if not layers:
        raise ValueError(
            f"none of the {len(counter.sites)} routers was called, e.g. {counter.sites[0].name!r}: something bypasses them "
            "(a fused kernel?). Load the model with use_kernels=False."
        )
    for layer in layers:
        if not torch.isfinite(layer.confidence).all():
            raise ValueError(
                f"the logits of router {layer.name!r} are not finite, so its choices mean nothing: load the model in "
                "another dtype (`--dtype float32`)."
            )
    return layers


def _notes(stream: TextStream) -> list[str]:
    """Returns warnings about how a domain was read."""
    notes, name = [], stream.domain.name
    if stream.skipped:
        notes.append(
            f"{stream.skipped} rows of {name} were skipped: they have no text in the field, or no messages that the chat template takes."
        )
    if stream.undecodable:
        notes.append(
            f"{len(stream.undecodable)} files of {name} are not all UTF-8, e.g. {printable(min(stream.undecodable))}: their other "
            "bytes were replaced."
        )
    if stream.tokens * SHORT < stream.sequences * stream.room:
        notes.append(
            f"Sequences of {name} are short: {stream.tokens / stream.sequences:.0f} tokens on average, of at most {stream.room}. "
            "Routers may choose differently in longer ones, so compare only texts of similar length, or join them (--packing)."
        )
    return notes


def _describe(counter: RouterCounter, layers: list[Layer]) -> dict[str, Any]:
    config: Any = counter.root.config
    native = any(site.native_bias for site in counter.sites)
    ours = counter.balancer is not None and counter.balancer.has_bias and not native
    return {
        "name": getattr(config, "_name_or_path", "") or type(counter.root).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in counter.root.parameters()),
        "dtype": str(next(counter.root.parameters()).dtype).removeprefix("torch."),
        "layers": config.get_text_config().num_hidden_layers,
        "routers": len(layers),
        "experts": sorted({layer.experts for layer in layers}),
        "top_k": sorted({layer.top_k for layer in layers}),
        "selection_bias": STATE_NAME if ours else "the family's own" if native else "none",
    }
