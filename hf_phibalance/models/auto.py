"""`from_pretrained(..., phi_balance=...)`: loading a model and patching it in one call."""

from __future__ import annotations

import functools
import os
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import cached_file, logging

from ..balancing import config_in, fingerprint, get_balancer, give_own_config, patch, read_state
from ..config import PhiBalanceConfig
from ..files import quoted, read_json
from ..reporting import auto_class_name
from ..sidecar import STATE_NAME


logger = logging.get_logger(__name__)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class _AutoModel:
    """
    An auto class of transformers whose models come back φ-balanced.

    `phi_balance` may be a [`PhiBalanceConfig`], a mapping of its fields, `True` (what config.json says, else the
    defaults), `False` (the ordinary model), or be left out: then config.json decides, so that a model that was saved while
    patched is patched again. `false` and `null` in config.json mean no balancing. The folder of an adapter keeps its
    configuration in `phi_balance.state` instead.
    """

    plain: type[_BaseAutoModelClass]  # that of transformers

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *args, phi_balance: Any = None, **kwargs
    ) -> nn.Module:
        """
        Args:
            pretrained_model_name_or_path (`str`): folder or Hub name.
            phi_balance (`PhiBalanceConfig`, `dict` or `bool`, *optional*): see the class.
            kwargs: handed to the `from_pretrained` of transformers' class of the same name.

        Raises:
            ValueError: if the configuration is invalid, the model has no router, or its state does not fit it.
        """
        PhiBalanceConfig.from_any(phi_balance)  # bad input fails before the weights are loaded
        loaded = cls.plain.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _patch_loaded(model, pretrained_model_name_or_path, phi_balance, kwargs)
        return loaded

    @classmethod
    def from_config(cls, config, *args, phi_balance: Any = None, **kwargs) -> nn.Module:
        """A model with random weights; see `from_pretrained` for `phi_balance`."""
        PhiBalanceConfig.from_any(phi_balance)
        model = cls.plain.from_config(config, *args, **kwargs)
        _patch_loaded(model, None, phi_balance, kwargs)
        return model


class AutoModelForCausalLM(_AutoModel):
    __doc__ = str(_AutoModel.__doc__).replace("An auto class of transformers", "`transformers.AutoModelForCausalLM`")
    plain = transformers.AutoModelForCausalLM


class AutoModelForImageTextToText(_AutoModel):
    __doc__ = str(_AutoModel.__doc__).replace(
        "An auto class of transformers", "`transformers.AutoModelForImageTextToText`"
    )
    plain = transformers.AutoModelForImageTextToText


def auto_class_for(config: Any) -> type[_AutoModel]:
    """The auto class for a checkpoint with this `config`, see [`reporting.auto_class_name`]."""
    name = auto_class_name(config.model_type, getattr(config, "architectures", None))
    return next(cls for cls in (AutoModelForCausalLM, AutoModelForImageTextToText) if cls.__name__ == name)


def load_any(source: str, *args, **kwargs) -> nn.Module:
    """`from_pretrained` of the auto class that `source`, a checkpoint or an adapter on one, is for; see [`auto_class_for`]."""
    loading = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    adapter = cached_file(source, "adapter_config.json", **_quietly(kwargs))
    base = source if adapter is None else base_of_adapter(adapter)
    if adapter is not None:
        loading.pop("revision", None)
    return auto_class_for(transformers.AutoConfig.from_pretrained(base, **loading)).from_pretrained(
        source, *args, **kwargs
    )


def base_of_adapter(config: str | os.PathLike) -> str:
    """
    The base model, folder or Hub name, that the `adapter_config.json` `config` names.

    Raises:
        ValueError: if it names none, or is damaged.
    """
    remedy = "Save the adapter again with PEFT's save_pretrained."
    base = read_json(config, remedy).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"base_model_name_or_path in {config} must be the name of a model, got {quoted(base)}. {remedy}"
        )
    return base


def _flag(model: nn.Module, source: str | None, kwargs: dict[str, Any]) -> Any:
    """Returns what config.json says under `phi_balance`; of a language model out of a vision-language one, that of the whole."""
    own = getattr(model.config, "phi_balance", None)
    if own is not None or source is None or _is_adapter(model):
        return own
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    return transformers.PreTrainedConfig.get_config_dict(source, **hub)[0].get("phi_balance")


