import re
from html.parser import HTMLParser

import numpy as np
import pytest

import ops
from debug.profiler import profile
from debug.show_code import Code, show
from debug.trace import Recording, trace
from ops import ceilings, html
from ops.op import registry
from ops.table import Table
from tests.debug import chromium
from tests.llm import small

EVIL = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>'\"&"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(ceilings, "fma_peak", lambda: 1e11)


@pytest.fixture(scope="module")
def model():
    return small.model(np.random.default_rng(0))


@pytest.fixture(scope="module")
def traced(model):
    with trace() as t:
        model([1, 2, 3])
    return t


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order, and collects text and tags."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_nothing_comes_from_elsewhere(model, traced):
    with profile() as p:
        model([1])
    pages = [
        traced,
        p,
        p.diff(p),
        model,
        ops.tensor(np.ones((8, 8), "float32")),
        Code(ops.neg, traced.records[0].outputs[0]),
    ]
    for each in pages:
        page = each._repr_html_()
        Balanced(page)
        assert "<script" not in page and "<link" not in page and "@import" not in page
        assert not re.search(r"(src|href)=(?!['\"]?data:)", page) and "url(" not in page
        assert not re.search(r"[^-\w]color:\s*(#|rgb|black|white)", page)


def test_what_comes_from_outside_is_escaped(model, traced, tmp_path):
    record = traced.records[0]
    saved = Recording.load(traced[:1].save(tmp_path / "t"))
    saved.records[0].op_name = saved.records[0].path = saved.records[0].source = saved.records[0].kernel = EVIL
    evil = small.model(np.random.default_rng(0))
    setattr(evil, EVIL, ops.tensor([1.0]))
    pages = [saved, evil, Table(EVIL, [EVIL], [[EVIL]], EVIL), Code(record)]
    for each in pages:
        parsed = Balanced(each._repr_html_())
        assert not {"script", "img"} & {*parsed.tags}
    assert EVIL in Balanced(saved._repr_html_()).text and EVIL in Balanced(evil._repr_html_()).text
    assert "script" not in Balanced(html.box(html.tabs({EVIL: EVIL}))).tags


def test_a_trace_as_a_table(traced):
    page = Balanced(traced._repr_html_())
    assert page.tags.count("tr") == len(traced) + 1
    assert "layers.1.self_attn/attention[0]@" in page.text and "llama.py:" in page.text
    assert "float32[3, 32]" in page.text and f"{len(traced)} calls" in page.text
    many = Recording(traced.records * 100)
    page = Balanced(many._repr_html_())
    assert page.tags.count("tr") == 2001 and "the first 1000 and the last 1000 of" in page.text


def test_a_table_as_text():
    table = Table("t", ["name", "n"], [["a", 1], ["b", None], ["c", 12345.678], ["d", 1e-7]], note="a note", most=3)
    lines = repr(table).splitlines()
    assert lines[0] == "t" and lines[-1] == "a note"
    assert [line.split() for line in lines[1:-1]] == [
        ["name", "n"],
        ["a", "1"],
        ["b"],
        ["...", "..."],
        ["d", "1.000e-07"],
    ]
    assert table.column("n")[2] == 12345.678 and len(table) == 4


def test_a_model_as_a_tree(model):
    page = model._repr_html_()
    parsed = Balanced(page)
    assert parsed.text.replace("\n", "").startswith("Llama")
    for line in repr(model).splitlines():
        for word in line.replace(": ", " ").split():
            assert word in parsed.text
    assert parsed.tags.count("details") == page.count("<summary") > 3
    assert "layers.0-2" in parsed.text and "3 x Block" in parsed.text


def test_a_histogram_and_outliers(rng):
    values = rng.standard_normal((40, 50)).astype("float32").clip(-3, 3)
    values[7, 31], values[39, 0] = -90.0, 50.0
    page = Balanced(ops.tensor(values)._repr_html_())
    assert "svg" in page.tags and "-90 to 50, log of counts" in page.text
    first, second = page.text.index("[7, 31]"), page.text.index("[39, 0]")
    assert first < second and page.text[first:].startswith("[7, 31]-90 (-") and "std)" in page.text[first:]
    values[2, 3] = np.nan
    page = Balanced(ops.tensor(values)._repr_html_())
    assert page.text.index("[2, 3]") < page.text.index("[7, 31]")


def test_outliers_of_a_huge_tensor_are_where_it_says(rng):
    values = np.zeros((3000, 700), "float32")
    stretch = values.size // 1024
    at = [int(i) * stretch + int(j) for i, j in zip(rng.integers(0, 1024, 3), rng.integers(0, 256, 3), strict=True)]
    values.reshape(-1)[at] = [5.0, -4.0, 3.0]
    page = Balanced(ops.tensor(values)._repr_html_())
    assert "largest magnitudes, of those sampled" in page.text
    for place in at:
        assert f"[{place // 700}, {place % 700}]" in page.text
    packed = ops.tensor(rng.standard_normal((4096, 512)).astype("float32"), "q4")
    assert "histogram" in packed._repr_html_() and "largest" not in packed._repr_html_()


