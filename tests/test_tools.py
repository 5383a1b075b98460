"The tools of the project, on a project of one notebook"
from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import check
import execute
import install
import nbfiles
import pytest
import readme

ROOT = Path(__file__).parent.parent


def code(text: str, **more: object) -> nbfiles.Cell:
    return {"cell_type": "code", "source": text.splitlines(True), "metadata": {}, "outputs": [], "execution_count": None,
            "id": f"c{len(text)}", **more}


def markdown(text: str) -> nbfiles.Cell:
    return {"cell_type": "markdown", "source": text.splitlines(True), "metadata": {}, "id": f"m{len(text)}"}


def book(path: Path, *cells: nbfiles.Cell) -> Path:
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbfiles.write({"cells": list(cells), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, path)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "A project in which everything is in order"
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    book(tmp_path / "nbs/00_one.ipynb", markdown("# One\n\n> first"), code("#| default_exp one"), code("#| export\nONE = 1"))
    book(tmp_path / "nbs/index.ipynb", markdown("# Title"))
    (tmp_path / "longlens").mkdir()
    (tmp_path / "longlens/__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "README.md").write_text(readme.readme(tmp_path / "nbs/index.ipynb"))
    check.nbdev("nbdev_export", tmp_path)
    return tmp_path


def append(path: Path, text: str) -> None: path.write_text(path.read_text() + text)


def test_nothing_to_say_of_a_project_in_order(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(project) == 0
    assert "FAIL" not in capsys.readouterr().out


def rename(project: Path) -> None:
    text = (project / "nbs/00_one.ipynb").read_text()
    (project / "nbs/00_one.ipynb").write_text(text.replace("default_exp one", "default_exp two"))


def store_an_error(project: Path) -> None:
    error = {"output_type": "error", "ename": "E", "evalue": "x", "traceback": []}
    book(project / "nbs/01_bad.ipynb", code("1/0", outputs=[error]))


def make_big(project: Path) -> None:
    with (project / "big.bin").open("wb") as f: f.truncate(9 * 2**20)


@pytest.mark.parametrize(("found_by", "said", "spoil"), [
    (check.modules, "one.py and its notebook differ", lambda p: append(p / "longlens/one.py", "\nTWO = 2\n")),
    (check.modules, "stray.py comes from no notebook", lambda p: (p / "longlens/stray.py").write_text("X = 1\n")),
    (check.modules, "one.py comes from no notebook", rename),
    (check.modules, "one.py is missing", lambda p: (p / "longlens/one.py").unlink()),
    (check.notebooks, "01_counted.ipynb is not clean", lambda p: book(p / "nbs/01_counted.ipynb", code("1", execution_count=7))),
    (check.notebooks, "01_bad.ipynb stores an error", store_an_error),
    (check.index, "README.md and nbs/index.ipynb differ", lambda p: book(p / "nbs/index.ipynb", markdown("# Other"))),
    (check.sizes, "big.bin has 9.0 MB", make_big),
    (check.paths, "notes.md:2 names a place on a machine", lambda p: (p / "notes.md").write_text("see\n/" + "home/ada/x\n")),
])
def test_what_is_wrong_is_named(project: Path, found_by: Callable[[Path], Iterator[str]], said: str,
                                spoil: Callable[[Path], object]) -> None:
    assert list(found_by(project)) == []
    spoil(project)
    problems = list(found_by(project))
    assert any(said in problem for problem in problems), problems


def test_an_ordinary_address_is_no_machine_path() -> None:
    for text in ("https://x.org/home/ada", "docs/tmp/x", "~/home/x", "a/opt/b"): assert not check.MACHINE.search(text)


def test_readme_shows_code_and_outputs_and_moves_links(tmp_path: Path) -> None:
    stream = {"output_type": "stream", "name": "stdout", "text": ["3\n"]}
    noise = {"output_type": "stream", "name": "stderr", "text": ["100%"]}
    table = {"output_type": "execute_result", "data": {"text/html": ["<table>"], "text/plain": ["shape"]}}
    links = "[a](probes/a.ipynb#x) ![b](images/b.png) [c](../LICENSE) [d](https://d.org) [e](#t)"
    index = book(tmp_path / "nbs/index.ipynb", markdown("# T\n\n" + links),
                 code("#| hide\nsecret = 1"), code("#| eval: false\nprint(3)  # [x](y)", outputs=[stream, noise]),
                 code("#| echo: false\nquiet", outputs=[table]))
    text = readme.readme(index)
    assert "[a](nbs/probes/a.ipynb#x) ![b](nbs/images/b.png) [c](LICENSE) [d](https://d.org) [e](#t)" in text
    assert "```python\nprint(3)  # [x](y)\n```\n\n```text\n3\n```" in text
    assert "```text\nshape\n```" in text
    assert not any(word in text for word in ("secret", "quiet", "100%", "#|"))


def test_readme_refuses_a_stored_error(tmp_path: Path) -> None:
    error = {"output_type": "error", "ename": "E", "evalue": "boom", "traceback": []}
    with pytest.raises(ValueError, match="boom"): readme.readme(book(tmp_path / "i.ipynb", code("1/0", outputs=[error])))


def test_execute_stores_the_same_outputs_twice(tmp_path: Path) -> None:
    kept = [{"output_type": "stream", "name": "stdout", "text": ["kept\n"]}]
    path = book(tmp_path / "a.ipynb", code("import sys; print('new'); print('noise', file=sys.stderr); object()"),
                code("#| slow\nraise ValueError", outputs=kept), code("import os; os.getcwd() == " + repr(str(tmp_path.resolve()))))
    run = [sys.executable, ROOT / "tools/execute.py", path]
    subprocess.run(run, check=True)
    first = path.read_bytes()
    subprocess.run(run, check=True)
    assert path.read_bytes() == first
    cells = nbfiles.read(path)["cells"]
    assert [out.get("text") or out["data"]["text/plain"] for out in cells[0]["outputs"]] == [["new\n"], ["<object>"]]
    assert cells[1]["outputs"] == kept
    assert cells[2]["outputs"][0]["data"]["text/plain"] == ["True"]


def test_execute_fails_and_leaves_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = book(tmp_path / "good.ipynb", code("1")), book(tmp_path / "bad.ipynb", code("2"), code("1 / 0"))
    before = bad.read_bytes()
    assert execute.main([str(bad), str(good)]) == 1
    assert bad.read_bytes() == before
    assert nbfiles.read(good)["cells"][0]["outputs"]
    assert "bad.ipynb, cell 1: ZeroDivisionError" in capfd.readouterr().err


def test_install_looks_where_pip_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "uv reads no settings of pip: without them it could take another build of torch"
    conf = tmp_path / "pip.conf"
    lines = ("[global]", "index-url = https://pypi.example/simple", "find-links = /some/wheels",
             "extra-index-url =", "  https://a.example", "  https://b.example")
    conf.write_text("\n".join(lines))
    for name in [n for n in os.environ if n.startswith("PIP_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(conf))
    monkeypatch.setenv("PIP_FIND_LINKS", "/other/wheels")
    command, _ = install.uv_command()
    given = list(itertools.pairwise(command))
    for pair in (("--index-url", "https://pypi.example/simple"), ("--find-links", "/other/wheels"),
                 ("--extra-index-url", "https://a.example"), ("--extra-index-url", "https://b.example")): assert pair in given
    assert ("--find-links", "/some/wheels") not in given  # the environment comes before the file
