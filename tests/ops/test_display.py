import base64
import re
import time
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

import ops
from ops import display
from ops.spec import DTYPES


def image_of(html: str) -> np.ndarray:
    """The palette indices of the map in `html`, decoded."""
    data = base64.b64decode(re.findall(r"base64,([^']+)'", html)[0])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + size]
        assert int.from_bytes(data[at + 8 + size : at + 12 + size]) == zlib.crc32(kind + content)
        chunks[kind], at = content, at + 12 + size
    width, height = int.from_bytes(chunks[b"IHDR"][:4]), int.from_bytes(chunks[b"IHDR"][4:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), "uint8").reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_matrix_as_text():
    x = ops.tensor([[1.0, -2.0, 0.5], [0.0, 4.0, 1e-7]])
    assert repr(x).splitlines() == [
        "float32[2, 3] on cpu",
        "min -2  mean 0.5833  max 4",
        "[[1  -2    0.5]",
        " [0   4  1e-07]]",
    ]


def test_corners_of_the_last_two_axes():
    x = ops.tensor(np.arange(2 * 100 * 50, dtype="int32").reshape(2, 100, 50))
    lines = repr(x).splitlines()
    assert lines[2] == "[0, :, :]:"
    assert lines[3].split() == ["[[", "0", "1", "2", "...", "47", "48", "49]"]
    assert lines[6] == " ..."
    assert lines[-1].split() == ["[4950", "4951", "4952", "...", "4997", "4998", "4999]]"]
    assert len(lines) == 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (400,), (0,), (3, 0), (1, 1), (9, 9), (2, 3, 4, 5)])
def test_every_dtype_and_rank(rng, dtype, shape):
    x = ops.tensor(np.asarray(rng.integers(0, 100, shape)).astype(DTYPES[dtype]))
    text, html = repr(x), x._repr_html_()
    assert text.startswith(f"{dtype}[{', '.join(map(str, shape))}] on cpu")
    assert len(text.splitlines()) <= 12 and max(map(len, text.splitlines())) <= 120
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    if x.size == 0:
        assert text.endswith(", empty") and "empty" in html
    elif x.size == 1:
        assert text.splitlines()[-1].strip("[]") == f"{x.item():.4g}"
    else:
        assert f"min {display._number(x.numpy().min().item())} " in text


def test_what_is_not_finite_is_counted():
    x = ops.tensor(np.array([[np.nan, 1], [np.inf, -np.inf]], "float32"))
    assert "min 1  mean 1  max 1  NaN 1  Inf 2" in repr(x)
    assert "yellow" in display.html(x)
    np.testing.assert_array_equal(image_of(display.html(x)), [[255, 254], [255, 255]])
    nothing = ops.tensor(np.full((2, 2), np.nan, "float16"))
    assert repr(nothing).splitlines()[1] == "NaN 4"
    assert "red" not in display.html(nothing)


def test_statistics_agree_with_numpy(rng):
    values = rng.standard_normal((300, 700)).astype("float32")
    found = display.statistics(ops.tensor(values))
    assert found.seen == values.size and found.least == values.min() and found.most == values.max()
    assert found.mean == pytest.approx(values.mean(dtype="float64"), abs=1e-9)
    assert found.deviation == pytest.approx(values.std(dtype="float64"))


def test_a_huge_tensor_is_sampled(rng):
    x = ops.zeros((128256, 256), "bfloat16")
    x.numpy()[64128:] = 1
    started = time.perf_counter()
    text, html = repr(x), display.html(x)
    assert time.perf_counter() - started < 1
    assert "of 262144 sampled values" in text and "of" in html
    assert "min 0  mean 0.5  max 1" in text
    drawn = image_of(html)
    assert drawn.shape == (32, 64) and (drawn[:16] == 127).all() and (drawn[16:] == 254).all()


def test_the_map_takes_means_of_blocks(rng):
    values = rng.standard_normal((70, 200)).astype("float32")
    cells = display._cells(values)
    assert cells.shape == (32, 64)
    rows, columns = np.arange(32) * 70 // 32, np.arange(64) * 200 // 64
    expected = values[rows[5] : rows[6], columns[63] :].mean(dtype="float64")
    assert cells[5, 63] == pytest.approx(expected)
    assert display._cells(values[:5, :7]).tolist() == values[:5, :7].tolist()


def test_colours_diverge_around_zero():
    drawn = image_of(display.html(ops.tensor([[-2.0, 0.0], [1.0, 2.0]])))
    np.testing.assert_array_equal(drawn, [[0, 127], [190, 254]])


def test_html_sets_no_text_colour_and_is_small(rng):
    html = display.html(ops.tensor(rng.standard_normal((64, 256)).astype("float32")))
    assert "color:inherit" in html and not re.search(r"[^-]color:\s*(#|rgb|black|white)", html)
    assert len(html) < 10_000
