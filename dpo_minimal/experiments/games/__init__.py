"""`games`: preferences without a reward, and where DPO, Nash-MD and online IPO take them."""
