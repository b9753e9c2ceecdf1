"""Regret of the EXP3 family on arms with known rewards, against its bounds: a figure, a table, and the method's own setting.

    PYTHONPATH=.:tests python benchmarks/bandit_regret.py

Arms, players and bounds are those of the test (tests/bandit_arms.py), with more rounds and runs. Writes bandit_regret.png,
.json and .md into benchmarks/results. Seeds are fixed: every number can be had again. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import bandit_arms as world
import matplotlib
import numpy as np
import torch
from bandit_arms import LEARNERS, Arms, play, play_bandit, regret, uniforms
from interleaved import machine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tqdm import tqdm

from lead_fast.bandit import Bandit, exp3_probs, exp3_update

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SEED, DELTA = 11, 0.05
K, T = 4, 4000
K_SEQUENCE, T_SEQUENCE, SEGMENTS = 3, 8000, 3
CONTROLS, CONTROL_RUNS = ("uniform", "greedy"), 5
STUDY_ARMS, STUDY_GAMMA, STUDY_ROUNDS = 7, 0.1, (12, 100, 200, 1000, 5000)
GREEDY_TABLES = 200
COLORS = {"exp3": "#0969da", "exp3_ix": "#bc4c00", "exp3s": "#1a7f37"}
GREY = "#57606a"


# Against the bounds


def environments() -> list[Arms]:
    arms = [make(T, K, SEED).fixed() for make in world.ENVIRONMENTS]
    arms = [Arms("switching, best arm", a.rewards) if a.name == "switching" else a for a in arms]
    sequence = world.switching(T_SEQUENCE, K_SEQUENCE, SEED, SEGMENTS)
    return [*arms, Arms("switching, sequence", sequence.rewards, sequence.sequence)]


def parameters(learner: str, arms: Arms) -> tuple[float, float]:
    """gamma and share as the corollaries choose them."""
    if learner == "exp3":
        return world.exp3_gamma(arms.num_arms, arms.num_rounds), 0.0
    if learner == "exp3s":
        return world.exp3s_gamma(arms.num_arms, arms.num_rounds, int(arms.hardness()[-1])), 1.0 / arms.num_rounds
    return world.exp3_ix_gamma(arms.num_arms, arms.num_rounds), 0.0


def bound(learner: str, arms: Arms, gamma: float, share: float) -> np.ndarray | None:
    """The bound after each round, fp64 [T]; None where the learner has none against this comparator."""
    rounds = np.arange(1, arms.num_rounds + 1)
    if learner == "exp3s":
        return world.exp3s_bound(arms.num_arms, gamma, share, rounds, arms.hardness())
    if arms.sequence is not None:
        return None
    if learner == "exp3":
        return world.exp3_bound(arms.num_arms, gamma, arms.best_gain())
    return world.exp3_ix_bound(arms.num_arms, gamma, rounds, DELTA)


def measure(runs: int) -> list[dict[str, Any]]:
    """One entry per environment and learner; regret curves fp64 [runs, T]."""
    entries = []
    for arms in tqdm(environments(), desc="environments"):
        numbers = [uniforms(arms.num_rounds, SEED, run) for run in range(4 * runs)]
        few = numbers[:CONTROL_RUNS]
        controls = {c: np.stack([regret(arms, play_bandit(Bandit(arms.num_arms, c), arms, n)) for n in few]) for c in CONTROLS}
        for learner in LEARNERS:
            gamma, share = parameters(learner, arms)

            def final(broken: str, learner=learner, arms=arms, few=few, gamma=gamma, share=share) -> float:
                drawn = (play(learner, arms, n, gamma, share=share, broken=broken) for n in few)
                return float(np.mean([regret(arms, d)[-1] for d in drawn]))

            # exp3 returns to an arm that looked bad by luck only: its runs differ widely there.
            count = 4 * runs if (arms.name, learner) == ("late riser", "exp3") else runs
            curves = np.stack([regret(arms, play(learner, arms, n, gamma, share=share)) for n in numbers[:count]])
            limit = bound(learner, arms, gamma, share)
            summary = {
                "environment": arms.name,
                "learner": learner,
                "arms": arms.num_arms,
                "rounds": arms.num_rounds,
                "runs": count,
                "gamma": gamma,
                "share": share,
                "regret": float(curves[:, -1].mean()),
                "standard_error": float(curves[:, -1].std(ddof=1) / math.sqrt(count)),
                "largest": float(curves[:, -1].max()),
                "bound": None if limit is None else float(limit[-1]),
                **{control: float(curve[:, -1].mean()) for control, curve in controls.items()},
                **{broken: final(broken) for broken in world.BROKEN},
            }
            entries.append({"summary": summary, "curves": curves, "controls": controls, "bound": limit})
    return entries


def greedy_on_coins() -> dict[str, float]:
    """`greedy` on many tables of the stationary coins: it is drawn from luck once, in its first K rounds."""
    regrets = []
    for seed in tqdm(range(GREEDY_TABLES), desc="greedy"):
        arms = world.bernoulli(1000, K, seed)
        regrets.append(regret(arms, play_bandit(Bandit(K, "greedy"), arms, [0.5] * 1000))[-1])
    return {
        "tables": GREEDY_TABLES,
        "rounds": 1000,
        "regret": float(np.mean(regrets)),
        "largest": float(np.max(regrets)),
        "stuck": float(np.mean(np.array(regrets) > 300.0)),
    }


# The method's own setting


def reach(variant: str, gamma: float, share: float, rounds: int) -> float:
    """How far P of one arm can get in `rounds` draws: each round takes the draw and reward that raise it most."""
    log_w, mask = torch.zeros(STUDY_ARMS, dtype=torch.float64), torch.ones(STUDY_ARMS, dtype=torch.bool)
    mixed, best = 0.0 if variant == "exp3_ix" else gamma, 1.0 / STUDY_ARMS
    for _ in range(rounds):
        probs = exp3_probs(log_w, mask, mixed)
        choices = [
            exp3_update(log_w, mask, arm, reward, float(probs[arm]), gamma, variant=variant, share=share)
            for arm, reward in [(0, 1.0), *((arm, -1.0) for arm in range(1, STUDY_ARMS))]
        ]
        reached = [float(exp3_probs(choice, mask, mixed)[0]) for choice in choices]
        if max(reached) <= best + 1e-9:
            break
        best, log_w = max(reached), choices[int(np.argmax(reached))]
    return best


def study(runs: int) -> list[dict[str, Any]]:
    """Whole `Bandit`s with their running reward scale: K = 7, gamma = 0.1, coins of 0.75 and 0.3, fresh in every run."""
    rows, mask, good = [], torch.ones(STUDY_ARMS, dtype=torch.bool), STUDY_ARMS // 2
    for rounds in tqdm(STUDY_ROUNDS, desc="own setting"):
        count = max(10, min(16 * runs, 2000 * runs // rounds))
        tables = [world.bernoulli(rounds, STUDY_ARMS, SEED + run) for run in range(count)]
        settings = (
            ("exp3", STUDY_GAMMA, 0.0), ("exp3", world.exp3_gamma(STUDY_ARMS, rounds), 0.0),
            ("exp3_ix", STUDY_GAMMA, 0.0),
            ("exp3_ix", min(1.0, world.exp3_ix_gamma(STUDY_ARMS, rounds)), 0.0),
            ("exp3s", STUDY_GAMMA, 0.01), ("exp3s", STUDY_GAMMA, 1.0 / rounds),
        )  # fmt: skip
        for variant, gamma, share in dict.fromkeys(settings):
            drawn, last = [], []
            for run, arms in enumerate(tables):
                bandit = Bandit(STUDY_ARMS, variant, gamma, share)
                drawn.append(play_bandit(bandit, arms, uniforms(rounds, SEED, run)))
                last.append(float(bandit.probs(mask)[good]))
            # All other arms are equally bad, so regret is the share of draws that went to them; 6/7 under uniform.
            lost = (np.array(drawn) != good).mean(1) / (1.0 - 1.0 / STUDY_ARMS)
            rows.append({
                "rounds": rounds,
                "variant": variant,
                "gamma": gamma,
                "share": share,
                "runs": count,
                "reach": reach(variant, gamma, share, rounds),
                "last_prob": float(np.mean(last)),
                "never_drawn": float(np.mean([good not in d for d in drawn])),
                "regret_of_uniform": float(lost.mean()),
                "standard_error": float(lost.std(ddof=1) / math.sqrt(count)),
            })  # fmt: skip
    return rows


# The figure


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Regret over rounds, an environment a row and a learner a column."""
    shown = [e for e in entries if e["summary"]["environment"] != "switching, best arm"]
    names = list(dict.fromkeys(e["summary"]["environment"] for e in shown))
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(names), len(LEARNERS), figsize=(10.5, 2.0 * len(names)), layout="constrained")
    for entry in shown:
        environment, learner = entry["summary"]["environment"], entry["summary"]["learner"]
        i, j = names.index(environment), LEARNERS.index(learner)
        panel(axes[i, j], entry)
        if j == 0:
            axes[i, j].set_ylabel(f"{environment}\nregret")
        if i == 0:
            axes[i, j].set_title(learner, color=COLORS[learner], fontweight="bold")
        if i == len(names) - 1:
            axes[i, j].set_xlabel("round")
    handles = [
        Line2D([], [], color="black", linewidth=1.8, label="mean over runs"),
        Patch(color="black", alpha=0.15, linewidth=0, label="smallest to largest run"),
        Line2D([], [], color="black", linestyle="--", linewidth=1.3, label="bound"),
        Line2D([], [], color=GREY, linewidth=1.1, label="uniform"),
        Line2D([], [], color=GREY, linestyle=":", linewidth=1.3, label="greedy"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def panel(ax: Any, entry: dict[str, Any]) -> None:
    curves, limit, color = entry["curves"], entry["bound"], COLORS[entry["summary"]["learner"]]
    rounds = curves.shape[1]
    at = np.unique(np.linspace(0, rounds - 1, 400).astype(int))
    ax.fill_between(at + 1, curves.min(0)[at], curves.max(0)[at], color=color, alpha=0.15, linewidth=0)
    ax.plot(at + 1, curves.mean(0)[at], color=color, linewidth=1.8)
    top = float(curves.max())
    if limit is None:
        ax.text(0.03, 0.95, "no bound against a sequence", transform=ax.transAxes, va="top", color=GREY)
    else:
        ax.plot(at + 1, limit[at], color=color, linestyle="--", linewidth=1.3)
        top = max(top, float(limit[-1]))
    uniform, greedy = (entry["controls"][control].mean(0) for control in CONTROLS)
    ax.plot(at + 1, uniform[at], color=GREY, linewidth=1.1)
    ax.plot(at + 1, greedy[at], color=GREY, linestyle=":", linewidth=1.3)
    # Controls that run away leave the panel: the learner and its bound stay readable.
    ax.set_ylim(min(0.0, 1.1 * float(curves.min())), 1.1 * max(top, min(float(uniform[-1]), 2.5 * top)))
    ax.set_xlim(0, rounds)
    ax.locator_params(nbins=5)


# The page


PAGE = """# Regret of the bandit on arms with known rewards

Written by `PYTHONPATH=.:tests python benchmarks/bandit_regret.py`. Machine: {machine}.

![regret over rounds against the bounds](bandit_regret.png)

Rewards are tables in [0, 1] that are fixed before the first draw: every adversary is oblivious, and an expectation is over
the bandit's own draws. What plays is what training uses: `exp3_probs`, `exp3_draw`, `exp3_update`. Environments: coins (0.75
against 0.3), bounded continuous rewards, a *near tie* (coins that differ by sqrt(K / T), the construction of the lower
bound), *switching* (coins of 0.95 and 0.05 whose good arm changes twice), a *late riser* (the arm that ends up best pays
nothing for a quarter of the time), a *trap* (every draw of `greedy` pays nothing), a *shadow* (whatever an EXP3 that the
adversary played in advance preferred pays nothing).

## The bounds

They hold after every round t, for rewards x in [0, 1] and fixed parameters. The test checks the closed forms.

- `exp3`, expected regret to the best fixed arm (Auer et al. 2002, Theorem 3.1): (e - 1) gamma G_max + K ln K / gamma.
  Here gamma = min(1, sqrt(K ln K / ((e - 1) T))), Corollary 3.2 with g = T: at most 2.63 sqrt(T K ln K).
- `exp3s`, expected regret to a sequence of arms of hardness h = 1 + its changes (Theorem 8.1):
  K (h ln(K / share) + e share t) / gamma + (e - 1) gamma t. Here share = 1 / T and gamma is that of Corollary 8.3.
- `exp3_ix`, regret of a run to the best fixed arm, with probability {confidence:.0%} (Neu 2015, proof of Theorem 1):
  2 ln K / eta + eta K t + (1 / eta + 1) ln(2 / delta). Here eta = gamma / K = sqrt(2 ln K / (K T)).

Derived again for the code as it is, with W the sum of the weights, xhat = x / p for the arm drawn and 0 for the others:

- exp3: gamma xhat / K <= 1, since p >= gamma / K, so exp(y) <= 1 + y + (e - 2) y^2 gives
  ln(W' / W) <= gamma x / (K (1 - gamma)) + (e - 2) gamma^2 / (K^2 (1 - gamma)) sum_i xhat_i in each round. Against
  ln(W_end / W_start) >= gamma / K sum_t xhat_j - ln K, in expectation, with sum_i G_i <= K G_max: the bound.
- exp3s: sharing adds e share to each round's ln(W' / W). In a segment that starts with the sum W its arm has at least
  the weight e share W / K after one round, and e covers that round's own factor: ln K becomes ln(K / share), h times.
- exp3_ix: with lhat = l / (p + eta / 2), sum_i p_i lhat_i = l - eta / 2 sum_i lhat_i and sum_i p_i lhat_i^2 <= sum_i lhat_i,
  so sum_t l - sum_t lhat_j <= ln K / eta + eta sum_t,i lhat_i. Neu's Lemma 1, with delta / 2 twice and eta = 2 gamma_ix:
  sum_t lhat_j <= L_j + ln(2 K / delta) / eta for all j, and eta sum lhat <= eta sum l + ln(2 / delta).

Rewards: exp3 and exp3s are told r = x, exp3_ix r = 2 x - 1, so that its loss (1 - r) / 2 is 1 - x. Training uses r in
[-1, 1]: the first two derivations need y <= 1 and r^2 <= 1 only, so the same bounds hold in r, with t for G_max, and half of
them in x. The test covers that case too.

## Regret after the last round

Mean and standard error over runs; what is compared with the bound is the mean, for exp3_ix the largest run. Bold: above
the bound. *Unweighted* leaves the importance weight out, *flipped* turns the reward's sign around: where they keep a bound
as well, keeping it says little.

{regret}

Single runs of exp3 on the late riser exceed its bound, which is on the mean: it returns to an arm that looked bad by luck. A
negative regret means that the learner followed a change, which no fixed arm can. `greedy` lives on luck where rewards are
stationary: {greedy}.

## The method's own setting

K = 7 arms, gamma = 0.1, rewards scaled by their running mean and spread as in training; one coin of 0.75, six of 0.3: an
easy case. *Reach*: the highest probability of one arm that any draws and rewards lead to (found greedily). 100% of uniform's
regret means that nothing was learned. *Tuned*: gamma as the corollaries choose it for that many rounds.

{study}

EXP3 needs hundreds of rounds before it differs much from uniform choice, however gamma is chosen: over few rounds its draws
are a lottery, and an arm can stay undrawn. exp3s with share = 0.01 never learns here: in each round every arm is given
e share / K of the total weight, against a growth of at most gamma / K, so share must stay well below gamma / (e (K - 1)),
0.006 in this setting.
"""


def page(result: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    greedy = result["greedy"]
    luck = (
        f"over {greedy['tables']} tables of the coins ({greedy['rounds']} rounds) its mean regret is {greedy['regret']:.0f},\n"
        f"and {greedy['stuck']:.0%} of the tables leave it on a bad arm for good (regret up to {greedy['largest']:.0f})"
    )
    return PAGE.format(
        machine=", ".join(f"{key} {value}" for key, value in result["machine"].items()),
        confidence=1.0 - result["delta"],
        regret=table(
            ["environment", "learner", "K, T", "gamma", "runs", "regret", "largest", "bound", "regret / bound",
             "unweighted", "flipped", "uniform", "greedy"],
            [regret_cells(row) for row in result["regret"]],
        ),
        greedy=luck,
        study=table(
            ["rounds", "variant", "gamma", "share", "runs", "reach", "P of the good arm at the end", "never drew it",
             "regret, % of uniform's"],
            [study_cells(row) for row in result["own_setting"]],
        ),
    )  # fmt: skip


def regret_cells(row: dict[str, Any]) -> list[str]:
    limit = row["bound"]

    def above(value: float) -> str:
        return f"**{value:.0f}**" if limit is not None and value > limit else f"{value:.0f}"

    judged = row["largest"] if row["learner"] == "exp3_ix" else row["regret"]
    return [
        row["environment"], row["learner"], f"{row['arms']}, {row['rounds']}", f"{row['gamma']:.3f}", str(row["runs"]),
        f"{row['regret']:.0f} ± {row['standard_error']:.0f}", f"{row['largest']:.0f}",
        *(("none", "") if limit is None else (f"{limit:.0f}", f"{judged / limit:.0%}")),
        *(above(row[key]) for key in ("unweighted", "flipped", "uniform", "greedy")),
    ]  # fmt: skip


def study_cells(row: dict[str, Any]) -> list[str]:
    share = {0.0: "", 0.01: "0.01"}.get(row["share"], "1 / T")
    gamma = "0.1" if row["gamma"] == STUDY_GAMMA else f"{row['gamma']:.3f}, tuned"
    return [
        str(row["rounds"]), row["variant"], gamma, share, str(row["runs"]), f"{row['reach']:.2f}", f"{row['last_prob']:.2f}",
        f"{row['never_drawn']:.1%}", f"{row['regret_of_uniform']:.1%} ± {row['standard_error']:.1%}",
    ]  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="runs of each learner in each environment")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    entries = measure(args.runs)
    result = {
        "machine": machine() | {"numpy": np.__version__, "matplotlib": matplotlib.__version__},
        "delta": DELTA,
        "regret": [entry["summary"] for entry in entries],
        "greedy": greedy_on_coins(),
        "own_setting": study(args.runs),
    }
    (args.out / "bandit_regret.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "bandit_regret.md").write_text(page(result), encoding="utf-8")
    draw(entries, args.out / "bandit_regret.png")


if __name__ == "__main__":
    main()
