"""Every operator of the engine's state in plain PyTorch: the specification, and the kernel where no library is loaded.

The table is kept in position order: rows grouped by arm, then task, then row number, rows set aside last. So an arm is one
run of memory, and ranking it streams. A row's predicted fall of loss is affine in its proxy,

    drop_i = slope[arm, s] * proxy_i + level[arm, s]          s the optimizer step (or round) the row was last seen at

with coefficients that depend on (arm, s) alone, so that ranking needs no power and no exponential a row.

    rows [N] int32, position [N] int32     position -> row, row -> position
    arm [N] int16                          of each position
    values [4, N + 1] fp32                 LOSS, IDU, PREVIOUS, PROXY; the last column takes the writes of ignored entries
    seen [2, N + 1] int32                  STEP, ROUND
    flags [2, N + 1] uint8                 USES, QUARANTINED
    left [K] int64                         rows of each arm that may still be chosen
    counters [4] int64                     NUM_STEPS, NUM_ROUNDS, NUM_QUARANTINED, OUT_OF_RANGE
    clock [C + 1, 3 + K] fp64              LR, NUM_ITEMS of step s; LR_SUM and each arm's part of it before step s
    unit [2] fp64                          PEAK_LR, ROUND_LR
    pairs [Q, K, 12] fp64                  for each kappa and arm X^T X (9), X^T y (3) of grad_norm's regression
    totals [2 + Q] fp64                    REVISITS, ALL pairs, each kappa's past squared error
    fit [1 + Q, 4 + K] fp64                kappa, c, d, e, c_k of each kappa; row 0 is the one in use
    coefficients [2, K, n] fp64            slope, level

Source: sections 4 to 6 of the method's specification (arXiv 2505.07437 and this project's choices).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lead_fast.reference_bandit import (  # noqa: F401, the operators of the state are one namespace
    VARIANTS,
    bandit_draw,
    bandit_update,
    exp3_draw,
    exp3_probs,
    exp3_update,
    scale_rewards,
)
from lead_fast.rng import philox_uniform_reference

LOSS, IDU, PREVIOUS, PROXY = range(4)
STEP, ROUND = range(2)
USES, QUARANTINED = range(2)
NUM_STEPS, NUM_ROUNDS, NUM_QUARANTINED, OUT_OF_RANGE = range(4)
LR, NUM_ITEMS, LR_SUM, ARM_LR_SUM = range(4)
PEAK_LR, ROUND_LR = range(2)
REVISITS, ALL_PAIRS, ERRORS = range(3)
KAPPA, SLOPE_C, OWN_D, OTHER_E, ARM_OFFSETS = range(5)
BEFORE_ROW, BEFORE_ARM, BEFORE_ROUND, BEFORE_LOSS, BEFORE_DROP, BEFORE_OBSERVED = range(6)
BEFORE_WIDTH = 6
CHOOSE = {"topk": 0, "softmax": 1, "random": 2}

# Streams of the counter-based generator: each draw is philox(seed, stream, round, counter), so a resumed run, or a reader
# of the log, draws the same.
STREAM_ARM, STREAM_TASKS, STREAM_ROWS, STREAM_SHUFFLE, STREAM_FIRST, STREAM_AUDIT = range(6)

# Guards ceil and floor of a share against products that are an integer but for rounding: 0.07 * 100 > 7.
_SHARE_SLACK = 1e-9


def observe(
    rows: Tensor, loss: Tensor, num_tokens: Tensor, grad_norm_sq: Tensor, now: Tensor | None, position: Tensor, arm: Tensor,
    values: Tensor, seen: Tensor, flags: Tensor, left: Tensor, counters: Tensor, clock: Tensor, unit: Tensor,
    pairs: Tensor | None, totals: Tensor | None, fit: Tensor | None, adam_beta1: float, max_uses: int, num_choosable: int,
    before: Tensor | None = None,
) -> None:  # fmt: skip
    """Scatters one micro-batch's statistics into the table.

    A sample without a row or without supervised tokens is ignored. A non-finite loss quarantines its row for good. Of a row
    that occurs twice the last finite loss counts. What a row's loss was expected to be against what it is now is a pair of
    grad_norm's regression, taken before the table moves.

    Args:
        rows: int64 [S]; -1 for samples without a row.
        loss, num_tokens, grad_norm_sq: fp32 [S], see `linear_cross_entropy`.
        now: int64 [1], optimizer steps completed at the observation; None: up to now.
        pairs, totals, fit: of grad_norm, or None for other estimators.
        num_choosable: positions from here on are set aside.
        before: fp64 [6, S], gets what stood of each sample's row before the table takes it: BEFORE_ROW, -1 where it is not
            taken; BEFORE_ARM; BEFORE_ROUND, of its last visit; BEFORE_LOSS, when last seen; BEFORE_DROP, the fall since then
            that grad_norm's fit in use predicts, 0 without `pairs`; and beside it BEFORE_OBSERVED, the loss that it takes.

    No host synchronisation on a GPU; the result does not depend on the order in which a device executes writes.
    """
    num_rows = position.shape[0]
    now = counters[NUM_STEPS : NUM_STEPS + 1].clone() if now is None else now
    out_of_range = (rows < -1) | (rows >= num_rows)
    if rows.device.type == "cpu" and bool(out_of_range.any()):
        raise ValueError(f"observe: `rows` must be in [-1, {num_rows}), got {int(rows[out_of_range][0])}")
    if num_rows == 0 or rows.shape[0] == 0:
        return
    counters[OUT_OF_RANGE] += out_of_range.sum()
    present = (rows >= 0) & (rows < num_rows) & (num_tokens > 0)
    at = torch.where(present, position[torch.where(present, rows, 0)].long(), num_rows)
    finite = torch.isfinite(loss)
    usable = present & finite & (flags[QUARANTINED, at] == 0)
    valid = usable & last_occurrence(torch.where(usable, rows, -1))

    if before is not None:
        _record(
            before, rows, loss, torch.where(valid, at, num_rows), now, valid, arm, values, seen, clock, unit, fit, adam_beta1
        )
    if pairs is not None:
        assert totals is not None and fit is not None
        _add_pairs(torch.where(valid, at, num_rows), loss, now, valid, arm, values, seen, clock, unit, fit, adam_beta1,
                   pairs, totals)  # fmt: skip

    write = torch.where(valid, at, num_rows)
    values[PREVIOUS, write] = values[IDU, write]  # IDU moves at the round's end only
    values[LOSS, write] = torch.where(valid, loss, 0.0)
    proxy = torch.where(torch.isfinite(grad_norm_sq), grad_norm_sq / num_tokens.clamp_min(1.0), 0.0)
    values[PROXY, write] = torch.where(valid, proxy, 0.0)
    seen[STEP, write] = now.int()
    seen[ROUND, write] = (counters[NUM_ROUNDS] + 1).int()
    values[:, num_rows], seen[:, num_rows] = 0, 0

    bad = present & ~finite
    counters[NUM_QUARANTINED] += bad.sum()
    first = bad & last_occurrence(torch.where(bad, rows, -1)) & (flags[QUARANTINED, at] == 0)
    lost = first & (at < num_choosable) & (flags[USES, at] < max_uses)
    left.index_add_(0, arm[at.clamp_max(num_rows - 1)].long(), -lost.long())
    flags[QUARANTINED, torch.where(bad, at, num_rows)] = 1
    flags[QUARANTINED, num_rows] = 0


def last_occurrence(rows: Tensor) -> Tensor:
    """True where a row number does not occur again later in `rows` [S]: of duplicates, the last one counts."""
    same = rows[:, None] == rows[None, :]
    return ~torch.triu(same, diagonal=1).any(1)


def _since(step: Tensor, arm: Tensor, now: Tensor, clock: Tensor, unit: Tensor, adam_beta1: float) -> tuple[Tensor, ...]:
    """What training did between `step` and `now`, fp64: lr / n_step * (1 - beta1^m), tau in rounds, own and other lr sums."""
    m = (now - step).double()
    tau = clock[now, LR_SUM] - clock[step, LR_SUM]
    own = clock[now, ARM_LR_SUM + arm] - clock[step, ARM_LR_SUM + arm]
    rate = clock[step, LR] / clock[step, NUM_ITEMS].clamp_min(1.0)
    momentum = torch.where(m > 0, 1.0 - torch.pow(torch.tensor(adam_beta1, dtype=torch.float64, device=m.device), m), 0.0)
    return rate * momentum, tau / unit[ROUND_LR], own, tau - own


def _record(
    before: Tensor, rows: Tensor, loss: Tensor, at: Tensor, now: Tensor, valid: Tensor, arm: Tensor, values: Tensor,
    seen: Tensor, clock: Tensor, unit: Tensor, fit: Tensor | None, adam_beta1: float,
) -> None:  # fmt: skip
    k, drop = arm[at.clamp_max(len(arm) - 1)].long(), torch.zeros_like(before[BEFORE_DROP])
    if fit is not None:
        step = torch.minimum(seen[STEP, at].long(), now)
        rate, tau, own, other = _since(step, k, now, clock, unit, adam_beta1)
        slope = (fit[0, SLOPE_C] + fit[0, ARM_OFFSETS:][k]) * rate * torch.exp(-fit[0, KAPPA] * tau)
        drop = slope * values[PROXY, at].double() + fit[0, OWN_D] * own + fit[0, OTHER_E] * other
    before[BEFORE_ROW] = torch.where(valid, rows, -1).double()
    stood = {BEFORE_ARM: k, BEFORE_ROUND: seen[ROUND, at], BEFORE_LOSS: values[LOSS, at], BEFORE_DROP: drop,
             BEFORE_OBSERVED: loss}  # fmt: skip
    for number, column in stood.items():
        before[number] = torch.where(valid, column, 0).double()


def _add_pairs(
    at: Tensor, loss: Tensor, now: Tensor, valid: Tensor, arm: Tensor, values: Tensor, seen: Tensor, clock: Tensor,
    unit: Tensor, fit: Tensor, adam_beta1: float, pairs: Tensor, totals: Tensor,
) -> None:  # fmt: skip
    step, k = seen[STEP, at].long(), arm[at.clamp_max(len(arm) - 1)].long()
    weight = (valid & (step < now)).double()  # a row seen again before any optimizer step teaches nothing
    rate, tau, own, other = _since(torch.minimum(step, now), k, now, clock, unit, adam_beta1)
    fits = fit[1:, None, :]  # [Q, 1, 4 + K]
    first = rate * values[PROXY, at].double() * torch.exp(-fits[..., KAPPA] * tau)
    x = torch.stack([first, own.expand_as(first), other.expand_as(first)], 2) * weight[:, None]  # [Q, S, 3]
    truth = torch.where(weight > 0, (values[LOSS, at] - loss).double(), 0.0)
    coefficients = torch.stack([fits[..., SLOPE_C] + fit[1:, ARM_OFFSETS:][:, k], *fits[..., OWN_D : OTHER_E + 1]
                                .expand(-1, len(at), -1).unbind(2)], 2)  # fmt: skip
    totals[ERRORS:] += (((x * coefficients).sum(2) - truth).square() * weight).sum(1)
    moments = torch.cat([(x[..., :, None] * x[..., None, :]).flatten(2), x * truth[:, None]], 2)
    pairs.index_add_(1, k, moments)
    totals[ALL_PAIRS] += weight.sum()
    totals[REVISITS] += (weight * (seen[ROUND, at] > 0)).sum()


def step(lr: Tensor, num_items: Tensor, arms: Tensor, clock: Tensor, counters: Tensor, unit: Tensor) -> None:
    """Advances the clocks by one optimizer step of learning rate `lr`, fp64 [], over `num_items`, fp64 [], supervised tokens.

    `arms`, int64 [A], are those that the step's samples came from, in equal parts; entries of -1 do not count.
    """
    s = counters[NUM_STEPS].clone()
    if s.device.type == "cpu" and int(s) + 1 >= clock.shape[0]:
        raise ValueError(f"step: `clock` must have an entry after step {int(s)}, got {clock.shape[0]} entries")
    drawn = arms >= 0
    share = torch.where(drawn, lr / drawn.sum(), 0.0)
    clock[s, LR], clock[s, NUM_ITEMS] = lr, num_items
    clock[s + 1, LR_SUM] = clock[s, LR_SUM] + lr
    sums = clock[s, ARM_LR_SUM:].clone()
    for number in range(len(arms)):  # in order: the sums of a run must not depend on a device's order of additions
        sums.index_add_(0, arms[number : number + 1].clamp_min(0), share[number : number + 1])
    clock[s + 1, ARM_LR_SUM:] = sums
    counters[NUM_STEPS] += 1
    unit[PEAK_LR] = torch.maximum(unit[PEAK_LR], lr)


def step_by_numbers(lr: float, num_items: float, arms: Tensor, clock: Tensor, counters: Tensor, unit: Tensor) -> None:
    """`step` of numbers that the host knows: on a device they are arguments of its kernel."""
    lr_there, num_items_there = (torch.full((), x, dtype=torch.float64, device=clock.device) for x in (lr, num_items))
    step(lr_there, num_items_there, arms, clock, counters, unit)


def grad_norm_coefficients(
    clock: Tensor, counters: Tensor, unit: Tensor, fit: Tensor, adam_beta1: float, num_steps: int
) -> Tensor:
    """Slope and level of a row's predicted fall, by the arm it is in and the step it was seen at: fp64 [2, K, num_steps + 1].

    slope = (c + c_k) * lr_s / n_s * (1 - beta1^m) * exp(-kappa * tau),   level = d * tau_k + e * (tau - tau_k)
    """
    num_arms = clock.shape[1] - ARM_LR_SUM
    steps = torch.arange(num_steps + 1, device=clock.device)[None, :]
    arms = torch.arange(num_arms, device=clock.device)[:, None]
    now = torch.tensor(num_steps, device=clock.device)
    rate, tau, own, other = _since(steps, arms, now, clock, unit, adam_beta1)
    c, d, e = fit[0, SLOPE_C] + fit[0, ARM_OFFSETS:], fit[0, OWN_D], fit[0, OTHER_E]
    slope = c[:, None] * (rate * torch.exp(-fit[0, KAPPA] * tau))
    return torch.stack([slope.expand(num_arms, -1), d * own + e * other])


def utility(
    rows: Tensor, position: Tensor, arm: Tensor, values: Tensor, seen: Tensor, coefficients: Tensor, by_round: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """IDU and Lhat of `rows`, int64 [R], now: fp32 [R] each.

    Lhat = max(0, L(seen) - drop),   IDU = (1 - b) * Lhat + b * IDU(previous visit)

    A row seen in a round (or at a step) that has no coefficients yet has drop 0.
    """
    at = position[rows].long()
    return _utility(at, arm[at].long(), values, seen, coefficients, by_round, smoothing)


def _utility(
    at: Tensor, arm: Tensor, values: Tensor, seen: Tensor, coefficients: Tensor, by_round: bool, smoothing: float
) -> tuple[Tensor, Tensor]:
    index = seen[ROUND if by_round else STEP, at].long()
    known = index < coefficients.shape[2]
    slope, level = coefficients[:, arm, torch.where(known, index, 0)]
    drop = torch.where(known, (slope * values[PROXY, at].double() + level).float(), 0.0)
    loss = (values[LOSS, at] - drop).clamp_min(0.0)
    return (1.0 - smoothing) * loss + smoothing * values[PREVIOUS, at], loss


def calibrate(pairs: Tensor, totals: Tensor, fit: Tensor, prior_pairs: float, min_pairs: float) -> None:
    """Fits c, d, e and c_k of every kappa from the pairs so far, and puts the kappa of the lowest past error in row 0.

    Ridge regression on features scaled to unit mean square, prior mean 0 with the weight of `prior_pairs` pairs. c_k is the
    arm's own slope in what c leaves, shrunk by the same weight. What fewer than `min_pairs` pairs speak of keeps its prior.
    """
    xtx, xty = pairs[..., :9].unflatten(2, (3, 3)), pairs[..., 9:]
    all_xtx, all_xty = xtx.sum(1), xty.sum(1)
    count = torch.stack([totals[REVISITS], totals[ALL_PAIRS], totals[ALL_PAIRS]])
    known = (count >= min_pairs).double()
    square = all_xtx.diagonal(dim1=1, dim2=2)
    scale = (square / count.clamp_min(1.0)).sqrt()
    use = known * (scale > 0)
    inverse = torch.where(use > 0, 1.0 / scale.clamp_min(1e-300), 0.0)
    ridge = prior_pairs * torch.eye(3, dtype=torch.float64, device=pairs.device)
    gram = all_xtx * inverse[:, :, None] * inverse[:, None, :] + ridge
    coefficients = torch.linalg.solve_ex(gram, (all_xty * inverse)[..., None])[0][..., 0] * inverse
    left = xty[..., 0] - torch.einsum("kai,ki->ka", xtx[:, :, 0, :], coefficients)
    prior = prior_pairs * (square[:, :1] / count[0].clamp_min(1.0))
    fit[1:, SLOPE_C:ARM_OFFSETS] = coefficients
    fit[1:, ARM_OFFSETS:] = left / (xtx[..., 0, 0] + prior).clamp_min(1e-300) * use[:, :1]
    best = 1 + totals[ERRORS:].argmin()
    fit[0] = fit[best]


def rank(
    arm_drawn: Tensor, group_offsets: Tensor, arm_groups: Tensor, rows: Tensor, values: Tensor, seen: Tensor, flags: Tensor,
    coefficients: Tensor, by_round: bool, utility: Tensor | None, num_tokens: Tensor | None, smoothing: float, rate: float,
    cap: int, token_budget: float, exclude_top: float, choose: int, temperature: float, seed: int, round: int, max_uses: int,
    max_arm_rows: int, capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The rows chosen in each task of the drawn arm, in ascending position: row int64, utility fp32, uses uint8, [capacity].

    Unused entries hold row -1. See `task_quotas` for how many a task gives and `chosen_in_groups` for which.

    Args:
        arm_drawn: int64 [1]; -1 chooses nothing.
        utility: fp32 [N] by position, in place of the table's IDU, for estimators without coefficients; or None.
        cap: rows of the arm at most, -1 for no cap.
        num_tokens, token_budget: int32 [N] by position, and the tokens that the arm's rows should have on average in place
            of `rate`; None and 0 for `rate`.
        round: number of the round, for its random numbers.
        max_arm_rows: rows of the largest arm: a device's launch shapes. capacity: rows that can be chosen at most.
    """
    arm = int(arm_drawn[0])
    out = (rows.new_full((capacity,), -1, dtype=torch.int64), values.new_zeros(capacity), flags.new_zeros(capacity))
    if arm < 0:
        return out
    at, group, groups = available_positions(arm, group_offsets, arm_groups, flags, max_uses)
    available = torch.bincount(group, minlength=groups)
    if token_budget > 0 and num_tokens is not None:
        mean = num_tokens[at].double().sum() / max(len(at), 1)
        tokens_cap = max(1, int(torch.round(token_budget / mean.clamp_min(1.0))))
        rate, cap = 1.0, tokens_cap if cap < 0 else min(cap, tokens_cap)
    uniform = philox_uniform_reference(seed, STREAM_TASKS, round, arm_drawn)
    quotas = task_quotas(available, rate, None if cap < 0 else cap, float(uniform[0]))
    excluded = torch.floor(exclude_top * available.double() + _SHARE_SLACK).long()
    if utility is None:
        idu, _ = _utility(at, torch.full_like(at, arm), values, seen, coefficients, by_round, smoothing)
    else:
        idu = utility[at]
    key = choice_key(idu, rows[at].long(), choose=choose, temperature=temperature, seed=seed, round=round)
    chosen = chosen_in_groups(idu, key, group, quotas, excluded)
    picked = at[chosen]
    if len(picked) > capacity:
        raise ValueError(f"rank: `capacity` must be at least the {len(picked)} rows chosen, got {capacity}")
    for column, entries in zip(out, (rows[picked].long(), idu[chosen], flags[USES, picked]), strict=True):
        column[: len(picked)] = entries
    return out


