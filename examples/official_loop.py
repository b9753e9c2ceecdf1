"""The published LEAD loop, its bandit and loss table replaced by `OfficialLead`; its own pool file is read as it is.

python examples/official_loop.py MODEL POOL.jsonl OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lead_fast.integrations.official import Compat, OfficialLead
from lead_fast.packing import ChatEncoder

model_path, pool_path, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_path)
encoder = ChatEncoder(AutoTokenizer.from_pretrained(model_path), max_length=512)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.995 ** (step // 8))

lead = OfficialLead.open(pool_path, sample_rate=0.1, selected_top_number=40, compat=Compat(no_smoothing=True))
lead.track(model.parameters())
row_of = {name: row for row, name in enumerate(lead.dataset_ids)}
while (current_task := lead.select_arm()) is not None:
    for dataset_id in lead.select_samples():  # batch size 1, as published
        sample = next(encoder.encode([lead.pool.messages(row_of[dataset_id])]))
        ids, supervised = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.supervised)[None]
        labels = ids.masked_fill(~supervised, -100)
        outputs = model(input_ids=ids, labels=labels, use_cache=False)
        outputs.loss.backward()
        losses, num_tokens = lead.sample_losses(outputs.logits, labels)
        lead.observe([dataset_id], losses, num_tokens)
        optimizer.step()
        optimizer.zero_grad()
        lead.step(schedule.get_last_lr()[0], num_tokens.sum())
        schedule.step()
    report = lead.update()
    print(f"arm {current_task}: {report.num_samples} samples, loss {report.mean_loss:.3f}, reward {report.reward:+.3f}")
lead.export(out)
