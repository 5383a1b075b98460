"The house: notebooks are the package tree, imports point downward, public names are few, typed and known to editors"
from __future__ import annotations

import ast
import inspect
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jedi
import pytest

import longlens
from longlens.run import Run

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PROGRAM = ROOT / "tests/typed_program.py"
FUNCTIONS = [name for name in longlens.__all__ if inspect.isfunction(getattr(longlens, name))]
CLASSES = [name for name in longlens.__all__ if inspect.isclass(getattr(longlens, name))]
CALLED_BY_OTHERS = {"longlens_attention", "longlens_mask"}    # by transformers, through its registries
TOGETHER = {"run", "settings", "options"}    # a Run, a dataclass of settings, and the fields of both by name


def notebooks() -> Iterator[tuple[Path, list[dict]]]:
    for path in sorted(NBS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts: yield path, json.loads(path.read_text(encoding="utf-8"))["cells"]


def text_of(cell: dict) -> str: return "".join(cell["source"])


def exported(cells: list[dict]) -> list[str]:
    return [text_of(c) for c in cells if c["cell_type"] == "code" and re.match(r"\s*#\| ?exporti?\b", text_of(c))]


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "longlens").rglob("*.py")):
        if path.name not in ("_modidx.py", "__init__.py"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))


# ---- the tree

def test_the_notebook_tree_is_the_package_tree() -> None:
    "nbs/X/NN_name.ipynb exports longlens/X/name.py, and NN is unique in its folder"
    numbers: Counter[str] = Counter()
    for path, cells in notebooks():
        place = path.relative_to(NBS)
        named = re.search(r"#\| ?default_exp ([\w.]+)", "\n".join(map(text_of, cells)))
        if path.stem == "index":
            assert not named, place
            continue
        number, _, name = path.stem.partition("_")
        assert re.fullmatch(r"\d\d", number) and name, f"{place}: NN_name.ipynb"
        numbers[f"{place.parent}/{number}"] += 1
        if place.parts[0] == "tutorials": assert not named, f"{place}: a tutorial is no module"
        else: assert named and named[1] == ".".join((*place.parent.parts, name)), f"{place} exports {named and named[1]}"
    assert not [place for place, count in numbers.items() if count > 1]


def test_every_room_has_a_page() -> None:
    "index.ipynb, with a title, a sentence, and a link to each notebook and room in it"
    for folder in sorted({path.parent for path, _ in notebooks()} - {NBS}):
        page = folder / "index.ipynb"
        assert page.exists(), folder.relative_to(ROOT)
        text = "\n".join(map(text_of, json.loads(page.read_text(encoding="utf-8"))["cells"]))
        assert re.match(r"# \S.*\n+> \S", text), page.relative_to(ROOT)
        links = set(re.findall(r"\]\(([\w./-]+\.ipynb)\)", text))
        inside = {p.name for p in folder.glob("*.ipynb")} - {"index.ipynb"}
        inside |= {f"{p.parent.name}/index.ipynb" for p in folder.glob("*/index.ipynb")}
        assert inside <= links, f"{page.relative_to(ROOT)} has no link to {', '.join(sorted(inside - links))}"


def test_links_between_notebooks_lead_somewhere() -> None:
    for path, cells in notebooks():
        for cell in cells:
            if cell["cell_type"] != "markdown": continue
            for link in re.findall(r"\]\(((?![a-z]+:|#)[^)\s#]+\.ipynb)", text_of(cell)):
                assert (path.parent / link).exists(), f"{path.relative_to(ROOT)}: {link}"


def test_every_exporting_notebook_shows_something() -> None:
    silent = [str(path.relative_to(NBS)) for path, cells in notebooks()
              if exported(cells) and not any(c.get("outputs") for c in cells if c["cell_type"] == "code")]
    assert not silent, silent


def test_export_cells_are_small() -> None:
    "A median of 10 lines or fewer, and nine in ten of 25 or fewer"
    lines = sorted(text.count("\n") + 1 for _, cells in notebooks() for text in exported(cells))
    assert statistics.median(lines) <= 10 and lines[int(.9 * (len(lines) - 1))] <= 25


# ---- imports (that they point downward, `make test` checks with import-linter)