def available_positions(
    arm: int, group_offsets: Tensor, arm_groups: Tensor, flags: Tensor, max_uses: int
) -> tuple[Tensor, Tensor, int]:
    """Positions of an arm's rows that may be chosen, ascending, int64; each one's task in the arm, int64; number of tasks."""
    first, last = int(arm_groups[arm]), int(arm_groups[arm + 1])
    offsets = group_offsets[first : last + 1]
    at = torch.arange(int(offsets[0]), int(offsets[-1]), device=flags.device)
    at = at[(flags[USES, at] < max_uses) & (flags[QUARANTINED, at] == 0)]
    return at, torch.searchsorted(offsets.contiguous(), at, right=True) - 1, last - first


def task_quotas(available: Tensor, rate: float, cap: int | None, uniform: float) -> Tensor:
    """Rows to take from each task, int64 [J].

    Args:
        available: rows still available in each task, int64 [J].
        rate: share taken of each, rounded up, at least one row of a task that has any.
        cap: rows of the whole arm at most, or None. Above it, the quotas are thinned by systematic sampling: task j gets
            floor or ceil of its proportional share, the total is exactly `cap`, and no task is favoured over the rounds.
        uniform: the number in (0, 1) that places the systematic sample.
    """
    wanted = torch.ceil(rate * available.double() - _SHARE_SLACK).long()
    wanted = torch.minimum(wanted.clamp_min(1), available)
    total = int(wanted.sum())
    if cap is None or total <= cap:
        return wanted
    cumulative = torch.cat([wanted.new_zeros(1), wanted.cumsum(0)]).double()
    edges = torch.floor(cumulative * (cap / total) + uniform).long()
    edges[0], edges[-1] = 0, cap
    return edges.diff()


