"""Tiny models, pools and trainers for the front ends' tests: no downloads, seconds on a CPU."""

import copy
import random

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import lead_fast as lf
from lead_fast.integrations.transformers import LeadTrainer
from lead_fast.offline.pretrain import train_tokenizer

VOCAB, N = 50, 60


class TokenRows(Dataset):
    """N rows of 6 to 19 tokens, the first half of each without supervision, as a list dataset of the host."""

    def __init__(self, seed=0, masked=True):
        r = random.Random(seed)
        self.rows = []
        for _ in range(N):
            ids = [r.randrange(3, VOCAB) for _ in range(r.randrange(6, 20))]
            labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :] if masked else list(ids)
            self.rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})

    def __len__(self):
        return N

    def __getitem__(self, row):
        return self.rows[row]


def tiny(kind="llama", vocab=VOCAB, **options):
    shape = dict(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8, **options,
    )  # fmt: skip
    if kind == "gpt2":
        shape = dict(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **shape), dtype=torch.float32)


def lora(model, dropout=0.0):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"]))


def array_pool(seed=0, n=N):
    r = np.random.default_rng(seed)
    return lf.Pool.from_arrays(arm=r.integers(0, 3, n), task=r.integers(0, 2, n), utility=3.0 + r.random(n))


def arguments(folder, **options):
    defaults = dict(
        use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none", learning_rate=1e-2,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return TrainingArguments(str(folder), **defaults | options)


CHOICE = lf.LeadConfig(budget=30, rate=0.3, min_rounds=6)
FIVE_ROWS = lf.LeadConfig(budget=30, rate=0.5, min_rounds=6)  # a round


def lead_trainer(folder, model=None, *, lead=CHOICE, pool=None, dataset=None, callbacks=None, eval_dataset=None,
                 data_collator=None, **options):  # fmt: skip
    return LeadTrainer(
        model if model is not None else tiny(), arguments(folder, **options), train_dataset=dataset or TokenRows(),
        pool=pool or array_pool(), lead=lead, callbacks=callbacks, eval_dataset=eval_dataset, data_collator=data_collator,
    )  # fmt: skip


def words_tokenizer():
    return train_tokenizer(["some words to learn from, 1 2 3. " * 3], 300)


def watch(engine):
    """Every call of the engine from now on, in order: ("begin", rows), ("observe", rows), ("step", lr, items), ("end",)."""
    calls = []
    begin, observe, step, end = engine.begin_round, engine.observe, engine.step, engine.end_round

    def begin_round():
        rnd = begin()
        calls.append(("begin", None if rnd is None else rnd.rows.tolist()))
        return rnd

    def observing(rows, samples):
        calls.append(("observe", rows.tolist(), samples.loss.tolist()))
        return observe(rows, samples)

    def stepping(*, lr, num_items):
        calls.append(("step", lr, num_items))
        return step(lr=lr, num_items=num_items)

    def end_round():
        calls.append(("end",))
        return end()

    engine.begin_round, engine.observe, engine.step, engine.end_round = begin_round, observing, stepping, end_round
    return calls


def alone(model, dataset, rows):
    """Loss over all supervised tokens, losses and gradients of `rows`, one at a time, by the model's own eager logits."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    model.zero_grad()
    total, items, losses = 0.0, sum(sum(label != -100 for label in dataset[row]["labels"][1:]) for row in rows), []
    for row in rows:
        ids, labels = (torch.tensor(dataset[row][name]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll = nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        (nll / items).backward()
        total += nll.item()
        losses.append(nll.item() / sum(label != -100 for label in labels[1:].tolist()))
    return total / items, losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Watcher(TrainerCallback):
    """What a user's callback sees: events, log lines, and the gradients before each optimizer step."""

    def __init__(self):
        self.events, self.logs, self.gradients = [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append("step_begin")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step_end")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")


class StopAfter(TrainerCallback):
    """What an interruption leaves: a checkpoint after `step`, and nothing of what came later."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
