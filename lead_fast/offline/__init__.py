"""What happens before LEAD's rounds: a model to start from, warm-up, one-pass scoring, clustering (section 2)."""
