"""Looking into the routers of a MoE model: where the tokens of some domains of text go, without training or patching.

Forward hooks count, on the device and for one batch at a time, which experts each router chose and how sure it was.
What is kept is two counts per layer, domain and expert, however much is read: those of every other sequence, and those
of the rest, so that the noise of the text itself can be told. The figures are pure functions of these counts.
Shapes: H = 2 halves, D domains, E experts, T tokens, k experts per token; B sequences of a batch, S long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..balancing.patching import RouterHook, _backbone, _unwrap, find_patch
from ..maths.metrics import DEAD_THRESHOLD, noise_floor, relative_load, summarise
from ..maths.pricing import routing_probs
from ..routers.discovery import RouterSite, find_routers
from .texts import Domain, TextStream


DEFAULT_MAX_TOKENS = 1 << 16
DEFAULT_SEQ_LEN = 512
FIGURES = ("max_vio", "gini", "cv", "normalised_entropy")
CONFIDENCE = ("top1_probability", "chosen_probability", "entropy_bits")  # means over tokens
MIN_STANDARD_ERRORS = 3.0  # by which the share of an expert in a domain has to differ from that in the others


# ---------------------------------------------------------------------- figures


def chance_figures(num_experts: int, top_k: int, tokens: float) -> dict[str, float]:
    """
    What the balance figures come to by chance alone if every token picks `top_k` experts uniformly.

    An expert's count then has the relative variance `v = (E - k) / (T k)`. CV is `sqrt(v)`; Gini, half the mean absolute
    difference of two Gaussian counts that add to a constant, is `sqrt(v (E - 1) / (E π))`; the entropy lacks
    `v / (2 log E)` of its maximum; MaxVio is [`metrics.noise_floor`]. Tokens of a text are correlated, so the noise of
    real texts is larger.

    Args:
        num_experts (`int`): Number of experts `E`.
        top_k (`int`): Experts per token `k`.
        tokens (`float`): Tokens `T`.

    Returns:
        `dict[str, float]`: by the names of `FIGURES`.
    """
    variance = (num_experts - top_k) / (tokens * top_k)
    return {
        "max_vio": float(noise_floor(num_experts, top_k, float(tokens))),
        "gini": math.sqrt(variance * (num_experts - 1) / (num_experts * math.pi)),
        "cv": math.sqrt(variance),
        "normalised_entropy": max(0.0, 1.0 - variance / (2 * math.log(num_experts))) if num_experts > 1 else 1.0,
    }


def design_effect(halves_HE: Tensor, top_k: int) -> float:
    """
    How many tokens of a text are worth one that was drawn on its own, at least 1.

    Tokens of a sequence resemble each other, so that counts vary more than those of independent tokens. By how much is
    measured between two halves of the sequences: what the half tells about the expert, over what it would tell if
    tokens were independent ([`mutual_information_bias`]). What whole sequences have in common does not show.

    Args:
        halves_HE (`torch.Tensor` of shape `(2, E)`): How often each expert was chosen in each half.
        top_k (`int`): Experts per token.
    """
    independent = mutual_information_bias(halves_HE, top_k)
    return max(1.0, float(mutual_information(halves_HE)) / independent) if independent > 0 else 1.0


def balance_figures(halves_HE: Tensor, top_k: int) -> dict[str, Any]:
    """
    How evenly experts are chosen.

    Args:
        halves_HE (`torch.Tensor` of shape `(2, E)`): How often each expert was chosen in each half of the sequences.
        top_k (`int`): Experts per token.

    Returns:
        `dict`: the figures of [`metrics.summarise`]; `dead`, the experts under a twentieth of the fair share; `chance`,
        the [`chance_figures`] of as many tokens; `design_effect`, and `chance_in_text`, those of so many times fewer
        tokens; and `noise`, by figure whether it is no further from balance than the latter. Dead experts are noise
        where so few tokens were counted that chance may leave an expert without any.
    """
    counts_E = halves_HE.sum(0)
    experts = counts_E.numel()
    figures: dict[str, Any] = {name: float(value) for name, value in summarise(counts_E.double()[None]).items()}
    relative_E = relative_load(counts_E.double())
    figures["dead"] = (relative_E < DEAD_THRESHOLD).nonzero().flatten().tolist()
    figures["dead_experts"] = len(figures["dead"])
    tokens = int(counts_E.sum()) / top_k
    figures["design_effect"] = design_effect(halves_HE, top_k)
    figures["chance"] = chance_figures(experts, top_k, tokens)
    figures["chance_in_text"] = chance_figures(experts, top_k, tokens / figures["design_effect"])
    sign = {"normalised_entropy": -1}  # of what is more uneven where it is larger
    figures["noise"] = {
        name: sign.get(name, 1) * figures[name] <= sign.get(name, 1) * figures["chance_in_text"][name]
        for name in FIGURES
    }
    figures["noise"]["dead_experts"] = figures["chance_in_text"]["max_vio"] >= 1.0 - DEAD_THRESHOLD
    return figures


def mutual_information(counts_DE: Tensor) -> Tensor:
    """
    Plug-in estimate of I(domain; expert) in bits, `()`: what the expert of an assignment tells about the domain of its
    token. From 0, every domain uses the experts alike, to the smaller of the entropies of domain and expert.

    Args:
        counts_DE (`torch.Tensor` of shape `(D, E)`): How often each expert was chosen in each domain.
    """
    joint_DE = counts_DE.double() / counts_DE.sum().clamp(min=1)

    def entropy(p: Tensor) -> Tensor:
        return torch.special.entr(p).sum() / math.log(2)

    return (entropy(joint_DE.sum(0)) + entropy(joint_DE.sum(1)) - entropy(joint_DE)).clamp(min=0.0)


def mutual_information_bias(counts_DE: Tensor, top_k: int) -> float:
    """
    What [`mutual_information`] comes to, in bits, if the domains do not differ at all: `(D - 1) (E - k) / (2 T k ln 2)`.

    For `k = 1` this is the correction of Miller and Madow. A token's `k` experts are distinct, and so not independent:
    to second order the estimate is `Σ_de (O_de - T_d π_e)² / (T_d π_e) / (2 T k ln 2)`, π_e being the probability that
    a token has expert e among its k; each square is `T_d π_e (1 - π_e)` on average, less its share `T_d / T` as
    π_e is fitted, and `Σ_e (1 - π_e) = E - k` whatever π is. Only experts and domains that occur count. Tokens are taken as
    independent; for those of real texts see [`specialisation_figures`].

    Args:
        counts_DE (`torch.Tensor` of shape `(D, E)`): How often each expert was chosen in each domain.
        top_k (`int`): Experts per token.
    """
    assignments = int(counts_DE.sum())
    domains, experts = (int((counts_DE.sum(axis) > 0).sum()) for axis in (1, 0))
    return max(domains - 1, 0) * max(experts - top_k, 0) / (2 * max(assignments, 1) * math.log(2))


def specialisation_figures(halves_HDE: Tensor, top_k: int) -> dict[str, Any]:
    """
    How much the domains differ in the experts they use.

    The bias is measured where that is larger than [`mutual_information_bias`]: each domain's two halves differ by
    chance only, and by as much as the tokens within a sequence depend on each other. With `I_d`, what the half tells
    about the expert in domain d, the bias is `Σ_d (1 - T_d / T) (T_d / T) I_d`, by the derivation given there.

    Args:
        halves_HDE (`torch.Tensor` of shape `(2, D, E)`):
            How often each expert was chosen in each domain, for two halves of the sequences.
        top_k (`int`): Experts per token.

    Returns:
        `dict`: in bits `plug_in`, its `bias` and `bias_if_independent`, `mutual_information` (plug-in less bias, at least 0)
        and `max_bits`, the entropy of the domains, which it cannot exceed; and `noise`, whether chance explains it
        (two standard deviations of a χ² variable of `(D - 1) (E - 1)` degrees of freedom, to which the plug-in is
        proportional by chance).
    """
    counts_DE = halves_HDE.sum(0)
    plug_in, independent = float(mutual_information(counts_DE)), mutual_information_bias(counts_DE, top_k)
    shares_D = (counts_DE.double().sum(1) / counts_DE.sum().clamp(min=1)).tolist()
    measured = sum(
        (1.0 - share) * share * float(mutual_information(halves_HDE[:, index])) for index, share in enumerate(shares_D)
    )
    bias = max(measured, independent)
    freedom = max((len(counts_DE) - 1) * (counts_DE.shape[1] - 1), 1)
    return {
        "mutual_information": max(plug_in - bias, 0.0),
        "plug_in": plug_in,
        "bias": bias,
        "bias_if_independent": independent,
        "max_bits": -sum(share * math.log2(share) for share in shares_D if share > 0),
        "noise": plug_in <= bias * (1.0 + 2.0 * math.sqrt(2.0 / freedom)),
    }


def lift(counts_DE: Tensor) -> Tensor:
    """Share of each expert in a domain over its share in all, `(D, E)`; 1 where the expert or the domain has nothing."""
    counts_DE = counts_DE.double()
    expected_DE = counts_DE.sum(1, keepdim=True) * counts_DE.sum(0) / counts_DE.sum().clamp(min=1)
    return torch.where(expected_DE > 0, counts_DE / expected_DE.clamp(min=1e-12), 1.0)


# ---------------------------------------------------------------------- what was counted


@dataclass
class Layer:
    """
    What one router did.

    Args:
        name (`str`): Its name, as in `model.named_modules()`.
        top_k (`int`): Experts per token.
        scoring (`str`): How its logits become probabilities.
        halves (`torch.Tensor` of shape `(2, D, E)`):
            How often each expert was chosen in each domain, whole numbers, for every other sequence and for the rest.
        confidence (`torch.Tensor` of shape `(D, 3)`): Sums over tokens of what `CONFIDENCE` names.
    """

    name: str
    top_k: int
    scoring: str
    halves: Tensor
    confidence: Tensor

    @property
    def counts(self) -> Tensor:
        """How often each expert was chosen in each domain, `(D, E)`."""
        return self.halves.sum(0)

    @property
    def experts(self) -> int:
        return self.halves.shape[-1]

    def tokens(self) -> Tensor:
        """Tokens of each domain, `(D,)`."""
        return self.counts.sum(1) // self.top_k


@dataclass
class Inspection:
    """
    What the routers of a model did with some texts.

    Args:
        model (`dict`): What is known of the model.
        settings (`dict`): How it was looked into.
        domains (`dict[str, dict]`): By name, what was read.
        layers (`list[Layer]`): The routers, in the order of the model.
        notes (`list[str]`): What a reader of the figures has to know.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    layers: list[Layer]
    notes: list[str] = field(default_factory=list)

    def scopes(self) -> list[str]:
        """Names of what figures are given for: all texts, then each domain if there are several."""
        return ["overall", *(self.domains if len(self.domains) > 1 else [])]

    def halves(self, layer: Layer, scope: str) -> Tensor:
        """Counts `(2, E)` of a layer in one of `scopes`, for the two halves of the sequences."""
        return layer.halves.sum(1) if scope == "overall" else layer.halves[:, list(self.domains).index(scope)]

    def counts(self, layer: Layer, scope: str) -> Tensor:
        """Counts `(E,)` of a layer in one of `scopes`."""
        return self.halves(layer, scope).sum(0)

    def confidence(self, layer: Layer, scope: str) -> dict[str, float]:
        """Means over the tokens of one of `scopes`, by the names of `CONFIDENCE`."""
        index = slice(None) if scope == "overall" else [list(self.domains).index(scope)]
        means = layer.confidence[index].sum(0) / layer.tokens()[index].sum().clamp(min=1)
        return dict(zip(CONFIDENCE, means.tolist()))

    def specialists(self, domain: str, top: int = 10) -> list[dict[str, Any]]:
        """
        The experts that `domain` uses most beyond what the other domains do.

        They are ranked by what they contribute to the mutual information of their layer; a share that differs from
        that of the other domains by fewer than three standard errors ([`design_effect`] included) is left out.

        Args:
            domain (`str`): Name of a domain.
            top (`int`, *optional*, defaults to `10`): At most so many.

        Returns:
            `list[dict]`: with `layer`, `expert`, `share` and `share_elsewhere` (of the tokens that choose it), `lift` and
            `bits`.
        """
        index, found = list(self.domains).index(domain), []
        for layer in self.layers:
            counts_DE, tokens_D = layer.counts.double(), layer.tokens().double()
            here, elsewhere = tokens_D[index], tokens_D.sum() - tokens_D[index]
            if not (here and elsewhere):
                continue
            share_E = counts_DE[index] / here
            other_E = (counts_DE.sum(0) - counts_DE[index]) / elsewhere
            pooled_E = counts_DE.sum(0) / tokens_D.sum()
            worth = design_effect(layer.halves[:, index], layer.top_k)
            error_E = (worth * pooled_E * (1 - pooled_E) * (1 / here + 1 / elsewhere)).clamp(min=1e-300).sqrt()
            lift_E = lift(counts_DE)[index]
            bits_E = counts_DE[index] / counts_DE.sum() * lift_E.clamp(min=1e-300).log2()
            for expert in ((share_E - other_E) / error_E > MIN_STANDARD_ERRORS).nonzero().flatten().tolist():
                found.append(
                    {
                        "layer": layer.name,
                        "expert": expert,
                        "share": float(share_E[expert]),
                        "share_elsewhere": float(other_E[expert]),
                        "lift": float(lift_E[expert]),
                        "bits": float(bits_E[expert]),
                    }
                )
        return sorted(found, key=lambda entry: -entry["bits"])[:top]

    def layer_figures(self, layer: Layer) -> dict[str, Any]:
        """All figures of a layer, by name of the scope."""
        return {
            scope: {
                **balance_figures(self.halves(layer, scope), layer.top_k),
                **self.confidence(layer, scope),
            }
            for scope in self.scopes()
        }

    def summary(self, scope: str) -> dict[str, float]:
        """Means over the layers of the figures of one of `scopes`, the worst MaxVio and the number of dead experts."""
        columns = [balance_figures(self.halves(layer, scope), layer.top_k) for layer in self.layers]
        confidences = [self.confidence(layer, scope) for layer in self.layers]
        mean = {name: sum(column[name] for column in columns) / len(columns) for name in FIGURES}
        return {
            "tokens": sum(read["tokens"] for name, read in self.domains.items() if scope in ("overall", name)),
            **mean,
            "max_vio_worst_layer": max(column["max_vio"] for column in columns),
            "noise_floor": sum(column["chance"]["max_vio"] for column in columns) / len(columns),
            "noise_floor_in_text": sum(column["chance_in_text"]["max_vio"] for column in columns) / len(columns),
            "dead_experts": sum(column["dead_experts"] for column in columns),
            **{name: sum(c[name] for c in confidences) / len(confidences) for name in CONFIDENCE},
        }

    def to_dict(self, top: int = 10) -> dict[str, Any]:
        """
        Everything as plain numbers and words, for JSON.

        Args:
            top (`int`, *optional*, defaults to `10`): Specialists of each domain.
        """
        several = len(self.domains) > 1
        return {
            "model": self.model,
            "settings": self.settings,
            "domains": self.domains,
            "summary": {scope: self.summary(scope) for scope in self.scopes()},
            "layers": [
                {
                    "name": layer.name,
                    "experts": layer.experts,
                    "top_k": layer.top_k,
                    "scoring": layer.scoring,
                    "counts": {scope: self.counts(layer, scope).tolist() for scope in self.scopes()},
                    "figures": self.layer_figures(layer),
                    "specialisation": specialisation_figures(layer.halves, layer.top_k) if several else None,
                }
                for layer in self.layers
            ],
            "specialists": {name: self.specialists(name, top) for name in self.domains} if several else {},
            "notes": self.notes,
        }


