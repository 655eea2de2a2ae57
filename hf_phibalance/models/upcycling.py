"""Upcycling: makes a Mixture-of-Experts model of a dense one. Its experts are copies of the dense MLPs."""

from __future__ import annotations

import copy
import math
import os
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from ..balancing import evaluating
from ..files import quoted
from .checkpoints import check_whole


logger = logging.get_logger(__name__)
MATRICES = ("gate_proj", "up_proj", "down_proj")
MLP_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
NOT_SAVED = "rotary_emb.inv_freq"  # in old Llama checkpoints; computed today
HEAD = "lm_head.weight"
NOT_COPIED = ("model_type", "architectures", "transformers_version", "_name_or_path")  # config fields
MADE_TOKENS = (4, 32)  # batch and length of the random tokens that models are compared on
QUANTIZED = (
    "a quantized model cannot be upcycled. Load it unpacked (`dequantize`), or use the model that it was made of."
)
NOTABLE, NOTABLE_IN_HALF = 1e-4, 1e-3  # KL divergence in nats, above which the difference is a warning
ALIGNED = 8  # transformers' grouped matrix products need rows of 16 bytes


@dataclass(frozen=True)
class MoeFamily:
    """How a MoE family names what the experts are made of, in its config and in its checkpoints."""

    model_type: str
    experts: str  # config field with the number of experts
    expert_size: str  # config field with the intermediate size of an expert
    block: str  # name of the MoE block in a layer
    weights: tuple[str, str, str] = MATRICES
    dense_layers: bool = True  # if layers may stay dense
    shared_expert: bool = False


MIXTRAL = MoeFamily(
    "mixtral", "num_local_experts", "intermediate_size", "block_sparse_moe", ("w1", "w3", "w2"), dense_layers=False
)
QWEN2_MOE = MoeFamily("qwen2_moe", "num_experts", "moe_intermediate_size", "mlp", shared_expert=True)
QWEN3_MOE = MoeFamily("qwen3_moe", "num_experts", "moe_intermediate_size", "mlp")
FAMILIES = {"llama": MIXTRAL, "mistral": MIXTRAL, "qwen2": QWEN2_MOE, "qwen3": QWEN3_MOE}  # by dense model type


@dataclass(frozen=True)
class Difference:
    """How much the logits of a MoE model differ from those of the dense model, on random tokens."""

    logit: float  # largest absolute difference of a logit
    largest: float  # largest absolute logit of the dense model
    kl: float  # mean KL divergence of the next-token probabilities from those of the dense model, in nats
    changed: float  # share of the tokens whose most likely next token is another one

    def __str__(self) -> str:
        return (
            f"On {math.prod(MADE_TOKENS)} random tokens, logits differ by at most {self.logit:.2g} (the largest is "
            f"{self.largest:.3g}), the next-token probabilities by a KL divergence of {self.kl:.2g}, and the most likely next token "
            f"changes for {self.changed:.1%} of them."
        )


@dataclass(frozen=True)
class Upcycling:
    """The options of [`upcycle`]. Raises `ValueError` if they do not fit together."""

    experts: int = 8
    top_k: int = 2
    splits: int = 1
    every: int = 1
    dense_layers: Sequence[int] = ()
    router_std: float = 0.02
    noise: float = 0.0
    reinit: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, what in (
            ("splits", self.splits >= 1, "1 or more"),
            ("every", self.every >= 1, "1 or more"),
            (
                "router_std",
                0 < self.router_std < math.inf,
                "more than 0: equal routers choose the same experts for every token",
            ),
            ("noise", 0 <= self.noise < math.inf, "0 or more"),
            ("reinit", 0 <= self.reinit <= 1, "a share between 0 and 1"),
        ):
            if not valid:
                raise ValueError(f"`{name}` must be {what}. Got {getattr(self, name)}.")
        if self.experts < 2 or self.experts % self.splits:
            raise ValueError(
                f"`experts` must be at least 2 and a multiple of `splits`, got experts={self.experts} and splits={self.splits}. "
                "`experts` counts the parts: with splits=4, 8 copies of an MLP are 32 experts."
            )
        if not 2 <= self.top_k <= self.experts:
            raise ValueError(
                f"`top_k` must be between 2 and experts={self.experts}, got {self.top_k}. The weights of the chosen experts sum to 1, "
                "so a single one always has the weight 1, and its router would learn nothing from the loss."
            )


