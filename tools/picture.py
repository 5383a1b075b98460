"""The picture in the README: the top of the page that `make demo` writes, as Chromium shows it.

    make demo && .venv/bin/python tools/picture.py
"""
from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "out/demo/index.html", ROOT / "nbs/images/report.png"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    "Open the page, wait for its charts, keep what fits on one screen"
    if not PAGE.is_file(): raise SystemExit(f"{PAGE.relative_to(ROOT)} is not there: run `make demo` first")
    PICTURE.parent.mkdir(exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=FLAGS)
        tab = browser.new_page(viewport={"width": 1000, "height": 1620}, color_scheme="light")
        tab.goto(PAGE.as_uri())
        tab.wait_for_selector("svg, canvas")
        tab.wait_for_timeout(1500)
        tab.screenshot(path=PICTURE)
        browser.close()
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__": main()
