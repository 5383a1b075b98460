"""What execute.py stores of a chart or a widget, so that the site can show it live.

A chart is stored as a picture, which Jupyter and code hosts show, and beside it as the Vega-Lite specification that the
picture was drawn from, which the site draws. A widget is stored as the state of its models just after its cell ran.
"""
from __future__ import annotations

import json
import sys
from typing import Any

CHART = "application/vnd.vegalite.v6+json"
WIDGET = "application/vnd.longlens.widget+json"
VIEW = "application/vnd.jupyter.widget-view+json"
MOST = 2**21    # characters; a larger chart or widget is stored as a picture or as text only


def rounded(value: Any) -> Any:
    "The value with seven digits in every float: what a chart can show, and as many as float32 has"
    if isinstance(value, float): return float(f"{value:.7g}")
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
    return [*map(rounded, value)] if isinstance(value, list) else value


def fits(value: Any, what: str) -> bool:
    "Is it small enough to be stored in a notebook?"
    size = len(json.dumps(value))
    if size > MOST: print(f"{what} of {size / 2**20:.1f} MB is not stored: {MOST / 2**20:.0f} MB at most", file=sys.stderr)
    return size <= MOST


def store_charts() -> None:
    "From now on Altair's renderer `png` gives the specification too"
    import altair as alt
    from altair.vegalite.v6.display import png_renderer

    def both(spec: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = png_renderer(spec, **options)
        spec = rounded(spec)
        return {**data, **({CHART: spec} if fits(spec, "the specification of a chart") else {})}, metadata
    alt.renderers.register("png", both)


def chart_of(data: dict[str, Any]) -> dict[str, Any] | None:
    "The specification of the chart that an output shows, also where it is stored as Altair's HTML"
    if CHART in data or WIDGET in data: return data.get(CHART)
    html = "".join(data.get("text/html", ""))
    if "altair-viz-" not in html or (at := html.rfind("})({")) < 0: return None
    try: spec = json.JSONDecoder().raw_decode(html, at + 3)[0]
    except json.JSONDecodeError: return None
    return spec if "$schema" in spec else None


def plain(model: dict[str, Any]) -> dict[str, Any]:
    "A model without what is not set, and without the name of the class that would show it in Jupyter"
    state = {k: rounded(v) for k, v in model["state"].items() if v is not None and not k.startswith(("_model_", "_view_"))}
    if "spec" in state and "vega" in state.get("_esm", ""): del state["_esm"]    # a JupyterChart brings all of Vega: the site has it
    return {"kind": model["model_name"].removesuffix("Model"), "state": state,
            **({"buffers": model["buffers"]} if model.get("buffers") else {})}


def widget_state(view: dict[str, Any]) -> dict[str, Any] | None:
    "A widget and all that it is made of, by number instead of by random name; None if it is too large"
    from ipywidgets.embed import dependency_state
    from ipywidgets.widgets.widget import _instances
    widget = _instances.get(view["model_id"])
    if widget is None: return None
    models = {name: plain(model) for name, model in dependency_state([widget], drop_defaults=False).items()}
    text = json.dumps({"view": view["model_id"], "models": models})
    for number, name in enumerate(sorted(models, key=text.index)): text = text.replace(name, f"widget-{number}")
    return state if fits(state := json.loads(text), "the state of a widget") else None


def with_widget(data: dict[str, Any]) -> dict[str, Any]:
    "The data of an output, its live widget replaced by the stored state"
    kept = {kind: value for kind, value in data.items() if kind != VIEW}
    state = widget_state(data[VIEW]) if VIEW in data else None
    return {**kept, WIDGET: state} if state else kept
