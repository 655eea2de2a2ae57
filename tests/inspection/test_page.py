"""The HTML page and its pictures."""

from made_texts import SEQ_LEN, domains_of, make_tokenizer
from tiny import tiny_model

from hf_phibalance.inspection import Domain, html_report, inspect_model
from hf_phibalance.inspection.pictures import colour_step, nice_ticks


def test_page_escapes_what_it_is_given(texts):
    domains = [Domain("<b>&", d.files, d.fields) if d.name == "low" else d for d in domains_of(texts)]
    found = inspect_model(tiny_model("mixtral"), make_tokenizer(), domains, seq_len=SEQ_LEN)
    found.model["name"] = "</title><script>"
    page = html_report(found)
    assert "<b>&" not in page and "</title><script>" not in page and "&lt;b&gt;&amp;" in page


def test_colours_and_ticks():
    assert [colour_step(value) for value in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 64.0)] == [-8, -8, -8, -4, 0, 4, 8, 8]
    assert nice_ticks(0.93) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(7.0) == [0.0, 2.0, 4.0, 6.0, 8.0] and nice_ticks(0.0) == [0.0, 1.0]
    for highest in (1e-6, 0.013, 3.0, 4.7, 120.0):
        ticks = nice_ticks(highest)
        assert ticks[-1] >= highest > ticks[-2] and 2 <= len(ticks) <= 6
