"""The HTML page of texts and of a watched run, also in a real browser: headless Chromium."""

import html
import json
import re
import shutil
import subprocess
import urllib.parse

import pytest
import torch
from made_records import write_collapse

from hf_phibalance.cli.runs import Run
from hf_phibalance.inspection import Comparison, Inspection, Layer, html_report
from hf_phibalance.inspection.results import Example


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --window-size=1400,1000 "
    "--virtual-time-budget=5000 --dump-dom"
)
# Measures each frame with all its parts unfolded and the pointer over a cell of the first picture, then over a layer of a plot.
MEASURE = """
function measure(frame) {
  const view = frame.contentWindow, body = view.document.body, all = selector => [...body.querySelectorAll(selector)];
  all("details").forEach(part => part.open = true);
  const tips = [".heat td", ".plot > i"].map(spot => {
    all(spot)[0].dispatchEvent(new view.PointerEvent("pointermove", {bubbles: true, clientX: 9, clientY: 9}));
    return all("#tip")[0].textContent;
  });
  const spots = all(".tokens i"), tokens = [];
  const tell = spot => tokens.push([all("#tip")[0].hidden, all("#tip")[0].textContent, view.getComputedStyle(spot).backgroundColor]);
  if (spots.length) {
    for (const kind of ["pointermove", "pointerdown"]) {
      spots[4].dispatchEvent(new view.PointerEvent(kind, {bubbles: true, clientX: 9, clientY: 9}));
      tell(spots[4]);
      body.dispatchEvent(new view.PointerEvent(kind, {bubbles: true}));
      tokens.push(all("#tip")[0].hidden);
    }
    spots[0].focus();
    spots[0].dispatchEvent(new view.KeyboardEvent("keydown", {bubbles: true, key: "ArrowRight"}));
    tell(spots[1]);
    all("#layer")[0].value = 1;
    all("#layer")[0].dispatchEvent(new view.Event("input"));
    spots[4].dispatchEvent(new view.PointerEvent("pointerdown", {bubbles: true, clientX: view.innerWidth - 2, clientY: 9}));
    tell(spots[4]);
    const colour = all("#colour")[0];
    if (colour) {
      colour.value = "after";
      colour.dispatchEvent(new view.Event("input"));
      tell(spots[4]);
    }
  }
  const place = part => part.getBoundingClientRect(), style = part => view.getComputedStyle(part);
  const parts = all("*").filter(part => part.getClientRects().length);
  const outside = parts.filter(part => place(part).right > view.innerWidth + 0.5 || place(part).left < -0.5);
  const hidden = parts.filter(part => part.scrollWidth > part.clientWidth + 1 && style(part).overflowX != "visible");
  const cut = hidden.filter(part => !part.closest(".heat") && style(part).textOverflow != "ellipsis");
  return {
    tips, tokens, page: view.document.documentElement.scrollWidth, loaded: view.performance.getEntriesByType("resource").length,
    bad: [...outside, ...cut].map(part => part.outerHTML.slice(0, 200)), ink: style(body).color, paper: style(body).backgroundColor,
  };
}
addEventListener("load", () => {
  const measured = [...document.querySelectorAll("iframe")].map(measure);
  document.body.textContent = "MEASURED" + encodeURIComponent(JSON.stringify(measured)) + "DONE";
});
"""


def inspected(layers=12, experts=64, domains=("math", "code", "prose"), name="org/model", top_k=2, examples=0, seed=0):
    """An inspection with random choices, a dead expert in every fifth layer, and `examples` texts per domain."""
    generator, found, tokens = torch.Generator().manual_seed(seed), [], 1000
    small = torch.uint8 if experts <= 256 else torch.int16
    for number in range(layers):
        scores = torch.rand(len(domains) * tokens, experts, generator=generator)
        scores[:, 0] *= number % 5 > 0
        choices = scores.topk(top_k).indices
        parts = [choices[half::2].chunk(len(domains)) for half in range(2)]
        halves = torch.stack([torch.stack([p.flatten().bincount(minlength=experts) for p in own]) for own in parts])
        confidence = torch.rand(len(domains), 3, generator=generator).double() * tokens
        name_of = f"model.layers.{number}.mlp.gate"
        found.append(Layer(name_of, top_k, "softmax", halves, confidence, choices.to(small)))
    model = {"name": name, "model_type": "mixtral", "parameters": 10**9, "dtype": "bfloat16", "routers": layers}
    model |= {"experts": [experts], "top_k": [top_k], "selection_bias": "none"}
    read = {"tokens": tokens, "sequences": 200, "documents": 50, "files": 3, "files_read": 2}
    settings = {"seq_len": 512, "batch_size": 8, "max_tokens": None, "packing": False}
    shown = [example(domain, layers, experts, top_k, generator) for domain in domains for _ in range(examples)]
    return Inspection(model, settings, {domain: dict(read) for domain in domains}, found, ["a note"], shown)


def example(domain, layers, experts, top_k, generator):
    tokens = ["<b>", " two", "\n", "", " three" * 30, *[" word"] * 195]
    chosen = [torch.rand(len(tokens), experts, generator=generator).topk(top_k).indices for _ in range(layers)]
    weights = [torch.rand(len(tokens), top_k, generator=generator).sort(-1, descending=True).values for _ in chosen]
    return Example(domain, tokens, chosen, [own / own.sum(-1, keepdim=True) for own in weights])


