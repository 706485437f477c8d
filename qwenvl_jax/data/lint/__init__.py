"""What is wrong with fine-tuning rows: found all at once, before a training run meets it."""
