"""log pi(y|x) of whole completions under a GPT, samples from it, and the table of every completion there is.

A small GPT whose completions are all enumerated is a row of a table, so the closed forms can judge it.
What scores completions projects onto the vocabulary only the positions that predict a completion token.

But: no tokeniser, no files, no gradient steps.

Shapes: B sequences, T tokens, K completions of one prompt, X prompts, Y completions of a table, N nodes of
a prefix tree, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .generation import generate as generate  # also a name of this module
from .model import GPT
from .validation import InputError, check_count, check_ids, widen


class SequenceBatch(NamedTuple):
    """Prompts with completions, right-padded; what lies beyond a row's length is never scored [D9.1].

    Fields: ids (B, T); prompt_lengths (B,) >= 1; lengths (B,) of prompt and completion together.
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor


def sequence_logps(model: GPT, batch: SequenceBatch) -> Tensor:
    """log pi(y|x) of each row: the sum over completion tokens, prompt and padding excluded [D9.1, D13.5].

    Args:
        model: the policy.
        batch: see `SequenceBatch`; a completion's end-of-text, where it has one, is scored like any token.
    Returns:
        (B,) nats, in float32 or wider: a sum of bfloat16 terms near 500 would be rounded to multiples of 2.
    Raises:
        InputError: shapes do not fit, an empty prompt or completion, a length beyond the row.
    """
    return token_logps(model, batch).sum(-1)


def token_logps(model: GPT, batch: SequenceBatch) -> Tensor:
    """log pi(y_t | x, y_<t) of each completion token; their sum is `sequence_logps` [D9.1].

    Args, Raises: as `sequence_logps`.
    Returns:
        (B, T) nats, float32 or wider: [:, t] belongs to ids[:, t]; 0 at the prompt and the padding.
    """
    B = len(batch.ids)
    if batch.ids.dim() != 2 or batch.prompt_lengths.shape != (B,) or batch.lengths.shape != (B,):
        raise InputError(f"prompt_lengths and lengths must have shape ({B},), one entry a row of ids (B, T).")
    T = batch.ids.shape[1]
    if (batch.prompt_lengths < 1).any() or (batch.lengths > T).any():
        raise InputError("every row needs a prompt of at least one token and a length within the row.")
    if (batch.lengths <= batch.prompt_lengths).any():
        row = int((batch.lengths <= batch.prompt_lengths).nonzero()[0])
        raise InputError(f"row {row} has an empty completion; drop it or give it at least end-of-text.")
    position = torch.arange(T, device=batch.ids.device)
    scored = (position >= batch.prompt_lengths.unsqueeze(-1)) & (position < batch.lengths.unsqueeze(-1))
    row, place = scored.nonzero(as_tuple=True)  # of each scored token; the one before it predicts it
    logits = model.project(model.hidden(batch.ids)[row, place - 1])  # (tokens, V)
    logps = _TargetLogps.apply(logits, batch.ids[row, place])
    return logps.new_zeros(B, T).index_put((row, place), logps)


