"""From a raw pool to one that LEAD can choose from: model, warm-up, scores, clusters, each stage kept on disk."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lead_fast.config import PREPARE_OPTIONS, SETTLED_OPTIONS, LeadConfig, PrepareConfig
from lead_fast.files import atomic_path, read_jsonl, write_json, write_jsonl, write_text
from lead_fast.loading import check_length, embedded_tokens, load_model, load_tokenizer, loaded_to_shard, save_model
from lead_fast.lora import add_lora, load_lora
from lead_fast.offline.clustering import difficulty_arms, fine_tasks
from lead_fast.offline.pretrain import pretrained_model
from lead_fast.offline.scoring import Scores, score_pool
from lead_fast.offline.warmup import warm_up
from lead_fast.optimization import is_fsdp, make_accelerator, partitioned, scoring_model, shards_from_first, shards_weights
from lead_fast.packing import ChatEncoder, ConversationError, CutCounts
from lead_fast.pool import Pool
from lead_fast.ranks import Ranks
from lead_fast.selection import rows_aside

logger = logging.getLogger(__name__)

PREPARED_FILE = "prepare.json"
_UNUSED_PROMPT = 0.95


@dataclass(frozen=True)
class Prepared:
    """A pool with arms, tasks and first utilities, and the model that training starts from.

    Attributes:
        pool: ready for `LeadEngine`.
        base: transformers model folder or hub name.
        start: adapters or weights after the warm-up; None starts from `base` itself.
        summary: what the stages found and cost, as written to prepare.json.
    """

    pool: Pool
    base: str
    start: Path | None
    summary: dict[str, Any]

    def model(self, config: PrepareConfig, *, seed: int) -> nn.Module:
        """The model that training starts from, trainable as `config.tuning` says."""
        if config.tuning == "full":
            return load_base(str(self.start or self.base), config)
        base = load_base(self.base, config)
        if self.start is not None:
            return load_lora(base, self.start)
        return add_lora(base, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed, targets=config.adapted)

    def tokenizer(self, config: PrepareConfig) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return load_tokenizer(self.base, trust_remote_code=config.trust_remote_code)

    def encoder(self, config: PrepareConfig) -> ChatEncoder:
        """By that tokenizer, with the date of the offline stages."""
        date = self.summary.get("date")
        return ChatEncoder(self.tokenizer(config), config.max_length, date and datetime.date.fromisoformat(date))


def load_base(path: str, config: PrepareConfig) -> PreTrainedModel:
    """Loads a model in the run's precision: half for a frozen base, fp32 for weights that are trained."""
    accelerator = make_accelerator(config)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(accelerator.mixed_precision))
    dtype = half if half is not None and config.tuning == "lora" else torch.float32
    # What FSDP is to shard stays on the host until then; quantized weights go to their device at once.
    on_host = is_fsdp(accelerator) and config.quantize is None

    def load(weights: bool) -> PreTrainedModel:
        return load_model(
            path, dtype=dtype, device=torch.device("cpu") if on_host else accelerator.device,
            trust_remote_code=config.trust_remote_code, quantize=config.quantize, weights=weights,
        )  # fmt: skip

    from_first = on_host and shards_from_first(accelerator)
    with partitioned(accelerator):
        model = loaded_to_shard(load, Ranks.started(accelerator.device)) if from_first else load(True)
    check_length(model, config.max_length)
    return model