def _is_adapter(model: nn.Module) -> bool:
    """Whether transformers has loaded an adapter on its base model: config.json is then the base model's."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _patch_loaded(model: nn.Module, source: str | None, phi_balance: Any, kwargs: dict[str, Any]) -> None:
    """Patches a freshly loaded model as `phi_balance` asks and gives it the state that was saved beside its weights."""
    saved, file = _flag(model, source, kwargs), f"{source or type(model).__name__}/config.json"
    if getattr(model.config, "phi_balance", None) is not None:
        # so that what is unpatched later, or not patched at all, is saved as an ordinary model
        give_own_config(model)
        vars(model.config).pop("phi_balance", None)
    if phi_balance is False:
        return
    state = None
    if source is not None and (phi_balance or saved or _is_adapter(model)):
        state = find_state(source, kwargs)
    if state is not None and _is_adapter(model):
        saved, file = config_in(state), state
    elif phi_balance is None and _is_adapter(model):
        return
    config = _asked(phi_balance, saved, file)
    if config is None:
        return
    patch(model, config)
    if state is not None:
        balancer = get_balancer(model)
        balancer.load(state)
        now, then = fingerprint(balancer.sites[0]), read_state(state).model["weights"]
        if now and then and now != then:
            logger.warning(
                f"The routers of {source} are not those that its {STATE_NAME} was saved with: they were trained since, without "
                "φ-balancing. Its prices and selection bias are of then; get_balancer(model).reset() begins anew."
            )
    elif saved and source is not None:
        logger.warning(
            f"{source} was saved while φ-balanced, but its {STATE_NAME} was not found: its prices and means start anew "
            "and a selection bias in it is lost. Copy the file beside the weights to keep them."
        )


def _asked(phi_balance: Any, saved: Any, file: str) -> PhiBalanceConfig | None:
    """Returns the configuration to load a model with: that of `file`, which may be damaged or of a later version, or the user's."""
    if phi_balance is not None and phi_balance is not True:
        return PhiBalanceConfig.from_any(phi_balance)
    try:
        return PhiBalanceConfig.from_any(saved, f"`phi_balance` in {file}") or PhiBalanceConfig.from_any(phi_balance)
    except ValueError as error:
        raise ValueError(
            f"{error} Or pass another one, phi_balance={{...}}, or phi_balance=False for the ordinary model."
        ) from error


def find_state(source: str, kwargs: dict[str, Any]) -> str | None:
    """Path of the state beside the weights in `source`, a folder or a name on the Hub."""
    return cached_file(source, STATE_NAME, **_quietly(kwargs))


def _quietly(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `cached_file`, out of those of `from_pretrained`, with which a file may be missing."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs} | {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }


# ---------------------------------------------------------------------- transformers' own entry points

_originals: list[tuple[type, str, Any]] = []


def enable() -> None:
    """
    Lets transformers' own `from_pretrained` and `from_config` accept `phi_balance=...`; calls without it behave as
    ever. Taken back by [`disable`]; calling it twice is the same as once.
    """
    if _originals:
        return
    # each auto class holds copies of its own; without them, AutoConfig would swallow the flag of a model saved patched
    for owner in (PreTrainedModel, _BaseAutoModelClass, *_BaseAutoModelClass.__subclasses__()):
        for name in {"from_pretrained", "from_config", "_from_config"} & vars(owner).keys():
            original = vars(owner)[name]
            _originals.append((owner, name, original))
            setattr(owner, name, classmethod(_accepting_flag(original.__func__, loads=name == "from_pretrained")))


def disable() -> None:
    """Takes [`enable`] back."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def _accepting_flag(inner, loads: bool):
    @functools.wraps(inner)
    def wrapper(cls, *args, phi_balance: Any = None, **kwargs):
        if phi_balance is None or phi_balance is False:
            return inner(cls, *args, **kwargs)
        PhiBalanceConfig.from_any(phi_balance)
        loaded = inner(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        source = (args[0] if args else kwargs["pretrained_model_name_or_path"]) if loads else None
        _patch_loaded(model, source, phi_balance, kwargs)
        return loaded

    return wrapper
