"""LEAD in TRL's SFTTrainer, with LoRA adapters and the loss on assistant turns alone.

python examples/trl_sft.py MODEL POOL OUT

MODEL is a model folder or hub name, POOL what `lead-fast prepare` wrote (OUT/pool), or JSONL with `arm` and `utility`.
"""

import sys

import torch
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig

import lead_fast as lf
from lead_fast.integrations.trl import LeadSFTTrainer

model, pool, out = sys.argv[1:]
trainer = LeadSFTTrainer(
    model,
    SFTConfig(
        output_dir=out,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        assistant_only_loss=True,
        max_length=512,
        bf16=torch.cuda.is_available(),
        save_steps=10,
        logging_steps=5,
        report_to="none",
    ),
    processing_class=AutoTokenizer.from_pretrained(model),
    peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    pool=lf.Pool.open(pool),  # without train_dataset, the pool's own messages
    lead=lf.LeadConfig(budget=0.25, min_rounds=20),
)
trainer.train()
trainer.save_model(f"{out}/adapter")
trainer.engine.export(f"{out}/selected.jsonl")
