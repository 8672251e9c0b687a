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
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from . import tasks
from .contestant import Turns
from .tasks import Task


def collate(pairs: list[list[list[int]]]) -> list[tuple[Tensor, Tensor]]:
    """For chosen and for rejected: (B, T) ids and (B, T) ones at completion tokens."""
    sides = []
    for side in (1, 2):
        ids = [torch.tensor(pair[0] + pair[side]) for pair in pairs]
        scored = [torch.tensor([0] * len(pair[0]) + [1] * len(pair[side])) for pair in pairs]
        sides.append((pad_sequence(ids, batch_first=True), pad_sequence(scored, batch_first=True)))
    return sides


def logps(model: GPT2LMHeadModel, ids: Tensor, scored: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B,) log pi(y|x)."""
    logits = model(ids).logits[:, :-1]
    token_logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (token_logps * scored[:, 1:]).sum(-1)


def train_plainly(task: Task, turns: Turns) -> None:
    model = GPT2LMHeadModel.from_pretrained(task.folder).to(task.device)
    model.train()  # the config's dropout is 0
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=tasks.LEARNING_RATE, weight_decay=0.0)
    pairs = tasks.make_pairs(task)
    loader = DataLoader(pairs, batch_size=task.pairs_per_step, collate_fn=collate)
    autocast = torch.autocast(task.device, torch.bfloat16, enabled=task.dtype == "bfloat16")
    going = turns.ready(pairs)
    while going:
        for batch in loader:
            sides = [(ids.to(task.device), scored.to(task.device)) for ids, scored in batch]
            with autocast:
                chosen, rejected = (logps(model, *side) for side in sides)
                with torch.no_grad():
                    reference_chosen, reference_rejected = (logps(reference, *side) for side in sides)
            margin = tasks.BETA * ((chosen - reference_chosen) - (rejected - reference_rejected))
            loss = -F.logsigmoid(margin).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), tasks.MAX_GRAD_NORM)
            optimizer.step()
            going = turns.step_done(task.pairs_per_step, loss.item())
            if not going:
                break


def sample_hugging_face(task: Task, turns: Turns) -> None:
    """The same prompts, left-padded as `generate` wants them; no end-of-text and no top_k, as ours."""
    model = GPT2LMHeadModel.from_pretrained(task.folder).to(task.device).eval()
    model.generation_config.eos_token_id = None
    prompts, padding = tasks.make_prompts(task), tasks.end_of_text(task)
    ids = pad_sequence([torch.tensor(p) for p in prompts], True, padding, padding_side="left").to(task.device)
    mask = (ids != padding).long()
    options = {"do_sample": True, "top_k": 0, "use_cache": True, "max_new_tokens": tasks.NEW_TOKENS}
    going = turns.ready(prompts)
    while going:
        rows = model.generate(ids, attention_mask=mask, pad_token_id=padding, **options)
        going = turns.step_done(rows[:, ids.shape[1] :].numel())
