"""The picture in the README: the workbench on a question to SmolLM2, in JupyterLab, as Chromium shows it.

    .venv/bin/python tools/picture.py
"""
from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "nbs/images/workbench.png"
WIDEST = 1240    # of what is kept, pixels
CELL = """
import longlens as ll
from longlens.prompts.questions import read_questions, title_and_text
lm = ll.load("smollm2")
questions = read_questions("nq-sample")
film = next(q for q in questions if "coming home for christmas" in q.question)
text = "\\n\\n".join(": ".join(title_and_text(q.gold)) for q in (questions[0], film, questions[1]))
ll.explore(lm, text, question=film.question + "?")"""


def silenced(page: Any) -> Any:
    "The workbench with the head that copies most, and what the model says without it"
    from playwright.sync_api import expect
    app = page.locator(".lx-app")
    app.locator(".lx-chart svg.marks").first.wait_for()
    app.get_by_role("button", name="Silence this head").click()
    expect(app.get_by_role("rowheader", name="without")).to_be_visible()
    page.wait_for_timeout(1000)
    return app


def kept(app: Any) -> dict[str, float]:
    "From the top of the workbench to the end of a chart, whole, with the title of its axis"
    box, chart = app.bounding_box(), app.locator(".lx-picture", has_text="Where in the text").locator("svg.marks").bounding_box()
    return {"x": box["x"], "y": box["y"], "width": min(WIDEST, box["width"]), "height": chart["y"] + chart["height"] - box["y"] + 8}


def main() -> None:
    "Run one cell in JupyterLab, click, keep what is whole"
    sys.path.insert(0, str(ROOT / "tests"))
    from lab import browser, jupyterlab, open_page, run_notebook, write_notebook
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_notebook(root / "workbench.ipynb", CELL)
        with jupyterlab(root) as (url, token), browser(root / ".chrome", (1500, 2400)) as context:
            page = open_page(context, url)
            run_notebook(page, url, token, "workbench.ipynb", 300)
            page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
            page.screenshot(path=PICTURE, clip=kept(silenced(page)))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__": main()
