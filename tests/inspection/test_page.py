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
from hf_phibalance.inspection import Inspection, Layer, html_report


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
  const place = part => part.getBoundingClientRect(), style = part => view.getComputedStyle(part);
  const parts = all("*").filter(part => part.getClientRects().length);
  const outside = parts.filter(part => place(part).right > view.innerWidth + 0.5 || place(part).left < -0.5);
  const hidden = parts.filter(part => part.scrollWidth > part.clientWidth + 1 && style(part).overflowX != "visible");
  const cut = hidden.filter(part => !part.closest(".heat") && style(part).textOverflow != "ellipsis");
  return {
    tips, page: view.document.documentElement.scrollWidth, loaded: view.performance.getEntriesByType("resource").length,
    bad: [...outside, ...cut].map(part => part.outerHTML.slice(0, 200)), ink: style(body).color, paper: style(body).backgroundColor,
  };
}
addEventListener("load", () => {
  const measured = [...document.querySelectorAll("iframe")].map(measure);
  document.body.textContent = "MEASURED" + encodeURIComponent(JSON.stringify(measured)) + "DONE";
});
"""


def inspected(layers=12, experts=64, domains=("math", "code", "prose"), name="org/model"):
    """An inspection with random counts, and a dead expert in every fifth layer."""
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(layers):
        halves = torch.randint(1, 4000, (2, len(domains), experts), generator=generator)
        halves[:, :, 0] *= number % 5 > 0
        confidence = torch.rand(len(domains), 3, generator=generator).double() * halves.sum((0, 2))[:, None]
        found.append(Layer(f"model.layers.{number}.mlp.gate", 2, "softmax", halves, confidence))
    model = {"name": name, "model_type": "mixtral", "parameters": 10**9, "dtype": "bfloat16", "routers": layers}
    model |= {"experts": [experts], "top_k": [2], "selection_bias": "none"}
    read = {"tokens": 10**5, "sequences": 200, "documents": 50, "files": 3, "files_read": 2}
    settings = {"seq_len": 512, "batch_size": 8, "max_tokens": None, "packing": False}
    return Inspection(model, settings, {domain: dict(read) for domain in domains}, found, ["a note"])


def test_the_page_escapes_its_input_and_needs_no_other_file():
    page = html_report(inspected(layers=2, domains=("<b>&", "code"), name="</title><script>"))
    assert "<b>&" not in page and "</title><script>" not in page and "&lt;b&gt;&amp;" in page
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_page_in_a_browser(tmp_path, theme):
    """Wide and narrow: no message in the console, nothing cut off, nothing to scroll sideways; the pointer shows values."""
    write_collapse(tmp_path, layers=12, experts=64)
    run = Run(str(tmp_path))
    made = [inspected(), inspected(layers=1, experts=8, domains=("x" * 300,)), run.inspection()]
    pages, widths = [*map(html_report, made[:2]), html_report(made[2], run=run.for_page())], [1280, 390]
    assert len(pages[0]) < 200_000  # so that 61 layers of 384 experts stay below 5 MB
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
    assert [frame["page"] for frame in measured] == widths * 3
    for frame, inspection in zip(measured, [found for found in made for _ in widths]):
        assert not frame["bad"] and not frame["loaded"]
        layer = inspection.layers[0]
        load = layer.counts.sum(0).double()
        assert frame["tips"][0] == f"layer 0, expert 0: {load[0] / load.mean():.2f}× the fair share"
        first = (
            run.curves(30)["max_vio"][0]
            if inspection is made[2]
            else inspection.layer_figures(layer)["overall"]["max_vio"]
        )
        assert f": {first:.4f}" in frame["tips"][1]
        ink, paper = (sum(map(int, re.findall(r"\d+", frame[name])[:3])) for name in ("ink", "paper"))
        assert ink - paper > 400 if theme == "dark" else paper - ink > 400
