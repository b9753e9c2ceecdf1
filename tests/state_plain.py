"""The operators of the engine's state row by row in plain Python: what they mean, free of how any kernel computes it.

Arrays are NumPy's, by the names and layouts of `lead_fast.reference_state`; what an operator moves, it moves in place.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from lead_fast import _C
from lead_fast.reference_state import STREAM_ROWS, STREAM_TASKS

LOSS, IDU, PREVIOUS, PROXY = range(4)
f32 = np.float32


def uniform(seed: int, stream: int, round: int, counter: int) -> float:
    return float(_C.philox_uniform(seed, stream, round, np.array([counter]))[0])


def since(clock, unit, step, now, arm, beta1):
    """(lr / n_step * (1 - beta1^m), tau in rounds, own, other) of a row seen at `step`."""
    m = now - step
    tau = clock[now, 2] - clock[step, 2]
    own = clock[now, 3 + arm] - clock[step, 3 + arm]
    return clock[step, 0] / max(clock[step, 1], 1.0) * (1.0 - beta1**m), tau / unit[1], own, tau - own


def observe(rows, loss, num_tokens, grad, now, position, arm, values, seen, flags, left, counters, clock, unit, pairs,
            totals, fit, beta1, max_uses, num_choosable, before=None):  # fmt: skip
    now = int(counters[0] if now is None else now[0])
    if before is not None:
        before[:] = [[-1], [0], [0], [0], [0], [0]]
    present = [i for i in range(len(rows)) if rows[i] >= 0 and num_tokens[i] > 0]
    was_quarantined = flags[1].copy()
    last = {}  # of a row that occurs twice the last finite loss counts
    for i in present:
        if np.isfinite(loss[i]) and not was_quarantined[position[rows[i]]]:
            last[int(rows[i])] = i
    for i in sorted(last.values()):
        p = position[rows[i]]
        k, s = arm[p], seen[0, p]
        if before is not None:
            before[:4, i] = rows[i], k, seen[1, p], values[LOSS, p]
            before[5, i] = loss[i]
            if pairs is not None:
                kappa, c, d, e, *offsets = fit[0]
                rate, tau, own, other = since(clock, unit, min(s, now), now, k, beta1)
                x = np.array([rate * float(values[PROXY, p]) * math.exp(-kappa * tau), own, other])
                before[4, i] = x @ [c + offsets[k], d, e]
        if pairs is not None and s < now:
            rate, tau, own, other = since(clock, unit, s, now, k, beta1)
            truth = float(values[LOSS, p] - loss[i])
            for q, (kappa, c, d, e, *offsets) in enumerate(fit[1:]):
                x = np.array([rate * float(values[PROXY, p]) * math.exp(-kappa * tau), own, other])
                predicted = float(x @ [c + offsets[k], d, e])
                totals[2 + q] += (predicted - truth) ** 2
                pairs[q, k] += np.r_[np.outer(x, x).ravel(), x * truth]
            totals[1] += 1
            totals[0] += seen[1, p] > 0
        values[PREVIOUS, p] = values[IDU, p]
        values[LOSS, p] = loss[i]
        values[PROXY, p] = grad[i] / max(num_tokens[i], f32(1)) if np.isfinite(grad[i]) else 0
        seen[:, p] = now, counters[1] + 1
    for i in present:
        if not np.isfinite(loss[i]):
            p = position[rows[i]]
            counters[2] += 1
            if not flags[1, p] and p < num_choosable and flags[0, p] < max_uses:
                left[arm[p]] -= 1
            flags[1, p] = 1


def step(lr, num_items, arms, clock, counters, unit):
    s = counters[0]
    drawn = [k for k in arms if k != -1]
    clock[s, :2] = lr, num_items
    clock[s + 1, 2] = clock[s, 2] + lr
    clock[s + 1, 3:] = clock[s, 3:]
    for k in drawn:
        clock[s + 1, 3 + k] += lr / len(drawn)
    counters[0] += 1
    unit[0] = max(unit[0], lr)


step_by_numbers = step


def grad_norm_coefficients(clock, counters, unit, fit, beta1, num_steps):
    kappa, c, d, e, *offsets = fit[0]
    out = np.empty((2, len(offsets), num_steps + 1))
    for k, offset in enumerate(offsets):
        for s in range(num_steps + 1):
            rate, tau, own, other = since(clock, unit, s, num_steps, k, beta1)
            out[:, k, s] = (c + offset) * rate * math.exp(-kappa * tau), d * own + e * other
    return out


def utility_at(p, arm, values, seen, coefficients, by_round, smoothing):
    """(IDU, loss now) of the row at position p, each step rounded as fp32 numbers are."""
    index, drop = seen[int(by_round), p], f32(0)
    if index < coefficients.shape[2]:
        slope, level = coefficients[:, arm, index]
        drop = f32(float(slope) * float(values[PROXY, p]) + float(level))
    loss = max(f32(0), values[LOSS, p] - drop)
    return f32(1.0 - smoothing) * loss + f32(smoothing) * values[PREVIOUS, p], loss


def utility(rows, position, arm, values, seen, coefficients, by_round, smoothing):
    both = [utility_at(p, arm[p], values, seen, coefficients, by_round, smoothing) for p in position[rows]]
    return tuple(np.array(column, f32) for column in zip(*both, strict=True)) if both else (np.empty(0, f32),) * 2


def calibrate(pairs, totals, fit, prior_pairs, min_pairs):
    counts = totals[[0, 1, 1]]
    for q, per_arm in enumerate(pairs):
        xtx, xty = per_arm[:, :9].reshape(-1, 3, 3), per_arm[:, 9:]
        mean_square = np.diag(xtx.sum(0)) / np.maximum(counts, 1)
        use = [i for i in range(3) if counts[i] >= min_pairs and mean_square[i] > 0]
        scale = np.sqrt(mean_square[use])
        gram = xtx.sum(0)[np.ix_(use, use)] / np.outer(scale, scale) + prior_pairs * np.eye(len(use))
        found = np.zeros(3)
        found[use] = np.linalg.solve(gram, xty.sum(0)[use] / scale) / scale if use else 0
        fit[1 + q, 1:4] = found
        for k in range(len(per_arm)):
            left = xty[k, 0] - xtx[k, 0] @ found
            fit[1 + q, 4 + k] = left / (xtx[k, 0, 0] + prior_pairs * mean_square[0]) if 0 in use else 0
    fit[0] = fit[1 + int(np.argmin(totals[2:]))]


def quotas(available, rate, cap, number):
    wanted = [min(max(math.ceil(rate * a - 1e-9), 1), a) for a in available]
    total = sum(wanted)
    if cap < 0 or total <= cap:
        return wanted
    edges = [math.floor(sum(wanted[:j]) * (cap / total) + number) for j in range(len(wanted) + 1)]
    edges[0], edges[-1] = 0, cap
    return [after - before for before, after in pairwise(edges)]


def rank(arm_drawn, group_offsets, arm_groups, rows, values, seen, flags, coefficients, by_round, utility, num_tokens,
         smoothing, rate, cap, token_budget, exclude_top, choose, temperature, seed, round, max_uses, max_arm_rows,
         capacity):  # fmt: skip
    out = np.full(capacity, -1), np.zeros(capacity, f32), np.zeros(capacity, np.uint8)
    arm = int(arm_drawn[0])
    if arm < 0:
        return out
    tasks = []  # (position, utility) of the available rows, task by task
    for j in range(arm_groups[arm], arm_groups[arm + 1]):
        at = [p for p in range(group_offsets[j], group_offsets[j + 1]) if flags[0, p] < max_uses and not flags[1, p]]
        given = utility if utility is not None else {
            p: utility_at(p, arm, values, seen, coefficients, by_round, smoothing)[0] for p in at
        }  # fmt: skip
        tasks.append([(p, float(given[p])) for p in at])
    if num_tokens is not None and token_budget > 0:
        tokens = [int(num_tokens[p]) for task in tasks for p, _ in task]
        for_tokens = max(1, np.rint(token_budget / max(sum(tokens) / max(len(tokens), 1), 1)))
        rate, cap = 1.0, int(for_tokens if cap < 0 else min(cap, for_tokens))
    chosen = []
    wanted = quotas([len(task) for task in tasks], rate, cap, uniform(seed, STREAM_TASKS, round, arm))
    for task, quota in zip(tasks, wanted, strict=True):
        by_utility = sorted(task, key=lambda entry: (-entry[1], entry[0]))
        allowed = by_utility[math.floor(exclude_top * len(task) + 1e-9) :]
        if choose:
            numbers = {p: uniform(seed, STREAM_ROWS, round, int(rows[p])) for p, _ in allowed}
            keys = {p: numbers[p] if choose == 2 else u / temperature - math.log(-math.log(numbers[p])) for p, u in allowed}
            allowed.sort(key=lambda entry: (-keys[entry[0]], entry[0]))
        chosen += sorted(allowed[:quota])
    for column, entries in zip(out, zip(*[(rows[p], u, flags[0, p]) for p, u in chosen], strict=True), strict=False):
        column[: len(chosen)] = entries
    return out


def exp3_probs(log_w, mask, gamma):
    if not mask.any():
        return np.zeros(len(mask))
    weights = np.where(mask, np.exp(np.where(mask, log_w - log_w[mask].max(), 0.0)), 0.0)
    return np.where(mask, (1.0 - gamma) * weights / weights.sum() + gamma / mask.sum(), 0.0)


def exp3_draw(probs, uniforms):
    left, arms = probs.copy(), []
    for number in uniforms:
        beyond = [k for k in range(len(left)) if left[k] > 0 and left[: k + 1].sum() > number * left.sum()]
        arms.append(beyond[0] if beyond else max(np.flatnonzero(left), default=-1))
        if arms[-1] >= 0:
            left[arms[-1]] = 0
    return np.array(arms, np.int64)


def exp3_update(log_w, mask, arms, rewards, probs, gamma, variant, share):
    log_w, size = log_w.copy(), mask.sum()
    for arm, reward, prob in zip(arms, rewards, probs, strict=True):
        if arm < 0 or math.isnan(reward):
            continue
        before = np.logaddexp.reduce(log_w[mask])
        if variant in (0, 2):
            log_w[arm] += gamma / size * reward / prob
        if variant == 2 and share > 0:
            log_w = np.where(mask, np.logaddexp(log_w, before + math.log(math.e * share / size)), log_w)
        if variant == 1:
            log_w[arm] -= gamma / size * (1 - reward) / 2 / (prob + gamma / size / 2)
        log_w -= log_w[mask].max()
    return log_w


def scale_rewards(scale, rewards):
    out, seen = [], []
    for reward in rewards:
        scaled = 0.0
        if not math.isnan(reward):
            seen.append(reward)
            mean = np.mean(seen)
            squares = np.sum((np.array(seen) - mean) ** 2)
            scale[:] = len(seen), mean, squares
            if len(seen) >= 3:
                deviation = max(math.sqrt(squares / (len(seen) - 1)), 0.05 * abs(mean), 1e-6)
                scaled = min(1.0, max(-1.0, (reward - mean) / (2 * deviation)))
        out.append(scaled)
    return np.array(out)


def bandit_draw(log_w, counts, sums, mask, uniforms, gamma, variant):
    probs = np.zeros(len(mask))
    arms = np.flatnonzero(mask)
    if variant == 4 and len(arms):
        probs[max(arms, key=lambda k: (sums[k] / counts[k] if counts[k] else math.inf, -k))] = 1.0
    elif variant == 3 and len(arms):
        probs[arms] = 1 / len(arms)
    elif variant < 3:
        probs = exp3_probs(log_w, mask, 0.0 if variant == 1 else gamma)
    drawn = exp3_draw(probs, uniforms)
    return drawn, np.array([min(1.0, (drawn >= 0).sum() * probs[k]) if k >= 0 else 0.0 for k in drawn]), probs


def bandit_update(log_w, scale, counts, sums, mask, arms, rewards, probs, gamma, variant, share):
    out = []
    for arm, reward, prob in zip(arms, rewards, probs, strict=True):
        if arm < 0 or math.isnan(reward):
            out.append(0.0)
            continue
        n, mean, squares = scale[0] + 1, scale[1] + (reward - scale[1]) / (scale[0] + 1), scale[2]
        scale[:] = n, mean, squares + (reward - scale[1]) * (reward - mean)
        deviation = max(math.sqrt(scale[2] / max(n - 1, 1)), 0.05 * abs(mean), 1e-6)
        out.append(min(1.0, max(-1.0, (reward - mean) / (2 * deviation))) if n >= 3 else 0.0)
        counts[arm] += 1
        sums[arm] += reward
        log_w[:] = exp3_update(log_w, mask, [arm], [out[-1]], [prob], gamma, variant, share)
    return np.array(out)


def mark_chosen(rows, position, arm, flags, left, max_uses):
    for p in position[rows]:
        flags[0, p] += 1
        left[arm[p]] -= flags[0, p] >= max_uses and not flags[1, p]


def end_round(rows, begin_idu, drop, arms, position, arm, values, seen, flags, coefficients, by_round, smoothing,
              fall_of_utility, counters, unit):  # fmt: skip
    gains, losses = {int(k): [] for k in arms}, []
    for i, p in enumerate(position[rows]):
        if flags[1, p] or seen[1, p] != counters[1] + 1:
            continue
        idu, loss = utility_at(p, arm[p], values, seen, coefficients, by_round, smoothing)
        if drop is not None:
            loss = max(f32(0), values[LOSS, p] - drop[i])
            idu = f32(1.0 - smoothing) * loss + f32(smoothing) * values[PREVIOUS, p]
        values[IDU, p] = idu
        losses.append(float(values[LOSS, p]))
        gain = float(begin_idu[i]) - float(idu) if fall_of_utility else float(values[LOSS, p]) - float(loss)
        gains.setdefault(int(arm[p]), []).append(gain)
    rewards = [sum(gains[int(k)]) / len(gains[int(k)]) if k >= 0 and gains[int(k)] else math.nan for k in arms]
    counters[1] += 1
    unit[1] = unit[0] * counters[0] / counters[1] or unit[1]
    summary = len(losses), sum(losses) / len(losses) if losses else math.nan
    return np.array(rewards), np.array(summary, float), flags[1, position[rows]] != 0
