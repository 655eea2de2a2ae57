"""`from_pretrained(..., phi_balance=...)`: loading a model and patching it in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from ..balancing import config_in, find_balancer, fingerprint, get_balancer, give_own_config, patch, read_state
from ..config import PhiBalanceConfig
from ..files import STATE_NAME, find_state, hub_arguments
from .checkpoints import auto_class_of, base_of, class_below, find_adapter, labels_of
from .heads import auto_class_name


logger = logging.get_logger(__name__)


class _AutoModel:
    """
    An auto class of transformers whose models come back φ-balanced.

    `phi_balance` may be a [`PhiBalanceConfig`], a mapping of its fields, `True` (what config.json says, else the
    defaults), `False` (the ordinary model), or be left out: then config.json decides, so that a model that was saved while
    patched is patched again. `false` and `null` in config.json mean no balancing. The folder of an adapter keeps its
    configuration in `phi_balance.state` instead.
    """

    plain: type[_BaseAutoModelClass]  # that of transformers

    def __init_subclass__(cls) -> None:
        cls.plain = getattr(transformers, cls.__name__)
        cls.__doc__ = str(_AutoModel.__doc__).replace(
            "An auto class of transformers", f"`transformers.{cls.__name__}`"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *args, phi_balance: Any = None, **kwargs
    ) -> nn.Module:
        """
        Loads a model, or the adapter of one with its base model.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub name.
            phi_balance (`PhiBalanceConfig`, `dict` or `bool`, *optional*): see the class.
            kwargs:
                handed to the `from_pretrained` of transformers' class of the same name. For an adapter also
                `is_trainable=True`, with which its weights are trained.

        Returns:
            The model; for an adapter the `PeftModel` that PEFT's own loader makes of it.

        Raises:
            ValueError: if the configuration is invalid, the model has no router, or its state does not fit it.
        """
        loaded = _load(cls.plain.from_pretrained, pretrained_model_name_or_path, args, phi_balance, kwargs)
        if phi_balance is None and find_balancer(loaded[0] if isinstance(loaded, tuple) else loaded) is None:
            logger.warning(
                f"{pretrained_model_name_or_path} is loaded without balancing: its config.json does not ask for it, and `phi_balance` "
                "was not given. Pass phi_balance=True or {'coef': 0.01} to balance it, or phi_balance=False for the ordinary model."
            )
        return loaded

    @classmethod
    def from_config(cls, config, *args, phi_balance: Any = None, **kwargs) -> nn.Module:
        """A model with random weights; see `from_pretrained` for `phi_balance`."""
        PhiBalanceConfig.from_any(phi_balance)
        model = cls.plain.from_config(config, *args, **kwargs)
        _patch_loaded(model, None, phi_balance, kwargs)
        return model


class AutoModelForCausalLM(_AutoModel): ...


class AutoModelForImageTextToText(_AutoModel): ...


class AutoModelForSequenceClassification(_AutoModel): ...


class AutoModelForTokenClassification(_AutoModel): ...


class AutoModelForQuestionAnswering(_AutoModel): ...


class AutoModel(_AutoModel): ...


AUTO_CLASSES = {cls.__name__: cls for cls in _AutoModel.__subclasses__()}


def load_any(source: str, *args, phi_balance: Any = None, **kwargs) -> Any:
    """
    Loads `source`, a checkpoint or an adapter on one, with the auto class for its head; see [`reporting.auto_class_name`]. Says
    nothing if it is not balanced.

    Raises:
        ValueError: if there is no auto class for its head, or as `from_pretrained`.
    """
    adapter = find_adapter(source, kwargs)
    base, of_base = (source, kwargs) if adapter is None else base_of(adapter, source, kwargs)
    name = None if adapter is None else auto_class_of(adapter)
    if name is None:
        code = {"trust_remote_code": kwargs.get("trust_remote_code")}
        config = transformers.AutoConfig.from_pretrained(base, **hub_arguments(of_base), **code)
        name = auto_class_name(config.model_type, (adapter and class_below(adapter)) or config.architectures)
    return _load(AUTO_CLASSES[name].plain.from_pretrained, source, args, phi_balance, kwargs)


def _load(load: Callable, source: str, args: tuple, phi_balance: Any, kwargs: dict[str, Any]) -> Any:
    """
    Loads `source` with `load`, a `from_pretrained` of transformers, and patches the model as `phi_balance` asks. An adapter is
    loaded by PEFT: transformers leaves out what it does not know, for instance the magnitudes of DoRA.
    """
    PhiBalanceConfig.from_any(phi_balance)  # bad input fails before the weights are loaded
    adapter, is_trainable = find_adapter(source, kwargs), kwargs.pop("is_trainable", False)
    if adapter is None:
        loaded = load(source, *args, **kwargs)
        _patch_loaded(loaded[0] if isinstance(loaded, tuple) else loaded, source, phi_balance, kwargs)
        return loaded
    from peft import PeftModel  # before the patch, which looks for PEFT

    base, of_base = base_of(adapter, source, kwargs)
    state = find_state(source, kwargs)
    if state is not None and (phi_balance is None or phi_balance is True):
        phi_balance = _asked(phi_balance, config_in(state), state)
    if phi_balance is None:
        phi_balance = False
    loaded = load(base, *args, **labels_of(source, kwargs) | of_base)
    model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
    _patch_loaded(model, base, phi_balance, of_base)
    model = PeftModel.from_pretrained(model, source, is_trainable=is_trainable, **hub_arguments(kwargs))
    if state is not None and phi_balance is not False:  # it was loaded with the adapter
        _warn_if_trained_since(model, source, state)
    return (model, *info) if info else model


def _flag(model: nn.Module, source: str | None, kwargs: dict[str, Any]) -> Any:
    """Returns what config.json says under `phi_balance`; of a language model out of a vision-language one, that of the whole."""
    own = getattr(model.config, "phi_balance", None)
    if own is not None or source is None:
        return own
    return transformers.PreTrainedConfig.get_config_dict(source, **hub_arguments(kwargs))[0].get("phi_balance")


def _patch_loaded(model: nn.Module, source: str | None, phi_balance: Any, kwargs: dict[str, Any]) -> None:
    """Patches a freshly loaded model as `phi_balance` asks and gives it the state that was saved beside its weights."""
    saved, file = _flag(model, source, kwargs), f"{source or type(model).__name__}/config.json"
    if getattr(model.config, "phi_balance", None) is not None:
        # so that what is unpatched later, or not patched at all, is saved as an ordinary model
        give_own_config(model)
        vars(model.config).pop("phi_balance", None)
    if phi_balance is False:
        return
    config = _asked(phi_balance, saved, file)
    if config is None:
        return
    state = None if source is None else find_state(source, kwargs)
    patch(model, config)
    if state is not None:
        get_balancer(model).load(state)
        _warn_if_trained_since(model, source, state)
    elif saved and source is not None:
        logger.warning(
            f"{source} was saved while φ-balanced, but its {STATE_NAME} was not found: its prices and means start anew "
            "and a selection bias in it is lost. Copy the file beside the weights to keep them."
        )


def _warn_if_trained_since(model: nn.Module, source: str | None, state: str) -> None:
    """Warns if the routers of `model` are not those that its state was saved with."""
    now, then = fingerprint(get_balancer(model).sites[0]), read_state(state).model["weights"]
    if now and then and now != then:
        logger.warning(
            f"The routers of {source} are not those that its {STATE_NAME} was saved with: they were trained since, without "
            "φ-balancing. Its prices and selection bias are of then; get_balancer(model).reset() begins anew."
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
        if loads:
            source, *others = args or (kwargs.pop("pretrained_model_name_or_path"),)
            return _load(functools.partial(inner, cls), source, tuple(others), phi_balance, kwargs)
        PhiBalanceConfig.from_any(phi_balance)
        model = inner(cls, *args, **kwargs)
        _patch_loaded(model, None, phi_balance, kwargs)
        return model

    return wrapper
