"""DPO in one file, ending with its own proof: `python -m dpo_minimal.micro`, or alone, `python micro.py`.

Direct Preference Optimization (Rafailov et al., 2023) trains a language model on comparisons: of two
completions of a prompt x, people preferred y_w to y_l. The policy pi(y|x) starts as a copy of a reference
pi_ref(y|x), and beta log(pi / pi_ref) takes the place of a learned reward. Here the policy is a GPT-2 so
small that all its completions can be listed. So the policy pi* that training should find is known exactly,
and after some seconds the last line proves that it was found: within 1e-5 nats on every completion.

Equation numbers are the paper's, tags such as [D4.3] sections of derivations.md. Left out, and found in:
preferences.py (sampled comparisons), losses.py (rankings), zoo/ (other losses), policy.py (many prompts),
model.py (a GPT-2 with a cache), text/ (real text), validation.py (checks of input) and certificates.py
(the proof for any data, rounding included).
"""

import copy
from itertools import permutations, product

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, END = ["<end>", "not", "very", "good"], 0
PROMPT = [3]  # "good", as in: was it good?
MAX_LENGTH = 3  # a completion that has not ended after three tokens is cut there: 40 completions
N_LAYER, N_HEAD, N_EMBD = 2, 4, 32
BETA = 0.5  # the cost of leaving the reference: reward per nat of KL divergence
STEPS, LEARNING_RATE, SEED = 600, 5e-3, 0  # the rate falls to zero: the last digits need small steps
# Shapes: B rows, T tokens, C channels, H heads, V words, Y completions, N outcomes "w is preferred to l".


class Block(nn.Module):  # attention reads the earlier positions, the MLP works on each; both add to x
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(N_EMBD), nn.LayerNorm(N_EMBD)
        self.c_attn, self.attn_proj = nn.Linear(N_EMBD, 3 * N_EMBD), nn.Linear(N_EMBD, N_EMBD)
        self.c_fc, self.mlp_proj = nn.Linear(N_EMBD, 4 * N_EMBD), nn.Linear(4 * N_EMBD, N_EMBD)

    def forward(self, x):
        heads = self.c_attn(self.ln_1(x)).unflatten(-1, (3, N_HEAD, -1))  # (B, T, C) -> (B, T, 3, H, C / H)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # three of (B, H, T, C / H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).flatten(2))  # back to (B, T, C)
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):  # GPT-2: token ids (B, T) in, logits of the next token (B, T, V) out
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(len(VOCAB), N_EMBD)
        self.wpe = nn.Embedding(len(PROMPT) + MAX_LENGTH, N_EMBD)
        self.h = nn.Sequential(*[Block() for _ in range(N_LAYER)])
        self.ln_f = nn.LayerNorm(N_EMBD)
        for weight in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(weight, std=0.15)  # GPT-2's 0.02 would make all words about equally likely

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        return self.ln_f(self.h(x)) @ self.wte.weight.T  # the output head is the embedding again


def enumerate_completions():
    """Every completion there is: token ids (Y, MAX_LENGTH), filled up with END."""
    texts = [text for n in range(MAX_LENGTH + 1) for text in product(range(1, len(VOCAB)), repeat=n)]
    return torch.tensor([text + (END,) * (MAX_LENGTH - len(text)) for text in texts])


def completion_logps(gpt, prompt, completions):
    """log pi(y|x) of each completion, (Y,): the sum over its tokens, the first END included [D9.1]."""
    ids = torch.cat([prompt.expand(len(completions), -1), completions], -1)
    logits = gpt(ids[:, :-1])[:, len(prompt) - 1 :]  # (Y, T, V): each token is predicted by those before it
    token_logps = logits.log_softmax(-1).gather(-1, completions[:, :, None])[:, :, 0]  # (Y, T)
    scored = (completions == END).cumsum(-1) <= 1
    return (token_logps * scored).sum(-1)