def test_no_underscored_name_crosses_a_module() -> None:
    crossing = [f"{module}: {name.name}" for module, tree in modules() for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("longlens")) and node.module != "typing"
                for name in node.names if name.name.startswith("_") and not name.name.startswith("__") and not name.asname]
    assert not crossing, "\n".join(crossing)


def test_all_names_what_others_use() -> None:
    "A name in an `__all__` is used by another module, a notebook, a test or a page, or is a class"
    texts = {path: path.read_text(encoding="utf-8") for folder in ("nbs", "tests", "tools", "benchmarks", "docs", "longlens")
             for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".ipynb", ".md", ".pyi") and path.name != "_modidx.py"}
    words = {path: set(re.findall(r"[A-Za-z_]\w*", text)) for path, text in texts.items()}
    unused = []
    for path in sorted((ROOT / "longlens").rglob("*.py")):
        found = re.search(r"^__all__ = (\[.*?\])", texts.get(path, ""), re.M | re.S)
        if not found: continue
        own = {path, *(p for p in texts if p.suffix == ".ipynb" and f"default_exp {module_of(path)}\"" in texts[p])}
        for name in ast.literal_eval(found[1]):
            others = any(name in w for p, w in words.items() if p not in own) or name in CALLED_BY_OTHERS
            if not others and not re.search(rf"^class {name}\b", texts[path], re.M): unused.append(f"{module_of(path)}.{name}")
    assert not unused, f"{len(unused)}: {', '.join(unused)}"


def module_of(path: Path) -> str: return ".".join(path.relative_to(ROOT / "longlens").with_suffix("").parts)


# ---- public names

@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_signature_is_typed_and_short(name: str) -> None:
    function = getattr(longlens, name)
    parameters = inspect.signature(function).parameters
    own = [n for n, p in parameters.items() if n not in TOGETHER and p.kind is not p.VAR_KEYWORD]
    own = [n for n in own if n not in {f.name for f in Run.__dataclass_fields__.values()}]
    assert len(own) <= 10, f"{name} has {len(own)} parameters of its own"
    untyped = [n for n, p in parameters.items() if p.annotation is p.empty]
    assert not untyped, f"{name}: {', '.join(untyped)}"
    returned = str(inspect.signature(function).return_annotation)
    assert returned not in ("Any", "<class 'inspect._empty'>"), f"{name} gives {returned}"


def test_editors_know_public_names_and_their_parameters() -> None:
    "Completion by jedi, which JupyterLab uses"
    script = "import longlens as ll\nll."
    names = {c.name for c in jedi.Script(script, path=ROOT / "scratch.py", project=jedi.Project(ROOT)).complete(2, 3)}
    assert set(longlens.__all__) <= names
    for name in FUNCTIONS:
        code = f"import longlens as ll\nll.{name}("
        signatures = jedi.Script(code, path=ROOT / "scratch.py", project=jedi.Project(ROOT)).get_signatures(2, len(name) + 4)
        known = {p.name for p in signatures[0].params} if signatures else set()
        stars = {n for n, p in inspect.signature(getattr(longlens, name)).parameters.items() if p.kind is p.VAR_KEYWORD}
        assert {*inspect.signature(getattr(longlens, name)).parameters} - stars <= known, name


def test_editors_know_what_a_model_can_do() -> None:
    script = "import longlens as ll\nlm = ll.load()\nlm.prefi"
    assert [c.name for c in jedi.Script(script, path=ROOT / "scratch.py", project=jedi.Project(ROOT)).complete(3, 8)] == ["prefill"]


def test_a_type_checker_finds_every_planted_mistake() -> None:
    "typed_program.py calls every public function: rightly, and with a mistake on each line marked `# wrong`"
    text = PROGRAM.read_text(encoding="utf-8")
    called = set(re.findall(r"\bll\.(\w+)", text))
    assert set(FUNCTIONS) <= called, f"not called: {', '.join(sorted(set(FUNCTIONS) - called))}"
    planted = {number for number, line in enumerate(text.splitlines(), 1) if line.rstrip().endswith("# wrong")}
    done = subprocess.run([sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", PROGRAM], cwd=ROOT,
                          capture_output=True, text=True)
    found = {int(line) for line in re.findall(r"typed_program\.py:(\d+): error", done.stdout)}
    assert found == planted, f"not found: {sorted(planted - found)}; found where nothing is wrong: {sorted(found - planted)}\n{done.stdout}"
