"""What a results folder holds, checked before anything is made of it: each field that is used is of the kind that it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import PhiBalanceConfig
from ..files import LARGE, read_json


Check = Callable[[Any], str | None]  # what should be there instead, if anything
AGAIN = "Run the training again, or remove the folder."


def read_summary(path: Path) -> dict[str, Any]:
    """
    Reads `metrics.json`.

    Raises:
        ValueError: naming the field that is missing or of another kind than it should be.
    """
    summary = read_json(path, AGAIN)
    _check(path, SUMMARY(summary), AGAIN)
    if summary["balance"] is not None:
        try:
            PhiBalanceConfig.from_dict(summary["balance"])
        except ValueError as error:
            raise ValueError(f"{path}: `balance` cannot be used: {error}") from error
    return summary


def read_history(path: Path) -> dict[str, list[dict[str, Any]]]:
    """
    Reads `history.json`: `log_history` and `loads`.

    Raises:
        ValueError: naming what is missing or of another kind than it should be.
    """
    history = read_json(path, AGAIN, LARGE)
    if unknown := sorted(history.keys() - {"log_history", "loads"}):
        raise ValueError(
            f"{path} holds {unknown}, which this version does not know. Upgrade hf_phibalance if a newer wrote it."
        )
    _check(path, HISTORY(history), AGAIN)
    shapes = [{name: len(load) for name, load in entry["load"].items()} for entry in history["loads"]]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{path}: `loads` has other layers or experts at one step than at another. {AGAIN}")
    return history


def read_evaluation(path: Path) -> dict[str, Any]:
    """
    Reads what `recipes/evaluate.py` wrote.

    Raises:
        ValueError: naming what is of another kind than it should be.
    """
    remedy = "Run its evaluation again, or remove it."
    evaluation = read_json(path, remedy, LARGE)
    if "metrics" in evaluation:
        _check(path, EVALUATION(evaluation), remedy)
    return evaluation


def _check(path: Path, problem: str | None, remedy: str) -> None:
    if problem:
        raise ValueError(f"{path}: {problem}. {remedy}")


# ---------------------------------------------------------------------- kinds of values


def _is(kind: type | tuple[type, ...], name: str) -> Check:
    def check(value: Any) -> str | None:
        return (
            None if isinstance(value, kind) and not isinstance(value, bool) else f"must be {name}, got {value!r:.80}"
        )

    return check


def _number(value: Any) -> str | None:
    fits = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return None if fits and not isinstance(value, bool) else f"must be a number, got {value!r:.80}"


def _no_number_beyond_measure(value: Any) -> str | None:
    return _number(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _maybe(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _each(check: Check) -> Check:
    """A list of such values."""

    def check_all(values: Any) -> str | None:
        if not isinstance(values, list):
            return f"must be a list, got {values!r:.80}"
        return next(
            (f"entry {index} {problem}" for index, value in enumerate(values) if (problem := check(value))), None
        )

    return check_all


def _named(check: Callable[[str], Check | None]) -> Check:
    """An object; `check(key)` says of what kind the value of each key is, if that matters."""

    def check_all(values: Any) -> str | None:
        if not isinstance(values, Mapping):
            return f"must be an object, got {values!r:.80}"
        found = ((key, kind(value)) for key, value in values.items() if (kind := check(key)) is not None)
        return next((f"`{key}` {problem}" for key, problem in found if problem), None)

    return check_all


def _all_named(check: Check) -> Check:
    return _named(lambda key: check)


def _fields(required: Mapping[str, Check], optional: Mapping[str, Check]) -> Check:
    """An object with these fields, and others that do not matter."""
    check = _named({**required, **optional}.get)

    def check_all(values: Any) -> str | None:
        if problem := check(values):
            return problem
        return next((f"`{key}` is missing" for key in required if key not in values), None)

    return check_all


_text, _whole = _is(str, "a text"), _is(int, "a whole number")
_scalar = _is((str, int, float, type(None)), "a text or a number")
_figures = _maybe(_all_named(_maybe(_number)))


def _logged(key: str) -> Check | None:
    """Of what kind an entry of the log is: figures are drawn, the rest is kept as it is."""
    return _whole if key == "step" else _number if "moe/" in key or key.endswith(("loss", "exact_match")) else None


SUMMARY = _fields(
    required={
        "model_type": _text,
        "parameters": _number,
        "steps": _whole,
        "balance": _maybe(_is(dict, "an object")),
        "versions": _all_named(_text),
    },
    optional={
        "auto_class": _maybe(_text),
        "exact_match": _figures,
        "max_vio": _figures,
        "held_out": _figures,
        "before": _maybe(_fields({}, {"max_vio": _maybe(_number), "max_vio_per_layer": _maybe(_all_named(_number))})),
        "seconds": _maybe(_number),
        "noise_floor": _maybe(_number),
        "problems": _maybe(_all_named(_number)),
        "seed": _maybe(_number),
        "dataset": _maybe(_text),
        "task": _maybe(_text),
        "base_model": _maybe(_text),
        "command": _maybe(_text),
        "example_prompt": _maybe(_text),
    },
)
HISTORY = _fields(
    required={
        "log_history": _each(_named(_logged)),
        "loads": _each(_fields({"step": _whole, "load": _all_named(_each(_number))}, {})),
    },
    optional={},
)
EVALUATION = _fields(
    required={"metrics": _all_named(_no_number_beyond_measure)},
    optional={
        "task": _maybe(_text),
        "settings": _maybe(_is(dict, "an object")),
        "balance": _maybe(_fields({}, {"max_vio": _number})),
        "command": _maybe(_text),
        "date": _maybe(_text),
    },
)
