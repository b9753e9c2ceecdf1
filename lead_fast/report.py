"""Self-contained HTML reports: of a run, and of a comparison."""

from __future__ import annotations

import dataclasses
import html
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lead_fast.config import LeadConfig, TrainConfig, read_yaml
from lead_fast.files import read_jsonl, write_text
from lead_fast.metrics import TRAINING_PARTS
from lead_fast.page import COLORS, figure, page, paragraph, section, table


def write_run_report(run: str | Path) -> Path:
    """Writes report.html of a run folder from its rounds.jsonl and, of a run that has ended, its summary.json.

    Raises:
        ValueError: the folder is no run, or has no round yet.
    """
    folder = Path(run)
    if not (folder / "rounds.jsonl").exists():
        raise ValueError(f"report: {folder} must be the folder of a run, but it has no rounds.jsonl")
    rounds, ended = read_jsonl(folder / "rounds.jsonl"), (folder / "summary.json").exists()
    if not (rounds or ended):
        raise ValueError(f"report: the run in {folder} must have a round that has ended, got none yet")
    summary = json.loads((folder / "summary.json").read_text()) if ended else _so_far(folder, rounds)
    parts = [paragraph(_run_sentence(summary), "lead"), *_run_warnings(summary)]
    if rounds:
        probs = figure(lambda ax: _plot_probs(ax, rounds), "Probability of each arm before its round's draw.")
        draws = figure(
            lambda ax: _plot_draws(ax, rounds), "The arm of each round; hollow: a first visit, not drawn.", height=2.2
        )
        rewards = figure(lambda ax: _plot_reward(ax, rounds), "Reward of each round, in nats, by arm.")
        parts += [section("Arms", probs, draws, _arm_table(summary, rounds)), section("Reward", rewards)]
    if "utility" in summary:
        utility = figure(
            lambda ax: _plot_utility(ax, summary["utility"]),
            "Utility (IDU) of all rows that may be chosen, before the first round and after the last.",
        )
        parts.append(section("Utility", utility))
    if rounds and "step_losses" in rounds[0]:
        steps = figure(
            lambda axes: _plot_steps(axes, rounds), "Each optimizer step: mean nll per supervised token, norm of the gradient "
            "before clipping, learning rate.", height=4.6, panels=(3, 1), sharex=True,
        )  # fmt: skip
        parts.append(section("Steps", steps))
    if summary.get("evaluations"):
        heldout = figure(
            lambda ax: _plot_heldout(ax, {"this run": [summary["evaluations"]]}),
            "Mean over held-out samples of their mean nll per supervised token, over trained tokens.",
        )
        parts.append(section("Held-out loss", heldout, _source_loss_table(summary["evaluations"])))
    if summary.get("sources"):
        parts.append(section("Sources", _source_table(summary["sources"])))
    cost = [_cost_table(summary)]
    if rounds:
        cost.append(figure(lambda ax: _plot_time(ax, rounds), "What the time of each round went into."))
    parts += [section("Cost", *cost), section("Setup", _setup_table(folder, summary))]
    path = folder / "report.html"
    write_text(path, page("LEAD run", parts))
    return path


