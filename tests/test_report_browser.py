"""The report in a real browser: nothing from the data runs, it fits small screens, and the keyboard reaches the values.

Pages are served on this machine and opened in frames of one page, which can look into them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from report_pages import META, random_rows, report_on, write_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]
WIDE, SMALL, HEIGHT = 1280, 360, 2400

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

RUN = "parent.ran.push(location.pathname)"
PAYLOAD = (
    f"</script></style></title></textarea>--><script>{RUN}</script><img src=leak onerror={RUN}>"
    f"<svg onload={RUN}></svg>\"'><iframe srcdoc='<script>top.ran.push(parent.location.pathname)</script>'></iframe>"
)
HOSTILE = (
    f"{PAYLOAD}{{{{ 7 * 7 }}}}{{% for %}} javascript:{RUN} \u202egnp.exe\u202c עברית \u0000\u0007\u2028 👩‍🚀🇩🇪"
    + "Ỹ́̂" * 30
    + "W" * 600
)

LOOK = """
window.ran = [];
const look = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const [wide, narrow] = [".wide", ".narrow"].map((kind) => page.querySelector(kind)?.getClientRects().length);
  const texts = [...page.querySelectorAll(".chart svg text")]
    .filter((text) => text.textContent && text.getClientRects().length);
  return {
    width: view.innerWidth, scroll: page.documentElement.scrollWidth, wide, narrow,
    charts: page.querySelectorAll('.chart[tabindex="0"]').length,
    smallest: Math.min(...texts.map((text) => text.getBoundingClientRect().height)),
    text: page.body.innerText,
  };
};
const keys = (frame) => {
  const page = frame.contentDocument, view = frame.contentWindow, said = [];
  const chart = page.querySelectorAll(".chart")[1];
  chart.focus();
  for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home", "Escape"]) {
    chart.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    said.push(chart.parentElement.querySelector(".tip").textContent);
  }
  const mark = chart.querySelector('.wide [aria-roledescription="value"]:last-child');
  mark.dispatchEvent(new view.PointerEvent("pointermove", { bubbles: true }));
  said.push(chart.parentElement.querySelector(".tip").textContent);
  return said;
};
onload = () => {
  const frames = [...document.querySelectorAll("iframe")];
  const found = Object.fromEntries(frames.map((frame) => [frame.name, look(frame)]));
  const page = document.querySelector("[name=page]");
  if (page) found.keys = keys(page);
  found.ran = ran;
  document.querySelector("pre").textContent = JSON.stringify(found);
};
"""


class Handler(SimpleHTTPRequestHandler):
    asked: ClassVar[set[str]] = set()

    def log_message(self, format: str, *arguments: Any) -> None:
        self.asked.add(self.path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and where it is served."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "favicon.ico").touch()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def page(site: tuple[Path, str]) -> Path:
    folder, _ = site
    rows = random_rows()
    rows[0]["neg"][0], rows[0]["teacher_scores"][len(rows[0]["pos"])] = "a long text " * 100, 0.0
    (folder / "page.html").write_text(report_on(write_rows(folder / "scored.jsonl", rows, META)).html, encoding="utf-8")
    return folder / "page.html"


def chromium(tmp_path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=180,
        check=True,
    )
    return done.stdout


def frames(folder: Path, url: str, tmp_path: Path, **sources: tuple[str, int]) -> dict[str, Any]:
    """What the script above finds in pages opened in frames: name=(page, width)."""
    opened = "".join(
        f'<iframe name="{name}" src="{source}" width="{width}" height="900"></iframe>'
        for name, (source, width) in sources.items()
    )
    (folder / "frames.html").write_text(f"<!doctype html><script>{LOOK}</script>{opened}<pre></pre>")
    dom = chromium(tmp_path, "--window-size=1700,1000", "--dump-dom", f"{url}/frames.html")
    found = re.search(r"<pre>(.*?)</pre>", dom, re.DOTALL)
    assert found is not None, dom
    looked: dict[str, Any] = json.loads(unescape(found[1]))
    return looked


def test_nothing_from_the_data_runs(site: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = site
    row = {
        "query_id": HOSTILE,
        "query": HOSTILE,
        "answers": [HOSTILE, "x"],
        "pos": [HOSTILE, "p"],
        "neg": [HOSTILE * 20, HOSTILE, HOSTILE],
        "teacher_scores": [-3, -2, -1, -1.5, -1.5],
    }
    meta = {
        **META,
        **dict.fromkeys(("fastscore", "started", "finished", "output", HOSTILE), HOSTILE),
        "inputs": [HOSTILE],
        "scorer": {**META["scorer"], **dict.fromkeys(META["scorer"], HOSTILE), "versions": {HOSTILE: HOSTILE}},
    }
    name = f"<script>{RUN.replace('/', '')}<script>.jsonl"
    html = report_on(write_rows(folder / name, [row, row], meta)).html
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    assert policy.search(html)
    pages = {
        "hostile": html,
        "unguarded": policy.sub("", html),  # escaping alone holds
        "guarded": html.replace("</main>", f"{PAYLOAD}</main>"),  # the policy alone holds
        "control": f"<!doctype html><body><main>{PAYLOAD}</main>",  # and this is what they hold back
    }
    for stem, text in pages.items():
        (folder / stem).mkdir()
        (folder / stem / "page.html").write_text(text, encoding="utf-8")
    Handler.asked.clear()
    found = frames(folder, url, tmp_path, **{stem: (f"{stem}/page.html", SMALL) for stem in pages})
    assert found["ran"] == ["/control/page.html"] * 4, "the script, the image, the drawing and the frame"
    asked = {"/frames.html", "/control/leak", *(f"/{stem}/page.html" for stem in pages)}
    assert Handler.asked - {"/favicon.ico"} == asked
    for stem in ("hostile", "unguarded", "guarded"):
        assert found[stem]["charts"] == 4, "our own script runs"
    assert f"<script>{RUN}</script><img src=leak onerror={RUN}>" in found["hostile"]["text"]
    assert "{{ 7 * 7 }}" in found["hostile"]["text"]
    assert found["hostile"]["scroll"] <= SMALL


def test_it_fits_every_screen_and_the_keyboard_reaches_every_value(
    site: tuple[Path, str], page: Path, tmp_path: Path
) -> None:
    folder, url = site
    found = frames(
        folder, url, tmp_path, page=("page.html", WIDE), small=("page.html", SMALL), middle=("page.html", 600)
    )
    for name, width, wide in (("page", WIDE, 1), ("small", SMALL, 0), ("middle", 600, 0)):
        looked = found[name]
        assert looked["width"] == width
        assert looked["scroll"] <= width, f"scrolls sideways at {width} pixels"
        assert (looked["wide"], looked["narrow"]) == (wide, 1 - wide)
        assert looked["smallest"] >= 11, "text in charts keeps its size"
    ordered = re.findall(r"row \d+ of 40, line \d+: [−\d.]+", page.read_text(encoding="utf-8"))[:40]
    first, second, last = ordered[0], ordered[1], ordered[-1]
    assert found["keys"] == [first, second, first, last, last, first, "", last]
    assert found["ran"] == []


@pytest.mark.parametrize(("scheme", "flags"), [("light", []), ("dark", ["--force-dark-mode"])])
def test_it_is_drawn(site: tuple[Path, str], page: Path, tmp_path: Path, scheme: str, flags: list[str]) -> None:
    from PIL import Image

    folder, url = site
    style = page.read_text(encoding="utf-8").split("</style>")[0]
    block = style.split("prefers-color-scheme: dark")[scheme == "dark"]
    colors = {name: tuple(bytes.fromhex(value)) for name, value in re.findall(r"--(\w+): #([0-9a-f]{6});", block)}
    both = "".join(
        f'<iframe src="page.html" width="{w}" height="{HEIGHT}" style="border:0"></iframe>' for w in (WIDE, SMALL)
    )
    (folder / "both.html").write_text(
        f'<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:0;display:flex">{both}'
    )
    picture = tmp_path / "page.png"
    size = f"--window-size={WIDE + SMALL},{HEIGHT}"
    chromium(tmp_path, *flags, size, f"--screenshot={picture}", f"{url}/both.html")
    image = Image.open(picture).convert("RGB")
    assert image.size == (WIDE + SMALL, HEIGHT)
    for left, right in ((0, WIDE), (WIDE, WIDE + SMALL)):
        part = image.crop((left, 0, right, HEIGHT))
        assert part.getpixel((2, 2)) == colors["bg"]
        counted = {color: count for count, color in part.getcolors(maxcolors=1 << 24) or []}
        assert counted[colors["paper"]] > 0.2 * part.width * part.height
        # Bars of the margins, and the dashed outline of the negatives.
        assert counted[colors["pos"]] > 4000
        assert counted[colors["neg"]] > 400
        assert counted[colors["ink"]] > 400