def choice_key(idu: Tensor, rows: Tensor, *, choose: int, temperature: float, seed: int, round: int) -> Tensor:
    """What the choice goes by, highest first, fp64 [C]: utility; utility / temperature + Gumbel noise; or a uniform number."""
    if choose == CHOOSE["topk"]:
        return idu.double()
    noise = philox_uniform_reference(seed, STREAM_ROWS, round, rows)
    if choose == CHOOSE["random"]:
        return noise
    return idu.double() / temperature - torch.log(-torch.log(noise))


def chosen_in_groups(utility: Tensor, key: Tensor, group: Tensor, quotas: Tensor, excluded: Tensor) -> Tensor:
    """Marks the rows chosen in each group, bool [C].

    Args:
        utility: fp32 [C]. key: fp64 [C], see `choice_key`.
        group: int64 [C], ascending: the task of a candidate, 0..J-1. Within a group candidates ascend by row, so that every
            stable sort breaks ties toward the lower row.
        quotas: int64 [J], rows to choose, highest key first.
        excluded: int64 [J], highest-utility rows to leave out before.
    """
    starts = torch.searchsorted(group, torch.arange(len(quotas), device=group.device))
    place = torch.arange(len(group), device=group.device) - starts[group]

    def rank_by(value: Tensor) -> Tensor:
        order = torch.argsort(value, descending=True, stable=True)
        order = order[torch.argsort(group[order], stable=True)]
        ranks = torch.empty_like(order)
        ranks[order] = place
        return ranks

    allowed = rank_by(utility) >= excluded[group]
    return allowed & (rank_by(key.masked_fill(~allowed, -math.inf)) < quotas[group])


