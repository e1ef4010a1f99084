"""Build a static site of executed notebooks and repository pages, to read offline.

weclip site --out runs/site

Executed copies come from a published or finished run. Missing ones (exercises, the index) are
executed first. Formulas become MathML, so that no page needs a script or font from elsewhere.
"""

import html
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from os.path import relpath
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from tqdm import tqdm

from weclip_lib.storage.files import whole
from weclip_lib.storage.provenance import ROOT
from weclip_lib.studies.runner import NOTEBOOKS, declared_parameters, run_notebook

HERE = Path(__file__).parent
SOURCES = (ROOT / "results" / "mini", ROOT / "runs" / "mini")
WIDGET = "application/vnd.jupyter.widget-view+json"
PAGES = (Path("README.md"), Path("FAQ.md"), Path("results/README.md"), Path("data/README.md"))
MATH = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$", re.DOTALL)
LINK = re.compile(r'(<(?:a|img)\b[^>]*?\b(?:href|src)=")([^"]+)(")')
HEADING = re.compile(r'(<h[1-6][^>]*? id=")([^"]+)(")')


@dataclass
class Page:
    """One page of the site."""

    source: Path  # relative to the repository
    title: str
    body: str

    @property
    def target(self) -> Path:
        """Path in the site."""
        return site_path(self.source)


def site_path(source: Path) -> Path:
    """Return the path of a notebook or Markdown file on the site."""
    if source == Path("notebooks/index.ipynb"):
        return Path("index.html")
    if source.is_relative_to("notebooks"):
        return source.relative_to("notebooks").with_suffix(".html")
    if re.fullmatch(r"results/\w+/notebooks/.+\.ipynb", str(source)):
        return Path(source.name).with_suffix(".html")
    return Path("pages") / source.with_suffix(".html")


def with_mathml(markdown: str, first: int = 0) -> tuple[str, list[str]]:
    """Replace formulas by placeholders, numbered from `first`; return them as MathML, too."""
    found: list[str] = []

    def one(match: re.Match) -> str:
        code, display, inline = match.groups()
        if code:
            return code
        kind = "block" if display else "inline"
        found.append(convert((display or inline).strip(), display=kind))
        return f"MATHML{first + len(found) - 1}X"

    return MATH.sub(one, markdown), found


def rendered(markdown: str) -> str:
    """Convert Markdown to HTML."""
    text, formulas = with_mathml(markdown)
    return _filled(markdown2html(text), formulas)


def _filled(page: str, formulas: Sequence[str]) -> str:
    return re.sub(r"MATHML(\d+)X", lambda match: formulas[int(match[1])], page)


def _raw(text: str) -> NotebookNode:
    return nbformat.v4.new_raw_cell(text, metadata={"raw_mimetype": "text/html"})


def notebook_body(notebook: NotebookNode) -> str:
    """Convert an executed notebook to HTML; static twins replace live widgets."""
    formulas: list[str] = []
    cells: list[NotebookNode] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                del output.data[WIDGET]
        if cell.cell_type == "markdown":
            cell.source, found = with_mathml(cell.source, len(formulas))
            formulas += found
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
        cells += [_raw("FOLDX"), cell, _raw("UNFOLDX")] if hidden else [cell]
    notebook.cells = cells
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    body = _filled(exporter.from_notebook_node(notebook)[0], formulas)
    body = body.replace("UNFOLDX", "</details>")
    return body.replace("FOLDX", "<details><summary>A solution</summary>")


def _title(source: Path, markdown: str) -> str:
    first = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    return first[1].replace("`", "") if first else source.stem


def executed(notebook: Path, sources: Sequence[Path], work: Path) -> Path:
    """Find an executed copy of a notebook, or execute it."""
    inside = notebook.relative_to(NOTEBOOKS)
    for folder in sources:
        copy = folder / "notebooks" / inside.name
        if inside.parent == Path() and copy.exists():
            return copy
    folder = work / inside.parent
    chosen = {"profile": "mini"} if "profile" in declared_parameters(notebook) else {}
    run_notebook(notebook, folder, chosen)
    return folder / "notebooks" / notebook.name


@dataclass
class _Links(HTMLParser):
    """Ids, links and loaded resources (pictures, styles, scripts) of a page."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if named.get("id"):
            self.ids.add(named["id"])
        own = self.links if tag == "a" else self.resources
        own += [named[key] for key in ("href", "src") if named.get(key)]


def broken_links(site: Path) -> list[str]:
    """List links and loaded resources of a site's pages that lead nowhere."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = _Links()
        pages[path].feed(path.read_text(encoding="utf-8"))
    broken = []
    for path, page in pages.items():
        for link in page.links + page.resources:
            loaded = link in page.resources
            if re.match(r"data:" if loaded else r"https?:|mailto:|data:", link):
                continue
            place, _, fragment = unquote(link).partition("#")
            target = (path.parent / place).resolve() if place else path
            known = pages.get(target)
            if not target.is_file() or (fragment and known and fragment not in known.ids):
                broken.append(f"{path.relative_to(site)} -> {link}")
    return broken


