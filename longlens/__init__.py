"""See what a long context does inside a transformer: exact attention statistics at full length.

This file is written by hand: it says which public name lives in which module, and loads that module when the
name is first used, so that `import longlens` costs next to nothing. Everything else in the package is exported
from the notebooks in `nbs/`.
"""
from __future__ import annotations

__version__ = "0.1.0"

from importlib import import_module
from typing import Any

_WHERE = {    # public name -> the module that defines it
    "load": "models", "LongModel": "models",
    "attend": "measure.kernels", "AttentionOperator": "measure.attention", "capture": "measure.capture",
    "SinkMass": "measure.statistics", "Received": "measure.statistics", "Entropy": "measure.statistics",
    "Support": "measure.statistics", "SpanMass": "measure.statistics", "Distance": "measure.statistics",
    "DistanceProfile": "measure.statistics", "Rows": "measure.statistics", "ResidualNorm": "measure.statistics",
    "ValueNorm": "measure.statistics",
    "intervene": "measure.intervention", "ablate": "measure.intervene", "streaming": "measure.intervene",
    "lambda_mask": "measure.intervene", "temperature": "measure.intervene", "scale_spans": "measure.intervene",
    "Context": "pieces", "compose": "pieces", "Haystack": "haystack", "needle_context": "context",
    "attention_sinks": "probes.sinks", "SinkReport": "probes.sink_report",
    "retrieval_heads": "probes.heads", "HeadReport": "probes.head_report", "duo_gates": "probes.gates",
    "load_encoder": "encoders", "Encoder": "encoders", "extended": "measure.windows",
    "sweep": "sweeps", "lost_in_the_middle": "probes.middle", "MiddleReport": "probes.middle_report",
    "needle_grid": "probes.grid", "GridReport": "probes.grid_report", "published_grid": "probes.grid",
    "MeanRows": "measure.answer_rows", "Rollout": "measure.rollout", "SpectralNorm": "measure.collapse", "TokenSpread": "measure.collapse",
    "length_collapse": "probes.collapse", "CollapseReport": "probes.collapse_report",
    "explore": "views.workbench", "token_view": "views.tokens", "Reading": "views.reading",
    "trace_context": "probes.traceback", "Trace": "probes.trace_report",
    "evaluate_traceback": "probes.trace_evaluation", "TracebackReport": "probes.traceback_report",
    "scan": "probes.trace_scan", "ScanReport": "probes.trace_scan",
    "context_gain": "probes.context_gain", "GainReport": "probes.context_gain",
    "Report": "report",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    "Load the module of a public name at its first use (PEP 562)"
    if name not in _WHERE: raise AttributeError(f"module 'longlens' has no attribute {name!r}; it has: {', '.join(_WHERE)}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    "The public names, loaded or not"
    return sorted({*globals(), *_WHERE})
