"""The engine behind other front ends: transformers' Trainer, TRL, the official LEAD loop."""
