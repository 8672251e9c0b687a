"""What DPO is compared with: reward model, PPO, best of n, Preferred-FT, and evaluation with intervals."""