class Stages:
    """Folders that are whole or absent, each with the key of what made it.

    A stage whose key has changed (its options, its input, or a stage before it) is made again. Several processes make a
    stage together, and the first one writes it.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks

    def key(self, name: str, **settings: Any) -> str:
        text = json.dumps({"stage": name, **settings}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def done(self, name: str, key: str) -> bool:
        path = self.folder / name / "stage.json"
        done = path.exists() and json.loads(path.read_text())["key"] == key
        return bool(self.ranks.of_first(int(done)))

    @contextmanager
    def write(self, name: str, key: str, **notes: Any) -> Iterator[tuple[Path | None, dict[str, Any]]]:
        """A temporary folder, None where another process writes, and a dict of notes; both land when the block ends without
        an error."""
        start = time.perf_counter()
        if self.ranks.is_first:
            with atomic_path(self.folder / name) as temporary:
                temporary.mkdir(parents=True)
                yield temporary, notes
                notes["seconds"] = round(time.perf_counter() - start, 3)
                (temporary / "stage.json").write_text(json.dumps({"key": key, **notes}, indent=2, allow_nan=False))
        else:
            yield None, notes
        self.ranks.wait()

    def date(self) -> datetime.date:
        """The day on which the first stage began: what chat templates that write the date take for today."""

        def begun() -> str:
            path = self.folder / "date"
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(path, datetime.date.today().isoformat())
            return path.read_text()

        return datetime.date.fromisoformat(self.ranks.gather(self.ranks.on_first(begun))[0])

    def notes(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "stage.json").read_text())


def load_prepared(folder: Path) -> Prepared:
    """What `prepare` wrote to `folder`, which may have been moved since."""
    summary = json.loads((folder / PREPARED_FILE).read_text())
    start, own = folder / "start", folder / summary["base"]
    base = str(own.resolve()) if own.exists() else summary["base"]
    return Prepared(Pool.load(folder / "pool"), base, start if start.exists() else None, summary)


def check_prepared(prepared: Prepared, config: PrepareConfig) -> None:
    """Refuses options that a prepared pool has settled: its first utilities are those of its own model and lengths.

    Raises:
        ValueError: another model, other adapters or another `max_length`.
    """
    same = config.model is not None and Path(config.model).resolve() == Path(prepared.base).resolve()
    if config.model_config is not None or not (config.model is None or same):
        raise ValueError(f"model: {config.pool} was prepared with {prepared.base}; leave --model and --model-config out")
    made_by = prepared.summary.get("options", {})
    if prepared.start is not None:  # of an earlier version
        made_by = {"tuning": prepared.summary["tuning"]} | made_by
    for name, value in made_by.items():
        if name in SETTLED_OPTIONS and getattr(config, name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{name}: {config.pool} was prepared with {value!r}, got {getattr(config, name)!r}; leave {flag} out, or "
                "prepare it again"
            )


def prepare(pool: Pool, config: PrepareConfig, lead: LeadConfig, folder: Path) -> Prepared:
    """Runs the offline stages into `folder`; stages found there with the same inputs are not run again.

    Args:
        pool: a raw pool. One that already has arms and first utilities (the official LEAD pool) is taken as it is.
        config: model, warm-up, clusters.
        lead: seed, and what becomes of rows with difficulty above 1.
        folder: gets model/ (with `model_config`), start/, scores/, pool/ and prepare.json. Several processes share the
            warm-up's steps and the rows to score; all must see this folder.
    """
    ranks = Ranks.started(make_accelerator(config).device)
    stages, lead = Stages(folder, ranks), lead.resolve()
    summary: dict[str, Any] = {"model_config": config.model_config, "tuning": config.tuning}
    summary |= {"rows_read": len(pool), "rows_rejected": pool.num_rejected}
    base, pool = _base_model(pool, config, lead.seed, stages, summary)
    summary["base"] = base if config.model_config is None else "model"  # in this folder, wherever it goes
    brought = pool.arm is not None and pool.utility is not None
    if not brought:
        summary["options"] = {name: getattr(config, name) for name in PREPARE_OPTIONS} | {"hard_rows": lead.hard_rows}
    tokenizer = load_tokenizer(base, trust_remote_code=config.trust_remote_code)
    num_embedded = embedded_tokens(base, trust_remote_code=config.trust_remote_code)
    date = stages.date()
    summary["date"] = date.isoformat()
    encoder = ChatEncoder(tokenizer, config.max_length, date)
    if pool.has_text:
        pool, largest = _encodable(pool, encoder, config, ranks, summary)
        if num_embedded is not None and largest >= num_embedded:
            raise ValueError(
                f"model: {base} embeds {num_embedded} tokens, and the rows have token {largest}: add what is missing by "
                "`resize_token_embeddings`, or take the tokenizer that it was trained with"
            )
    if brought:
        logger.info("the pool brings arms and first utilities: no warm-up, no scoring")
    else:
        key = _warm_up(pool, encoder, base, config, lead.seed, stages, summary)
        _score(pool, encoder, base, config, lead.seed, stages, key, summary)

    def write() -> Prepared:
        prepared_pool = pool if brought else _cluster(pool, config, lead, stages, summary)
        if brought:
            aside = rows_aside(np.asarray(pool.aside), pool.difficulty, str(lead.hard_rows))
            prepared_pool = pool.with_arrays(aside=aside)
        summary["rows"] = len(prepared_pool)
        summary["rows_aside"] = int(prepared_pool.aside.sum())
        with atomic_path(folder / "pool") as temporary:
            prepared_pool.save(temporary)
        write_json(folder / PREPARED_FILE, summary)
        return Prepared(prepared_pool, base, None if brought else folder / "start", summary)

    return ranks.on_first(write) or load_prepared(folder)


def _encodable(
    pool: Pool, encoder: ChatEncoder, config: PrepareConfig, ranks: Ranks, summary: dict[str, Any]
) -> tuple[Pool, int]:
    """The pool without rows that the chat template cannot render, where bad rows are to be skipped; those set aside may stay.
    Also the largest token id of its rows.

    Raises:
        ValueError: it has such rows; the first is named.
    """
    errors = list[ConversationError]()
    rows = np.flatnonzero(~pool.aside)[ranks.number :: ranks.world]
    messages = tqdm(pool.iter_messages(rows), desc="checking the rows", delay=2, total=len(rows), leave=False,
                    disable=not ranks.is_first)  # fmt: skip
    largest = max((int(sample.input_ids.max()) for sample in encoder.encode(messages, errors=errors)), default=0)
    encoder.cuts = CutCounts(max_length=config.max_length)
    found = sorted((int(rows[error.number]), error.reason) for error in errors)
    shares = ranks.gather((found, largest))
    bad, largest = dict(sorted(entry for part, _ in shares for entry in part)), max(largest for _, largest in shares)
    if not bad:
        return pool, largest
    row, reason = next(iter(bad.items()))
    text = f"{len(bad):,} of {len(pool):,} rows cannot be rendered; the first is {pool.id(row)!r}: {reason}"
    if config.on_bad_row != "skip" or len(bad) == len(pool):
        raise ValueError(f"pool: {text}; --on-bad-row skip leaves such rows out")
    logger.warning("%s; they are left out", text)
    rejects = [{"id": pool.id(row), "field": "messages", "reason": reason, "raw": json.dumps(pool.messages(row))}
               for row, reason in bad.items()]  # fmt: skip
    path = rejects_path(config)

    def add() -> None:
        others = [line for line in (read_jsonl(path) if path.exists() else []) if "file" in line]  # that reading has refused
        write_jsonl(path, others + rejects)

    ranks.on_first(add)
    summary["rows_rejected"] += len(bad)
    return pool.subset(np.setdiff1d(np.arange(len(pool)), list(bad))), largest


def rejects_path(config: PrepareConfig) -> Path:
    """Where rows that are left out are written: beside the folder of the run."""
    return Path(f"{Path(str(config.out)).absolute()}.rejects.jsonl")


def _base_model(pool: Pool, config: PrepareConfig, seed: int, stages: Stages, summary: dict[str, Any]) -> tuple[str, Pool]:
    """The base model's path, and the pool without the rows that pretrained it."""
    if config.model_config is None:
        assert config.model is not None
        return str(Path(config.model).resolve()) if Path(config.model).exists() else config.model, pool
    order = np.random.default_rng(seed).permutation(len(pool))
    count = max(1, round(config.pretrain_share * len(pool)))
    if count >= len(pool):
        raise ValueError(f"pretrain_share: {len(pool)} rows leave none for the pool after {count} for pretraining")
    text, rest = np.sort(order[:count]), np.sort(order[count:])
    start = time.perf_counter()
    cached = pretrained_model(list(pool.iter_messages(text)), config, seed=seed)
    key = stages.key("model", source=cached.name)
    if not stages.done("model", key):
        with stages.write("model", key, rows=count) as (folder, notes):
            if folder is not None:
                shutil.copytree(cached, folder, dirs_exist_ok=True)
            notes["pretraining_seconds"] = round(time.perf_counter() - start, 3)
    summary["pretraining"] = {"rows": count, "seconds": stages.notes("model")["pretraining_seconds"]}
    return str((stages.folder / "model").resolve()), pool.subset(rest)