def write_compare_report(
    folder: Path, rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], *, noisy_share: float | None = None
) -> Path:
    """Writes report.html of a comparison: its table, held-out loss over tokens, and the first LEAD run's arms in detail."""
    series = {row["title"]: [r["evaluations"] for r in results if r["method"] == row["method"]] for row in rows}
    best = min(rows, key=lambda r: r["heldout_loss"])
    lead = f"{len(rows)} methods, {rows[0]['seeds']} seeds each, the same trained tokens, step size and start. "
    lead += f"Lowest held-out loss: {best['title']}."
    header = ["method", "held-out loss", "std over seeds", "noisy rows chosen", "rounds", "steps", "samples", "tokens"]
    body = [
        [
            r["title"],
            f"{r['heldout_loss']:.4f}",
            f"{r['heldout_loss_std']:.4f}",
            f"{r['noisy_share']:.1%}",
            f"{r['rounds']:.0f}",
            f"{r['optimizer_steps']:.0f}",
            f"{r['samples']:.0f}",
            f"{r['trained_tokens']:,.0f}",
        ]
        for r in rows
    ]
    note = "" if noisy_share is None else f"Noisy rows in the pool: {noisy_share:.1%}."
    parts = [
        paragraph(lead, "lead"),
        section("Result", table(header, body), paragraph(note)),
        section("Held-out loss", figure(lambda ax: _plot_heldout(ax, series),
                 "Held-out loss over trained tokens: mean over seeds, band from lowest to highest.")),
    ]  # fmt: skip
    for row in rows:
        run = next(r for r in results if r["method"] == row["method"])
        rounds = run["rounds"]
        if len(rounds[0]["probs"]) < 2:
            continue
        parts.append(section(
            f"{row['title']}, seed {run['seed']}",
            figure(lambda ax, rounds=rounds: _plot_probs(ax, rounds), "Arm probabilities over rounds."),
            figure(lambda ax, rounds=rounds: _plot_reward(ax, rounds), "Reward of each round, in nats, by arm."),
            figure(lambda ax, run=run: _plot_utility(ax, run["utility"]), "Utility of all rows, at the start and at the end."),
        ))  # fmt: skip
    path = folder / "report.html"
    write_text(path, page("LEAD beside its controls", parts))
    return path


# Plots


def _plot_probs(ax: Axes, rounds: list[dict[str, Any]]) -> None:
    probs = np.array([r["probs"] for r in rounds])
    x = [r["round"] for r in rounds]
    for arm in range(probs.shape[1]):
        ax.plot(x, probs[:, arm], color=COLORS[arm % len(COLORS)], label=f"arm {arm}")
    ax.set(xlabel="round", ylabel="probability", ylim=(0, None))
    ax.legend(ncol=4, fontsize="small", frameon=False)


def _plot_draws(ax: Axes, rounds: list[dict[str, Any]]) -> None:
    for r in rounds:
        for arm in r["arms"]:
            color = COLORS[arm % len(COLORS)]
            ax.plot(r["round"], arm, "o", ms=4, color=color, mfc="white" if r["forced"] else color)
    ax.set(xlabel="round", ylabel="arm", yticks=range(len(rounds[0]["probs"])))


def _plot_reward(ax: Axes, rounds: list[dict[str, Any]]) -> None:
    points = [(r["round"], arm, reward) for r in rounds
              for arm, reward in zip(r["arms"], r["rewards"], strict=True) if reward is not None]  # fmt: skip
    for arm in sorted({arm for _, arm, _ in points}):
        x, y = zip(*[(n, reward) for n, a, reward in points if a == arm], strict=True)
        ax.plot(x, y, "o", ms=4, color=COLORS[arm % len(COLORS)], label=f"arm {arm}")
    ax.axhline(0.0, color="#8c959f", lw=0.8)
    ax.set(xlabel="round", ylabel="reward (nats)")
    ax.legend(ncol=4, fontsize="small", frameon=False)


def _plot_utility(ax: Axes, histogram: dict[str, Any]) -> None:
    edges = np.array(histogram["edges"])
    for name, color in (("start", COLORS[5]), ("end", COLORS[0])):
        ax.stairs(histogram[name], edges, color=color, fill=True, alpha=0.35, label=name)
        ax.stairs(histogram[name], edges, color=color)
    ax.set(xlabel="utility (nats)", ylabel="rows")
    ax.legend(frameon=False)


