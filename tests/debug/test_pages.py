"""HTML pages: everything escaped, nothing loaded, colours that say how large an error is."""

import re

import numpy as np

from debug import pages


def opacities(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"fill-opacity='([\d.]+)'", text)]


def test_a_heat_map():
    errors = np.array([[0.0, 1e-8, 1e-4], [1.0, 50.0, np.nan]])
    text = pages.heat_map(["layers.0", "a<b"], errors, "errors", "position")
    shades = opacities(text)
    assert shades[:2] == [0, 0] and 0.3 < shades[2] < 0.8 and shades[3:] == [1, 1, 1]
    assert "a&lt;b, position 1: 50" in text and "a<b" not in text
    assert "a&lt;b, position 2: inf" in text, "NaN is as bad as it gets"


def test_many_positions_share_columns(rng):
    errors = np.full((2, 1000), 1e-9)
    place = int(rng.integers(1000))
    errors[1, place] = 0.5
    text = pages.heat_map(["a", "b"], errors, "errors", "position")
    shades = opacities(text)
    assert len(shades) <= 2 * 160 and sum(shade > 0.5 for shade in shades) == 1, "the largest of a column shows"
    low, high = map(int, re.findall(r"b, position (\d+)-(\d+): 0\.5<", text)[0])
    assert low <= place <= high


def test_nothing_to_show():
    assert "nothing to show" in pages.heat_map([], np.empty((0, 0)), "errors", "position")
    assert "nothing" in pages.table([])


def test_a_page_is_escaped_and_themed(tmp_path):
    body = pages.sentence("<i>x</i>", "wrong") + pages.table([{"a<": "<td>", "status": "agrees"}], "status")
    text = pages.save(tmp_path / "p.html", "<title>", body).read_text("utf-8")
    assert "&lt;i&gt;" in text and "&lt;td&gt;" in text and "a&lt;" in text and "<title>&lt;title&gt;</title>" in text
    assert "prefers-color-scheme: dark" in text and 'content="light dark"' in text