def _model_settings(config: PrepareConfig) -> dict[str, Any]:
    names = ("tuning", "lora_rank", "lora_alpha", "lora_targets", "weight_decay", "max_grad_norm", "step_tokens",
             "accumulation", "precision", "max_length", "quantize")  # fmt: skip
    return {name: getattr(config, name) for name in names} | {"learning_rate": config.peak_learning_rate}


def _warm_up(
    pool: Pool,
    encoder: ChatEncoder,
    base: str,
    config: PrepareConfig,
    seed: int,
    stages: Stages,
    summary: dict[str, Any],
) -> str:
    count = max(1, round(config.warmup_share * len(pool))) if config.warmup_share > 0 else 0
    source = stages.notes("model")["key"] if config.model_config else base
    key = stages.key("start", base=source, pool=pool.fingerprint, rows=count, seed=seed, **_model_settings(config))
    if not stages.done("start", key):
        rows = np.sort(np.random.default_rng([seed, 1]).permutation(len(pool))[:count])
        shuffled = np.random.default_rng([seed, 2]).permutation(rows)
        samples = list(encoder.encode(pool.iter_messages(shuffled)))
        model: nn.Module = load_base(base, config)
        if config.tuning == "lora":
            model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed, targets=config.adapted)
        with stages.write("start", key, rows=rows.tolist(), tokens=sum(map(len, samples))) as (folder, notes):
            notes["loss"] = warm_up(model, samples, config) if samples else None
            save_model(model, encoder.tokenizer, folder)
    notes = stages.notes("start")
    summary["warmup"] = {"rows": len(notes["rows"]), **{k: notes[k] for k in ("tokens", "loss", "seconds")}}
    return key