def _plot_heldout(ax: Axes, series: dict[str, list[list[dict[str, Any]]]]) -> None:
    for number, (title, runs) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        grid = np.linspace(0, max(e["trained_tokens"] for e in runs[0]), 100)
        curves = np.array([
            np.interp(grid, [e["trained_tokens"] for e in run], [e["heldout_loss"] for e in run]) for run in runs
        ])  # fmt: skip
        ax.plot(grid, curves.mean(0), color=color, label=title)
        if len(runs) > 1:
            ax.fill_between(grid, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
    ax.set(xlabel="trained tokens", ylabel="held-out loss (nats)")
    ax.legend(frameon=False)


# Tables and words


def _so_far(folder: Path, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run that goes on, or was interrupted: what its rounds and its preparation tell of its summary."""
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    made = [
        path
        for path in (folder / "prepared" / "prepare.json", Path(config.get("pool") or "") / "prepare.json")
        if path.exists()
    ]
    prepared = json.loads(made[0].read_text()) if made else {}
    seconds = Counter[str]()
    for r in rounds:
        seconds.update(r["seconds"])
    spent = {part: seconds[part] for part in TRAINING_PARTS}
    tokens, total = sum(r["tokens"] for r in rounds), max(1e-9, sum(spent.values()))
    return {
        "unfinished": True, "preset": config.get("preset", "robust"), "rounds": len(rounds), "rows": rounds[-1]["rows_used"],
        "pool": prepared.get("rows"), "arms": prepared.get("arms"), "preparation": prepared, "trained_tokens": tokens,
        "optimizer_steps": sum(r["steps"] for r in rounds), "seconds_by_part": seconds, "tokens_per_second": tokens / total,
        "estimation_share": (spent["estimate"] + spent["select"]) / total,
        "peak_mib": max(r["performance"]["peak_mib"] for r in rounds),
        "warmup_tokens": prepared.get("warmup", {}).get("tokens", 0),
        "scoring_tokens": prepared.get("scoring", {}).get("tokens", 0),
        "audit_tokens": sum(r.get("audit", {}).get("tokens", 0) for r in rounds),
        "warnings": [warning for r in rounds for warning in r.get("warnings", ())],
    }  # fmt: skip


def _run_sentence(summary: dict[str, Any]) -> str:
    pool = f" of {summary['pool']:,}" if summary["pool"] is not None else ""
    text = (
        f"{'Not finished. So far, p' if summary.get('unfinished') else 'P'}reset {summary['preset']}: {summary['rounds']:,} "
        f"rounds, {summary['rows']:,}{pool} rows, {summary['trained_tokens']:,} trained tokens in "
        f"{summary['optimizer_steps']:,} optimizer steps."
    )
    if summary.get("heldout_loss_before") is not None:
        text += f" Held-out loss {summary['heldout_loss_before']:.4f} before, {summary['heldout_loss_after']:.4f} after."
    return text


def _run_warnings(summary: dict[str, Any]) -> list[str]:
    warnings = []
    if summary["rounds"] < 100 and not summary.get("unfinished"):
        reach = summary["arm_probability_reachable"]
        warnings.append(
            f"{summary['rounds']} rounds are few for a bandit: with the best reward every time, one arm could have reached a "
            f"probability of {reach:.2f} at most. The arms visited are close to a lottery."
        )
    difficulty = summary.get("preparation", {}).get("difficulty", {})
    if difficulty.get("median", 0.0) >= 0.95:
        warnings.append(
            f"Median difficulty {difficulty['median']:.3f}: the model hardly used the prompt when the arms were made, so "
            "arms by difficulty mean little."
        )
    warnings += [f"Round {w['round']}: {w['text']}." for w in summary.get("warnings", ())]
    return [f'<p class="warning">{html.escape(w)}</p>' for w in warnings]


def _arm_table(summary: dict[str, Any], rounds: list[dict[str, Any]]) -> str:
    if not summary.get("arms"):
        return ""
    body = []
    for arm in summary["arms"]:
        rewards = [x for r in rounds for a, x in zip(r["arms"], r["rewards"], strict=True) if a == arm["arm"] and x is not None]
        visits = sum(arm["arm"] in r["arms"] for r in rounds)
        mean = f"{np.mean(rewards):.4f}" if rewards else "-"
        body.append(
            [
                f"arm {arm['arm']}",
                f"{arm['rows']:,}",
                f"{arm['tasks']}",
                f"{arm['mean_difficulty']:.3f}",
                f"{visits}",
                mean,
            ]
        )
    return table(["arm (0 is the easiest)", "rows", "tasks", "mean difficulty", "rounds", "mean reward"], body)


def _setup_table(folder: Path, summary: dict[str, Any]) -> str:
    """What the run was made with, and the options that are not the defaults; config.yaml has all of them."""
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
    defaults = {f.name: f.default for kind in (TrainConfig, LeadConfig) for f in dataclasses.fields(kind)}
    chosen = {name: value for name, value in config.items() if value != defaults.get(name) and name not in ("out", "resume")}
    made_with = {name: summary[name] for name in ("processes", "device", "precision", "versions") if name in summary}
    return table(["option", "value"], [[name.replace("_", " "), str(value)] for name, value in (chosen | made_with).items()])


def _source_table(sources: list[dict[str, Any]]) -> str:
    total, chosen = sum(s["pool"] for s in sources), max(1, sum(s["chosen"] for s in sources))
    body = [[s["source"], f"{s['pool']:,}", f"{s['pool'] / total:.1%}", f"{s['chosen']:,}", f"{s['chosen'] / chosen:.1%}"]
            for s in sources]  # fmt: skip
    return table(["source", "rows in the pool", "share", "rows chosen", "share"], body)


def _source_loss_table(evaluations: list[dict[str, Any]]) -> str:
    before, after = evaluations[0].get("by_source"), evaluations[-1].get("by_source")
    if not before or not after:
        return ""
    return table(["source", "before", "after"], [[k, f"{v:.4f}", f"{after[k]:.4f}"] for k, v in before.items()])


def _plot_time(ax: Axes, rounds: list[dict[str, Any]]) -> None:
    """Share of each part in a round's seconds, stacked."""
    parts = sorted({part for r in rounds for part in r["seconds"]}, key=lambda part: _PARTS.get(part, ("", 9))[1])
    seconds = np.array([[r["seconds"].get(part, 0.0) for r in rounds] for part in parts])
    x = [r["round"] for r in rounds]
    shares = 100 * seconds / np.maximum(seconds.sum(0), 1e-9)
    ax.stackplot(x, shares, labels=parts, colors=COLORS[: len(parts)], alpha=0.75)
    ax.set(xlabel="round", ylabel="share of the time (%)", ylim=(0, 100), xlim=(x[0], max(x[-1], x[0] + 1)))
    ax.legend(ncol=len(parts), fontsize="small", frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _plot_steps(axes: Any, rounds: list[dict[str, Any]]) -> None:
    """Loss, gradient norm and learning rate of each optimizer step."""
    columns = (("step_losses", "loss (nats)"), ("step_grad_norms", "gradient norm"), ("learning_rates", "learning rate"))
    for ax, (name, label), color in zip(axes[:, 0], columns, COLORS, strict=False):
        values = [value for r in rounds for value in r.get(name, ())]
        points = [(step, value) for step, value in enumerate(values, 1) if value is not None]
        ax.plot(*zip(*points, strict=True), color=color, lw=1.0) if points else None
        ax.set(ylabel=label, ylim=(0, None))
    axes[-1, 0].set(xlabel="optimizer step")


# What a round's time goes into, and the order in which it is shown.
_PARTS = {
    "step": ("forward, backward, optimizer", 0), "data": ("tokenizing, packing", 1), "select": ("drawing and ranking", 2),
    "estimate": ("observing, clocks, utilities, bandit", 3), "signals": ("warnings", 4), "evaluate": ("held-out rows", 5),
    "audit": ("re-scoring", 6), "checkpoint": ("checkpoints", 7),
}  # fmt: skip


def _cost_table(summary: dict[str, Any]) -> str:
    parts = summary["seconds_by_part"]
    total = sum(parts.values()) or 1.0
    body = [
        [f"{name}: {_PARTS[name][0]}" if name in _PARTS else name, f"{parts[name]:.2f}", f"{parts[name] / total:.1%}"]
        for name in sorted(parts, key=lambda part: _PARTS.get(part, ("", 9))[1])
    ]
    body.append(["rounds, all", f"{total:.2f}", "100%"])
    lines = []
    if "tokens_per_second" in summary:
        lines.append(
            f"{summary['tokens_per_second']:,.0f} tokens per second in the rounds (evaluation, audit and checkpoints apart); "
            f"LEAD's own share of that time {summary['estimation_share']:.2%}; peak memory {summary['peak_mib']:,.0f} MiB."
        )
    lines.append(
        f"Tokens: {summary['trained_tokens']:,} trained (forward and backward), {summary['warmup_tokens']:,} in the warm-up, "
        f"{summary['scoring_tokens']:,} scored and {summary.get('audit_tokens', 0):,} re-scored for the audit (forward only)."
    )
    return table(["part of the rounds", "seconds", "share"], body) + "".join(map(paragraph, lines))
