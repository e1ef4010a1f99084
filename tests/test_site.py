import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from weclip_lib.tools import site

PIXEL = "iVBORw0KGgo="


def test_formulas_become_mathml_and_code_stays() -> None:
    text, found = site.with_mathml("The $x_i$ costs `$5` and\n\n$$ \\frac{a}{b} $$\n\nno \\$3")
    assert text == "The MATHML0X costs `$5` and\n\nMATHML1X\n\nno \\$3"
    assert "<msub>" in found[0] and "<mfrac>" in found[1] and 'display="block"' in found[1]
    assert "<mfrac>" in site.rendered("so $$\\frac{a}{b}$$ it is")


def test_a_notebook_shows_the_twin_and_folds_solutions() -> None:
    live = {site.WIDGET: {"model_id": "x"}, "image/png": PIXEL, "text/plain": "CamExplorer()"}
    solution = new_code_cell("assert 1 + 1 == 2", metadata={"jupyter": {"source_hidden": True}})
    shown = new_code_cell("explorer", outputs=[new_output("display_data", live)])
    cells = [new_markdown_cell("# 01 · The $x$\n\nand $y^2$"), shown, solution]
    body = site.notebook_body(new_notebook(cells=cells))
    assert "data:image/png;base64" in body and "widget" not in body
    assert body.index("<details>") < body.index("assert") < body.index("</details>")
    assert body.count("<math") == 2 and "MATHML" not in body


def test_links_that_lead_nowhere_are_named(tmp_path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="here">A</h1><a href="b.html#there">b</a><a href="#here">x</a><img src="no.png">'
        '<a href="https://example.org/c">out</a><a href="b.html#nowhere">y</a>'
    )
    (tmp_path / "b.html").write_text('<h2 id="there">B</h2><a href="gone.html">z</a>')
    assert site.broken_links(tmp_path) == [
        "a.html -> b.html#nowhere",
        "a.html -> no.png",
        "b.html -> gone.html",
    ]


def test_all_pages_link_up_and_need_nothing_from_elsewhere(whole_site) -> None:
    pages = {path.relative_to(whole_site) for path in whole_site.rglob("*.html")}
    assert {"index.html", "01_cam_generation.html", "exercises/01_cam_generation.html"} <= {
        str(page) for page in pages
    }
    assert len(pages) == 1 + 2 * 12 + len(site.PAGES)
    for page in pages:
        text = (whole_site / page).read_text()
        assert "<script" not in text and "MATHML" not in text
        links = site._Links()
        links.feed(text)
        assert not [link for link in links.resources if link.startswith("http")]


def test_a_broken_link_stops_the_site(tmp_path) -> None:
    bad = new_notebook(cells=[new_markdown_cell("# T\n\n[gone](99_gone.ipynb)")])
    nbformat.write(bad, tmp_path / "bad.ipynb")
    made = site.Site(tmp_path / "out")
    made.add_notebook(site.Path("notebooks/01_cam_generation.ipynb"), tmp_path / "bad.ipynb")
    with pytest.raises(ValueError, match="99_gone"):
        made.write()