def _score(
    pool: Pool, encoder: ChatEncoder, base: str, config: PrepareConfig, seed: int, stages: Stages, previous: str,
    summary: dict[str, Any],
) -> None:  # fmt: skip
    key = stages.key("scores", previous=previous)
    if not stages.done("scores", key):
        start = stages.folder / "start"
        model = load_base(str(start), config) if config.tuning == "full" else load_lora(load_base(base, config), start)
        accelerator, ranks = make_accelerator(config), stages.ranks
        encoder.cuts = type(encoder.cuts)(max_length=config.max_length)
        rows = np.arange(ranks.number, len(pool), ranks.world)
        packed = scoring_model(model, accelerator, config)
        with stages.write("scores", key) as (folder, notes):
            own = score_pool(
                packed, encoder.encode(pool.iter_messages(rows)), len(rows), pack_tokens=config.pack_tokens,
                device=accelerator.device, seed=seed, quiet=not ranks.is_first, autocast=lambda: accelerator.autocast(),
                together=ranks if shards_weights(accelerator) else None,
            )  # fmt: skip
            shares = ranks.gather((own, encoder.cuts))
            scores = Scores.merge([share for share, _ in shares])
            encoder.cuts = CutCounts.merge([cuts for _, cuts in shares])
            arrays = {f.name: getattr(scores, f.name) for f in dataclasses.fields(Scores) if f.name != "tokens"}
            if folder is not None:
                save_file(arrays, folder / "scores.safetensors")
            notes |= {"tokens": scores.tokens, "cuts": dataclasses.asdict(encoder.cuts)}
        if encoder.cuts.prompts or encoder.cuts.answers:
            logger.warning("%s", encoder.cuts)
    notes = stages.notes("scores")
    summary["scoring"] = {k: notes[k] for k in ("tokens", "cuts", "seconds")}


