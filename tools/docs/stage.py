"""Notebooks and hand-written pages as a Sphinx source tree of MyST markdown.

Nothing is executed: what a cell gave is stored in its notebook. `nbdev.serve.proc_nbs` is not used: it imports every module,
stops at the first that does not import, and knows nothing of charts and widgets.
"""
from __future__ import annotations

import ast
import base64
import hashlib
import re
from configparser import ConfigParser
from html import escape
from pathlib import Path
from typing import Any

from book import PARTS, Index, Page, Room, exported, pages, rooms, shown
from entries import entries
from markup import block, demoted, described, escaped, linked, moved, raw
from nbfiles import Cell, directives, source, without_directives
from outputs import WIDGET, chart_of

from longlens.charts.page import as_json

BESIDE = {    # files of the repository that have a page: file -> page, its navigation title
    "benchmarks/RESULTS.md": "benchmarks", "benchmarks/AGREEMENT.md": "agreement", "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
}
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LOADER = re.compile(r"<script\b(?:(?!</script).)*?(?:https?:)?//(?:(?!</script).)*</script>|<link\b[^>]*>", re.DOTALL | re.IGNORECASE)
RULED = re.compile(r"[\u2500-\u257f]")    # lines of a table that was drawn with characters
STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
SHAPE = re.compile(r"<small>shape: \((.*?)\)</small>")