def mark_chosen(rows: Tensor, position: Tensor, arm: Tensor, flags: Tensor, left: Tensor, max_uses: int) -> None:
    """Counts one use of each of `rows`, int64 [R], distinct; an arm has one row less for each that is used up."""
    at = position[rows].long()
    uses = flags[USES, at] + 1
    flags[USES, at] = uses
    exhausted = (uses >= max_uses) & (flags[QUARANTINED, at] == 0)
    left.index_add_(0, arm[at].long(), -exhausted.long())


def end_round(
    rows: Tensor, begin_idu: Tensor, drop: Tensor | None, arms: Tensor, position: Tensor, arm: Tensor, values: Tensor,
    seen: Tensor, flags: Tensor, coefficients: Tensor, by_round: bool, smoothing: float, fall_of_utility: bool,
    counters: Tensor, unit: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Carries the rows that a round has observed to its end, rewards its arms, and counts it.

    Args:
        rows: int64 [R], of the round, distinct. begin_idu: fp32 [R], their utility at its begin.
        drop: fp32 [R], predicted fall of each row's loss, for estimators without coefficients; None: by `coefficients`.
        arms: int64 [m], drawn; -1 for none.
        fall_of_utility: an arm's reward is the mean fall of its rows' utility since the begin; else the mean of the loss that
            was observed minus the loss now.

    Returns:
        Rewards fp64 [m], NaN for an arm of which no row was observed; fp64 [2], the number of rows observed and the mean of
        their losses, NaN without any; bool [R], rows whose loss was not finite, now or before.

    IDU of the rows observed moves; so do the number of rounds and ROUND_LR, the unit of tau: peak rate times the mean number
    of steps a round.
    """
    at = position[rows].long()
    quarantined = flags[QUARANTINED, at] != 0
    observed = (seen[ROUND, at] == counters[NUM_ROUNDS] + 1) & ~quarantined
    last = values[LOSS, at]
    if drop is None:
        idu, now = _utility(at, arm[at].long(), values, seen, coefficients, by_round, smoothing)
    else:
        now = (last - drop).clamp_min(0.0)
        idu = (1.0 - smoothing) * now + smoothing * values[PREVIOUS, at]
    values[IDU, at] = torch.where(observed, idu, values[IDU, at])
    gain = begin_idu.double() - idu.double() if fall_of_utility else last.double() - now.double()
    in_arm = (arm[at] == arms[:, None]) & observed
    rewards = torch.where(in_arm, gain, 0.0).sum(1) / in_arm.sum(1)
    summary = torch.stack([observed.sum().double(), torch.where(observed, last, 0.0).double().sum() / observed.sum()])

    counters[NUM_ROUNDS] += 1
    round_lr = unit[PEAK_LR] * (counters[NUM_STEPS].double() / counters[NUM_ROUNDS].double())
    unit[ROUND_LR] = torch.where(round_lr > 0.0, round_lr, unit[ROUND_LR])
    return rewards, summary, quarantined