def test_the_code_of_a_call(traced):
    record = traced["layers.0.input_layernorm/rms_norm[0]"]
    code = Code(record)
    assert "def rms_norm(x: Tensor" in code.python and "np.mean(x32**2" in code.python
    assert "sum_of_squares" in code.tir and "define" in code.llvm and "ret" in code.assembly
    assert code.title.startswith(f"{record.full_address}, kernel tvm: rms_norm(float32[3, 32], float32[32], eps=1e-05")
    page = Balanced(code._repr_html_())
    assert page.tags.count("button") == page.tags.count("pre") == 4 and "sum_of_squares" in page.text
    text = repr(code)
    assert "sum_of_squares" in text and "more lines: .assembly has all" in text and "\x1b" not in text
    again = Code(ops.rms_norm, *record.args, **record.constants)
    assert again.tir == code.tir


def test_what_has_no_code_says_why(traced, tmp_path, monkeypatch):
    @ops.op()
    def unfinished(x: ops.Tensor) -> ops.Tensor:
        return ops.like(x)

    monkeypatch.delitem(registry, "unfinished")
    assert "unfinished has no kernel" in Code(unfinished, ops.tensor([1.0])).texts()["tir"]
    with pytest.raises(ops.OpError, match="has its arguments already"):
        Code(traced.records[0], 1)
    lost = Recording.load(traced[:1].save(tmp_path / "t")).records[0]
    lost.op_name = "gone"
    with pytest.raises(ops.OpError, match="this process has no op"):
        Code(lost)
    with pytest.raises(ops.OpError, match="show takes a tensor"):
        show(3)


def test_show_in_a_terminal(capsys, traced):
    show(ops.tensor([1.0, 2.0]))
    assert capsys.readouterr().out.startswith("float32[2] on cpu")
    show(ops.neg, ops.tensor([[1.0]]))
    out = capsys.readouterr().out
    assert "neg(float32[1, 1])" in out and "prim_func" in out


def test_a_roofline(model):
    with profile() as p:
        model([1, 2, 3])
    svg = p.roofline()
    parsed = Balanced(svg)
    assert parsed.tags.count("circle") == len([row for row in p.rows() if row.flops])
    assert "peak 100 GFLOP/s" in parsed.text and "memory 10 GB/s" in parsed.text
    assert "without operations: " in parsed.text and "embedding" in parsed.text
    for name, low, high in (("cx", 0, 640), ("cy", 0, 340)):
        assert all(low <= float(value) <= high for value in re.findall(rf"{name}='([^']*)'", svg))


@pytest.fixture(scope="module")
def gallery(model, traced):
    """Everything on one page."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 128)).astype("float32")
    values[3, 4] = np.nan
    with profile() as p:
        model([1, 2, 3])
        model([4])
    ordered = Table("order", ["name", "n"], [["b", 10], ["a", 9], ["c", None], ["d", -1.5]])
    shown = [
        ordered,
        traced,
        p,
        p.diff(p),
        model,
        Code(traced.records[1]),
        ops.tensor(values),
        ops.tensor([[1.0, -2.0]]),
    ]
    return "\n".join(f"<section>{each._repr_html_()}</section>" for each in shown)


_TABLE = "document.querySelector('.limpid table')"
_ORDER = f"Array.from({_TABLE}.tBodies[0].rows).map(r => r.cells[0].textContent).join('')"
_HEADS = f"{_TABLE}.querySelectorAll('th')"
_PRES = "Array.from(document.querySelectorAll('pre[role=tabpanel]')).map(p => p.checkVisibility())"
_SCRIPT = f"""(() => {{
  const found = {{orders: [{_ORDER}]}}
  for (const i of [1, 1, 0]) {{ {_HEADS}[i].click(); found.orders.push({_ORDER}) }}
  {_HEADS}[0].dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true}}))
  found.orders.push({_ORDER})
  found.sorted = {_HEADS}[0].getAttribute('aria-sort')
  found.panes = [{_PRES}]
  document.querySelectorAll('button[role=tab]')[2].click()
  found.panes.push({_PRES})
  found.contrast = least()
  const root = document.documentElement
  found.overflow = root.scrollWidth - root.clientWidth
  found.align = getComputedStyle({_HEADS}[0]).textAlign
  found.layout = getComputedStyle({_TABLE}).tableLayout
  document.querySelector('.limpid details, details').open = false
  found.closed = !document.querySelector('details div').checkVisibility()
  return found
}})()"""


@pytest.mark.skipif(chromium.path() is None, reason="there is no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("theme", chromium.THEMES)
def test_in_a_browser(tmp_path, gallery, theme):
    found = chromium.rendered(tmp_path, gallery, theme, _SCRIPT)
    assert found["orders"] == ["bacd", "badc", "dabc", "abcd", "dcba"]  # as given, numbers down, up, names up, down
    assert found["sorted"] == "descending"
    assert found["panes"] == [[True, False, False, False], [False, False, True, False]]
    assert found["contrast"][0] >= 4.5, found["contrast"]
    assert found["overflow"] <= 0
    assert (found["align"], found["layout"]) == ("left", "auto")
    assert found["closed"]
