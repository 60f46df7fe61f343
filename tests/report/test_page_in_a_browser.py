"""The page in a real browser: it fits narrow and wide windows, is readable in light and dark, fetches nothing."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from support.run_folder import write_run

from tvaprune.stages.report import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
         "--enable-logging=stderr")  # fmt: skip
WIDTHS = (1280, 400)
LIGHT, DARK = 1, 0  # of the browser's setting
# Measures the page in frames of both widths, for a window is never narrower than 500 pixels.
HARNESS = """<body><script>
const found = {};
function brightness(colour) {
  return colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765;
}
function measure(width, page) {
  const view = page.defaultView, styled = (one) => view.getComputedStyle(one), root = page.documentElement;
  const texts = [...page.querySelectorAll("svg text")];
  const sizes = texts.map((one) => one.getBoundingClientRect().height).filter((size) => size > 0);
  found[width] = {
    fetched: view.performance.getEntriesByType("resource").map((one) => one.name),
    width: root.clientWidth, scroll: root.scrollWidth, sections: page.querySelectorAll("section").length,
    paper: brightness(styled(page.body).backgroundColor), ink: brightness(styled(page.body).color),
    label: brightness(styled(texts[0]).fill), smallest: Math.min(...sizes), charts: page.querySelectorAll("svg").length,
    tables: [...page.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth).length,
  };
  if (Object.keys(found).length == 2) document.body.textContent = "found" + JSON.stringify(found) + "end";
}
for (const width of [1280, 400]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => measure(width, frame.contentDocument);
  frame.src = "PAGE";
  document.body.append(frame);
}
</script>"""


def browse(path, folder, scheme=LIGHT):
    """The page's tree after it was shown, and what scripts on it complained of."""
    own = f"--user-data-dir={folder / 'browser'}", "--proxy-server=127.0.0.1:9"  # nobody: no byte leaves the machine
    result = subprocess.run(
        [CHROMIUM, *FLAGS, *own, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1300,900",
         "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    shutil.rmtree(folder / "browser", ignore_errors=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def measured(page, folder, scheme):
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("PAGE", page.as_uri()), encoding="utf-8")
    tree, complaints = browse(harness, folder, scheme)
    found = re.search(r"found(\{.*\})end", unescape(tree))
    assert found is not None, tree[-2000:]
    return json.loads(found.group(1)), complaints


@pytest.fixture
def page(tmp_path):
    return report([write_run(tmp_path / "run"), write_run(tmp_path / "other")], tmp_path / "page.html")


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_it_fits_both_widths_and_is_readable(scheme, page, tmp_path):
    found, complaints = measured(page, tmp_path, scheme)
    assert complaints == []
    for width in WIDTHS:
        seen = found[str(width)]
        assert seen["fetched"] == []
        assert seen["scroll"] <= seen["width"] <= width, f"the page is wider than a window of {width}"
        assert seen["sections"] == 9 and seen["charts"] >= 8
        for words in (seen["ink"], seen["label"]):
            assert (words - seen["paper"] if scheme == DARK else seen["paper"] - words) > 0.35
        assert seen["smallest"] >= 9, "the labels of charts are too small to read"
    assert found["400"]["tables"] > found["1280"]["tables"]  # these scroll, the page does not


def test_what_would_be_wrong_is_seen(page, tmp_path):
    """Controls: a page too wide, one that throws, one that fetches, one that is dark ink on dark paper."""
    text = page.read_text(encoding="utf-8")
    wrong = '<div style="width: 900px">x</div><img src="http://example.com/x.png"><script>throw Error("no")</script>'
    page.write_text(text.replace("</main>", f"{wrong}</main>").replace("--ink: #e4e7ea", "--ink: #22272c"))
    found, complaints = measured(page, tmp_path, DARK)
    assert found["400"]["scroll"] > 400 and found["1280"]["scroll"] <= 1280
    assert found["400"]["ink"] - found["400"]["paper"] < 0.35
    assert any("Error: no" in line for line in complaints)
    assert found["400"]["fetched"] == ["http://example.com/x.png"]
