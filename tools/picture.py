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
CELL = '''
import longlens as ll
lm = ll.load("smollm2")
text = """The library of Lindau was opened at the harbour in 1896. Its first director was Clara Voss, who had been a watchmaker.
She collected sea charts and the logs of ships. In 1923 a fire destroyed the reading room, but the charts were saved.
Today the library is led by Dora Lund. She had the roof covered with green tiles. There is a tour every Thursday."""
ll.explore(lm, text, question="Who was the first director of the library?")'''


def silenced(page: Any) -> Any:
    "The workbench with the head that copies most, and what the model says without it"
    from playwright.sync_api import expect
    app = page.locator(".lx-app")
    app.locator(".lx-chart svg.marks").first.wait_for()
    app.get_by_role("button", name="Silence this head").click()
    expect(app.get_by_role("rowheader", name="without")).to_be_visible(timeout=150_000)
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