def test_the_page_escapes_its_input_and_needs_no_other_file():
    page = html_report(inspected(layers=2, domains=("<b>&", "code"), name="</title><script>", examples=1))
    assert "<b>&" not in page and "</title><script>" not in page and "&lt;b&gt;&amp;" in page
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)


@pytest.mark.slow
def test_the_page_of_a_large_model_stays_below_five_megabytes():
    """Two models of 48 layers and 128 experts on three domains, with what the token view takes at most."""
    sizes = {"layers": 48, "experts": 128, "top_k": 8, "examples": 3}
    page = html_report(Comparison(inspected(**sizes), inspected(**sizes, seed=1)))
    assert 2_000_000 < len(page.encode()) < 5_000_000
    assert page.count('<i tabindex="') == 9 * 108 and page.count('class="tokens"') == 9


def said(inspections, token, layer):
    """The tip of a token of the first text."""
    example = inspections[-1].examples[0]
    rows = []
    for found in inspections:
        pair = zip(found.examples[0].choices[layer][token].tolist(), found.examples[0].weights[layer][token].tolist())
        rows.append(", ".join(f"{expert} ({int(100 * round(255 * weight) / 255 + 0.5)} %)" for expert, weight in pair))
    lines = [f"experts before: {rows[0]}", f"after: {rows[1]}"] if len(rows) > 1 else [f"experts {rows[0]}"]
    return "\n".join([f"“{example.tokens[token].strip()}”, layer {layer}", *lines])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_page_in_a_browser(tmp_path, theme):
    """Wide and narrow: no message in the console, nothing cut off, nothing to scroll sideways; the pointer shows values."""
    pair = [inspected(layers=2, experts=300, domains=("x" * 300, "y"), seed=seed, examples=2) for seed in range(2)]
    write_collapse(tmp_path, layers=12, experts=64)
    run = Run(str(tmp_path))
    shown = inspected(examples=3)
    assert len(html_report(inspected())) < 200_000  # so that 61 layers of 384 experts stay below 5 MB
    made = [[shown], [inspected(layers=1, experts=8, domains=("x" * 300,))], pair, [run.inspection()]]
    pages = [html_report(found[0] if len(found) < 2 else Comparison(*found)) for found in made[:3]]
    pages, widths = [*pages, html_report(made[3][0], run=run.for_page())], [1280, 390]
    frames = [
        f'<iframe style="width:{width}px; height:900px; border:0" srcdoc="{html.escape(page)}"></iframe>'
        for page in pages
        for width in widths
    ]
    outer = f'<meta charset="utf-8"><style>:root {{ color-scheme: light dark }}</style>{"".join(frames)}'
    (tmp_path / "all.html").write_text(f"{outer}<script>{MEASURE}</script>", encoding="utf-8")
    command = [BROWSER, *OPTIONS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(theme)}", str(tmp_path / "all.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search("MEASURED(.*)DONE</body>", done.stdout)
    assert found and "CONSOLE" not in done.stderr, done.stderr
    measured = json.loads(urllib.parse.unquote(found[1]))
    assert [frame["page"] for frame in measured] == widths * 4
    for frame, inspections in zip(measured, [found for found in made for _ in widths]):
        assert not frame["bad"] and not frame["loaded"]
        check_tokens(frame["tokens"], inspections)
        first = inspections[0]  # the first picture is that of the model before
        layer = first.layers[0]
        load = layer.counts.sum(0).double()
        assert frame["tips"][0] == f"layer 0, expert 0: {load[0] / load.mean():.2f}× the fair share"
        plotted = [f": {first.layer_figures(layer)['overall']['max_vio']:.4f}"]
        if inspections is made[3]:
            plotted = [f": {run.curves(30)['max_vio'][0]:.4f}"]
        elif len(inspections) > 1:
            differ = Comparison(*inspections).layer_figures[0]
            plotted = [f"{scope}: {figures['differ']:.4f}" for scope, figures in differ.items()]
        assert all(text in frame["tips"][1] for text in plotted)
        ink, paper = (sum(map(int, re.findall(r"\d+", frame[name])[:3])) for name in ("ink", "paper"))
        assert ink - paper > 400 if theme == "dark" else paper - ink > 400


def check_tokens(told, inspections):
    """What the pointer, a tap and the keyboard showed of tokens, and their colours."""
    if not inspections[-1].examples:
        assert told == []
        return
    hover, left, tap, left_again, arrow, other_layer, *recoloured = told
    assert left and left_again  # nothing is shown beside the tokens
    assert hover == tap and hover[:2] == [False, said(inspections, 4, 0)]
    assert arrow[:2] == [False, said(inspections, 1, 0)]
    assert other_layer[:2] == [False, said(inspections, 4, 1)]
    if len(inspections) == 1:
        assert hover[2].startswith("oklch") and other_layer[2] != hover[2] and not recoloured
    else:  # both experts differ in either layer
        assert other_layer[2] == hover[2] and recoloured[0][2].startswith("oklch")
