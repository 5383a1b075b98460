"""Is the repository as it should be? Prints what is not, with what to do about it.

Compares with what nbdev would write into a copy, not with git: a working tree with changes is checked as it is.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from nbfiles import read
from readme import readme

ROOT = Path(__file__).resolve().parent.parent
BIG = 8 * 2**20
MACHINE = re.compile(r"(?<![\w.~-])/(?:home|Users|root|tmp|work|mnt|opt)/\w[\w./-]*|file:///[\w.]")


def files(root: Path) -> list[Path]:
    "Every file that is, or would be, committed"
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                            capture_output=True, text=True, check=True).stdout
    return [root / name for name in sorted(set(listed.split("\0"))) if name and (root / name).is_file()]


def copy(root: Path, to: Path) -> Path:
    "A copy of the notebooks and the package's own files, without the exported modules"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(root / "nbs", to / "nbs", ignore=skip)
    shutil.copy(root / "settings.ini", to)
    for init in (root / "longlens").rglob("__init__.py"):
        (to / init.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, to / init.relative_to(root))
    return to


def nbdev(command: str, folder: Path) -> None:
    "Run one of nbdev's commands in a folder"
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}    # set, nbdev exports nothing
    done = subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{command} failed:\n{done.stdout}{done.stderr}")


def modules(root: Path) -> Iterator[str]:
    "Modules in step with their notebooks, and none without one"
    with tempfile.TemporaryDirectory() as folder:
        fresh = copy(root, Path(folder) / "copy")
        nbdev("nbdev_export", fresh)
        made = {p.relative_to(fresh).as_posix(): p.read_bytes() for p in (fresh / "longlens").rglob("*.py")}
    here = {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / "longlens").rglob("*.py")}
    for name in sorted(made.keys() | here.keys()):
        if name not in made: yield f"{name} comes from no notebook: delete it, or write the notebook"
        elif name not in here: yield f"{name} is missing: run nbdev_export"
        elif made[name] != here[name]: yield f"{name} and its notebook differ: run nbdev_export (or nbdev_update, if the module is right)"


def notebooks(root: Path) -> Iterator[str]:
    "Notebooks cleaned, and without stored errors"
    with tempfile.TemporaryDirectory() as folder:
        fresh = copy(root, Path(folder) / "copy")
        nbdev("nbdev_clean", fresh)
        clean = {p.relative_to(fresh): p.read_bytes() for p in (fresh / "nbs").rglob("*.ipynb")}
    for name, content in sorted(clean.items()):
        book = read(root / name)
        outputs = [out for cell in book["cells"] for out in cell.get("outputs", [])]
        if (root / name).read_bytes() != content: yield f"{name} is not clean: run nbdev_clean"
        if set(book["metadata"]) - {"kernelspec"}: yield f"{name} has metadata besides the kernel: {', '.join(book['metadata'])}"
        if any(out["output_type"] == "error" for out in outputs): yield f"{name} stores an error: mend it and run tools/execute.py"


def sizes(root: Path) -> Iterator[str]:
    "No file over 8 MB"
    for file in files(root):
        if file.stat().st_size > BIG: yield f"{file.relative_to(root)} has {file.stat().st_size / 2**20:.1f} MB: 8 MB at most"


def index(root: Path) -> Iterator[str]:
    "README.md as nbs/index.ipynb has it"
    file, text = root / "README.md", readme(root / "nbs/index.ipynb")
    if not file.exists() or file.read_text(encoding="utf-8") != text: yield "README.md and nbs/index.ipynb differ: run make readme"


def paths(root: Path) -> Iterator[str]:
    "No path of somebody's machine"
    for file in files(root):
        try: text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        for number, line in enumerate(text.splitlines(), 1):
            if found := MACHINE.search(line): yield f"{file.relative_to(root)}:{number} names a place on a machine: {found[0]}"


CHECKS: list[Callable[[Path], Iterator[str]]] = [modules, notebooks, index, sizes, paths]


def main(root: Path = ROOT) -> int:
    "Run every check; how many found something"
    bad = 0
    for check in CHECKS:
        problems = list(check(root))
        bad += bool(problems)
        print(f"{'FAIL' if problems else 'ok  '} {check.__doc__}")
        for problem in problems: print(f"     {problem}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
