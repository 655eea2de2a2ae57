"""
Which rank of expert parallelism should hold which experts, by the loads that an inspection counted.

Shapes: H = 2 halves of the sequences, E experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..files import layer_labels
from ..maths import busiest_rank, experts_per_rank, least_busiest_rank, spread_experts
from .results import Inspection


# SGLang 0.5.23 stops at the first forward of the first three, and routes tokens of the last to wrong experts.
MAP_NOT_READ = ("mixtral", "olmoe", "phimoe", "gpt_oss")


@dataclass
class Placement:
    """
    The experts of each rank, spread by the loads of one half of the sequences and measured on the other half.

    Args:
        inspection (`Inspection`): The counts.
        ranks (`int`): Number of ranks.
        orders (`list[torch.Tensor]`):
            For each layer, its experts in the order of ranks, `(E,)`: the first E / R are on rank 0, the next on rank 1, and so on.
    """

    inspection: Inspection
    ranks: int
    orders: list[Tensor]

    def layer_figures(self, index: int, scope: str) -> dict[str, float]:
        """
        Returns the load of the busiest rank over the mean in layer number `index`, on the held-out half of the sequences in one of
        [`Inspection.scopes`]:
            - `linear`: in the order of the checkpoint, as engines place experts by default;
            - `placed`: in this placement;
            - `least`: a bound below any placement that has each expert once.
        """
        load_E = self.inspection.halves(self.inspection.layers[index], scope)[1].double()
        return {
            "linear": float(busiest_rank(load_E, self.ranks)),
            "placed": float(busiest_rank(load_E[self.orders[index]], self.ranks)),
            "least": float(least_busiest_rank(load_E, self.ranks)),
        }

    def summary(self, scope: str) -> dict[str, float]:
        """
        Returns the means over layers of [`layer_figures`]. In each layer, all ranks wait for the busiest one. A batch is less even than all of
        the text, and waits longer.
        """
        columns = [self.layer_figures(index, scope) for index in range(len(self.orders))]
        return {name: sum(column[name] for column in columns) / len(columns) for name in columns[0]}

    def expert_map(self) -> dict[str, list[list[int]]]:
        """
        Returns the map that SGLang reads with `--init-expert-location FILE.json`. Each decoder layer has a row with its experts in the order
        of ranks. Rows of layers without routers are in the order of the checkpoint, and SGLang does not use them.

        Raises:
            ValueError: If the layers differ in their number of experts, if their names do not tell which decoder layers they are, or if
                SGLang cannot use a map for the family.
        """
        if self.inspection.model["model_type"] in MAP_NOT_READ:
            raise ValueError(
                f"SGLang cannot use a map of experts for model_type={self.inspection.model['model_type']!r}: leave out `--map`."
            )
        layers, sizes = self.inspection.layers, sorted({layer.experts for layer in self.inspection.layers})
        labels = [label.split() for label in layer_labels([layer.name for layer in layers])]
        if len(sizes) > 1 or any(len(label) != 2 for label in labels):
            reason = f"layers have {sizes} experts" if len(sizes) > 1 else f"{layers[0].name!r} names no single layer"
            raise ValueError(f"there is no map of experts for SGLang, because {reason}: leave out `--map`.")
        rows = [list(range(sizes[0])) for _ in range(self.inspection.model["layers"])]
        for (_, index), order_E in zip(labels, self.orders):
            rows[int(index)] = order_E.tolist()
        return {"physical_to_logical_map": rows}

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures, and the experts of each rank, as plain numbers and words, for JSON."""
        scopes, found = self.inspection.scopes(), self.inspection
        return {
            "model": found.model,
            "settings": found.settings,
            "domains": found.domains,
            "ranks": self.ranks,
            "summary": {scope: self.summary(scope) for scope in scopes},
            "layers": [
                {
                    "name": layer.name,
                    "experts_of_ranks": order_E.view(self.ranks, -1).tolist(),
                    "figures": {scope: self.layer_figures(index, scope) for scope in scopes},
                }
                for index, (layer, order_E) in enumerate(zip(found.layers, self.orders))
            ],
            "notes": found.notes,
        }


def place(inspection: Inspection, ranks: int) -> Placement:
    """
    Spreads the experts of each layer over the ranks of expert parallelism, equally many on each, so that the busiest rank has as little
    load as possible. Loads are those of every other sequence of all texts.

    Args:
        inspection (`Inspection`): Made by [`inspect_model`] on texts like those the model will see.
        ranks (`int`): Number of ranks, a divisor of the number of experts.

    Returns:
        `Placement`: the experts of each rank, and figures on the other sequences.

    Raises:
        ValueError: If `ranks` does not divide the number of experts, or if a domain has only one sequence.

    Example:

    ```python
    placement = place(inspect_model(model, tokenizer, domains), ranks=8)
    placement.summary("overall")  # {"linear": 1.9, "placed": 1.1, "least": 1.0}
    ```
    """
    for layer in inspection.layers:
        experts_per_rank(layer.experts, ranks)
        for domain, assignments_H in zip(inspection.domains, layer.halves.sum(-1).unbind(1)):
            if not assignments_H.all():
                raise ValueError(
                    f"the texts of {domain} are a single sequence, so none is left to measure on: give more of them, or a smaller "
                    "`--seq_len`."
                )
    orders = [spread_experts(inspection.halves(layer, "overall")[0], ranks) for layer in inspection.layers]
    return Placement(inspection, ranks, orders)
