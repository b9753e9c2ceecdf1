"""`lead-fast audit RUN`: the audit's table, audit.json and audit.html, a self-contained page."""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from lead_fast.audit import STAGES, TITLES, AuditReport, Records, audit, show
from lead_fast.files import write_json, write_text
from lead_fast.page import COLORS, figure, page, paragraph, section, table

_POINTS = 250  # of one scatter plot: more only make the page heavy
_KINDS = ("trained", "untouched")


def run_audit(run: str) -> dict[str, Any]:
    """Prints the audit of a run and writes audit.json and audit.html into its folder.

    Returns:
        A JSON summary: where the files are, and each estimator's error on re-scored rows.
    """
    report = audit(run)
    folder = Path(run)
    write_json(folder / "audit.json", report.to_dict())
    write_text(folder / "audit.html", audit_page(report))
    print(report, textwrap.fill(_HOW_TO_READ, 100), sep="\n\n", end="\n\n", flush=True)
    overall = [e for e in report.errors if e["source"] == "rescored" and e["slice"] == "all"]
    return {
        "audit": str(folder / "audit.html"),
        "estimator": report.estimator,
        "rounds": report.num_rounds,
        "rescored_rounds": len(report.rescored),
        "tokens": report.tokens,
        "rescored": [{k: e[k] for k in ("rows", "estimator", "n", "mae", "spearman_change")} for e in overall],
    }


def audit_page(report: AuditReport) -> str:
    """The whole page, HTML."""
    cost = (
        f"{report.estimator} chose. Of {report.num_rounds:,} rounds, {len(report.rescored):,} were followed by a re-scoring of "
        f"random rows with the model as it then was: {report.tokens:,} forward tokens, {report.seconds:.1f} seconds, which no "
        "estimator saw. Visits are free: a row that is trained on shows its loss."
    )
    parts = [paragraph(cost, "lead"), section("Error", _error_table(report), paragraph(_HOW_TO_READ))]
    sources = [("rescored", "Re-scored rows"), ("visits", "Visits")]
    for source, title in sources:
        if any(s == source and len(records) for (s, _), records in report.records.items()):
            parts.append(section(title, *_plots(report, source)))
    parts.append(section("Stages of training", _stage_table(report)))
    return page("Audit of predicted losses", parts)


_HOW_TO_READ = (
    "MAE and bias (predicted minus true) in nats per supervised token. Rank correlations by Spearman: of predicted and true "
    "loss, and of predicted and true change since the row was last seen; the latter also within each round, where a change "
    "common to all rows counts for nothing. Predictions that are all the same rank nothing: 0. Top 10%: share of the rows "
    "with the highest true loss that the prediction finds."
)


def _error_table(report: AuditReport) -> str:
    names = ("mae", "bias", "spearman_level", "spearman_change", "spearman_change_within", "top_overlap")
    header = ["rows", "estimator", "n", "MAE", "bias", "rank of loss", "of change", "within rounds", "top 10%"]
    body = []
    for (source, rows), title in TITLES.items():
        entries = [e for e in report.errors if (e["source"], e["rows"], e["slice"]) == (source, rows, "all") and e["n"]]
        for number, e in enumerate(entries):
            numbers = [show(e[name], 4 if name in ("mae", "bias") else 3, sign=name == "bias") for name in names]
            body.append([title if number == 0 else "", e["estimator"], f"{e['n']:,}", *numbers])
    return table(header, body)


def _stage_table(report: AuditReport) -> str:
    header = ["rows", "estimator", *(f"{what}, {stage}" for what in ("MAE", "rank of change") for stage in STAGES)]
    body = []
    for (source, rows), title in TITLES.items():
        if not len(report.records.get((source, rows), ())):
            continue
        for number, estimator in enumerate(report.estimators):
            found = [report.find(source, rows, estimator, stage) for stage in STAGES]
            body.append([title if number == 0 else "", estimator, *(show(e["mae"]) for e in found),
                         *(show(e["spearman_change"], 3) for e in found)])  # fmt: skip
    return table(header, body)


def _plots(report: AuditReport, source: str) -> list[str]:
    columns = len(report.estimators)
    names = {"rescored": ("trained rows", "untouched rows"), "visits": ("visits again", "first visits")}[source]
    captions = {
        False: "Predicted loss against true loss, in nats: exact on the line.",
        True: "Predicted against true change of the loss since last seen, in nats.",
    }
    scatters = [
        figure(functools.partial(_plot_scatter, report, source, names, change=change),
               f"{caption} Predictions outside the frame stand on its edge.", height=8.5 / columns + 0.4, panels=(1, columns),
               sharex=True, sharey=True)
        for change, caption in captions.items()
    ]  # fmt: skip
    return [
        *scatters,
        figure(functools.partial(_plot_rounds, report, source, names), "Error, bias and rank correlation over the rounds.",
               height=5.6, panels=(3, 2), sharex=True, sharey="row"),
        figure(functools.partial(_plot_arms, report, source, names), "Mean absolute error by arm (0 is the easiest).",
               height=2.6, panels=(1, 2), sharey=True),
    ]  # fmt: skip


