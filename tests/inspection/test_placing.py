"""`place` and `phibalance place`: measured on text that the placement did not see, and written as SGLang reads it."""

import json
import re

import pytest
import torch
from made_texts import SEQ_LEN, domains_of, make_tokenizer
from tiny import tiny_model

from hf_phibalance import cli
from hf_phibalance.inspection import Inspection, Layer, inspect_model, place


def made(halves, names=("model.layers.1.mlp.gate",), layers=3):
    """An inspection of one domain with these counts `(2, E)` in each layer."""
    found = [Layer(name, 1, "softmax", torch.tensor(halves)[:, None], torch.zeros(1, 3)) for name in names]
    return Inspection(
        {"name": "made", "model_type": "qwen3_moe", "layers": layers}, {}, {"text": {"tokens": 1}}, found
    )


def test_a_placement_is_measured_on_the_other_half():
    """The first half keeps experts 0 and 1 apart, the other half has its load on 0 and 2, which share a rank."""
    placement = place(made([[6, 6, 0, 0], [6, 0, 6, 0]]), ranks=2)
    assert placement.orders[0].tolist() == [0, 2, 1, 3]
    assert placement.layer_figures(0, "overall") == {"linear": 1.0, "placed": 2.0, "least": 1.0}
    placement = place(made([[6, 0, 6, 0], [6, 6, 0, 0]]), ranks=2)
    assert placement.layer_figures(0, "overall")["linear"] == 2.0


def test_every_figure_is_that_of_a_naive_sum(texts):
    """Means over layers, each domain alone, in a model whose counts come from `inspect_model`."""
    found = inspect_model(tiny_model("qwen3_moe"), make_tokenizer(), domains_of(texts), seq_len=SEQ_LEN)
    placement = place(found, ranks=4)
    for scope, domain in (("overall", [0, 1]), ("low", [0]), ("high", [1])):
        ratios = []
        for layer, order in zip(found.layers, placement.orders):
            counts = layer.halves[1, domain].sum(0).tolist()
            sums = [sum(counts[expert] for expert in order.tolist()[rank * 2 : rank * 2 + 2]) for rank in range(4)]
            ratios.append(max(sums) * 4 / sum(sums))
        assert placement.summary(scope)["placed"] == pytest.approx(sum(ratios) / len(ratios))
    assert placement.summary("overall")["placed"] < placement.summary("overall")["linear"]


def test_the_map_has_a_row_for_every_decoder_layer():
    """SGLang passes the keys of the file as arguments, so there must be no other, and finds rows by the number of a layer."""
    placement = place(made([[6, 6, 1, 0], [1, 1, 1, 1]]), ranks=2)
    written = placement.expert_map()
    assert list(written) == ["physical_to_logical_map"]
    rows = written["physical_to_logical_map"]
    assert rows[0] == rows[2] == [0, 1, 2, 3] and rows[1] == placement.orders[0].tolist() != [0, 1, 2, 3]


@pytest.mark.parametrize(
    "inspection, ranks, message",
    [
        (made([[1, 1, 1], [1, 1, 1]]), 2, "`ranks` is 2.*3 experts.*divisor of 3"),
        (made([[1, 1], [0, 0]]), 2, "texts of text are a single sequence.*smaller `--seq_len`"),
    ],
)
def test_what_cannot_be_placed_is_refused(inspection, ranks, message):
    with pytest.raises(ValueError, match=message):
        place(inspection, ranks)


def test_a_map_needs_the_numbers_of_layers():
    placement = place(made([[1, 1], [1, 1]], names=("encoder.1.layers.0.gate",)), ranks=2)
    with pytest.raises(ValueError, match="names no single layer: leave out `--map`"):
        placement.expert_map()
    placement.inspection.layers[0].name = "layers.0.gate"
    placement.inspection.layers.append(made([[1, 1, 1, 1], [1, 1, 1, 1]], names=("layers.1.gate",)).layers[0])
    with pytest.raises(ValueError, match=r"layers have \[2, 4\] experts"):
        placement.expert_map()
    placement.inspection.model["model_type"] = "mixtral"
    with pytest.raises(ValueError, match="SGLang cannot use a map of experts for model_type='mixtral'"):
        placement.expert_map()


@pytest.mark.slow
def test_command(tmp_path, texts, capsys):
    model, folder = tiny_model("qwen3_moe"), tmp_path / "saved"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    words = ["place", str(folder), "--texts", *texts[0], "--field", "body", "--seq_len", "12", "--ranks", "4"]
    assert cli.main([*words, "--json", f"{tmp_path}/a.json", "--map", f"{tmp_path}/map.json"]) == 0
    expected = place(inspect_model(model, make_tokenizer(), domains_of(texts), seq_len=12), ranks=4)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["summary"] == expected.to_dict()["summary"] and written["ranks"] == 4
    assert [layer["experts_of_ranks"] for layer in written["layers"]] == [
        order.view(4, 2).tolist() for order in expected.orders
    ]
    assert json.loads((tmp_path / "map.json").read_text()) == expected.expert_map()
    shown = capsys.readouterr().out
    assert all(f"{value:.3f}" in shown for value in expected.summary("overall").values())
    for name in ("map.txt", "a.json"):
        assert cli.main([*words, "--json", f"{tmp_path}/a.json", "--map", f"{tmp_path}/{name}"]) == 1
        assert "`--map` must be a .json file" in capsys.readouterr().err
    assert cli.main([*words[:-1], "3"]) == 1
    assert re.search("`ranks` is 3.*8 experts.*divisor of 8", capsys.readouterr().err)