def _slug(heading: str) -> str:
    """Make GitHub's id of a heading, so that links written for GitHub work here."""
    return re.sub(r"[^\w-]", "", html.unescape(unquote(heading)).lower().replace(" ", "-"))


class Site:
    """Pages with links between them, and the files that they show.

    Args:
        out: Folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.pages: list[Page] = []

    def add_notebook(self, source: Path, copy: Path) -> None:
        """Add the executed copy of a notebook."""
        notebook = nbformat.read(copy, as_version=4)
        title = _title(source, notebook.cells[0].source)
        self.pages.append(Page(source, title, notebook_body(notebook)))

    def add_markdown(self, source: Path) -> None:
        """Add a repository page."""
        text = (ROOT / source).read_text(encoding="utf-8")
        self.pages.append(Page(source, _title(source, text), rendered(text)))

    def _linked(self, page: Page) -> str:
        """Return the body; links to repository files become links of the site."""
        targets = {other.target for other in self.pages}

        def one(match: re.Match) -> str:
            link = html.unescape(match[2])
            if re.match(r"[a-z]+:|#", link):
                return match[0] if link[0] != "#" else f"{match[1]}#{_slug(link[1:])}{match[3]}"
            place, _, fragment = link.partition("#")
            source = Path(relpath((ROOT / page.source).parent / unquote(place), ROOT))
            if (ROOT / source).is_dir():
                readme = source / "README.md"
                target = site_path(readme) if (ROOT / readme).exists() else Path("index.html")
            elif source.suffix in (".md", ".ipynb") and site_path(source) in targets:
                target = site_path(source)
            else:
                target = self._copied(source)
            back = relpath(target, page.target.parent)
            return f"{match[1]}{back}{'#' + _slug(fragment) if fragment else ''}{match[3]}"

        linked = LINK.sub(one, page.body)
        return HEADING.sub(lambda match: f"{match[1]}{_slug(match[2])}{match[3]}", linked)

    def _copied(self, source: Path) -> Path:
        """Copy a repository file to the site."""
        target = Path("files") / source
        if (ROOT / source).is_file():
            (self.out / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / source, self.out / target)
        return target

    def _navigation(self, page: Page) -> str:
        lines = []
        for other in self.pages:
            here = ' aria-current="page"' if other is page else ""
            link = relpath(other.target, page.target.parent)
            kind = ' class="inner"' if other.target.parent == Path("exercises") else ""
            lines.append(f'<li{kind}><a href="{link}"{here}>{html.escape(other.title)}</a></li>')
        return f"<nav><ul>{''.join(lines)}</ul></nav>"

    def write(self) -> None:
        """Write all pages.

        Raises:
            ValueError: If a link leads nowhere; all such links are named.
        """
        style = (HERE / "site.css").read_text() + HtmlFormatter().get_style_defs(".highlight")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "style.css").write_text(style)
        for number, page in enumerate(self.pages):
            nearby = []
            for word, other in (("before", number - 1), ("after", number + 1)):
                if 0 <= other < len(self.pages):
                    link = relpath(self.pages[other].target, page.target.parent)
                    title = html.escape(self.pages[other].title)
                    nearby.append(f'<a class="{word}" href="{link}">{title}</a>')
            path = self.out / page.target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "<!doctype html>\n"
                '<html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f"<title>{html.escape(page.title)}</title>"
                f'<link rel="stylesheet" href="{relpath("style.css", page.target.parent)}"></head>'
                f"<body>{self._navigation(page)}<main>{self._linked(page)}"
                f"<footer>{''.join(nearby)}</footer></main></body></html>\n",
                encoding="utf-8",
            )
        if broken := broken_links(self.out):
            raise ValueError("links that lead nowhere:\n" + "\n".join(broken))


def build(out: Path, sources: Sequence[Path], work: Path) -> None:
    """Make the site, whole or not at all.

    Args:
        sources: Folders of runs; the first with an executed copy is used.
        work: Where missing copies are executed, and kept.
    """
    with whole(out) as partial:
        site = Site(partial)
        lessons = sorted(NOTEBOOKS.glob("*.ipynb"), key=lambda path: (path.stem != "index", path))
        for notebook in tqdm(lessons, desc="pages", unit="lesson"):
            exercises = NOTEBOOKS / "exercises" / notebook.name
            for path in (notebook, exercises):
                if path.exists():
                    site.add_notebook(path.relative_to(ROOT), executed(path, sources, work))
        for page in PAGES:
            site.add_markdown(page)
        site.write()
        shutil.rmtree(out, ignore_errors=True)


def run(chosen: Site) -> None:
    """Run `weclip site`.

    Raises:
        ValueError: If a notebook fails, or a link is broken.
    """
    out = (chosen.out or ROOT / "runs" / "site").resolve()
    build(out, chosen.source or SOURCES, ROOT / "runs" / "pages")
    sys.stdout.write(f"open {out / 'index.html'}\n")