def expected_pairs(rewards):
    """What people answer: they see all pairs equally often, and prefer w to l with probability
    sigmoid(r_w - r_l), Bradley-Terry (Eq. 1) [D2.1]. Returns each outcome's w, l and probability, (N,)."""
    w, l = torch.tensor(list(permutations(range(len(rewards)), 2))).T
    return w, l, torch.sigmoid(rewards[w] - rewards[l]) / (len(w) / 2)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    """-log sigmoid(margin) (Eq. 7) [D4.3]. Its gradient is -weight * grad(log pi(y_w) - log pi(y_l)): near
    beta where the policy orders the pair wrongly, near 0 where it is sure [D5.1]. Returns both, (N,)."""
    margin = beta * ((policy_chosen_logps - policy_rejected_logps) - (ref_chosen_logps - ref_rejected_logps))
    return -F.logsigmoid(margin), beta * torch.sigmoid(-margin).detach()


def optimal_logps(ref_logps, rewards, *, beta):
    """log pi*, where pi* = pi_ref exp(r / beta) / Z has most reward - beta KL(pi | pi_ref) (Eq. 4) [D3.4]."""
    return (ref_logps + rewards / beta).log_softmax(-1)


def certificate(logps, ref_logps, w, l, share, *, beta):
    """A bound on max |log pi - log pi*| that reads the loss around pi and not pi* itself [D11.2].

    In the scores s = beta log(pi / pi_ref) the loss is convex, its minimum is at r, and a step d changes its
    curvature by at most a factor exp(range of d). So where the gradient is small compared with the
    curvature, the minimum must be near.
    """
    scores = beta * (logps - ref_logps)
    chance = torch.sigmoid(scores[w] - scores[l])
    pull = (F.one_hot(w) - F.one_hot(l)).double()  # (N, Y): where each outcome pulls the scores
    gradient = -(share * (1 - chance)) @ pull
    hessian = pull.T @ ((share * chance * (1 - chance))[:, None] * pull)
    inverse = torch.linalg.inv(hessian + 1 / len(scores)) - 1 / len(scores)  # a constant in s changes nothing
    newton = inverse @ gradient  # from the minimum to here, if the curvature stayed the same
    softness = inverse.diagonal()[:, None] + inverse.diagonal() - 2 * inverse  # (Y, Y), of each s_i - s_j
    x = (softness.max() * (gradient @ newton)).sqrt()  # at least the range of newton
    change = x / (1 - x) + torch.log1p(-x)  # what newton misses because the curvature changes
    distance = min(-torch.log1p(-x), newton.max() - newton.min() + change)
    return distance.item() / beta if x <= 0.5 else torch.inf


def main():
    torch.set_num_threads(1)  # on matrices this small, two threads wait for each other
    torch.manual_seed(SEED)
    prompt, completions = torch.tensor(PROMPT), enumerate_completions()
    policy = GPT().double()
    reference = copy.deepcopy(policy).requires_grad_(False)  # only the policy learns
    ref_logps = completion_logps(reference, prompt, completions)
    rewards = torch.randn(len(completions)).double()  # no pattern that a network could guess
    w, l, share = expected_pairs(rewards)
    best = optimal_logps(ref_logps, rewards, beta=BETA)  # log pi*, known before training starts

    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.95))
    for step in range(STEPS):
        logps = completion_logps(policy, prompt, completions)
        losses, weights = dpo_loss(logps[w], logps[l], ref_logps[w], ref_logps[l], beta=BETA)
        loss, weight, error = share @ losses, share @ weights, (logps - best).abs().max()
        if step % 100 == 0:
            print(f"step {step:3}  loss {loss:.6f}  mean weight {weight:.6f}  max error {error:.1e}")
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS) ** 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    logps = completion_logps(policy, prompt, completions).detach()
    print("\ncompletion      reward  log π_ref      log π     log π*")
    for y in rewards.argsort(descending=True)[[0, 1, 2, -3, -2, -1]]:
        text = " ".join(VOCAB[token] for token in completions[y] if token != END)
        print(f"{text:14} {rewards[y]:7.3f} {ref_logps[y]:10.6f} {logps[y]:10.6f} {best[y]:10.6f}")
    error, bound = (logps - best).abs().max(), certificate(logps, ref_logps, w, l, share, beta=BETA)
    assert error <= bound
    print(f"\nmax |log π − log π*| = {error:.1e} ≤ {bound:.1e} (proved from the gradient)")


if __name__ == "__main__":
    main()