def _cluster(pool: Pool, config: PrepareConfig, lead: LeadConfig, stages: Stages, summary: dict[str, Any]) -> Pool:
    """Arms and tasks from the scores; what becomes of rows whose prompt does not help."""
    scores = load_file(stages.folder / "scores" / "scores.safetensors")
    difficulty = scores["difficulty"].copy()
    broken = ~np.isfinite(difficulty) | ~np.isfinite(scores["utility"])
    hard = (difficulty > 1.0) & ~broken
    if broken.all():
        raise ValueError("scores: no row has a finite loss; look at the model, or use --precision fp32")
    median = float(np.median(difficulty[~broken]))
    summary["difficulty"] = {"median": median, "above_1": int(hard.sum()), "not_finite": int(broken.sum())}
    logger.info("difficulty: median %.3f, %d of %d rows above 1 (the prompt does not help)", median, hard.sum(), len(pool))
    if broken.any():
        logger.warning("%d rows have no finite loss, or no answer token left within max_length: set aside", broken.sum())
    if not median < _UNUSED_PROMPT:
        logger.warning(
            "median difficulty %.3f: the model hardly uses the prompt yet (0.95 and more mean that knowing the question barely"
            " helps with the answer), so arms by difficulty mean little; warm up longer, or start from a better model", median,
        )  # fmt: skip
    if lead.hard_rows == "zero":
        difficulty[hard] = 0.0
    aside = broken | hard if lead.hard_rows == "aside" else broken
    if aside.all():
        logger.warning("no row has a difficulty of at most 1: none is set aside")
        aside = broken
    difficulty[broken] = 0.0
    arm = np.zeros(len(pool), np.int16)
    arm[~aside] = difficulty_arms(difficulty[~aside], config.num_arms, seed=lead.seed)
    arm[aside] = arm[~aside].max(initial=0)  # never selected; shown with the hardest rows
    embedding = np.nan_to_num(scores["embedding"])
    if pool.task is not None:
        logger.info("the rows bring their tasks (column `task`): no fine clusters are made")
    task = pool.task if pool.task is not None else fine_tasks(arm, embedding, config.tasks_per_arm, seed=lead.seed)
    summary["arms"] = [
        {"arm": k, "rows": int(((arm == k) & ~aside).sum()), "tasks": len(np.unique(task[(arm == k) & ~aside])),
         "mean_difficulty": float(difficulty[(arm == k) & ~aside].mean())}
        for k in range(int(arm.max()) + 1)
    ]  # fmt: skip
    return pool.with_arrays(
        arm=arm, task=task.astype(np.int32), utility=np.where(broken, 0, scores["utility"]).astype(np.float32),
        difficulty=difficulty.astype(np.float32), num_tokens=scores["num_tokens"], aside=aside,
    )  # fmt: skip


def encoded_rows(encoder: ChatEncoder, pool: Pool, rows: Iterable[int], *, name: str = "pool") -> list[Any]:
    """Tokenized samples of rows of a pool, which errors call `name`, in the order given.

    Raises:
        ValueError: a row that cannot be rendered, which is named.
    """
    wanted = np.asarray(list(rows), np.int64)
    try:
        return list(encoder.encode(pool.iter_messages(wanted)))
    except ConversationError as error:
        raise ValueError(f"{name}: row {pool.id(int(wanted[error.number]))!r}: {error.reason}") from error
