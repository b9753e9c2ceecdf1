"""Options of the engine (`LeadConfig`) and of the command line (`PrepareConfig`, `TrainConfig`).

Every field carries its own help text in `metadata`, so that the command line, the YAML reader and this page cannot
disagree. Section numbers refer to the method's specification (arXiv 2505.07437 and this project's choices).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PRESETS: dict[str, dict[str, Any]] = {
    # The method as published: few large rounds, hard top-k, reward by utility difference.
    "paper": {
        "choose": "topk",
        "reward": "idu",
        "exclude_top": 0.0,
        "visit_all_first": False,
        "min_rounds": 0,
        "hard_rows": "zero",
    },
    # At least 100 small rounds, every arm seen once before EXP3 draws, suspected noise left out, fresh rewards.
    "robust": {
        "choose": "softmax",
        "reward": "drop",
        "exclude_top": 0.2,
        "visit_all_first": True,
        "min_rounds": 100,
        "hard_rows": "aside",
    },
}


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its help text and its allowed values."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _check(config: object, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{type(config).__name__}: `{name}` must be {expected}, got {getattr(config, name)!r}")


def _check_choices(config: Any) -> None:
    for f in dataclasses.fields(config):
        choices = f.metadata.get("choices")
        value = getattr(config, f.name)
        if choices is not None and value is not None:
            _check(config, f.name, value in choices, f"one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class LeadConfig:
    """How LEAD chooses. Fields left at None take the preset's value; `resolve()` returns the filled copy.

    Raises:
        ValueError: a value out of range; the message names the field, what is expected and what was given.
    """

    preset: str = option("robust", "'paper' is the method as published, 'robust' this project's", choices=tuple(PRESETS))
    budget: int | float = option(0.025, "rows to use: an integer, or a share of the pool in (0, 1]; distinct rows count")
    gamma: float = option(0.1, "exploration of the bandit, in (0, 1]")
    smoothing: float = option(0.1, "b of the exponential smoothing, in [0, 1)")
    rate: float = option(0.015, "share of each task's available rows chosen in a round")
    round_tokens: int | None = option(None, "tokens a round instead of `rate`; needs the pool's token counts")
    min_rounds: int | None = option(None, "rounds a run has at least: caps the rows of a round (0: no cap)")
    arms_per_round: int = option(1, "arms drawn without replacement and mixed in one round")
    max_uses: int = option(4, "rounds that a row may be chosen in (1 to 255)")
    estimator: str = option(
        "grad_norm", "loss-change estimator: none, historical, grad_norm, first_order (experimental), or a registered name"
    )
    adam_beta1: float = option(0.9, "beta1 of the optimizer, used by grad_norm (0 for plain SGD)")
    bandit: str = option("exp3", "bandit over arms", choices=("exp3", "exp3_ix", "exp3s", "uniform", "greedy"))
    share: float = option(0.001, "weight that exp3s shares among arms each round, in [0, 1); well below gamma / (3 K)")
    reward: str | None = option(None, "'idu': fall of utility; 'drop': fall of loss", choices=("idu", "drop"))
    choose: str | None = option(None, "choice within a task", choices=("topk", "softmax", "random"))
    temperature: float = option(1.0, "temperature of choose='softmax', in nats of utility")
    exclude_top: float | None = option(None, "share of highest-utility rows left out per arm and task, in [0, 1)")
    visit_all_first: bool | None = option(None, "visit every arm once before the bandit draws")
    hard_rows: str | None = option(
        None, "rows with difficulty > 1: 'zero' sets it to 0, 'aside' never selects them", choices=("zero", "aside")
    )
    seed: int = option(0, "seed of every random number of the engine, in [0, 2^63)")

    def __post_init__(self) -> None:
        _check_choices(self)
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float):
            _check(self, "budget", False, "an int (rows) or a float in (0, 1] (share of the pool)")
        if isinstance(self.budget, int):
            _check(self, "budget", self.budget >= 1, "at least 1 row")
        else:
            _check(self, "budget", 0.0 < self.budget <= 1.0, "a share in (0, 1], or an int of rows")
        _check(self, "gamma", 0.0 < self.gamma <= 1.0, "in (0, 1]")
        _check(self, "smoothing", 0.0 <= self.smoothing < 1.0, "in [0, 1)")
        _check(self, "rate", 0.0 < self.rate <= 1.0, "in (0, 1]")
        _check(self, "round_tokens", self.round_tokens is None or self.round_tokens >= 1, "at least 1, or None")
        _check(self, "min_rounds", self.min_rounds is None or self.min_rounds >= 0, "at least 0, or None")
        _check(self, "arms_per_round", self.arms_per_round >= 1, "at least 1")
        _check(self, "max_uses", 1 <= self.max_uses <= 255, "in 1..255")
        _check(self, "adam_beta1", 0.0 <= self.adam_beta1 < 1.0, "in [0, 1)")
        _check(self, "share", 0.0 <= self.share < 1.0, "in [0, 1)")
        _check(self, "temperature", self.temperature > 0.0, "above 0")
        _check(self, "exclude_top", self.exclude_top is None or 0.0 <= self.exclude_top < 1.0, "in [0, 1)")
        _check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")

    def resolve(self) -> LeadConfig:
        """A copy in which every field left at None has the preset's value."""
        preset = PRESETS[self.preset]
        return dataclasses.replace(self, **{k: v for k, v in preset.items() if getattr(self, k) is None})

    def budget_rows(self, num_rows: int) -> int:
        """Distinct rows that a run may use on a pool of `num_rows` rows, at least 1."""
        rows = self.budget if isinstance(self.budget, int) else round(self.budget * num_rows)
        return max(1, min(rows, num_rows))


