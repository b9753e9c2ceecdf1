"""A small Llama with its own tokenizer, pretrained on text that then stays out of the pool: everything runs offline."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lead_fast.config import PrepareConfig
from lead_fast.files import atomic_path
from lead_fast.loading import MODEL_SIZES, build_model, save_model
from lead_fast.optimization import Optimization, learning_rate, make_accelerator
from lead_fast.packing import PLAIN_TEMPLATE, ChatEncoder, Messages, Sample, balanced_fill, pack
from lead_fast.ranks import Ranks

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_QUIET_TEXTS = 2000  # fewer train a tokenizer within two seconds: no bar
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def cache_folder() -> Path:
    """$LEAD_FAST_CACHE, or ~/.cache/lead-fast."""
    return Path(os.environ.get("LEAD_FAST_CACHE") or Path.home() / ".cache" / "lead-fast")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with digits apart, BOS, EOS, padding and the plain chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], show_progress=len(texts) > _QUIET_TEXTS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, chat_template=PLAIN_TEMPLATE
    )


def pretrained_model(conversations: Sequence[Messages], config: PrepareConfig, *, seed: int) -> Path:
    """A folder with a model of `config.model_config` and its tokenizer, both trained on `conversations`.

    The model learns every token of the rendered conversations. The folder is cached by text, size, schedule and seed.

    Returns:
        Path of a transformers model folder.
    """
    size = config.model_config
    assert size is not None
    settings = {
        "format": FORMAT_VERSION, "model": MODEL_SIZES[size], "size": size, "seed": seed,
        "epochs": config.pretrain_epochs, "learning_rate": config.pretrain_learning_rate,
        "max_length": config.max_length, "step_tokens": config.step_tokens,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for messages in conversations:
        digest.update(json.dumps(messages).encode())
    folder = cache_folder() / "models" / f"{size}-{digest.hexdigest()[:16]}"
    accelerator = make_accelerator(config)
    ranks = Ranks.started(accelerator.device)
    if ranks.of_first(int(folder.exists())):
        logger.info("pretrained model: %s (cached)", folder)
        return folder
    texts = (message["content"] for messages in conversations for message in messages)
    tokenizer = train_tokenizer(list(texts), MODEL_SIZES[size]["vocab_size"])
    encoder = ChatEncoder(tokenizer, config.max_length)
    encoded = tqdm(encoder.encode(conversations), total=len(conversations), desc="tokenizing", delay=2, leave=False)
    samples = [Sample(s.input_ids, np.ones(len(s), bool), s.keep_alone) for s in encoded]
    model = _pretrain(samples, tokenizer, accelerator, config, size, seed)
    with atomic_path(folder) if ranks.is_first else nullcontext() as temporary:
        save_model(model, tokenizer, temporary)
    ranks.wait()
    return folder


def _pretrain(
    samples: list[Sample], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, config: PrepareConfig, size: str,
    seed: int,
) -> torch.nn.Module:  # fmt: skip
    model = build_model(size, tokenizer, seed=seed, device=accelerator.device)
    optimization = Optimization(model, accelerator, config)
    generator = np.random.default_rng(seed)
    target = math.ceil(config.pretrain_epochs * sum(len(s) for s in samples))
    done = 0
    title, quiet = f"pretraining the {size} model", not optimization.ranks.is_first
    with tqdm(total=target, desc=title, unit="tok", unit_scale=True, delay=2, disable=quiet) as bar:
        while done < target:
            order = generator.permutation(len(samples))
            for index in balanced_fill([len(samples[i]) for i in order], config.step_tokens):
                lr = learning_rate(done / target, peak=config.pretrain_learning_rate, schedule="cosine", warmup=0.03)
                result = optimization.step([pack([samples[order[i]] for i in index])], lr)
                done += result.num_tokens
                bar.update(result.num_tokens)
                bar.set_postfix_str(f"loss {float(result.loss):.3f}", refresh=False)
                if done >= target:
                    break
    return model
