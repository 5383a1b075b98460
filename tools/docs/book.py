"""The notebooks of the project, as pages: what each is called, what it defines, and where it stands on the site.

The site has the rooms of the house: a folder of nbs/ is a room, its `index.ipynb` is the room's page, and the order is that of
the contract in pyproject.toml, from the ground up. Within a room it is the order of the file names. A folder without an index
gets a page that lists its notebooks, so that a new one is never lost.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from entries import Entry, entries, ordered
from nbfiles import Cell, directives, read, source, without_directives

ROOMS = ("tutorials", "", "models", "encoders", "needle_lm", "prompts", "task_data", "attention", "measure", "interventions",
         "retrieval_eval",
         "sweeps", "charts", "probes", "apps", "cli")
GROUND = ("Ground floor", "What every room stands on, and nothing of longlens below it: reports, texts, methods, runs.")
PARTS = {    # part of the public reference -> the rooms whose public names it lists; the rest goes to the last
    "models": ("Models and encoders", ("models", "encoders", "needle_lm")),
    "prompts": ("Prompts", ("prompts", "task_data", "retrieval_eval")),
    "measuring": ("Attention and its statistics", ("attention", "measure")),
    "interventions": ("Interventions", ("interventions",)),
    "probes": ("Probes and reports", ("probes", "report", "run", "sweeps")),
    "more": ("Charts, apps and the rest", ()),
}
TITLE = re.compile(r"\A\s*#[ \t]+(.+)(?:\s*\n>[ \t]*(.+))?")
HIDDEN = {"hide", "default_exp"}


def shown(cell: Cell) -> bool:
    "Does a cell have a place on the page?"
    marks = directives(cell)
    return cell["cell_type"] != "raw" and not HIDDEN & set(marks) and marks.get("include") != "false" and bool(source(cell).strip())


def exported(cell: Cell) -> bool:
    "Is it a cell of the package?"
    return cell["cell_type"] == "code" and bool({"export", "exporti", "exports"} & set(directives(cell)))


@dataclass(frozen=True)
class Page:
    "One notebook"
    path: Path      # of the file
    name: str       # on the site, without suffix: measure/02_capture

    @cached_property
    def cells(self) -> list[Cell]: return read(self.path)["cells"]

    @cached_property
    def heading(self) -> tuple[str, str]:
        "Title and subtitle"
        first = next((source(c) for c in self.cells if c["cell_type"] == "markdown" and TITLE.match(source(c))), "")
        found = TITLE.match(first)
        return (found[1].strip(), (found[2] or "").strip()) if found else (self.path.stem, "")

    @cached_property
    def module(self) -> str:
        "The module that the notebook exports to, without the package; empty if it exports nothing"
        named = [directives(c)["default_exp"] for c in self.cells if c["cell_type"] == "code" and "default_exp" in directives(c)]
        return named[0] if named and any(map(exported, self.cells)) else ""

    @property
    def folder(self) -> str: return self.name.rpartition("/")[0]

    @cached_property
    def entries(self) -> list[Entry]:
        "What the notebook exports, in order, private classes included"
        return [e for c in self.cells if exported(c) for e in entries(without_directives(c), f"longlens.{self.module}", private=True)]


def pages(nbs: Path) -> list[Page]:
    "Every notebook under a folder, in the order of the site"
    found = [Page(p, p.relative_to(nbs).with_suffix("").as_posix()) for p in nbs.rglob("*.ipynb")
             if not any(part[0] in "._" for part in p.relative_to(nbs).parts)]
    order = {folder: number for number, folder in enumerate(ROOMS)}
    return sorted(found, key=lambda p: (order.get(p.folder.split("/")[0], len(order)), p.folder, p.name))


@dataclass(frozen=True)
class Room:
    "A folder of notebooks"
    folder: str
    index: Page | None    # its own page, index.ipynb
    pages: list[Page]    # the others
    rooms: list[str]    # the folders right below it

    @property
    def name(self) -> str:
        "Of its page on the site"
        return f"{self.folder}/index" if self.folder else "ground"

    @property
    def heading(self) -> tuple[str, str]:
        "Title, and a sentence"
        if self.index: return self.index.heading
        return (self.folder.rpartition("/")[2].replace("_", " ").capitalize(), "") if self.folder else GROUND


def rooms(found: Iterable[Page]) -> dict[str, Room]:
    "Every folder with notebooks, the ground floor first; the landing page and the tutorials belong to none"
    made: dict[str, Room] = {}
    for page in found:
        if page.name == "index" or page.folder.startswith("tutorials"): continue
        parts = page.folder.split("/") if page.folder else []
        for depth in range(len(parts) + bool(not parts)):
            folder = "/".join(parts[:depth + 1])
            if folder in made: continue
            made[folder] = Room(folder, None, [], [])
            if depth: made["/".join(parts[:depth])].rooms.append(folder)
        if page.name.endswith("/index"): made[page.folder] = replace(made[page.folder], index=page)
        else: made[page.folder].pages.append(page)
    return made


class Index:
    "Every exported name: where it is defined, and which page says so"

    def __init__(self, found: Iterable[Page], public: dict[str, str]):
        self.public = public    # name -> module without the package, as longlens/__init__.pyi has it
        self.names: dict[str, list[tuple[Entry, Page]]] = {}
        self.patched: dict[str, list[Entry]] = {}
        self.arguments: dict[str, set[str]] = {}    # module -> names of parameters in it
        self.modules: dict[str, str] = {}    # module -> name of its page
        for page in found:
            if page.module: self.modules[f"longlens.{page.module}"] = page.name
            parts = [part for one in page.entries for part in (one, *one.members)]
            self.arguments[page.module] = {p.name.lstrip("*") for part in parts for p in part.parameters}
            for one in page.entries:
                if "." in one.name: self.patched.setdefault(one.name.split(".")[0], []).append(one)
                else: self.names.setdefault(one.name, []).append((one, page))

    def find(self, name: str, module: str = "") -> tuple[Entry, Page] | None:
        "A name's entry and page: the module's own, the public one, or the only one"
        known = self.names.get(name, [])
        module = module or self.public.get(name, "")
        own = [pair for pair in known if pair[0].module == f"longlens.{module}"]
        return own[0] if own else known[0] if len(known) == 1 else None

    def whole(self, entry: Entry) -> Entry:
        "A class with what it inherits from classes that are not public, and with the methods that were added to it later"
        if entry.kind != "class": return entry
        given = entry
        for base in entry.bases:
            known = self.find(base.split("[")[0])
            if not known or (given.parameters and not given.fields): continue
            above, own = self.whole(known[0]), {p.name: p for p in given.parameters}
            if above.fields or not own:
                both, marks = ordered([*(own.pop(p.name, p) for p in above.parameters), *own.values()])
                given = replace(given, parameters=both, marks=marks or above.marks)
        later = [m for m in self.patched.get(entry.name, []) if m.name not in {one.name for one in entry.members}]
        init = next((m for m in later if m.name.endswith(".__init__")), None)
        if init: given = replace(given, parameters=init.parameters, marks=init.marks)
        mine = {m.name.partition(".")[2]: m for m in (*entry.members, *(m for m in later if m.public))}
        theirs = {m.name.partition(".")[2]: m for base in entry.bases if base not in self.public for m in self._members(base)}
        added = [replace(m, name=f"{entry.name}.{name}") for name, m in theirs.items() if name not in mine]
        return replace(given, members=(*mine.values(), *added))

    def _members(self, base: str) -> tuple[Entry, ...]:
        known = self.find(base.split("[")[0])
        return self.whole(known[0]).members if known else ()

    def target(self, name: str, module: str = "") -> str:
        "What a link to a name points at; empty if there is no such name, or more than one"
        name, _, member = name.partition(".")
        known = None if name.startswith("_") else self.find(name, module)
        if not known: return ""
        if member and f"{name}.{member}" not in {m.name for m in self.whole(known[0]).members}: return ""
        return (f"longlens.{name}" if name in self.public else f"{known[0].module}.{name}") + f".{member}" * bool(member)