# Options that make a prepared pool; training on it must have the same of the first ones.
SETTLED_OPTIONS = ("tuning", "lora_rank", "lora_alpha", "lora_targets", "max_length")
PREPARE_OPTIONS = (
    *SETTLED_OPTIONS, "num_arms", "tasks_per_arm", "warmup_share", "pretrain_share", "pretrain_epochs",
    "pretrain_learning_rate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Model, data and the offline stages (section 2): warm-up, difficulty, first utility, clusters."""

    model: str | None = option(None, "a transformers model folder or hub name")
    model_config: str | None = option(
        None, "build and pretrain a small Llama instead of loading one", choices=("tiny", "small")
    )
    pool: str | None = option(None, "the pool: JSONL, JSONL.gz, Parquet, a datasets folder, or a prepared pool")
    out: str | None = option(None, "folder that the run writes")
    resume: bool = option(
        False, "go on in `out` from the newest good checkpoint; stages that are complete are not run again. `train` takes an "
        "option that is left out from the run's config.yaml, and for `out` the folder that it is started in"
    )  # fmt: skip
    on_bad_row: str = option("error", "stop at the first bad row, or write it to a rejects file", choices=("error", "skip"))
    max_length: int = option(1024, "tokens of a packed sample; longer prompts are cut from the left")
    pack_tokens: int = option(4096, "tokens of one packed forward pass while scoring")
    tuning: str = option("lora", "train LoRA adapters or all weights", choices=("lora", "full"))
    lora_rank: int = option(64, "rank of the LoRA adapters")
    lora_alpha: float = option(16.0, "alpha of the LoRA adapters")
    lora_targets: str | None = option(
        None,
        "linear layers to adapt: last parts of their names, parted by commas; None: all of the text decoder but routers",
    )
    quantize: str | None = option(
        None, "with tuning lora, load the frozen base in 4 bits (QLoRA: nf4, double quantization) or 8 bits, by bitsandbytes",
        choices=("4bit", "8bit"),
    )  # fmt: skip
    gradient_checkpointing: bool = option(False, "recompute each layer's activations in backward instead of keeping them")
    compile: bool = option(False, "compile the model's layers with torch.compile")
    liger: bool = option(False, "liger-kernel's norms, rotary embeddings and MLPs in place of the model's own; needs a GPU")
    learning_rate: float | None = option(None, "peak learning rate of AdamW; None: 2e-5, or 1e-3 with model_config")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    max_grad_norm: float = option(1.0, "gradient clipping by global norm; 0 turns it off")
    step_tokens: int = option(2048, "tokens (prompt and answer) packed into one optimizer step of all processes, at most")
    accumulation: int = option(1, "micro-batches that an optimizer step is split into, in each process")
    precision: str = option("auto", "auto: bf16 on a GPU that has it, else fp32", choices=("auto", "fp32", "bf16", "fp16"))
    warmup_share: float = option(0.01, "share of the pool for the warm-up of section 2")
    num_arms: int = option(7, "difficulty clusters K")
    tasks_per_arm: int = option(8, "fine clusters inside each arm")
    pretrain_share: float = option(0.2, "share of the pool that pretrains a model built by --model-config; it leaves the pool")
    pretrain_epochs: float = option(3.0, "passes over that share")
    pretrain_learning_rate: float = option(2e-3, "peak learning rate of that pretraining")
    trust_remote_code: bool = option(False, "run code that a model folder brings along")
    threads: int | None = option(None, "CPU threads of torch; None leaves torch's own choice")

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("max_length", "pack_tokens", "step_tokens"):
            _check(self, name, getattr(self, name) >= 8, "at least 8")
        for name in ("accumulation", "lora_rank", "num_arms", "tasks_per_arm"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "num_arms", self.num_arms <= 32767, "at most 32767")
        _check(self, "learning_rate", self.learning_rate is None or self.learning_rate > 0.0, "above 0, or None")
        for name in ("pretrain_learning_rate", "lora_alpha"):
            _check(self, name, getattr(self, name) > 0.0, "above 0")
        for name in ("warmup_share", "pretrain_share"):
            _check(self, name, 0.0 <= getattr(self, name) < 1.0, "in [0, 1)")
        for name in ("weight_decay", "max_grad_norm", "pretrain_epochs"):
            _check(self, name, getattr(self, name) >= 0.0, "at least 0")
        _check(self, "quantize", self.quantize is None or self.tuning == "lora", "None unless tuning is 'lora'")
        _check(self, "quantize", self.quantize is None or self.model_config is None, "None for a model built by model_config")
        targets = self.lora_targets is None or (self.tuning == "lora" and all(self.adapted or ("",)))
        _check(self, "lora_targets", targets, "names parted by commas, or None unless tuning is 'lora'")
        _check(self, "liger", not (self.liger and self.compile), "False with `compile`, which fuses the same")
        _check(self, "threads", self.threads is None or self.threads >= 1, "at least 1, or None")

    @property
    def adapted(self) -> list[str] | None:
        """`lora_targets` as a list."""
        return None if self.lora_targets is None else [name.strip() for name in self.lora_targets.split(",")]

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the default for the kind of model."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.model_config is None else 1e-3


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PrepareConfig):
    """Everything of `PrepareConfig`, and the LEAD rounds."""

    heldout: str | None = option(None, "held-out rows in any pool format: their loss is reported")
    heldout_rows: int = option(512, "rows of the held-out set that are scored, at most (0: all)")
    eval_every: int = option(0, "score the held-out rows every so many rounds (0: before and after)")
    train_tokens: int | None = option(
        None, "stop at so many trained tokens, if the budget lasts so long; the learning rate runs by them"
    )
    schedule: str = option("cosine", "learning rate over progress", choices=("constant", "linear", "cosine"))
    warmup_ratio: float = option(0.03, "share of progress with a rising learning rate")
    checkpoint_minutes: float = option(10.0, "write a checkpoint after so many minutes, inside a round too (0: not by time)")
    checkpoint_rounds: int = option(0, "write a checkpoint after so many rounds, whichever comes first (0: not by rounds)")
    report_to: str | None = option(
        None, "trackers that get the metrics of each step and round, by accelerate: tensorboard, wandb, trackio, ...; "
        "several are separated by commas"
    )  # fmt: skip
    log_utilities: bool = option(False, "write a Parquet file a round: row, task, uses and utility of every candidate")
    audit_every: int = option(0, "re-score random rows every so many rounds, to audit the predicted losses (0: never)")
    audit_rows: int = option(128, "rows re-scored each time: half trained on before, half never")
    audit_estimators: str = option(
        "none,historical,grad_norm", "estimators to audit beside the one that chooses; `none` always is"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "heldout_rows", self.heldout_rows >= 0, "at least 0")
        _check(self, "eval_every", self.eval_every >= 0, "at least 0")
        _check(self, "train_tokens", self.train_tokens is None or self.train_tokens >= 1, "at least 1, or None")
        _check(self, "warmup_ratio", 0.0 <= self.warmup_ratio < 1.0, "in [0, 1)")
        _check(self, "audit_every", self.audit_every >= 0, "at least 0")
        _check(self, "audit_rows", self.audit_rows >= 2, "at least 2")
        for name in ("checkpoint_minutes", "checkpoint_rounds"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")

    @property
    def trackers(self) -> list[str]:
        """Names of `report_to`."""
        return [name.strip() for name in (self.report_to or "").split(",") if name.strip()]

    @property
    def audited(self) -> list[str]:
        """Names of the estimators that an audit watches: `none`, and those of `audit_estimators`."""
        names = [name.strip() for name in self.audit_estimators.split(",")]
        return list(dict.fromkeys(["none", *filter(None, names)]))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file: a flat mapping of option names to values.

    Raises:
        ValueError: the file is not a mapping.
    """
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{path}: expected YAML, a line `option: value` each, got {text}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of option names to values, got {type(values).__name__}")
    return {str(k).replace("-", "_"): v for k, v in values.items()}


def to_yaml(*configs: Any) -> str:
    """The options of one or more configurations as one flat YAML mapping."""
    merged: dict[str, Any] = {}
    for config in configs:
        merged |= dataclasses.asdict(config)
    merged.pop("resume", None)  # how a run was called is no part of it: used as --config, it would write into any folder
    return yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
