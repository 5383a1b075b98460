"""A JupyterLab and a browser for tests: a server of its own on a free port, Chromium, and no way out of this machine"""
from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
        "--disable-sync --disable-dev-shm-usage").split()


def find_chromium() -> str | None:
    "The browser that is installed, or that CHROMIUM names"
    return next((path for name in (os.environ.get("CHROMIUM") or "", *NAMES) if name and (path := shutil.which(name))), None)


def missing(*needs: str) -> str:
    "Why there can be no test in a browser; nothing, if there can"
    for module in needs or ("playwright", "jupyterlab"):
        try: __import__(module)
        except ImportError: return f"{module} is not installed: pip install {module}"
    return "" if find_chromium() else "no Chromium is installed: apt-get install chromium, or say where it is with CHROMIUM="


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyterlab(
    root: Path,    # where notebooks, settings and the log are
) -> Iterator[tuple[str, str]]:    # address, token
    "A JupyterLab with settings of its own, and no news"
    port, token = free_port(), secrets.token_hex(16)
    own = {f"JUPYTER_{k}_DIR": str(root / f".{k.lower()}") for k in ("CONFIG", "DATA", "RUNTIME")}
    settings = {"apputils-extension/notification": {"fetchNews": "false"}, "notebook-extension/tracker": {"windowingMode": "none"}}
    for name, values in settings.items():    # no news; every cell is in the page
        file = root / ".config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    here = {"IPYTHONDIR": str(root / ".ipython"), "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **own, **here}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={root}", "--allow-root", "--expose-app-in-browser",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(root / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, root / "lab.log")
            yield f"http://127.0.0.1:{port}", token
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        if server.poll() is not None: raise RuntimeError(log.read_text()[-2000:])
        try: return urllib.request.urlopen(url, timeout=2).close()
        except OSError: time.sleep(0.25)
    raise TimeoutError(f"JupyterLab did not answer in a minute: {log.read_text()[-2000:]}")


@contextmanager
def browser(
    folder: Path,                  # for its profile
    size: tuple[int, int] = (1400, 1000),
) -> Iterator[Any]:                # a Playwright context
    "A headless Chromium"
    from playwright.sync_api import expect, sync_playwright
    with sync_playwright() as pw:
        how = {"executable_path": find_chromium(), "headless": True, "args": ARGS, "viewport": {"width": size[0], "height": size[1]}}
        context = pw.chromium.launch_persistent_context(str(folder), **how)
        context.set_default_timeout(60_000)
        expect.set_options(timeout=30_000)
        yield context
        context.close()


def open_page(context: Any, home: str) -> Any:
    "A page that can only reach `home`; `page.outside` has what it wanted elsewhere, `page.wrong` what its console complained of"
    page = context.new_page()
    page.outside, page.wrong = [], []

    def gate(route: Any) -> None:
        if route.request.url.startswith((home, "data:", "blob:")): return route.continue_()
        page.outside.append(route.request.url)
        route.abort()
    page.route("**/*", gate)
    page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.wrong.append(str(e)))
    return page


def write_notebook(path: Path, *cells: str) -> Path:
    "A notebook of code cells"
    empty = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    made = [{**empty, "id": f"c{i}", "source": c} for i, c in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


_READY = "window.jupyterapp?.shell.currentWidget?.context?.isReady"
_IDLE = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
_DONE = """() => { const w = window.jupyterapp.shell.currentWidget, m = w.content.model.cells;
  for (let i = 0; i < m.length; i++) if (m.get(i).type === 'code' && !m.get(i).executionCount) return false;
  return w.sessionContext.session.kernel.status === 'idle'; }"""


def run_notebook(page: Any, url: str, token: str, name: str, seconds: float = 120) -> None:
    "Open a notebook in JupyterLab and run all of it"
    page.goto(f"{url}/lab/tree/{name}?reset&token={token}")
    for condition in (_READY, _IDLE): page.wait_for_function(f"() => {condition}", timeout=1000 * seconds)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(_DONE, timeout=1000 * seconds)


def errors_of(page: Any) -> list[str]:
    "What cells raised, of the notebook that is open"
    return page.evaluate("""() => { const m = window.jupyterapp.shell.currentWidget.content.model.cells, out = [];
      for (let i = 0; i < m.length; i++) for (const o of m.get(i).toJSON().outputs ?? []) if (o.output_type === 'error') out.push(o.evalue);
      return out; }""")


def set_theme(page: Any, name: str) -> None:
    "JupyterLab Light or JupyterLab Dark"
    page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
    page.wait_for_function("dark => document.body.dataset.jpThemeLight === String(!dark)", arg="Dark" in name)


AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}    # its rules for WCAG 2.2, A and AA
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}    # all that a dark theme can break


def axe_lines(response: Any) -> list[str]:
    "What axe-core found, a line each: rule, element, and why"
    found = [(v["id"], n) for v in response["violations"] for n in v["nodes"]]
    return [f"{rule}: {n['target'][-1]}: {n['failureSummary'].splitlines()[-1].strip()}" for rule, n in found]


def axe_violations(page: Any, within: str = "body", contrast_only: bool = False) -> list[str]:
    "What axe-core finds inside an element"
    from axe_playwright_python.sync_playwright import Axe
    return axe_lines(Axe().run(page, context=within, options=CONTRAST if contrast_only else AXE).response)
