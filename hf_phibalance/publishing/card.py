"""The model card of a run, and the section about balance for a card that somebody else wrote."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import PhiBalanceConfig
from ..methods import METHODS
from ..reporting import TEXT_CLASS, without_paths
from .evaluations import evaluation_text, model_index
from .pictures import CURVES_NAME, LOADS_NAME
from .run import Run, method_of
from .tables import layer_table, summary_rows


CARD_NAME = "README.md"
CARD_MARK = "<!-- hf_phibalance -->"  # tells the template's cards from others
TAGS = ("mixture-of-experts", "phi-balancing")  # the last one only of what was φ-balanced


def model_card(
    run: Run,
    baseline: Run | None = None,
    template: str | os.PathLike | None = None,
    *,
    title: str,
    base_model: str | None = None,
    licence: Mapping[str, str] | None = None,
    library_name: str = "transformers",
    repo_id: str | None = None,
    pictures: Sequence[str] = (LOADS_NAME, CURVES_NAME),
) -> Any:
    """
    The model card of a run; it says only what was measured.

    Args:
        run (`Run`): The run. Whatever its summary lacks, the card leaves out.
        baseline (`Run`, *optional*): A run to show beside it.
        template (`str` or `os.PathLike`, *optional*): A Jinja template, else [`find_template`]'s.
        title (`str`): Name of the model.
        base_model (`str`, *optional*): What was fine-tuned, if not the summary's `base_model`.
        licence (`Mapping[str, str]`, *optional*):
            `license`, `license_name` and `license_link` of the base model, as far as it has them.
        library_name (`str`, *optional*, defaults to `"transformers"`): `"peft"` for an adapter.
        repo_id (`str`, *optional*): Where the model will be on the Hub.
        pictures (`Sequence[str]`, *optional*): The report's pictures that lie beside the card.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    summary, balance, licence = run.summary, run.summary.get("balance"), dict(licence or {})
    base_model = base_model or summary.get("base_model")
    base_name = base_model and (Path(base_model).name if Path(base_model).exists() else base_model)
    hub_base = base_model if base_name == base_model else None  # a folder is no name on the Hub
    hub_dataset, dataset_text = _dataset_names(summary)
    results = model_index(run, hub_dataset, dataset_text)
    data = ModelCardData(
        model_name=title,
        base_model=hub_base,
        library_name=library_name,
        pipeline_tag="text-generation" if run.auto_class == TEXT_CLASS else "image-text-to-text",
        language="en" if dataset_text else None,
        tags=[*tags(balance), summary["model_type"]],
        datasets=[hub_dataset] if hub_dataset else None,
        eval_results=results or None,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    if not results:  # it belongs to the model-index alone
        data.pop("model_name")
    return ModelCard.from_template(
        data,
        template_path=str(template or find_template()),
        title=title,
        summary=summary,
        auto_class=run.auto_class,
        prompt=_literal(summary.get("example_prompt") or "Question: ...\nAnswer:"),
        base_name=base_name,
        dataset_text=dataset_text,
        columns=[run.name] if baseline is None else [baseline.name, run.name],
        rows=[row for row in summary_rows(run, baseline) if row[0] != "seconds"],  # of a machine that nobody knows
        command=without_paths(summary.get("command")),
        has_exact_match=(summary.get("exact_match") or {}).get("trained") is not None
        and bool(summary.get("problems")),
        layer_table=layer_table(run, baseline),
        balance=balance_text(balance) if balance else None,
        routers=routers_text(balance) if balance else None,
        flag=_flag(balance) if library_name == "peft" else "True",
        mark=CARD_MARK,
        evaluations=[evaluation_text(evaluation) for evaluation in run.evaluations],
        has_bias=bool(balance and balance.get("bias_coef")),
        is_adapter=library_name == "peft",
        licence=licence.get("license_name") or licence.get("license"),
        repo_id=repo_id,
        loads_picture=LOADS_NAME if LOADS_NAME in pictures else None,
        curves_picture=CURVES_NAME if CURVES_NAME in pictures else None,
    )


def _literal(text: str) -> str:
    """`text` in Python, line by line where nothing in it would end the string, the code block, or mean something else."""
    plain = text.replace("\n", "").isprintable() and not any(mark in text for mark in ("\\", '"""', "```", "~~~"))
    return f'"""{text}"""' if plain and not text.endswith('"') else repr(text)


def find_template() -> Path:
    """
    The template of the model card, `model_cards/template.md` of the source tree or as installed.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    source = Path(__file__).parents[2] / "model_cards" / "template.md"
    if source.is_file():
        return source
    beside = Path(__file__).parents[2] / "share" / "hf_phibalance" / "template.md"  # as pip --target has it
    recorded = [Path(str(file.locate())) for file in importlib.metadata.files("hf_phibalance") or ()]
    for path in (beside, *recorded):
        if path.parts[-2:] == ("hf_phibalance", "template.md") and path.is_file():
            return path
    raise FileNotFoundError(f"there is no model card template at {source}: install hf_phibalance again, or pass one.")


def _dataset_names(summary: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Name on the Hub of what a run was trained on, if it is there, and what a reader is to call it."""
    dataset = summary.get("dataset")
    if not dataset:
        return None, None
    if dataset == "toy":
        kind = "Python" if summary.get("task") == "mbpp" else "GSM8K-format"
        return None, f"generated {kind} problems"
    return (None, Path(dataset).name) if Path(dataset).exists() else (dataset, dataset)


def balance_section(run: Run) -> str:
    """What a card that somebody else wrote should say about the balance of the model, as Markdown."""
    balance = run.summary["balance"]
    lines = [
        "## Expert balance",
        "",
        f"This model was trained with {routers_text(balance)}: {balance_text(balance)}."
        if balance
        else "The loads of the routers were counted; nothing was balanced.",
        "MaxVio is (greatest load of an expert − mean load) / mean load: 0 is balance.",
        f"`phb.{run.auto_class}.from_pretrained(..., phi_balance=True)` of `hf_phibalance` brings back the prices and "
        "means from `phi_balance.state`.",
    ]
    table = layer_table(run)
    return "\n".join([*lines, *(["", table] if table else [])]) + "\n"


def tags(balance: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The Hub's tags of a model with this `PhiBalanceConfig`."""
    return TAGS if not balance or method_of(balance) == "phi" else TAGS[:-1]


def routers_text(balance: Mapping[str, Any]) -> str:
    """How the routers of a model were balanced, and where that is published, as Markdown."""
    if method_of(balance) == "phi":
        return "φ-balanced routers ([arXiv 2605.15403](https://arxiv.org/abs/2605.15403))"
    return f"routers balanced by the method `{method_of(balance)}` ({METHODS[method_of(balance)].source})"


def balance_text(balance: Mapping[str, Any]) -> str:
    """The fields of a `PhiBalanceConfig` in one line."""
    return ", ".join(f"`{key}={value}`" for key, value in balance.items() if key != "version" and value != {})


def _flag(balance: Mapping[str, Any] | None) -> str:
    """What `phi_balance=` is to be where no config beside the weights says it: an adapter has none."""
    default = PhiBalanceConfig().to_dict()
    changed = {key: value for key, value in (balance or {}).items() if value != default.get(key)}
    return str(changed or True)
