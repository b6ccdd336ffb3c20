"""Pages as a browser lays them out: headless Chromium, with the notebook's own rules for tables around them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

THEMES = {  # of JupyterLab: background, text, rows of tables, and a row under the mouse
    "light": ("#ffffff", "rgba(0,0,0,.87)", "#f5f5f5", "#e1f5fe"),
    "dark": ("#111111", "rgba(255,255,255,.87)", "#212121", "#0d3c61"),
}
WIDTH = 900

# What `.jp-RenderedHTMLCommon` says of the elements that are used, and of the page around.
_STYLE = """
body{margin:0;background:%s;color:%s}
.jp{font:14px/1.6 system-ui,sans-serif;padding:8px;color:inherit}
.jp table{border-collapse:collapse;border-spacing:0;border:none;font-size:12px;table-layout:fixed;
margin-left:auto;margin-right:auto;margin-bottom:1em}
.jp thead{border-bottom:1px solid #9e9e9e;vertical-align:bottom}
.jp td,.jp th,.jp tr{vertical-align:middle;padding:.5em;line-height:normal;white-space:normal;max-width:none;
border:none}
.jp:not(.md) td,.jp:not(.md) th{text-align:right}
.jp tbody tr:nth-child(even){background:%s}
.jp tbody tr:hover{background:%s}
.jp pre{border:none;margin:0;padding:0;background:#777;color:#777;white-space:pre-wrap}
.jp svg,.jp img{max-width:100%%;height:auto}
"""

_CONTRAST = """
function over(top, below) { return top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1) }
function rgba(text) {
  const n = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
  return n.length < 4 ? n.concat(1) : n.slice(0, 4)
}
function light(c) {
  const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  return .2126 * r + .7152 * g + .0722 * b
}
function contrast(element) {
  const chain = []
  for (let e = element; e; e = e.parentElement) chain.unshift(e)
  let ground = [255, 255, 255, 1], opacity = 1
  for (const e of chain) {
    const style = getComputedStyle(e)
    opacity *= style.opacity
    ground = over(rgba(style.backgroundColor), ground)
    const bar = style.backgroundImage.match(/rgba?\\([^)]*/)
    if (bar) ground = over(rgba(bar[0]), ground)
  }
  const style = getComputedStyle(element), ink = rgba(element.namespaceURI.endsWith('svg') ? style.fill : style.color)
  ink[3] *= opacity
  const [a, b] = [light(over(ink, ground)), light(ground)]
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
}
function least() {
  let worst = [99, ''], walker = document.createTreeWalker(document.querySelector('.jp'), NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement
    if (!node.data.trim() || !element.checkVisibility() || element.tagName == 'STYLE') continue
    const found = contrast(element)
    if (found < worst[0]) worst = [found, node.data.trim().slice(0, 40)]
  }
  return worst
}
"""


def path() -> str | None:
    """The browser, where there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page(body: str, theme: str, script: str = "null") -> str:
    """A page with `body` as the output of a cell, and what the expression `script` gives as JSON in it."""
    run = f"<script>{_CONTRAST}\ndocument.getElementById('found').textContent = JSON.stringify({script})</script>"
    found = "<pre id='found' hidden></pre>"
    head = f"<!doctype html><meta charset='utf-8'><style>{_STYLE % THEMES[theme]}</style>"
    return f"{head}<body><div class='jp'>{body}</div>{found}{run}</body>"


def rendered(folder: Path, body: str, theme: str, script: str) -> Any:
    """What `script`, a JavaScript expression, gives on the page; `least()` is the lowest contrast of a text on it."""
    file = folder / f"{theme}.html"
    file.write_text(page(body, theme, script), "utf-8")
    dom = _chromium(folder, "--dump-dom", file.as_uri())
    text = re.search(r"<pre id=.found.[^>]*>(.*?)</pre>", dom, re.DOTALL)
    assert text and text[1], dom[-2000:]
    return json.loads(html.unescape(text[1]))


def screenshot(folder: Path, body: str, theme: str, height: int = 1600) -> Path:
    """A picture of the page."""
    file, picture = folder / f"{theme}.html", folder / f"{theme}.png"
    file.write_text(page(body, theme), "utf-8")
    _chromium(folder, f"--screenshot={picture}", file.as_uri(), height=height)
    return picture


def _chromium(folder: Path, *arguments: str, height: int = 1200) -> str:
    browser = path()
    assert browser is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{height}"]
    profile = f"--user-data-dir={folder / 'browser'}"
    done = subprocess.run(
        [browser, *options, profile, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout
