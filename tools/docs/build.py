"""The site: tools/docs/build.py writes _docs from the notebooks, docs/, and the files that have a page.

Every page works from a plain file server, and from the file system, with no network: Vega comes from vl-convert, which draws
the pictures in the notebooks, MathJax from a Python package, and the rest is Sphinx's and the theme's. Nothing is executed.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from importlib.metadata import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

from stage import Stage, stage

MATHJAX = "sphinx-mathjax-offline"


def vendored(to: Path) -> None:
    "The scripts that pages load: Vega with the look of the report pages, and MathJax as one file"
    from longlens.charts.page import PAGE, vega_script
    to.mkdir(parents=True, exist_ok=True)
    (to / "vega.js").write_text(f"{vega_script()}\nwindow.longlensPage = {json.dumps(PAGE)};\n", encoding="utf-8")
    found = [f for f in files(MATHJAX) or [] if f.name == "tex-svg.js"]
    if not found: raise FileNotFoundError(f"{MATHJAX} has no tex-svg.js: install the version that constraints.txt names")
    shutil.copy(found[0].locate(), to / "tex-svg.js")


def sphinx(root: Path, source: Path, out: Path, trees: Path, jobs: int) -> int:
    "Run Sphinx; its exit status"
    from sphinx.cmd.build import main
    (static := source / "_static").mkdir(exist_ok=True)
    os.environ.update(LONGLENS_ROOT=str(root), LONGLENS_STATIC=str(static))
    # -a: all pages are written, for each has the navigation of the whole site; what is read again is what changed
    return main(["-q", "-a", "-b", "html", "-j", str(jobs), "-c", str(HERE), "-d", str(trees), str(source), str(out)])


def swept(source: Path, out: Path) -> None:
    "Remove pages whose sources are gone, which Sphinx leaves"
    for page in out.rglob("*.html"):
        name = page.relative_to(out).with_suffix("")
        if not (source / name).with_suffix(".md").exists() and name.name not in ("genindex", "search", "py-modindex"): page.unlink()


def build(root: Path, out: Path, work: Path, jobs: int = 2) -> tuple[int, Stage]:
    "Build the site; the exit status of Sphinx, and what was staged"
    made = stage(root, work / "source")
    status = sphinx(root, work / "source", out, work / "doctrees", jobs)
    swept(work / "source", out)
    vendored(out / "_static")
    (out / ".nojekyll").touch()    # GitHub leaves folders out that start with an underscore, unless told not to
    return status, made


def main(args: list[str] | None = None) -> int:
    "Build, and say where it is"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the project: settings.ini, nbs/, docs/")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site")
    parser.add_argument("--work", type=Path, default=ROOT / "build/docs", help="folder for sources and caches")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    asked = parser.parse_args(args)
    start = time.time()
    out = asked.out.resolve()
    status, made = build(asked.root.resolve(), out, asked.work.resolve(), asked.jobs)
    there = f"{len(list(out.rglob('*.html')))} pages, {made.live['chart']} live charts, {made.live['widget']} widgets"
    print(f"{os.path.relpath(out)}/index.html: {there}, {time.time() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
