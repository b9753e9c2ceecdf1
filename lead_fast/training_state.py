"""What a checkpoint holds of a training run, taken out of it and put back: weights, optimizer, scaler, engine, random numbers.

Everything is by name, so that it does not depend on how many processes hold the parameters or in what order. Frozen weights
are not copied: they are identified, and must be there again. The learning rate is a function of progress (tokens trained,
rows used), which the counters of the run carry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lead_fast.checkpoint import State, tensor_bytes
from lead_fast.models import trained_parameters
from lead_fast.optimization import Optimization, StepResult, TrainingError, reshard, zero_stage
from lead_fast.packing import CutCounts
from lead_fast.pool import ARRAYS, Pool
from lead_fast.shards import assign, own_part, sharded_like, whole, whole_on_first, whole_shape
from lead_fast.trainer import OpenRound, TrainingRun, attach

if TYPE_CHECKING:
    from lead_fast.engine import LeadEngine
    from lead_fast.signals import Signals

logger = logging.getLogger(__name__)

# Elements of each frozen weight that identify it: any other model, revision or precision differs in some of them.
_SAMPLED = 4096


class TrainingState:
    """Engine, model and optimizer of a run, as a checkpoint sees them.

    Args:
        engine: of the run.
        optimization: of the run.
        signals: of the run.
        heldout: the pool that scores the run, or None.
        places: what the user calls the pool and the held-out rows, for errors.
    """

    def __init__(
        self, engine: LeadEngine, optimization: Optimization, signals: Signals, heldout: Pool | None = None,
        places: Mapping[str, str | None] | None = None,
    ) -> None:  # fmt: skip
        self.engine, self.optimization, self.signals = engine, optimization, signals
        attach(engine, optimization)
        self.places = places or {}
        self.identity = {
            "pool": _pool_digest(engine.pool),
            "held-out rows": None if heldout is None else heldout.fingerprint,
            "frozen weights": frozen_digest(optimization.bare),
        }

    def capture(self, run: TrainingRun) -> State:
        """The state at a boundary of optimizer steps; tensors are the live ones, on their own devices.

        All processes must call it. Sharded tensors are put together on the host of the first one, which alone gets the whole.

        Raises:
            TrainingError: a trained weight is not finite; going on from it would lead nowhere.
        """
        reshard(self.optimization.bare)
        return {
            "weights": _weights(self.optimization),
            "optimizer": _optimizer(self.optimization),
            "engine": self.engine.state_dict(),
            "signals": self.signals.state_dict(),
            "random": {str(rank): state for rank, state in enumerate(self.optimization.ranks.gather(random_state()))},
            "run": _run(run),
            "identity": self.identity,
            "environment": environment(self.optimization),
        }

    def restore(self, state: State, rounds: list[dict[str, Any]]) -> TrainingRun:
        """Puts a captured state back; engine, model and optimizer are new, made as they were made for it.

        Args:
            state: of a checkpoint.
            rounds: lines of rounds.jsonl that belong to it.

        Returns:
            The run, for `run_rounds` to go on with.

        Raises:
            ValueError: another pool, other held-out rows, frozen weights, parameters or arrays.
        """
        for what, got in self.identity.items():
            if got != state["identity"][what]:
                where = self.places.get(what)
                raise ValueError(
                    f"resume: the {what} must be those the run began with: expected {state['identity'][what]}, got {got}"
                    + ("" if where is None else f" in {where}")
                )
        now = environment(self.optimization)
        if different := {name: (was, now[name]) for name, was in state["environment"].items() if now[name] != was}:
            changes = ", ".join(f"{name} {was} -> {is_now}" for name, (was, is_now) in different.items())
            logger.warning("resume: the last bits may differ from those of a run that was not interrupted (%s)", changes)
        _restore_weights(self.optimization.bare, state["weights"])
        _restore_optimizer(self.optimization, state["optimizer"])
        self.engine.load_state_dict(state["engine"])
        self.signals.load_state_dict(state["signals"])
        # Processes that were not there before keep the state that they were seeded with.
        if (saved := state["random"].get(str(self.optimization.ranks.number))) is not None:
            restore_random_state(saved)
        return _restore_run(state["run"], rounds)

    def capture_zero(self, folder: Path) -> None:
        """DeepSpeed's part of the state, in its own format (pickled tensors): each process writes its shard."""
        self.optimization.model.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)

    def restore_zero(self, folder: Path) -> None:
        """Puts `capture_zero` back, after `restore`; the number of processes must be the same."""
        loaded, _ = self.optimization.model.load_checkpoint(str(folder), tag="zero", load_module_strict=False)
        if loaded is None:
            raise ValueError(f"resume: DeepSpeed finds no state of {self.optimization.ranks.world} processes in {folder}")


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and evenly spaced elements of the weights that are not trained."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            flat = whole(weight).reshape(-1)
            digest.update(f"{name} {weight.dtype} {tuple(whole_shape(weight))}".encode())
            digest.update(tensor_bytes(flat[:: max(1, len(flat) // _SAMPLED)]))
    return digest.hexdigest()


def _pool_digest(pool: Pool) -> str:
    digest = hashlib.sha256(pool.fingerprint.encode())
    for name in ARRAYS:
        if (array := getattr(pool, name)) is not None:
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def environment(optimization: Optimization) -> dict[str, Any]:
    """What results depend on to the last bit beside options and data."""
    device = optimization.device
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": str(optimization.accelerator.mixed_precision),
        "processes": optimization.ranks.world,
    }


# Weights and optimizer


def _weights(optimization: Optimization) -> State:
    parameters, ranks = dict(trained_parameters(optimization.bare)), optimization.ranks
    bad = torch.stack([~torch.isfinite(own_part(p)).all() for p in parameters.values()]).int()
    if bool(ranks.sum(bad).any()):  # of all shards, so that all name the same
        name = list(parameters)[int(bad.bool().int().argmax())]
        raise TrainingError(f"checkpoint: {name} holds NaN or infinity, so none was written; lower --learning-rate")
    return {name: whole_on_first(p, ranks.is_first) for name, p in parameters.items()}


def _restore_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    parameters = dict(trained_parameters(model))
    if parameters.keys() != saved.keys():
        different = sorted(parameters.keys() ^ saved.keys())
        raise ValueError(f"checkpoint: expected the same trained weights, got {len(different)} others, as {different[0]}")
    for name, parameter in parameters.items():
        value, shape = saved[name], whole_shape(parameter)
        if value.shape != shape or value.dtype != parameter.dtype:
            raise ValueError(f"checkpoint: {name} must be {parameter.dtype} {list(shape)}, "
                             f"got {value.dtype} {list(value.shape)}")  # fmt: skip
        assign(parameter, value)


def _optimizer(optimization: Optimization) -> State:
    if optimization.is_zero:
        stage = zero_stage(optimization.accelerator)
        return {"format": "deepspeed", "processes": optimization.ranks.world, "stage": stage}
    names = {id(p): name for name, p in trained_parameters(optimization.bare)}
    is_first = optimization.ranks.is_first
    state = {
        names[id(p)]: {k: whole_on_first(v, is_first) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for p, entry in optimization.optimizer.state.items()
    }
    groups = [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimization.optimizer.param_groups]
    scaler = optimization.accelerator.scaler
    return {"state": state, "groups": groups, "scaler": None if scaler is None else scaler.state_dict()}


def _restore_optimizer(optimization: Optimization, saved: State) -> None:
    if optimization.is_zero != ("format" in saved):
        raise ValueError(
            "resume: a run under DeepSpeed goes on under DeepSpeed, any other under another launcher configuration"
        )
    if optimization.is_zero:
        if saved["processes"] != (got := optimization.ranks.world):
            raise ValueError(f"resume: ZeRO's optimizer is that of {saved['processes']} processes, got {got}")
        if saved["stage"] != (stage := zero_stage(optimization.accelerator)):
            raise ValueError(f"resume: the optimizer is that of ZeRO's stage {saved['stage']}, got stage {stage}")
        return  # by restore_zero
    parameters = dict(trained_parameters(optimization.bare))
    optimizer, state = optimization.optimizer, {}
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for name, entry in saved["state"].items():
        parameter = parameters[name]
        # Cloned: the saved tensors are views of the file.
        state[order[id(parameter)]] = {
            k: sharded_like(v.clone(), parameter) if isinstance(v, Tensor) else v for k, v in entry.items()
        }
    groups = [
        # JSON has no tuples; which implementation runs is this device's.
        {k: tuple(v) if isinstance(live.get(k), tuple) else v for k, v in group.items()}
        | {k: live[k] for k in ("foreach", "fused", "capturable")}
        | {"params": [order[id(parameters[name])] for name in group["params"]]}
        for group, live in zip(saved["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scaler = optimization.accelerator.scaler
    if (scaler is None) != (saved["scaler"] is None):
        raise ValueError(f"checkpoint: expected a gradient scaler: {saved['scaler'] is not None}, got {scaler is not None}")
    if scaler is not None:
        scaler.load_state_dict(saved["scaler"])


# Random numbers


def seed_generators(seed: int) -> None:
    """Seeds the global generators of Python, NumPy (with the lower 32 bits) and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> State:
    """The global generators of Python, NumPy and torch (CPU and every CUDA device): byte tensors, and what is no byte."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "words": _bytes(np.array(words, np.uint32)), "gauss": gauss},
        "numpy": {"kind": str(kind), "keys": _bytes(np.asarray(keys, np.uint32)), "position": int(position),
                  "has_gauss": int(has_gauss), "cached": float(cached)},
        "torch": torch.get_rng_state(),
        "cuda": {str(device): value for device, value in enumerate(cuda)},
    }  # fmt: skip


def restore_random_state(saved: State) -> None:
    """Puts `random_state()` back; CUDA devices that are not here any more are passed over."""
    python, numpy = saved["python"], saved["numpy"]
    random.setstate((python["version"], tuple(_words(python["words"])), python["gauss"]))
    keys = np.array(_words(numpy["keys"]), np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(saved["torch"].clone())
    for device in range(min(torch.cuda.device_count(), len(saved["cuda"]))):
        torch.cuda.set_rng_state(saved["cuda"][str(device)].clone(), device)


def _bytes(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.view(np.uint8).copy())


def _words(saved: Tensor) -> list[int]:
    return saved.numpy().view(np.uint32).tolist()


# Counters and position


def _run(run: TrainingRun) -> State:
    steps = None
    if run.open is not None:
        steps = {
            "used_before": run.open.used_before,
            "trained": [
                [lr, float(r.loss), r.num_items, r.num_tokens, float(r.grad_norm), r.seconds] for lr, r in run.open.trained
            ],
        }
    return {
        "num_rounds": len(run.rounds),
        "num_steps": run.num_steps,
        "trained_tokens": run.trained_tokens,
        "supervised_tokens": run.supervised_tokens,
        "evaluations": run.evaluations,
        "cuts": dataclasses.asdict(run.cuts),
        "seconds": dict(run.seconds),
        "open_seconds": dict(run.clock.parts),
        "open": steps,
    }


def _restore_run(saved: State, rounds: list[dict[str, Any]]) -> TrainingRun:
    run = TrainingRun(
        rounds=rounds,
        num_steps=saved["num_steps"],
        trained_tokens=saved["trained_tokens"],
        supervised_tokens=saved["supervised_tokens"],
        evaluations=saved["evaluations"],
        cuts=CutCounts(**saved["cuts"]),
    )
    run.seconds.update(saved["seconds"])
    run.clock.parts.update(saved["open_seconds"])
    if saved["open"] is not None:
        trained = [
            (lr, StepResult(torch.tensor(loss), items, tokens, torch.tensor(norm), seconds))
            for lr, loss, items, tokens, norm, seconds in saved["open"]["trained"]
        ]
        run.open = OpenRound(saved["open"]["used_before"], trained)
    return run
