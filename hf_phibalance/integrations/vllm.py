"""
Plugin for vLLM: serves checkpoints with a `phi_balance.state` with their selection bias. Only needs to be installed.

vLLM calls [`register`] in each of its processes. When a worker loads a checkpoint with a bias, each MoE layer gets a
`custom_routing_function`, vLLM's interface for other selection rules. It selects experts as the patched model does,
and weights them as the family does. Families that keep a bias in their weights need nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..files import STATE_NAME, quoted


if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..balancing import StateFile


# Model type of the language model: the scores that the bias is added to. Only families compared with vLLM's own code.
RANKED = {
    "gpt_oss": "logits",
    "granitemoe": "logits",
    "granitemoeshared": "logits",
    "flex_olmo": "probs",
    "mixtral": "probs",
    "olmoe": "probs",
    "qwen2_moe": "probs",
    "qwen3_moe": "probs",
    "qwen3_next": "probs",
}
REMEDY = (
    "`phibalance export` writes a checkpoint that needs no selection bias; without the state beside the weights "
    f"({STATE_NAME}), vLLM serves this one without its bias."
)
logger = logging.getLogger("vllm.hf_phibalance")  # a child of vLLM's logger, so it uses its handler


@functools.cache
def register() -> None:
    """Called by vLLM in every process. Only a process that makes a worker imports more."""
    try:
        from vllm.v1.worker.worker_base import WorkerBase
    except ImportError:
        logger.warning(f"hf_phibalance does not know this version of vLLM, which loses selection biases. {REMEDY}")
        return
    make_worker = WorkerBase.__init__

    @functools.wraps(make_worker)
    def make(worker: Any, *args: Any, **kwargs: Any) -> None:
        _wrap_loaders()
        make_worker(worker, *args, **kwargs)

    WorkerBase.__init__ = make


@functools.cache
def _wrap_loaders() -> None:
    """Wraps the model loaders of this process so that they add the biases."""
    from vllm.model_executor.model_loader import BaseModelLoader

    for loader in (BaseModelLoader, *BaseModelLoader.__subclasses__()):
        if "load_model" in vars(loader):
            loader.load_model = _loading_biased(loader.load_model)


def _loading_biased(load: Any) -> Any:
    @functools.wraps(load)
    def load_model(loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        state = find_biases(model_config, vllm_config.load_config.download_dir)
        if state is None:
            return load(loader, vllm_config, model_config, *args, **kwargs)
        with choosing_with_bias(model_config):
            model = load(loader, vllm_config, model_config, *args, **kwargs)
        hand_out(state, model, model_config, stages=vllm_config.parallel_config.pipeline_parallel_size)
        return model

    return load_model


def find_biases(model_config: Any, download_dir: str | None) -> StateFile | None:
    """Returns the state of a checkpoint if it has biases. `None` for a draft model, which works without them."""
    if model_config.runner_type == "draft" or not model_config.get_num_experts():
        return None
    from ..balancing import read_state
    from ..config import PhiBalanceConfig
    from ..files import find_state

    path = None
    with contextlib.suppress(OSError, ValueError):  # neither a folder nor a repository name, e.g. a GGUF file
        path = find_state(model_config.model, {"revision": model_config.revision, "cache_dir": download_dir})
    if path is None:
        said = getattr(model_config.hf_config, "phi_balance", None)
        trained = PhiBalanceConfig.from_any(said, f"`phi_balance` in the config of {model_config.model}")
        if trained and trained.bias_coef and model_config.hf_text_config.model_type in RANKED:
            logger.warning(
                f"{model_config.model} was trained with a selection bias, which is lost: there is no {STATE_NAME}."
            )
        return None
    state = read_state(path)
    return state if any(part.any() for key, part in state.tensors.items() if key.endswith(".bias")) else None


class BiasedChoice:
    """
    The `custom_routing_function` of one MoE layer. Selects the experts with the highest score + bias, and weights them
    by their probabilities. `ranked`: the scores that the bias is added to, `"probs"` or `"logits"`.
    """

    def __init__(self, ranked: str) -> None:
        self.are_probs = ranked == "probs"
        self.bias: Tensor | None = None

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        from ..routers import rank_scores

        assert self.bias is not None
        logits = gating_output.float()
        probs = logits.softmax(-1)
        ranked = rank_scores(probs if self.are_probs else logits, self.bias, are_probs=self.are_probs)
        chosen = ranked.topk(topk, dim=-1).indices
        weights = probs.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True) if renormalize else weights, chosen


@contextlib.contextmanager
def choosing_with_bias(model_config: Any) -> Iterator[None]:
    """
    Context manager: MoE layers made inside it get a [`BiasedChoice`], except in families with their own bias.

    Raises:
        ValueError: if the family is not in `RANKED`, or a layer chooses by another rule than softmax and top-k.
    """
    from vllm.model_executor.layers.fused_moe import layer

    family = model_config.hf_text_config.model_type
    make_router = getattr(layer, "create_fused_moe_router", None)
    if make_router is None:
        raise ValueError(
            f"{model_config.model} has a selection bias, but this version of vLLM makes its routers elsewhere than hf_phibalance "
            f"knows of. {REMEDY}"
        )

    def make(**options: Any) -> Any:
        if options.get("e_score_correction_bias") is not None:
            return make_router(**options)
        if family not in RANKED:
            raise ValueError(
                f"{model_config.model} has a selection bias, but hf_phibalance has not been tried in vLLM with {quoted(family)}, only "
                f"with {', '.join(RANKED)}. {REMEDY}"
            )
        refuse_other_rules(options)
        if options.get("custom_routing_function") is None:  # a loader that calls another one has set it already
            options["custom_routing_function"] = BiasedChoice(RANKED[family])
        return make_router(**options | {"use_grouped_topk": False})

    layer.create_fused_moe_router = make
    try:
        yield
    finally:
        layer.create_fused_moe_router = make_router


def refuse_other_rules(options: dict[str, Any]) -> None:
    """Raises if `options` of a vLLM router are more than softmax and top-k."""
    groups, custom = options.get("num_expert_group") or 1, options.get("custom_routing_function")
    other = {
        "scoring_func": options.get("scoring_func", "softmax") != "softmax",
        "num_expert_group": options.get("use_grouped_topk") and groups > 1,
        "custom_routing_function": custom is not None and not isinstance(custom, BiasedChoice),
        "routed_scaling_factor": options.get("routed_scaling_factor", 1.0) != 1.0,
        "num_fused_shared_experts": options.get("num_fused_shared_experts"),
        **{name: options.get(name) is not None for name in ("zero_expert_type", "hash_indices_table", "bias_vl")},
    }
    for name in (name for name, differs in other.items() if differs):
        value = options[name] if isinstance(options[name], (str, int, float)) else type(options[name]).__name__
        raise ValueError(
            f"vLLM makes a router with {name}={value!r} here, to which hf_phibalance cannot add a selection bias. {REMEDY}"
        )


def hand_out(state: StateFile, model: nn.Module, model_config: Any, stages: int) -> None:
    """
    Gives each MoE layer of `model` its bias, as a buffer, so that it survives vLLM's sleep mode.

    Raises:
        ValueError: if the state belongs to another model, or a layer would choose without its bias.
    """
    from vllm.model_executor.layers.fused_moe import MoERunner

    from ..balancing import check_model

    layers = {module.layer_name: module for module in model.modules() if isinstance(module, MoERunner)}
    if any(runner.routed_experts.e_score_correction_bias is not None for runner in layers.values()):
        return  # it is in the weights
    runners = {_layer_index(name): runner for name, runner in layers.items()}
    biases = {_layer_index(key): key for key in state.tensors if key.endswith(".bias")}
    if stages > 1:  # this worker holds one stage of a pipeline
        biases = {index: key for index, key in biases.items() if index in runners}
    if runners.keys() != biases.keys() or len(runners) < len(layers):
        raise ValueError(
            f"{model_config.model} has selection biases for the layers {sorted(biases)}, but vLLM has MoE layers at "
            f"{sorted(runners)}. {REMEDY}"
        )
    for index, runner in runners.items():
        choice = getattr(runner.router, "custom_routing_function", None)
        if not isinstance(choice, BiasedChoice) or runner.is_monolithic:
            raise ValueError(
                f"{runner.layer_name} would choose its experts inside a kernel ({type(runner._quant_method).__name__}, "
                f"{type(runner.router).__name__}), where no selection bias can be added. Another `--moe-backend`, or: {REMEDY}"
            )
        name = biases[index].removesuffix(".bias")
        found = [runner.moe_config.num_logical_experts, runner.moe_config.experts_per_token, "softmax"]
        saved = {"type": state.model["type"], "routers": {name: state.model["routers"][name]}}
        check_model(saved, {"type": model_config.hf_text_config.model_type, "routers": {name: found}})
        weight = next(runner.parameters())
        runner.register_buffer("selection_bias", state.tensors[biases[index]].to(weight.device), persistent=False)
        choice.bias = runner.selection_bias
    logger.info(f"φ-balancing: {len(runners)} MoE layers choose with the selection bias beside the weights.")


def _layer_index(name: str) -> int:
    """Returns the layer's number in the name of a module. The rest of the name differs between vLLM and transformers."""
    return int(re.findall(r"\.(\d+)\.", f".{name}")[0])
