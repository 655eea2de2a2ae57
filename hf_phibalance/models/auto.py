"""`from_pretrained(..., phi_balance=...)`: loads a model and patches it in one call."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from ..balancing import find_balancer, fingerprint, get_balancer, give_own_config, patch, read_state
from ..config import PhiBalanceConfig
from ..files import STATE_NAME, find_state, hub_arguments
from .checkpoints import auto_class_name, auto_class_of, base_of, class_below, find_adapter, labels_of


logger = logging.get_logger(__name__)


class _AutoModel:
    """
    An auto class of transformers whose models come back φ-balanced.

    `phi_balance` is a [`PhiBalanceConfig`], a mapping of its fields, `True` (the settings in config.json, else the
    defaults) or `False` (the ordinary model). If it is not given, config.json decides: a model saved while patched is
    patched again; `false` and `null` mean no balancing. Adapters keep their settings in `phi_balance.state`.
    """

    plain: type[_BaseAutoModelClass]  # the class of transformers

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
        Loads a model, or an adapter on its base model.

        Args:
            pretrained_model_name_or_path (`str`): Folder or Hub name.
            phi_balance (`PhiBalanceConfig`, `dict` or `bool`, *optional*): See the class.
            kwargs:
                Passed to `from_pretrained` of transformers' class of the same name. For an adapter,
                `is_trainable=True` makes its weights trainable.

        Returns:
            The model. For an adapter, the `PeftModel` that PEFT loads.

        Raises:
            ValueError: If the settings are invalid, the model has no router, or the saved state does not fit it.
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
        """Builds a model with random weights. See the class for `phi_balance`."""
        return _build(cls.plain.from_config, (config, *args), phi_balance, kwargs)


class AutoModelForCausalLM(_AutoModel): ...


class AutoModelForImageTextToText(_AutoModel): ...


class AutoModelForSequenceClassification(_AutoModel): ...


class AutoModelForTokenClassification(_AutoModel): ...


class AutoModelForQuestionAnswering(_AutoModel): ...


class AutoModel(_AutoModel): ...


AUTO_CLASSES = {cls.__name__: cls for cls in _AutoModel.__subclasses__()}


def load_any(source: str, *args, phi_balance: Any = None, **kwargs) -> Any:
    """
    Loads `source`, a checkpoint or an adapter, with the auto class for its head. Unlike `from_pretrained`, it does not
    warn if the model is not balanced.

    Raises:
        ValueError: If there is no auto class for its head, and where `from_pretrained` raises.
    """
    adapter = find_adapter(source, kwargs)
    base, of_base = (source, kwargs) if adapter is None else base_of(adapter, source, kwargs)
    name = None if adapter is None else auto_class_of(adapter)
    if name is None:
        code = {"trust_remote_code": kwargs.get("trust_remote_code")}
        config = transformers.AutoConfig.from_pretrained(base, **hub_arguments(of_base), **code)
        name = auto_class_name(config.model_type, (adapter and class_below(adapter)) or config.architectures)
    return _load(AUTO_CLASSES[name].plain.from_pretrained, source, args, phi_balance, kwargs)


def register_deepseek_moe() -> None:
    """Registers the model type `"deepseek"` with transformers' auto classes, if transformers has its decoder."""
    if importlib.util.find_spec("transformers.models.deepseek_ocr2") is not None:
        from .deepseek_moe import register

        register()


# ---------------------------------------------------------------------- loading and patching


def _build(make: Callable, args: tuple, phi_balance: Any, kwargs: dict[str, Any]) -> nn.Module:
    """Builds a model with `make`, a `from_config` of transformers, and patches it."""
    PhiBalanceConfig.from_any(phi_balance)
    model = make(*args, **kwargs)
    _patch_loaded(model, None, phi_balance, kwargs)
    return model


def _load(load: Callable, source: str, args: tuple, phi_balance: Any, kwargs: dict[str, Any]) -> Any:
    """
    Loads `source` with `load`, a `from_pretrained` of transformers, and patches the model. Loads adapters with PEFT,
    because transformers ignores parts of them (for example DoRA's magnitudes).
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
        phi_balance = _choose_config(phi_balance, read_state(state).config, state)
    if phi_balance is None:
        phi_balance = False
    loaded = load(base, *args, **labels_of(source, kwargs) | of_base)
    model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
    _patch_loaded(model, base, phi_balance, of_base)
    model = PeftModel.from_pretrained(model, source, is_trainable=is_trainable, **hub_arguments(kwargs))
    if state is not None and phi_balance is not False:  # PEFT's loader has loaded the state as well
        _warn_if_trained_since(model, source, state)
    return (model, *info) if info else model


def _patch_loaded(model: nn.Module, source: str | None, phi_balance: Any, kwargs: dict[str, Any]) -> None:
    """Patches a freshly loaded model as `phi_balance` asks, and loads the state beside its weights."""
    saved = getattr(model.config, "phi_balance", None)
    if saved is not None:  # removed: the model is saved as an ordinary one if it is not patched, or unpatched later
        give_own_config(model)
        vars(model.config).pop("phi_balance", None)
    if phi_balance is False:
        return
    if saved is None and source is not None:  # a language model has the settings of its vision-language model
        saved = transformers.PreTrainedConfig.get_config_dict(source, **hub_arguments(kwargs))[0].get("phi_balance")
    config = _choose_config(phi_balance, saved, f"{source or type(model).__name__}/config.json")
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
    """Warns if the routers of `model` have changed since its state was saved."""
    now, then = fingerprint(get_balancer(model).sites[0]), read_state(state).model["weights"]
    if now and then and now != then:
        logger.warning(
            f"The routers of {source} are not those that its {STATE_NAME} was saved with: they were trained since, without "
            "φ-balancing. Its prices and selection bias are older than the weights; get_balancer(model).reset() starts anew."
        )


def _choose_config(phi_balance: Any, saved: Any, file: str) -> PhiBalanceConfig | None:
    """Returns the settings to load with: the user's, else those `saved` in `file` (`ValueError` if unusable)."""
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
    Lets transformers' own `from_pretrained` and `from_config` accept `phi_balance=...`. Calls without it behave as
    before. [`disable`] undoes it. A second call does nothing.
    """
    if _originals:
        return
    # each auto class has its own copies of these functions
    for owner in (PreTrainedModel, _BaseAutoModelClass, *_BaseAutoModelClass.__subclasses__()):
        for name in {"from_pretrained", "from_config", "_from_config"} & vars(owner).keys():
            original = vars(owner)[name]
            _originals.append((owner, name, original))
            setattr(owner, name, classmethod(_accepting_flag(original.__func__, loads=name == "from_pretrained")))


def disable() -> None:
    """Undoes [`enable`]."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def _accepting_flag(inner, loads: bool):
    @functools.wraps(inner)
    def wrapper(cls, *args, phi_balance: Any = None, **kwargs):
        if phi_balance is None or phi_balance is False:
            return inner(cls, *args, **kwargs)
        if not loads:
            return _build(functools.partial(inner, cls), args, phi_balance, kwargs)
        source, *others = args or (kwargs.pop("pretrained_model_name_or_path"),)
        return _load(functools.partial(inner, cls), source, tuple(others), phi_balance, kwargs)

    return wrapper