# ---------------------------------------------------------------------- counting


class RouterCensus:
    """
    Counts what the routers of a model choose, by hooks that only look. It stands in for a balancer behind
    [`patching.RouterHook`], so that what is read is what balancing would read, in every family.

    Args:
        model (`torch.nn.Module`): A MoE model of transformers, possibly wrapped or patched.
        domains (`int`): Number of domains.

    Raises:
        ValueError: if the model has no router that can be read.
    """

    is_measuring = False  # what `RouterHook` asks of its balancer

    def __init__(self, model: nn.Module, domains: int) -> None:
        self.root = _unwrap(model)[-1]
        try:
            self.sites: list[RouterSite] = find_routers(self.root)
        except ValueError as error:
            raise ValueError(f"There is nothing to inspect: {error}") from error
        self.domains = domains
        self.backbone = _backbone(self.root, self.sites)
        patch = find_patch(model)
        self._patched = None if patch is None else patch.balancer
        self._counts: list[Tensor | None] = [None] * len(self.sites)
        self._confidence: list[Tensor | None] = [None] * len(self.sites)
        self._top_k = [site.top_k for site in self.sites]
        self._mask: Tensor | None = None  # (T,) of the forward under way
        self._half = torch.zeros(0)  # (T,)
        self._domain = 0

    @contextmanager
    def attached(self) -> Iterator[RouterCensus]:
        """While open, the hooks are in the model."""
        handles = [
            module.register_forward_hook(RouterHook(cast(Any, self), index))
            for index, site in enumerate(self.sites)
            for module in site.modules
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def counting(self, domain: int, mask_BS: Tensor, half_B: Tensor) -> Iterator[None]:
        """
        While open, a forward of tokens of which `mask_BS (B, S)` count belongs to domain number `domain`; `half_B (B,)`
        says by 0 or 1 to which half each sequence belongs.
        """
        self._domain, self._mask = domain, mask_BS.reshape(-1)
        self._half = half_B.unsqueeze(-1).expand_as(mask_BS).reshape(-1)
        try:
            yield
        finally:
            self._mask = None

    @property
    def is_idle(self) -> bool:
        return self._mask is None

    def choice_bias(self, index: int) -> Tensor | None:
        """Bias that is in force in the selection of router `index`, for those that do not return their choice."""
        if self._patched is not None:
            return self._patched.choice_bias(index)
        bias = self.sites[index].read_native_bias()
        if bias is None and self.sites[index].native_bias:
            raise ValueError(
                f"the choice of router {self.sites[index].name!r} cannot be told while its selection bias is offloaded: "
                "load the model without offloading to CPU or disk."
            )
        return bias

    def observe(self, index: int, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """Counts one call of router `index`: `logits (T, E)`, `selected (..., k)`; returns `carrier` as it is."""
        site, mask_T = self.sites[index], cast(Tensor, self._mask).to(logits.device)
        if logits.shape != (mask_T.numel(), site.num_experts):
            raise ValueError(
                f"router {site.name!r} returned logits of shape {tuple(logits.shape)} where {mask_T.numel()} tokens and "
                f"{site.num_experts} experts were expected: this model routes something else than its tokens."
            )
        chosen_Tk = selected.reshape(mask_T.numel(), -1)
        if self._counts[index] is None:
            exact = torch.float32 if logits.device.type == "mps" else torch.float64
            self._counts[index] = logits.new_zeros(2, self.domains, site.num_experts, dtype=torch.int64)
            self._confidence[index] = logits.new_zeros(self.domains, len(CONFIDENCE), dtype=exact)
            self._top_k[index] = chosen_Tk.shape[-1]
        counts, confidence = cast(Tensor, self._counts[index]), cast(Tensor, self._confidence[index])
        cell_Tk = chosen_Tk + (site.num_experts * self._half.to(logits.device)).unsqueeze(-1)
        added = torch.zeros(2 * site.num_experts, dtype=torch.int64, device=logits.device)
        added.scatter_add_(0, cell_Tk.reshape(-1), mask_T.long().unsqueeze(-1).expand_as(cell_Tk).reshape(-1))
        counts[:, self._domain] += added.view(2, -1)
        probs_TE = routing_probs(logits, site.scoring)
        figures_3T = torch.stack(
            [
                probs_TE.amax(-1),
                probs_TE.gather(-1, chosen_Tk).sum(-1),
                torch.special.entr(probs_TE).sum(-1) / math.log(2),
            ]
        )
        confidence[self._domain] += torch.where(mask_T, figures_3T, 0.0).to(confidence.dtype).sum(-1)
        return carrier

    def layers(self) -> list[Layer]:
        """What has been counted, of the routers that were called."""
        return [
            Layer(site.name, top_k, site.scoring, counts.cpu(), cast(Tensor, sums).double().cpu())
            for site, top_k, counts, sums in zip(self.sites, self._top_k, self._counts, self._confidence)
            if counts is not None
        ]

    def uncalled(self) -> list[str]:
        """Names of routers that were never called."""
        return [site.name for site, counts in zip(self.sites, self._counts) if counts is None]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, each module being left in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    tokenizer: Any,
    domains: Sequence[Domain],
    *,
    seq_len: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    on_batch: Callable[[TextStream], None] | None = None,
) -> Inspection:
    """
    Runs `model` over texts and counts what its routers do. The model is left as it was.

    Args:
        model (`torch.nn.Module`): A MoE model of transformers, possibly wrapped, or patched by [`patch`]: then the
            selection bias that is in force is part of what is seen.
        tokenizer: Its tokenizer.
        domains (`Sequence[Domain]`): The texts, as [`inspection_texts.parse_domains`] makes them.
        seq_len (`int`, *optional*): Longest sequence; 512 tokens, or what the model can take, if not said.
        batch_size (`int`, *optional*, defaults to `8`): Sequences of one forward.
        max_tokens (`int`, *optional*, defaults to `65536`): Tokens of text of each domain; `None` reads everything.
        on_batch (`Callable[[TextStream], None]`, *optional*): Called after each batch, to show progress.

    Returns:
        `Inspection`: what was counted.

    Raises:
        ValueError: if the model has no routers, or a setting or the tokenizer does not fit it.
    """
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}: choose at least 1.")
    census = RouterCensus(model, len(domains))
    config = cast(Any, census.root.config).get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    seq_len = seq_len or min(DEFAULT_SEQ_LEN, limit)
    if seq_len > limit and hasattr(config, "max_position_embeddings"):
        raise ValueError(f"`seq_len` is {seq_len}, but the model takes at most {limit} tokens: choose no more.")
    embedding = cast(Any, census.backbone).get_input_embeddings()
    device = next((p.device for p in embedding.parameters() if p.device.type != "meta"), torch.device("cpu"))
    vocabulary = getattr(embedding, "num_embeddings", None) or config.vocab_size
    read: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    with census.attached(), _evaluating(census.root):
        for index, domain in enumerate(domains):
            stream = TextStream(domain, tokenizer, seq_len, max_tokens)
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
                    census.backbone(
                        input_ids=ids_BS.to(device), attention_mask=attended_BS.long().to(device), use_cache=False
                    )
                if on_batch is not None:
                    on_batch(stream)
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
    layers = census.layers()
    empty = [name for name, entry in read.items() if not entry["tokens"]]
    if empty:
        raise ValueError(f"there is no text in domain {', '.join(empty)}. {' '.join(notes)}")
    if not layers:
        raise ValueError(
            f"none of the {len(census.sites)} routers was called, e.g. {census.sites[0].name!r}: something bypasses them "
            "(a fused kernel?). Load the model with use_kernels=False."
        )
    if census.uncalled():
        names = census.uncalled()
        notes.append(f"{len(names)} routers were never called and are left out: {', '.join(names[:4])}.")
    for layer in layers:
        if not torch.isfinite(layer.confidence).all():
            raise ValueError(
                f"the logits of router {layer.name!r} are not finite, so its choices mean nothing: load the model in "
                "another dtype (`--dtype float32`)."
            )
    return Inspection(
        _describe(census, layers),
        {"seq_len": seq_len, "batch_size": batch_size, "max_tokens": max_tokens},
        read,
        layers,
        notes,
    )


def _remarks(stream: TextStream) -> list[str]:
    """What went wrong in reading a domain without stopping it."""
    notes = []
    if stream.skipped_rows:
        notes.append(f"{stream.skipped_rows} rows of {stream.domain.name} had no text in the field and were skipped.")
    if stream.undecodable:
        notes.append(
            f"{len(stream.undecodable)} files of {stream.domain.name} are not all UTF-8, e.g. {Path(stream.undecodable[0]).name}; "
            "what could not be read was replaced."
        )
    return notes


def _describe(census: RouterCensus, layers: list[Layer]) -> dict[str, Any]:
    config: Any = census.root.config
    balancer = census._patched
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
        "selection_bias": "phi_balance.safetensors"
        if balancer is not None and balancer.has_bias and not native
        else own,
    }
