"""The commands on text: sft, dpo, audit, sample, score."""
