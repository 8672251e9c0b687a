"""A GPT on preference files: tokenizer, files, rows, batches, objectives, runs, checkpoints."""