def _plot_scatter(report: AuditReport, source: str, names: tuple[str, str], axes: Any, *, change: bool) -> None:
    shown = [(name, _sample(report.records[source, kind])) for name, kind in zip(names, _KINDS, strict=True)]
    bases = [records["seen_loss"] if change else 0.0 for _, records in shown]
    truths = [records["observed"] - base for (_, records), base in zip(shown, bases, strict=True)]
    low, high = float(min(t.min(initial=np.inf) for t in truths)), float(max(t.max(initial=-np.inf) for t in truths))
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin
    for ax, estimator in zip(axes[0], report.estimators, strict=True):
        for (name, records), true, base, color in zip(shown, truths, bases, COLORS, strict=False):
            predicted = records.predicted[estimator] - base if change else np.maximum(records.predicted[estimator], 0.0)
            ax.plot(true, np.clip(predicted, low, high), "o", ms=2.5, alpha=0.4, mew=0, color=color, label=name,
                    clip_on=False)  # fmt: skip
        ax.plot([low, high], [low, high], color="#8c959f", lw=0.8)
        ax.set(title=estimator, xlabel="true", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes[0, 0].set(ylabel="predicted")
    axes[0, 0].legend(fontsize="small", frameon=False, markerscale=2, loc="upper left")


def _sample(records: Records) -> Records:
    """At most `_POINTS` of the records, the same ones for every estimator."""
    if len(records) <= _POINTS:
        return records
    keep = np.zeros(len(records), bool)
    keep[np.linspace(0, len(records) - 1, _POINTS).astype(np.int64)] = True
    return records.where(keep)


def _plot_rounds(report: AuditReport, source: str, names: tuple[str, str], axes: Any) -> None:
    labels = {"mae": "MAE (nats)", "bias": "bias (nats)", "spearman_change": "rank of change"}
    for column, (kind, name) in enumerate(zip(_KINDS, names, strict=True)):
        for row, (statistic, label) in enumerate(labels.items()):
            ax = axes[row, column]
            for number, estimator in enumerate(report.estimators):
                curve = next(c for c in report.curves if (c["source"], c["rows"], c["estimator"]) == (source, kind, estimator))
                points = [(x, y) for x, y in zip(curve["round"], curve[statistic], strict=True) if y is not None]
                # Thinner from one to the next: curves that lie on each other stay visible.
                width = 0.8 + 0.7 * (len(report.estimators) - 1 - number)
                ax.plot(*(zip(*points, strict=True) if points else ([], [])), "o-", ms=width + 1.6, lw=width,
                        color=_color(number), label=estimator)  # fmt: skip
            if statistic != "mae":
                ax.axhline(0.0, color="#8c959f", lw=0.8)
            if column == 0:
                ax.set(ylabel=label)
        axes[0, column].set(title=name)
        # One estimator may be far off: the others are to be told apart all the same.
        axes[0, column].set_yscale("log")
        axes[1, column].set_yscale("symlog", linthresh=0.1)
        axes[2, column].set(xlabel="round")
    axes[0, 0].legend(fontsize="small", frameon=False)


def _plot_arms(report: AuditReport, source: str, names: tuple[str, str], axes: Any) -> None:
    for ax, kind, name in zip(axes[0], _KINDS, names, strict=True):
        for number, estimator in enumerate(report.estimators):
            entries = [e for e in report.errors if e["slice"].startswith("arm ") and e["n"]
                       and (e["source"], e["rows"], e["estimator"]) == (source, kind, estimator)]  # fmt: skip
            arms = [int(e["slice"].removeprefix("arm ")) for e in entries]
            size = 5 + 2 * (len(report.estimators) - 1 - number)
            ax.plot(arms, [e["mae"] for e in entries], "o", ms=size, color=_color(number), label=estimator)
            ax.set(xticks=arms)
        ax.set(title=name, xlabel="arm", yscale="log")
        ax.margins(x=0.15)
        ax.grid(axis="y", which="both", color="#d8dee4", lw=0.6)
    axes[0, 0].set(ylabel="MAE (nats)")
    axes[0, 0].legend(fontsize="small", frameon=False)


def _color(number: int) -> str:
    # The scatter plots' two colours stand for kinds of rows: estimators have others.
    return COLORS[2:][number % len(COLORS[2:])]
