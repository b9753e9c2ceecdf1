"""LEAD in a plain PyTorch loop: the loss also says what each sample taught, the engine chooses what comes next.

Runs on a CPU in seconds: a tiny Llama built from a configuration, samples of made-up tokens.
"""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lead_fast as lf

N, LENGTH, ARMS = 200, 16, 4
generator = np.random.default_rng(0)
arm = generator.integers(0, ARMS, N)  # difficulty: an arm's samples walk through the vocabulary with its own stride
first = generator.integers(0, 64, N)
tokens = torch.from_numpy((first[:, None] + (arm[:, None] + 1) * np.arange(LENGTH)) % 64)

torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

pool = lf.Pool.from_arrays(arm=arm, utility=np.full(N, np.log(64)))
engine = lf.LeadEngine(pool, lf.LeadConfig(budget=0.6, min_rounds=15, rate=0.2, seed=0))
while (rnd := engine.begin_round()) is not None:
    for rows in rnd.rows.split(8):
        batch = tokens[rows]
        hidden = model.model(batch[:, :-1]).last_hidden_state
        out = lf.linear_cross_entropy(hidden, model.lm_head.weight, batch[:, 1:])
        out.loss.backward()
        engine.observe(rows, out.samples)
        optimizer.step()
        optimizer.zero_grad()
        engine.step(lr=3e-3, num_items=batch[:, 1:].numel())
    report = engine.end_round()
    print(f"round {report.number}: arm {report.arm}, loss {report.mean_loss:.3f}, reward {report.reward:+.3f}")
print(f"{engine.num_used} of {N} samples in {engine.num_rounds} rounds")