def settings(root: Path) -> dict[str, str]:
    "The package's metadata"
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(root / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def public_names(root: Path) -> dict[str, str]:
    "Public name -> module, as longlens/__init__.pyi has it, without importing the package"
    stub = ast.parse((root / "longlens/__init__.pyi").read_text(encoding="utf-8")).body
    return {name.name: node.module for node in stub if isinstance(node, ast.ImportFrom) and node.module for name in node.names}


class Stage:
    "Writes the source tree"

    def __init__(self, root: Path, to: Path):
        self.root, self.to = root, to
        self.settings = settings(root)
        self.pages = pages(root / "nbs")
        self.index = Index(self.pages, public_names(root))
        self.made: set[Path] = set()
        self.live = {"chart": 0, "widget": 0}    # how many there are

    def write(self, name: str, data: str | bytes) -> None:
        "A file of the tree, touched only if it changed, so that Sphinx builds what is new"
        path, data = self.to / name, data.encode() if isinstance(data, str) else data
        self.made.add(path)
        if path.exists() and path.read_bytes() == data: return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def place(self, page: str) -> Any:
        "How links of a page find what they point at: another page, a picture, or the repository"
        up = "../" * page.count("/")

        def where(target: str) -> str:
            if target.startswith("nbs/") and target.endswith(".ipynb"): return up + target[4:-6] + ".md"
            if target in BESIDE: return f"{up}{BESIDE[target]}.md"
            if target.startswith("docs/"): return up + target[5:]
            if (self.root / target).is_file() and Path(target).suffix in (".png", ".svg", ".gif", ".webp"):
                self.write(target, (self.root / target).read_bytes())
                return up + target
            return f"{self.settings['git_url']}/blob/{self.settings['branch']}/{target}"
        return where

    def prose(self, text: str, page: str, folder: str, module: str = "") -> str:
        "Markdown from a file of `folder`, with its links as they are on the site"
        return moved(linked(text, self.index, module), folder, self.place(page))

    # outputs

    def text(self, printed: str) -> str:
        printed = ANSI.sub("", printed).rstrip("\n")
        kind = "output ruled" if RULED.search(printed) else "output"
        return block("code-block", "text", f":class: {kind}\n\n{printed}")

    def html(self, html: str) -> str:
        shapes = SHAPE.findall(html)
        html = LOADER.sub("", SHAPE.sub("", STYLE.sub("", html)).replace(' border="1"', ""))
        note = "".join(f'<p class="shape">{rows} row{"s" * (rows != "1")}, {columns} column{"s" * (columns != "1")}</p>'
                       for rows, _, columns in (shape.partition(", ") for shape in shapes))
        return raw(f'<div class="output html">{html}{note}</div>')

    def picture(self, data: str, size: dict[str, Any], page: str) -> str:
        content = base64.b64decode("".join(data))
        name = f"pictures/{hashlib.sha256(content).hexdigest()[:16]}.png"
        self.write(f"_static/{name}", content)
        width = f' width="{float(size["width"]):.0f}"' if "width" in size else ""
        return raw(f'<div class="output"><img alt="chart" src="{"../" * page.count("/")}_static/{name}"{width}></div>')

    def drawn(self, kind: str, value: dict[str, Any]) -> str:
        "A place for a chart or a widget, and beside it what it is drawn from"
        self.live[kind] += 1
        label = value.get("description") or title_of(value) if kind == "chart" else "widget, as it was stored"
        return raw(f'<div class="output live" data-{kind} role="group" aria-label="{escape(str(label), quote=True)}">'
                   f'<script type="application/json">{as_json(value)}</script></div>')

    def output(self, out: dict[str, Any], page: str) -> str:
        "One output of a cell"
        if out["output_type"] == "stream": return self.text("".join(out["text"])) if out["name"] == "stdout" else ""
        if out["output_type"] == "error": return self.text(f"{out['ename']}: {out['evalue']}")
        data, one = out.get("data", {}), lambda kind: "".join(data[kind])
        if WIDGET in data: return self.drawn("widget", data[WIDGET])
        if chart := chart_of(data): return self.drawn("chart", chart)
        if "text/html" in data: return self.html(one("text/html"))
        if "image/svg+xml" in data: return raw(f'<div class="output">{one("image/svg+xml")}</div>')
        if "image/png" in data: return self.picture(one("image/png"), out.get("metadata", {}).get("image/png", {}), page)
        if "text/markdown" in data: return demoted(one("text/markdown"), 2)
        return self.text(one("text/plain")) if "text/plain" in data else ""

    def outputs(self, cell: Cell, page: str) -> list[str]:
        "All outputs of a cell; prints in a row are one"
        joined: list[dict[str, Any]] = []
        for out in cell.get("outputs", []):
            last = joined[-1] if joined else {}
            same = out["output_type"] == last.get("output_type") == "stream" and out["name"] == last["name"]
            if same: joined[-1] = {**last, "text": [*last["text"], *out["text"]]}
            else: joined.append(out)
        return [text for text in (self.output(out, page) for out in joined) if text]

    # pages

    def code(self, cell: Cell, page: Page) -> list[str]:
        "A code cell: what it exports, its source, what it gave"
        marks, text = directives(cell), without_directives(cell)
        given = [] if marks.get("output") == "false" else self.outputs(cell, page.name)
        fence = block("python", "", text, language=True)
        if not text.strip(): return given
        if not exported(cell): return [*([] if marks.get("echo") == "false" else [fence]), *given]
        defined = [described(e, self.index, options=self.hidden(e.name), later=False) for e in entries(text, f"longlens.{page.module}")]
        lines, what = text.count("\n") + 1, "Imports" if only_imports(text) else "Source"
        unfolded = " open" if page.folder.startswith("tutorials") else ""    # where the source is what is being told
        summary = f'<details class="source"{unfolded}><summary>{what}, {lines} line{"s" * (lines != 1)}</summary>'
        return [*defined, raw(summary), fence, raw("</details>"), *given]

    def hidden(self, name: str) -> str:    # public names stand in the index once: with their entry in the reference
        return ":no-index-entry:\n" if name in self.index.public else ""

    def notebook(self, page: Page) -> None:
        "A notebook's page"
        title, subtitle = page.heading
        parts, folder = [], f"nbs/{page.folder}".rstrip("/")
        for cell in filter(shown, page.cells):
            if cell["cell_type"] == "code": parts += self.code(cell, page)
            else: parts.append(self.prose(source(cell), page.name, folder, page.module))
        body = "\n\n".join(parts)
        start = re.match(r"\s*#[ \t].*\n*(?:>.*\n*)*", body)
        body = body[start.end():] if start else body
        body = demoted(body, int(bool(re.search(r"^# ", re.sub(r"^(`{3,}).*?^\1", "", body, flags=re.M | re.S), re.M))))
        head = [f"# {title}", *([f"{{.subtitle}}\n{self.prose(subtitle, page.name, folder)}"] if subtitle else [])]
        if page.module:
            path = f"{self.settings['git_url']}/blob/{self.settings['branch']}/nbs/{page.name}.ipynb"
            head += [f"```{{py:currentmodule}} longlens.{page.module}\n```",
                     f"{{.where}}\nModule `longlens.{page.module}` · [notebook]({path})"]
        self.write(f"{page.name}.md", "\n\n".join([*head, body]) + "\n")

    def contents(self, names: list[str], caption: str = "", hidden: bool = True, depth: int = 1) -> str:
        "A table of contents"
        options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden + [f":maxdepth: {depth}"]
        return block("toctree", "", "\n".join([*options, "", *names]))

    def room(self, room: Room, all_rooms: dict[str, Room]) -> None:
        "The page of a room: its own, or a list of its notebooks; the rooms in it follow its notebooks"
        below = [all_rooms[folder] for folder in room.rooms]
        contents = self.contents([*(f"/{p.name}" for p in room.pages), *(f"/{one.name}" for one in below)])
        if room.index:
            self.notebook(room.index)
            text = (self.to / f"{room.name}.md").read_text(encoding="utf-8")
        else: text = "\n\n".join([f"# {room.heading[0]}", room.heading[1], *self.listed(room, below)]) + "\n"
        self.write(f"{room.name}.md", f"{text}\n{contents}\n")

    def listed(self, room: Room, below: list[Room]) -> list[str]:
        "A line for each notebook of a room, and for each room in it"
        lines = [f"[{one.heading[0]}](/{one.name}.md)\n: {one.heading[1] or '&nbsp;'}" for one in below]
        return [*(f"[{page.heading[0]}](/{page.name}.md){f' · `longlens.{page.module}`' if page.module else ''}\n"
                  f": {self.prose(page.heading[1], room.name, f'nbs/{page.folder}') or '&nbsp;'}" for page in room.pages), *lines]

    def reference(self) -> list[str]:
        "Pages of all public names, by what they are for"
        left, names, tables = dict(self.index.public), ["reference/index"], []
        for part, (title, modules) in PARTS.items():
            mine = [n for n, where in left.items() if not modules or where.split(".")[0] in modules]
            for name in mine: del left[name]
            if mine: tables.append(self.reference_part(part, title, mine))
        intro = ("Every name that `import longlens as ll` gives, from the comments beside the code. The notebooks define more: their pages "
                 "say what each module is for, show it at work, and list all of it.")
        self.write("reference/index.md", "\n\n".join(
            ["# Reference", intro, *(f"## [{t}](/reference/{part}.md)\n\n{table}" for part, t, table in tables),
             self.contents([f"/reference/{part}" for part, _, _ in tables])]) + "\n")
        return names

    def reference_part(self, part: str, title: str, mine: list[str]) -> tuple[str, str, str]:
        "One page of the reference; its name, its title, and a table of its names"
        parts, rows = [f"# {title}"], ["| name | what it is |", "|---|---|"]
        for name in mine:
            found = self.index.find(name)
            if not found:
                parts.append(f"`{name}` is listed in `longlens.{self.index.public[name]}`, and no notebook exports it there.")
                continue
            entry, page = found
            first = entry.doc.split("\n\n")[0].replace("\n", " ")
            rows.append(f"| {{py:obj}}`{name} <longlens.{name}>` | {linked(escaped(first), self.index)} |")
            where = f"Explained and tested in [{page.heading[0]}](/{page.name}.md), module `{entry.module}`."
            parts.append(described(entry, self.index, f"longlens.{name}", note=where))
        self.write(f"reference/{part}.md", "\n\n".join(parts) + "\n")
        return part, title, "\n".join(rows)

    def written(self) -> list[str]:
        "Hand-written pages, docs/**/*.md, and files of the repository that have a page; their names"
        for file, name in BESIDE.items():
            path = self.root / file
            if path.exists(): self.write(f"{name}.md", self.prose(path.read_text(encoding="utf-8"), name, Path(file).parent.as_posix()))
        names = []
        for path in sorted((self.root / "docs").rglob("*.md")):
            name = path.relative_to(self.root / "docs").with_suffix("").as_posix()
            self.write(f"{name}.md", self.prose(path.read_text(encoding="utf-8"), name, f"docs/{Path(name).parent.as_posix()}"))
            names.append(name)
        return names

    def landing(self, trees: list[str]) -> None:
        "The landing page, from nbs/index.ipynb, with the navigation of the site"
        page = next((p for p in self.pages if p.name == "index"), None)
        if page: self.notebook(page)
        else: self.write("index.md", "# longlens\n")
        text = (self.to / "index.md").read_text(encoding="utf-8")
        self.write("index.md", text + "\n" + "\n\n".join(trees) + "\n")

    def all(self) -> None:
        "Write everything, and remove what is no longer made"
        for page in self.pages:
            if not page.name.endswith("index") or page.folder == "tutorials": self.notebook(page)
        house = rooms(self.pages)
        for room in house.values(): self.room(room, house)
        tutorials = [f"/{p.name}" for p in self.pages if p.folder == "tutorials"]
        written, reference = self.written(), self.reference()
        methods = [f"/{n}" for n in written if n.startswith("methods/")]
        rest = [f"/{n}" for n in written if not n.startswith("methods/")]
        beside = [f"/{n}" for n in BESIDE.values() if (self.to / f"{n}.md").exists()]
        self.landing([self.contents(tutorials, "Tutorials"), self.contents(methods, "Methods"),
                      self.contents([f"/{n}" for n in reference], "Reference", depth=2),
                      self.contents([f"/{one.name}" for one in house.values() if "/" not in one.folder], "Rooms", depth=2),
                      self.contents([*rest, *beside], "Project")])
        for path in sorted(self.to.rglob("*")):
            if path.is_file() and path not in self.made: path.unlink()


def only_imports(text: str) -> bool:
    "Does a cell do nothing but import?"
    try: return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(text).body)
    except SyntaxError: return False


def title_of(spec: dict[str, Any]) -> str:
    "What a chart is called"
    title = spec.get("title", "chart")
    text = title.get("text", "chart") if isinstance(title, dict) else title
    return " ".join(text) if isinstance(text, list) else str(text)


def stage(root: Path, to: Path) -> Stage:
    "Write the source tree of the site"
    made = Stage(root, to)
    made.all()
    return made
