"""
Axolotl YAML: `plugins: [hf_phibalance.integrations.axolotl.PhiBalancePlugin]` and `phi_balance: {coef: 0.01}`.

`phi_balance` takes the fields of [`PhiBalanceConfig`], `true` for the defaults, or `false` for no balancing. `watch: true` watches the
routers ([`watch`]), also without `phi_balance`.

Axolotl ignores a plugin that it cannot import, and trains without it. This module imports the package inside its
methods, whose errors end the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator, model_validator


if TYPE_CHECKING:
    from ..config import PhiBalanceConfig


BUILT_IN_LOSS = ("output_router_logits", "router_aux_loss_coef", "aux_loss_coef")  # in `overrides_of_model_config`
MASKLESS = ("gemma4", "gemma4_unified")  # model types whose packed rows lose their mask on the way to the model
SHARED = ("context_parallel_size", "expert_parallel_size")


class PhiBalanceArgs(BaseModel):
    """The fields that the plugin adds to Axolotl's schema."""

    phi_balance: dict[str, Any] | None = None
    watch: bool = False

    @field_validator("phi_balance", mode="before")
    @classmethod
    def check_fields(cls, value: Any) -> dict[str, Any] | None:
        """Fills in the defaults of [`PhiBalanceConfig`], so that Axolotl logs all fields. Raises its errors."""
        from ..config import PhiBalanceConfig

        config = PhiBalanceConfig.from_any(value)
        return None if config is None else config.to_dict()

    @model_validator(mode="after")
    def refuse_impossible(self) -> Any:
        """Raises if other YAML settings would make the coefficient or the counts inexact."""
        from ..config import PhiBalanceConfig

        asked: Any = self
        key = "watch" if self.phi_balance is None else "phi_balance"
        if "phi_balance" not in self.model_fields_set and not self.watch:
            raise ValueError(
                "phi_balance is missing: write phi_balance: {coef: 0.01} to balance, or watch: true to watch only."
            )
        if self.phi_balance is None and self.watch:
            self.phi_balance = PhiBalanceConfig(method="none").to_dict()
        if self.phi_balance is None:
            return self
        config = PhiBalanceConfig.from_dict(self.phi_balance)
        for name, value in (asked.overrides_of_model_config or {}).items():
            if config.is_on and name in BUILT_IN_LOSS and value:
                raise ValueError(
                    f"overrides_of_model_config: {name}: {value} adds a second auxiliary loss to phi_balance. Remove one "
                    "of them."
                )
        for name in SHARED:
            if (getattr(asked, name, None) or 1) > 1:
                raise ValueError(
                    f"{name}: {getattr(asked, name)} lets ranks share tokens or experts, so that the tokens of a step cannot "
                    f"be told from the world size. Remove {name} or {key}."
                )
        streams = asked.streaming or asked.pretraining_dataset
        if streams and asked.sample_packing and config.token_mask == "attention":
            raise ValueError(
                "streaming: true with sample_packing fills rows up with padding and drops the attention mask that would tell it from "
                f"tokens, so that it would count. Set {_labels_only(config)}, or remove streaming or sample_packing."
            )
        if asked.merge_lora and config.bias_coef > 0 and asked.merge_method != "legacy":
            raise ValueError(
                f"merge_method: {asked.merge_method} merges files without loading the model, and would leave out the selection "
                f"bias (phi_balance: bias_coef: {config.bias_coef}). Set merge_method: legacy."
            )
        return self


def _labels_only(config: PhiBalanceConfig) -> str:
    """Returns the setting with which padding does not count."""
    return f"phi_balance: {{{'method: none, ' if config.method == 'none' else ''}token_mask: labels}}"


class PhiBalancePlugin(BasePlugin):
    """Patches the model that Axolotl has loaded, adapter included, and attaches to its trainer."""

    def get_input_args(self) -> str:
        return f"{__name__}.{PhiBalanceArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        from ..balancing import get_balancer, patch
        from ..config import PhiBalanceConfig
        from ..files import state_in

        if not cfg.phi_balance:
            return
        config = PhiBalanceConfig.from_dict(cfg.phi_balance.to_dict())
        family = model.config.model_type
        if cfg.sample_packing and family in MASKLESS and config.token_mask == "attention":
            raise ValueError(
                f"sample_packing: true with {family}, for which Axolotl deletes the attention mask that tells the padding of a packed "
                f"row from its tokens, so that it would count. Set {_labels_only(config)}, or sample_packing: false."
            )
        patch(model, config)
        for folder in (cfg.base_model, cfg.lora_model_dir):
            if folder and state_in(folder) is not None:
                get_balancer(model).load(folder)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        from ..training import attach, watch

        if not cfg.phi_balance:
            return
        attach(trainer)
        if cfg.watch:
            watch(trainer)
        if cfg.sample_packing:
            _keep_attention_mask(trainer)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Saves the state, since some of Axolotl's ways of saving write only the tensors of an adapter."""
        from ..balancing import get_balancer

        if cfg.phi_balance and cfg.local_rank == 0 and get_balancer(model).is_saved:
            get_balancer(model).save(cfg.output_dir)


def _keep_attention_mask(trainer: Any) -> None:
    """
    Axolotl pads packed rows and drops their attention mask, so that attention separates the samples by position.
    Padding would then count. Here the mask stays in the batch until the tokens are counted. It is dropped before the
    backbone's own forward.
    """
    from ..balancing import get_balancer, wrap_below

    def drop(backbone: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        packed = kwargs.get("position_ids") is not None and kwargs.get("past_key_values") is None
        return inner(*args, **kwargs | ({"attention_mask": None} if packed else {}))

    wrap_below(get_balancer(trainer.model), drop)
    trainer.args.sample_packing_drop_attention_mask = False
