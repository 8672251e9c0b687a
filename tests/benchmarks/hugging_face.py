"""Hugging Face's GPT-2 in a loop of the kind that tutorials show, and its own `generate`.

The loop: chosen and rejected in passes of their own, policy and reference too, all logits, log_softmax and
gather, the reference at every step, batches right-padded to the longest row, torch's AdamW as it comes. It
passes no attention mask, because behind right-padding causal attention needs none; that is the quicker way.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from .contestant import Turns
from .tasks import (
    BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NEW_TOKENS,
    Pair,
    Task,
    end_of_text,
    make_pairs,
    make_prompts,
)


def collate(pairs: list[Pair], padding: int) -> dict[str, Tensor]:
    """{chosen, rejected: (B, T) ids, chosen_mask, rejected_mask: (B, T) True at completion tokens}."""
    width = max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = torch.full((len(pairs), width), padding)
        mask = torch.zeros(len(pairs), width, dtype=torch.bool)
        for row, pair in enumerate(pairs):
            completion = getattr(pair, side)
            end = len(pair.prompt) + len(completion)
            ids[row, :end] = torch.tensor(pair.prompt + completion)
            mask[row, len(pair.prompt) : end] = True
        batch |= {side: ids, f"{side}_mask": mask}
    return batch


def logps(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B,) log pi(y|x)."""
    logits = model(ids).logits[:, :-1]
    token_logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (token_logps * mask[:, 1:]).sum(-1)


def train_plainly(task: Task, turns: Turns) -> None:
    model = GPT2LMHeadModel.from_pretrained(task.folder).to(task.device)
    model.train()  # the config's dropout is 0
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    pairs = make_pairs(task)
    loader = DataLoader(
        pairs, batch_size=task.pairs_per_step, collate_fn=lambda rows: collate(rows, end_of_text(task))
    )
    autocast = torch.autocast(task.device, torch.bfloat16, enabled=task.dtype == "bfloat16")
    going = turns.ready(pairs)
    while going:
        for batch in loader:
            batch = {name: tensor.to(task.device) for name, tensor in batch.items()}
            sides = [(batch[side], batch[f"{side}_mask"]) for side in ("chosen", "rejected")]
            with autocast:
                chosen, rejected = (logps(model, *side) for side in sides)
                with torch.no_grad():
                    reference_chosen, reference_rejected = (logps(reference, *side) for side in sides)
            margin = BETA * ((chosen - reference_chosen) - (rejected - reference_rejected))
            loss = -F.logsigmoid(margin).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            going = turns.step_done(task.pairs_per_step, loss.item())
            if not going:
                break


def sample_hugging_face(task: Task, turns: Turns) -> None:
    """The same prompts, left-padded as `generate` wants them; no end-of-text and no top_k, as ours."""
    model = GPT2LMHeadModel.from_pretrained(task.folder).to(task.device).eval()
    model.generation_config.eos_token_id = None
    prompts = make_prompts(task)
    width = max(map(len, prompts))
    ids = torch.tensor([[end_of_text(task)] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids, mask = ids.to(task.device), mask.to(task.device)
    going = turns.ready(prompts)
    while going:
        rows = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            use_cache=True,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=end_of_text(task),
        )
        going = turns.step_done(rows[:, width:].numel())