class _TargetLogps(torch.autograd.Function):
    """(tokens, V), (tokens,) -> (tokens,): log softmax(logits)[target], keeping one table of that size where
    autograd would keep three.

    The logits take most of a step's memory: 200 MB for a thousand tokens of GPT-2. They stay in the dtype of
    their product; exponentials and sums are taken in float32 or wider, some rows at a time; and in the end
    their gradient, (one-hot - softmax) times the incoming one, is written over them.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        log_sums = _log_sums(logits)
        ctx.save_for_backward(logits, targets, log_sums)
        return widen(logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)) - log_sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sums = ctx.saved_tensors  # a second time is refused: they are overwritten
        columns = (x.unsqueeze(-1) for x in (log_sums, targets, gradient))
        blocks = (x.split(_rows_at_a_time(logits)) for x in (logits, *columns))
        for some, log_sum, target, incoming in zip(*blocks):
            chance = (widen(some) - log_sum).exp_()
            some.copy_(chance.mul_(-incoming).scatter_add_(-1, target, incoming))
        return logits, None


def _log_sums(logits: Tensor) -> Tensor:
    """(tokens, V) -> (tokens,): log-sum-exp in float32 or wider."""
    return torch.cat([widen(some).logsumexp(-1) for some in logits.split(_rows_at_a_time(logits))])


def _rows_at_a_time(logits: Tensor) -> int:
    """Rows whose logits fit into a cache: a million of them."""
    return max(1, 2**20 // logits.shape[-1])


# --------------------------------------------------------------------- completions that share their prompt


class SharedPromptBatch(NamedTuple):
    """Rows [prompt | completion 1 | ... | completion K | padding]: each prompt is read once [D9.1].

    Fields: ids (B, T); prompt_lengths (B,) >= 1; completion_lengths (B, K) >= 1.
    """

    ids: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor

    def to(self, device: torch.device | str) -> SharedPromptBatch:
        """The same batch on another device."""
        return SharedPromptBatch(*(field.to(device) for field in self))


def shared_prompt_batch(
    prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]], *, multiple: int = 1
) -> SharedPromptBatch:
    """Lay out B prompts with K completions each, right-padded [D9.1].

    Args:
        prompts: B lists of token ids.
        completions: B sequences of K lists of token ids, end-of-text included where it is to be scored.
        multiple: round T up to a multiple of this, for faster matrix products.
    Raises:
        InputError: counts that do not fit, an empty prompt or completion.
    """
    K = len(completions[0]) if completions else 0
    if not prompts or len(prompts) != len(completions) or K == 0 or any(len(c) != K for c in completions):
        raise InputError("a batch needs at least one prompt and the same number of completions for each.")
    if not all(prompts) or not all(ids for answers in completions for ids in answers):
        raise InputError("a prompt or completion is empty; give it at least end-of-text.")
    rows = [sum(answers, start=list(prompt)) for prompt, answers in zip(prompts, completions, strict=True)]
    T = -(-max(map(len, rows)) // multiple) * multiple
    return SharedPromptBatch(
        torch.tensor([row + [0] * (T - len(row)) for row in rows]),
        torch.tensor([len(prompt) for prompt in prompts]),
        torch.tensor([[len(ids) for ids in answers] for answers in completions]),
    )


def shared_prompt_logps(model: GPT, batch: SharedPromptBatch) -> Tensor:
    """log pi(y|x) of K completions of each prompt, in one pass that reads the prompt once [D9.1].

    A completion attends to its prompt and itself, never to another completion, and its positions go on
    from the prompt's; so the numbers and gradients are those of K separate sequences.

    Returns:
        (B, K) nats, float32 or wider.
    Raises:
        InputError: shapes do not fit, an empty prompt or completion, lengths beyond the row.
    """
    logps, tokens = shared_prompt_token_logps(model, batch)
    B, K = batch.completion_lengths.shape
    return logps.new_zeros(B * K).index_add(0, tokens.sequence, logps).view(B, K)


class CompletionTokens(NamedTuple):
    """The N completion tokens of a `SharedPromptBatch`, row by row and each completion from its first [D9.1].

    Fields:
        sequence: (N,) the completion of each: column k of row b is b * K + k.
        place: (N,) its index in ids.flatten().
        predictor: (N,) the index of the token before, whose hidden state predicts it; of a completion's
            first token that is the prompt's last.
    """

    sequence: Tensor
    place: Tensor
    predictor: Tensor


def shared_prompt_token_logps(model: GPT, batch: SharedPromptBatch) -> tuple[Tensor, CompletionTokens]:
    """log pi(y_t | x, y_<t) of each completion token, (N,) nats, and which tokens they are [D9.1].

    Args, Raises: as `shared_prompt_logps`, whose terms these are.
    """
    hidden, tokens = shared_prompt_states(model, batch)
    filler = (0, -len(tokens.place) % _TOKEN_MULTIPLE)  # entries that are computed and dropped
    logits = model.project(pick(hidden, F.pad(tokens.predictor, filler)))
    logps = _TargetLogps.apply(logits, F.pad(batch.ids.flatten()[tokens.place], filler))
    return logps[: len(tokens.place)], tokens


def pick(hidden: Tensor, places: Tensor) -> Tensor:
    """(B T, C) states, (N,) places -> (N, C) [D9.1].

    An embedding, whose gradient adds up in order: K completions share the prompt's last state, and indexing
    would add their gradients in whatever order the threads arrive.
    """
    return F.embedding(places, hidden)


def shared_prompt_states(model: GPT, batch: SharedPromptBatch) -> tuple[Tensor, CompletionTokens]:
    """Hidden states of every place of a batch, (B T, C), and where its completion tokens are [D9.1].

    Args, Raises: as `shared_prompt_logps`.
    """
    ids, prompt_lengths, completion_lengths = batch
    B, T = ids.shape
    K = completion_lengths.shape[-1]
    if prompt_lengths.shape != (B,) or completion_lengths.shape != (B, K):
        raise InputError(f"prompt_lengths must have shape ({B},) and completion_lengths ({B}, K).")
    edges = torch.cat([prompt_lengths.unsqueeze(-1), completion_lengths], -1).cumsum(-1)  # (B, K + 1)
    if prompt_lengths.min() < 1 or completion_lengths.min() < 1 or edges.max() > T:
        raise InputError("every row needs a prompt and completions of one token or more, and must hold them.")
    place = torch.arange(T, device=ids.device).expand(B, T).contiguous()
    part = torch.searchsorted(edges, place, right=True)  # 0 prompt, 1 to K completion, K + 1 padding
    start = F.pad(edges, (1, 0)).gather(1, part)  # (B, T) where the token's part begins
    offset = torch.where(part > 0, prompt_lengths.unsqueeze(-1), 0)
    positions = (place - start + offset).masked_fill(part > K, 0)
    same = part.unsqueeze(-1) == part.unsqueeze(-2)  # (B, T, T)
    mask = (same | (part == 0).unsqueeze(-2)) & (place[0].unsqueeze(-1) >= place[0])
    hidden = model.hidden(ids, positions, mask.unsqueeze(1))

    row, token = ((part > 0) & (part <= K)).nonzero(as_tuple=True)  # the completions' tokens
    first = token == start[row, token]
    predictor = torch.where(first, prompt_lengths[row], token) - 1
    tokens = CompletionTokens(row * K + part[row, token] - 1, row * T + token, row * T + predictor)
    return hidden.flatten(0, 1), tokens


_TOKEN_MULTIPLE = 64  # a matrix library prepares a kernel for each new shape: this keeps shapes few


# ------------------------------------------------------------------------------- every completion there is


class Completions(NamedTuple):
    """Y completions [D9.1]: ids (Y, T), padded with end-of-text; lengths (Y,), end-of-text included."""

    ids: Tensor
    lengths: Tensor


def enumerate_completions(vocab_size: int, max_length: int, eos: int) -> Completions:
    """Every completion of at most max_length tokens, once, shortest first [D9.1].

    A completion ends with end-of-text, or is cut after max_length tokens without one. Together they are
    prefix-free and exhaustive, so their probabilities sum to one under any model.

    Args: vocab_size >= 2; max_length >= 1; eos in [0, vocab_size). Raises InputError.
    Returns: Completions, sum_{t < max_length} (V-1)^t + (V-1)^max_length of them.

    Example:
        >>> enumerate_completions(vocab_size=3, max_length=2, eos=2).ids.tolist()
        [[2, 2], [0, 2], [1, 2], [0, 0], [0, 1], [1, 0], [1, 1]]
    """
    check_count("vocab_size", vocab_size, minimum=2)
    check_count("max_length", max_length)
    if not 0 <= eos < vocab_size:
        raise InputError(f"eos must lie in [0, {vocab_size}), got {eos}.")
    words = torch.tensor([token for token in range(vocab_size) if token != eos])
    prefixes = [torch.empty(1, 0, dtype=torch.long)]  # entry t: all strings of t tokens without end-of-text
    for _ in range(max_length):
        last = words.repeat(len(prefixes[-1])).unsqueeze(-1)
        prefixes.append(torch.cat([prefixes[-1].repeat_interleave(len(words), 0), last], -1))
    ids = [F.pad(strings, (0, max_length - t), value=eos) for t, strings in enumerate(prefixes)]
    lengths = [torch.full((len(strings),), min(t + 1, max_length)) for t, strings in enumerate(prefixes)]
    return Completions(torch.cat(ids), torch.cat(lengths))


class PrefixTree(NamedTuple):
    """The distinct prefixes of completions; node 0 is the empty one, each other adds a token [D9.2].

    Fields:
        completions: the set.
        tokens: (N - 1,) the token of each node but the root.
        depth: (N - 1,) how many tokens its prefix has.
        ancestors: (N, N) True where the column's prefix begins the row's (itself included).
        context: (Y, T) the node from which each token of each completion is predicted.
    """

    completions: Completions
    tokens: Tensor
    depth: Tensor
    ancestors: Tensor
    context: Tensor


def prefix_tree(completions: Completions) -> PrefixTree:
    """Build the tree once, score with it often [D9.2]. Raises InputError on lengths outside 1 to T."""
    ids, lengths = completions
    Y, T = ids.shape
    if lengths.shape != (Y,) or (lengths < 1).any() or (lengths > T).any():
        raise InputError(f"lengths must have shape ({Y},) with entries from 1 to {T}.")
    node = torch.zeros(Y, dtype=torch.long, device=ids.device)
    contexts, tokens, depths = [node], [ids.new_empty(0)], [ids.new_empty(0)]
    ancestors = torch.ones(1, 1, dtype=torch.bool, device=ids.device)
    for t in range(1, T):
        longer = lengths > t  # only they need a context of t tokens
        step = torch.stack([node[longer], ids[longer, t - 1]], -1)  # (parent, token)
        children, child = torch.unique(step, dim=0, return_inverse=True)
        first, count = len(ancestors), len(children)
        node = node.masked_scatter(longer, first + child)
        contexts.append(node)
        tokens.append(children[:, 1])
        depths.append(torch.full_like(children[:, 1], t))
        own = torch.eye(count, dtype=torch.bool, device=ids.device)
        ancestors = torch.cat([F.pad(ancestors, (0, count)), torch.cat([ancestors[children[:, 0]], own], -1)])
    return PrefixTree(completions, torch.cat(tokens), torch.cat(depths), ancestors, torch.stack(contexts, -1))


def completion_logps(model: GPT, prompts: Tensor, completions: Completions | PrefixTree) -> Tensor:
    """log pi(y|x) of every completion after every prompt, shared prefixes computed once [D9.1].

    One forward pass over sequences of prompt + tree: a node attends to the prompt and its ancestors and
    sits at the position it would have in a sequence of its own.

    Args:
        model: the policy.
        prompts: (X, P) token ids, all of one length.
        completions: the set, or its `prefix_tree` where it is scored more than once.
    Returns:
        (X, Y) nats, float32 or wider.
    Raises:
        InputError: shapes do not fit, a completion reaches beyond the context, an id beyond the vocabulary.
    """
    tree = completions if isinstance(completions, PrefixTree) else prefix_tree(completions)
    ids, lengths = tree.completions
    check_ids("ids of completions", ids, model.config.vocab_size)
    logits = widen(model.project(tree_states(model, prompts, tree)))
    node_logps = logits.log_softmax(-1).flatten(1)  # (X, N * V)
    token_logps = node_logps[:, tree.context * logits.shape[-1] + ids]  # (X, Y, T)
    scored = torch.arange(ids.shape[1], device=prompts.device) < lengths.unsqueeze(-1)
    return token_logps.masked_fill(~scored, 0).sum(-1)


def tree_states(model: GPT, prompts: Tensor, tree: PrefixTree) -> Tensor:
    """Hidden states of every prefix after every prompt, (X, N, C), the first that of the prompt's end [D9.2].

    Args, Raises: as `completion_logps`.
    """
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise InputError(f"prompts must have shape (X, P) and not be empty, got {tuple(prompts.shape)}.")
    X, P = prompts.shape
    device = prompts.device
    nodes = torch.cat([prompts, tree.tokens.expand(X, -1)], -1)  # (X, P + N - 1)
    positions = torch.cat([torch.arange(P, device=device), P - 1 + tree.depth])
    mask = F.pad(tree.ancestors[1:, 1:], (P, 0, P, 0))
    mask[:, :P] = True
    mask[:P, :P] = torch.ones(P, P, dtype=torch.bool, device=device).tril()
    return model.hidden(nodes, positions, mask)[:, P - 1 :]


def whole_completions(completions: Completions) -> tuple[PrefixTree, Tensor]:
    """The tree in which completions themselves are prefixes too, and the node of each: (Y,) [D9.2].

    What reads a completion to its end, such as a reward model, needs its last token's state.
    """
    ids, lengths = completions
    tree = prefix_tree(Completions(F.pad(ids, (0, 1)), lengths + 1))  # as if one more token followed
    return tree, tree.context[torch.arange(len(ids), device=ids.device), lengths]


class EnumeratedPolicy(nn.Module):
    """A GPT as a bandit policy: its call gives the (X, Y) table of all completions of fixed prompts [D9.1].

    Prompts and completions must be on the GPT's device; moving the module moves the GPT alone.
    """

    def __init__(self, gpt: GPT, prompts: Tensor, completions: Completions):
        super().__init__()
        self.gpt = gpt
        self.prompts = prompts
        self.tree = prefix_tree(completions)

    def forward(self) -> Tensor:
        """(X, Y) log pi(y|x)."""
        return completion_logps(self.gpt, self.prompts, self.tree)
