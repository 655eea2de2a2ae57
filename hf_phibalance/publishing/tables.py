"""Figures of a run beside those of a baseline, as rows and as Markdown."""

from __future__ import annotations

from typing import Any

from .run import Run


def summary_rows(run: Run, baseline: Run | None = None) -> list[list[str]]:
    """The figures of a run, beside those of `baseline` if there is one: rows of a name and one text per run."""
    summaries = [run.summary] if baseline is None else [baseline.summary, run.summary]
    rows: list[list[str]] = []
    for label, keys, form in (
        ("exact match, untrained", ("exact_match", "untrained"), "{:.1%}"),
        ("exact match, trained", ("exact_match", "trained"), "{:.1%}"),
        ("MaxVio per step, first tenth of training", ("max_vio", "start"), "{:.3f}"),
        ("MaxVio per step, last tenth of training", ("max_vio", "end"), "{:.3f}"),
        ("MaxVio over all held-out problems, untrained", ("before", "max_vio"), "{:.3f}"),
        ("MaxVio over all held-out problems", ("held_out", "max_vio"), "{:.3f}"),
        ("Gini over all held-out problems", ("held_out", "gini"), "{:.3f}"),
        ("dead experts on held-out problems", ("held_out", "dead_experts"), "{:.0f}"),
        ("loss on held-out problems", ("held_out", "loss"), "{:.4f}"),
        ("seconds", ("seconds",), "{:.0f}"),
    ):
        values = []
        for summary in summaries:
            value: Any = summary
            for key in keys:
                value = None if value is None else value.get(key)
            values.append("–" if value is None else form.format(value))
        if any(value != "–" for value in values):
            rows.append([label, *values])
    return rows


def layer_table(run: Run, baseline: Run | None = None) -> str:
    """MaxVio layer by layer, before and after, as a Markdown table; empty if no layer was measured."""
    columns = run.layers()
    after = baseline.layers().get("held-out data, after") if baseline is not None else None
    if columns and after:
        columns[f"{baseline.name} run, held-out data, after"] = after  # type: ignore[union-attr]
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not names:
        return ""
    lines = [
        f"| MaxVio of | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(
            f"| `{name}` | "
            + " | ".join(f"{column[name]:.3f}" if name in column else "–" for column in columns.values())
            + " |"
            for name in names
        ),
    ]
    return "\n".join(lines)
