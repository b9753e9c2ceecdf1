"""Parts of a self-contained HTML page: tables, plots as inline SVG, sections. No script, nothing fetched."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#57606a", "#bf8700", "#0550ae")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead, figcaption { color: #57606a; } figure { margin: 1rem 0; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; } th { color: #57606a; font-weight: 600; }
.warning { background: #fff8c5; border-left: 4px solid #d4a72c; padding: .5rem .8rem; margin: .6rem 0; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML document of the parts below."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str, css: str = "") -> str:
    """A paragraph of plain text, with a class of the page's style; no text, no paragraph."""
    return f'<p class="{css}">{html.escape(text)}</p>' if text else ""


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first column is aligned left."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def figure(
    plot: Callable[[Any], None], caption: str, *, height: float = 3.2, panels: tuple[int, int] = (1, 1), **subplots: Any
) -> str:
    """A plot as inline SVG.

    Args:
        plot: draws on the matplotlib Axes, or, of several panels, on their array [rows, columns].
        caption: plain text below it.
        height: inches, of a width of 8.5.
        panels: rows and columns of Axes.
        **subplots: sharex, sharey, ... of `plt.subplots`.
    """
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "lead"}):
        drawing, axes = plt.subplots(*panels, figsize=(8.5, height), layout="constrained", squeeze=False, **subplots)
        try:
            plot(axes[0, 0] if panels == (1, 1) else axes)
            buffer = io.StringIO()
            drawing.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            plt.close(drawing)
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"
