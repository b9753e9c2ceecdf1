"""LEAD in transformers' Trainer.

python examples/transformers_trainer.py MODEL POOL OUT

MODEL is a model folder or hub name, POOL what `lead-fast prepare` wrote (OUT/pool), or JSONL with `arm` and `utility`.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import lead_fast as lf
from lead_fast.integrations.transformers import LeadTrainer

model, pool, out = sys.argv[1:]
trainer = LeadTrainer(
    AutoModelForCausalLM.from_pretrained(model),
    TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        save_steps=10,
        save_total_limit=2,
        logging_steps=5,
        report_to="none",
    ),
    processing_class=AutoTokenizer.from_pretrained(model),
    pool=lf.Pool.open(pool),
    lead=lf.LeadConfig(budget=0.25, min_rounds=20),
)
trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on where a run stopped
trainer.save_model(f"{out}/model")
trainer.engine.export(f"{out}/selected.jsonl")