class Upcycler:
    """
    Makes the config and the tensors of a MoE model. Needs the config and the class name of the dense model.

    Raises `ValueError` if it is not a dense language model of a known family, or the options do not fit it.
    """

    def __init__(self, dense: PreTrainedConfig, class_name: str, options: Upcycling) -> None:
        found = FAMILIES.get(dense.model_type)
        if found is None or not class_name.endswith("ForCausalLM") or class_name.startswith("Peft"):
            raise ValueError(
                f"{quoted(class_name)} of model_type={dense.model_type!r} cannot be upcycled: it must be a dense language model "
                f"(...ForCausalLM) of type {', '.join(FAMILIES)}. Merge an adapter first (`merge_and_unload`)."
            )
        quantization = dense.to_dict().get("quantization_config") or {}
        if quantization.get("quant_method", "gguf") != "gguf":  # a GGUF file may have been unpacked
            raise ValueError(f"`quantization_config` is set: {QUANTIZED}")
        count = dense.num_hidden_layers
        if wrong := [layer for layer in options.dense_layers if not 0 <= layer < count]:
            raise ValueError(f"`dense_layers` must be numbers from 0 to {count - 1}, got {wrong}.")
        self.options, self.family, self.dense = options, found, dense
        self.layers = [n for n in range(count) if (n + 1) % options.every == 0 and n not in options.dense_layers]
        if not self.layers:
            raise ValueError(
                f"`every`={options.every} and `dense_layers`={list(options.dense_layers)} leave none of the {count} layers to "
                "upcycle: choose a smaller `every`, or fewer `dense_layers`."
            )
        self.config = self._make_config(dense)
        classes: Any = transformers.AutoModelForCausalLM._model_mapping
        self.model_class = classes[type(self.config)]
        self.config.architectures = [self.model_class.__name__]

    def _make_config(self, dense: PreTrainedConfig) -> PreTrainedConfig:
        options, family = self.options, self.family
        size, rest = divmod(dense.intermediate_size, options.splits)
        if rest or size % ALIGNED:
            raise ValueError(
                f"`splits` must cut intermediate_size={dense.intermediate_size} into parts of a multiple of {ALIGNED}, got {options.splits}."
            )
        if not family.dense_layers and (options.every > 1 or options.dense_layers):
            raise ValueError(
                f"`every`={options.every} and `dense_layers`={list(options.dense_layers)} are not possible with {dense.model_type}: "
                f"it becomes a {family.model_type}, which has experts in every layer. Leave out both options."
            )
        for name in ("attention_bias", "mlp_bias"):
            if family is MIXTRAL and getattr(dense, name, False):
                raise ValueError(f"`{name}`=True cannot be upcycled: a {family.model_type} has no such biases.")
        windows = sorted({*(getattr(dense, "layer_types", None) or ())})
        if family is QWEN3_MOE and len(windows) > 1:
            raise ValueError(
                f"`layer_types` with {windows} cannot be upcycled: in a {family.model_type} all layers have a sliding window, or "
                "none. If your texts are shorter than the window, set `use_sliding_window` to false in config.json, and remove "
                "`layer_types`."
            )
        known = AutoConfig.for_model(family.model_type)
        fields = {name: value for name, value in dense.to_dict().items() if hasattr(known, name) or name == "head_dim"}
        fields = {name: value for name, value in fields.items() if name not in NOT_COPIED}
        fields |= {family.experts: options.experts, "num_experts_per_tok": options.top_k, family.expert_size: size}
        if family.dense_layers:
            fields |= {"norm_topk_prob": True, "decoder_sparse_step": options.every}
            fields["mlp_only_layers"] = sorted(options.dense_layers)
        if family.shared_expert:
            fields["shared_expert_intermediate_size"] = size
        if family is QWEN3_MOE and windows == ["full_attention"]:
            fields["use_sliding_window"] = False
        return AutoConfig.for_model(family.model_type, **fields)

    def check_names(self, names: Collection[str]) -> None:
        """Raises `ValueError` if a tensor of the dense model is not among the names of tensors."""
        with torch.device("meta"):
            dense: Any = transformers.AutoModelForCausalLM.from_config(self.dense)
        wanted = (name for name in dense.state_dict() if not self._is_tied(name))
        if missing := next((name for name in wanted if name not in names), None):
            raise ValueError(
                f"{missing!r} is not among the tensors of the model. It must be an ordinary checkpoint: without an adapter, and for "
                "the command in safetensors files. `phb.upcycle` takes whatever from_pretrained loads."
            )

    def _is_tied(self, name: str) -> bool:
        """True for a head that is the embeddings. Some versions of transformers would untie it if it were there."""
        return name == HEAD and self.config.tie_word_embeddings

    def convert(self, name: str, dense: Tensor) -> Iterator[tuple[str, Tensor]]:
        """
        Yields the tensors that are made of the dense tensor `name`, and their names in a MoE checkpoint. They do not depend on
        the order of the calls: each tensor has random numbers of its own.
        """
        found = MLP_WEIGHT.fullmatch(name)
        if found is None or int(found[1]) not in self.layers:
            if not name.endswith(NOT_SAVED) and not self._is_tied(name):
                yield name, dense.clone()
            return
        layer, matrix = found.groups()
        family = self.family
        block = f"model.layers.{layer}.{family.block}"
        axis = 1 if matrix == "down_proj" else 0  # the dimension of the MLP's neurons
        parts = dense.chunk(self.options.splits, axis)
        for expert in range(self.options.experts):
            part = parts[expert % len(parts)].to(torch.promote_types(dense.dtype, torch.float32), copy=True)
            if matrix == "down_proj":
                part *= len(parts)  # a token's weights sum to 1, so each of its parts has 1/splits of the weight
            self._change(part, axis, layer, matrix, expert)
            yield f"{block}.experts.{expert}.{family.weights[MATRICES.index(matrix)]}.weight", part.to(dense.dtype)
        if matrix == "gate_proj":
            yield f"{block}.gate.weight", self._router(layer, dense)
        if family.shared_expert:
            if matrix == "gate_proj":
                yield f"{block}.shared_expert_gate.weight", dense.new_zeros(1, dense.shape[1])
            # its output is 0 until training moves its down_proj
            part = torch.zeros_like(parts[0]) if matrix == "down_proj" else parts[0].clone()
            yield f"{block}.shared_expert.{matrix}.weight", part

    def _change(self, part: Tensor, axis: int, layer: str, matrix: str, expert: int) -> None:
        """Adds noise to a matrix of an expert, and draws some of its neurons anew."""
        if self.options.noise:
            part += self.options.noise * part.std() * self._normal(part, layer, matrix, expert, "noise")
        if self.options.reinit:
            # the same neurons in all three matrices
            numbers = self._generator(layer, expert, "neurons")
            neurons = torch.randperm(part.shape[axis], generator=numbers, device="cpu")
            neurons = neurons[: math.ceil(self.options.reinit * len(neurons))].to(part.device)
            old = part.index_select(axis, neurons)
            new = old.mean() + old.std() * self._normal(old, layer, matrix, expert, "reinit")
            part.index_copy_(axis, neurons, new)

    def _router(self, layer: str, dense: Tensor) -> Tensor:
        """Returns a random router, `(E, hidden)`. The parts of a copy share a row, if a token gets all of them or none."""
        options = self.options
        shared = options.splits if options.top_k % options.splits == 0 else 1
        rows = dense.new_empty(options.experts // shared, dense.shape[1], dtype=torch.float32)
        return (options.router_std * self._normal(rows, layer, "router")).repeat_interleave(shared, 0).to(dense.dtype)

    def _generator(self, *words: object) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(zlib.crc32(repr((self.options.seed, *words)).encode()))

    def _normal(self, like: Tensor, *words: object) -> Tensor:
        numbers = self._generator(*words)  # on the CPU, whatever the default device
        return torch.randn(like.shape, generator=numbers, dtype=like.dtype, device="cpu").to(like.device)


def upcycle(
    model_or_path: nn.Module | str | os.PathLike,
    experts: int = 8,
    top_k: int = 2,
    *,
    splits: int = 1,
    every: int = 1,
    dense_layers: Sequence[int] = (),
    router_std: float = 0.02,
    noise: float = 0.0,
    reinit: float = 0.0,
    seed: int = 0,
    **loading: Any,
) -> Any:
    """
    Makes a Mixture-of-Experts model of a dense one: a Mixtral of a Llama or Mistral, a Qwen2-MoE of a Qwen2, a Qwen3-MoE of
    a Qwen3. Each expert is a copy of its layer's MLP, or a part of it. The routers are random and new.

    Copies compute what the dense model computes, up to rounding, because the weights of the chosen experts sum to 1. The shared
    expert of Qwen2-MoE begins with an output of 0. The log says how much the logits differ on random tokens.

    Args:
        model_or_path (`PreTrainedModel` or `str`): The dense model. A folder or Hub name is loaded.
        experts (`int`, *optional*, defaults to 8): Experts of a layer.
        top_k (`int`, *optional*, defaults to 2): Experts of a token.
        splits (`int`, *optional*, defaults to 1):
            Cuts each MLP into this many experts and scales their outputs up by as much
            ([arXiv 2410.07524](https://arxiv.org/abs/2410.07524)). If `top_k` is a multiple of it, the parts of a copy share
            a router row, and the result is exact. Otherwise a token gets random parts of the MLP.
        every (`int`, *optional*, defaults to 1): Upcycles every n-th layer, the n-th first. Not for Mixtral.
        dense_layers (`Sequence[int]`, *optional*): Layers that stay dense, from 0. Not for Mixtral.
        router_std (`float`, *optional*, defaults to 0.02): Standard deviation of the routers' weights.
        noise (`float`, *optional*, defaults to 0.0):
            Standard deviation of noise on the experts' weights, as a share of that of each matrix.
        reinit (`float`, *optional*, defaults to 0.0):
            Share of the neurons of each expert that are drawn anew, with the mean and standard deviation of the old ones
            (Drop-Upcycling, [arXiv 2502.19261](https://arxiv.org/abs/2502.19261), which uses 0.5).
        seed (`int`, *optional*, defaults to 0): Seed of everything random.
        loading: Passed to `from_pretrained`, if a path was given: `dtype`, `revision`, `gguf_file`, ...

    Returns:
        `PreTrainedModel`: The MoE model, in eval mode. The dense model stays as it is, and shares nothing with it.

    Raises:
        ValueError: If the model is not a dense language model of these families or is quantized, or an option is wrong.
    """
    options = Upcycling(experts, top_k, splits, every, dense_layers, router_std, noise, reinit, seed)
    dense: Any = model_or_path
    if not isinstance(dense, nn.Module):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True, **loading)
        dense, info = loaded
        check_whole(info, str(model_or_path))
    elif loading:
        raise TypeError(f"{', '.join(loading)}: needs a path to load from, got a {type(dense).__name__}.")
    upcycler = Upcycler(dense.config, type(dense).__name__, options)
    tensors = dense.state_dict()
    upcycler.check_names(tensors)
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise ValueError(f"Some weights are not floating-point numbers: {QUANTIZED}")
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(
            "Some weights are offloaded to disk. Load all of them, or run `phibalance upcycle`, which needs little memory."
        )
    state = dict(made for name, tensor in tensors.items() for made in upcycler.convert(name, tensor))
    model = upcycler.model_class.from_pretrained(
        None,
        config=upcycler.config,
        state_dict=state,
        dtype=dense.dtype,
        attn_implementation=dense.config._attn_implementation,
        device_map={"": dense.device},
    )
    model.name_or_path = model.config.name_or_path = ""  # an adapter must not take the dense model for its base
    model.generation_config = copy.deepcopy(dense.generation_config)
    found = difference(made_logits(dense), made_logits(model))
    allowed = NOTABLE_IN_HALF if torch.finfo(dense.dtype).bits == 16 else NOTABLE
    logger.log(logging.WARNING if found.kl > allowed else logging.INFO, f"Upcycled into {experts} experts. {found}")
    return model


def made_logits(model: Any) -> Tensor:
    """Returns the logits of a model on random tokens, `(batch, length, vocabulary)` in float32 on the CPU."""
    numbers = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, MADE_TOKENS, generator=numbers, device="cpu")
    with evaluating(model), torch.no_grad():
        return model(tokens.to(model.device), use_cache=False).logits.float().cpu()


def difference(dense: Tensor, moe: Tensor) -> Difference:
    """Compares the logits of [`made_logits`] of two models."""
    before, after = dense.double().log_softmax(-1), moe.double().log_softmax(-1)
    return Difference(
        logit=float((moe - dense).abs().max()),
        largest=float(dense.abs().max()),
        kl=float((before.exp() * (before - after)).sum(-1).mean()),
        changed=float((dense.argmax(-1) != moe.argmax(-1)).float().mean()),
    )
