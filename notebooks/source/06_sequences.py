# %% [markdown]
# # 6 · Sequences: from a table to a GPT-2
#
# **Before this:** notebooks 2 and 3, or what they show: π\* = π_ref exp(r/β) / Z, and that DPO on a table finds it ·
# **Read:** 25 minutes · **Solve:** 30 minutes · **Difficulty:** ●●○ · **Derivations:** [D9.1], [D9.2], [D9.3], [D9.4], [D13.2]
#
# **The claim.** So far a policy was a table: one number for each completion. A language model has no such table. It writes a completion token by token, and $\log\pi(y|x)$ is a sum over the tokens. Nothing else changes: a small GPT, trained by DPO on comparisons of whole completions, ends at the same π\*.

# %% tags=["setup"]

import copy

import torch
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.bandit import dpo_objective
from dpo_minimal.text.tokenizer import byte_tokenizer

figures.use_style()

# %% [markdown]
# ## One row of tokens
#
# Three tokens are enough: `a`, `b`, and `.`, which ends the text. Below is the row of a batch. Its prompt is `ab`, its completion is `ba.`, and two tokens of padding fill it up to the width of the batch. The padding is `.` too; so only the lengths can say where the completion ends.
#
# At each position a GPT returns a logit for every token that may come *next*.

# %%
tokens = "ab."  # numbers 0, 1 and 2
torch.manual_seed(0)
config = dpo.GPTConfig(vocab_size=3, block_size=8, n_layer=2, n_head=2, n_embd=32)
reference = dpo.GPT(config).double().requires_grad_(False)
reference.ln_f.weight *= 3  # random weights, but next tokens that differ from one another
ids = torch.tensor([[0, 1, 1, 0, 2, 2, 2]])  # ab | ba. | ..
logits = reference(ids)
next_logps = logits.log_softmax(-1)[0, :-1]  # what positions 0 to 5 say about positions 1 to 6
logps = next_logps.gather(-1, ids[0, 1:, None])[:, 0]
print("shape of the logits: row, position, token", tuple(logits.shape))
print("log-probability of the token that came:", *(f"{logp:.3f}" for logp in logps))

# %% [markdown]
# **Predict before you run.** The figure shows those six numbers, each above the token it belongs to. Which of them add up to $\log\pi(y|x)$? Which position of the logits predicts the first token of the completion?

# %%
figure, axes = plt.subplots()
counted = [False, True, True, True, False, False]
for place, (logp, counts) in enumerate(zip(logps.tolist(), counted), start=1):
    look = dict(color=figures.BLUE) if counts else dict(color="none", edgecolor=figures.BLACK, hatch="//")
    axes.bar(place, logp, **look)
for place, name in ((0.5, "prompt"), (3, "completion"), (5.5, "padding")):
    axes.text(place, 0.15, name, ha="center")
axes.set(xticks=range(7), xticklabels=[tokens[i] for i in ids[0]], xlabel="token", xlim=(-0.5, 6.5))
axes.set(ylabel="log-probability (nats)", yticks=[-2, -1, 0], ylim=(None, 0.6))
figures.show(figure, "6.a")
print(f"log π(y|x) = {logps[1:4].sum():.3f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The three filled bars. The prompt is a condition: the policy did not choose it. The first `.` is a decision like any other, to stop here and not to go on. The second and third `.` were never said. The first completion token stands at position 2 and is predicted at position 1, the last one of the prompt.

# %% [markdown]
# By the chain rule of probability ([D9.1]):
#
# $$\log\pi(y|x)=\sum_t\log\pi(y_t\mid x,y_{<t}).$$
#
# It is a *sum* over the completion's tokens, end-of-text included, prompt and padding excluded. Many mistakes in DPO code are made here, and they raise no error: the loss still falls.

# %% [markdown]
# ### Exercise 6.1: which tokens count
#
# *5 minutes.* Rows are padded on the right. `prompt_lengths` holds the number of prompt tokens of each row, `lengths` that of prompt and completion together, and `T` is the width of the batch. Return True where a token belongs to the completion.


# %% tags=["exercise"]
def completion_mask(prompt_lengths, lengths, T):
    """(B,) and (B,) counts, a width -> (B, T) booleans, True at completion tokens (D9.1)."""
    ### BEGIN SOLUTION
    position = torch.arange(T)
    return (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    ### END SOLUTION


# %% tags=["check"]
check("6.1", completion_mask)

# %% [markdown]
# ### Exercise 6.2: log π(y|x)
#
# *12 minutes · central.* Logits at position $t$ predict the token at position $t+1$. Return the log-probability of each row's completion. Do not call your answer to 6.1; write out what you need.


# %% tags=["exercise"]
def sequence_logps(logits, ids, prompt_lengths, lengths):
    """(B, T, V) logits, (B, T) tokens, two (B,) counts -> (B,) log π(y|x), in nats (D9.1)."""
    ### BEGIN SOLUTION
    logps = logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T-1), of the tokens 1 to T-1
    position = torch.arange(1, ids.shape[1])
    counted = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    return (logps * counted).sum(-1)
    ### END SOLUTION


# %% tags=["check"]
check("6.2", sequence_logps)

# %% [markdown] tags=["answer"]
# Positions begin at 1 because the first entry of `logps` belongs to token 1. In the library `dpo.sequence_logps` takes the model itself and projects onto the vocabulary only where a completion token is predicted.

# %% [markdown]
# ## Every completion there is
#
# A completion ends with `.` or is cut after three tokens. There are fifteen of them, and no others. So a GPT over this vocabulary *is* a row of a table, with fifteen entries, and we can ask for all of them.

# %%
prompts = torch.tensor([[0, 1], [1, 0]])  # ab and ba
completions = dpo.enumerate_completions(vocab_size=3, max_length=3, eos=2)
texts = ["".join(tokens[i] for i in y[:n]) for y, n in zip(completions.ids, completions.lengths)]
table = dpo.completion_logps(reference, prompts, completions)
print(texts)
print("shape", tuple(table.shape), " sums of π(y|x)", [f"{total:.6f}" for total in table.exp().sum(-1)])

# %% [markdown]
# There is no better test of a log-probability than this: over all completions, probabilities sum to one, for any weights of the model. Two other scores are popular. One leaves out end-of-text. The other takes the *mean* over tokens, because long completions have small probabilities.
#
# **Predict before you run.** Exponentiate the score of each of the fifteen and add up. Which of the three scores gives one? Are the others above or below it?

# %%
Y = len(texts)
rows = torch.cat([prompts[:1].expand(Y, -1), completions.ids], -1)
batch = dpo.SequenceBatch(rows, torch.full((Y,), 2), 2 + completions.lengths)
each = dpo.token_logps(reference, batch)  # (15, 5), zero at prompt and padding
scores = {
    "sum over tokens": each.sum(-1),
    "without end-of-text": each.masked_fill(rows == 2, 0).sum(-1),
    "mean over tokens": each.sum(-1) / completions.lengths,
}
totals = {name: score.exp().sum().item() for name, score in scores.items()}
print({name: round(total, 3) for name, total in totals.items()})

# %%
figure, axes = plt.subplots()
axes.bar(totals.keys(), totals.values(), 0.6, color=[figures.BLUE, figures.ORANGE, figures.GREEN])
axes.axhline(1, color=figures.BLACK, linestyle=":")
axes.set(xlabel="score of a completion", ylabel="sum of exp(score), all completions")
figures.show(figure, "6.b")

# %% [markdown] tags=["outcome"]
# **What happened.** Only the sum gives a distribution. Without end-of-text the completion `.` has no token left and gets the score $\log1$; a mean over tokens is a geometric mean of probabilities, which is at least their product. Such scores may define useful losses, but with other optima: notebook 7 has two of them, and [D13.5] tells where DPO on means would end.

# %% [markdown]
# ## π\* has next-token probabilities too
#
# π\* was defined for whole completions. What would a language model that *is* π\* do after a prefix? Like every distribution over completions it has conditionals: the probability of a prefix is the sum over the completions that begin with it, and the next token's is a ratio of two such sums. The library's `next_token_logps` does this for any set of completions; here you do it for those of two tokens.

# %% [markdown]
# ### Exercise 6.3: from completions to next tokens
#
# *7 minutes.* Entry $[a,b]$ of a $V\times V$ table is the log-probability of the completion $ab$. Return two tensors: the log-probabilities of the first token, and those of the second given the first (one row for each first token).


# %% tags=["exercise"]
def next_token_logps(logps):
    """(V, V) log π of two tokens -> (V,) of the first, (V, V) of the second given the first."""
    ### BEGIN SOLUTION
    first = logps.logsumexp(-1)
    return first, logps - first[:, None]
    ### END SOLUTION


# %% tags=["check"]
check("6.3", next_token_logps)

# %% [markdown]
# There is a second way to the same conditionals, which shows *why* π\* likes a token. Give each prefix $h$ a value. A whole completion is worth its reward, and a shorter prefix the soft maximum of what may follow ([D9.2]):
#
# $$V(h)=\beta\log\sum_a\pi_{\rm ref}(a|h)\,e^{V(ha)/\beta},\qquad V(y)=r(y).$$
#
# Then π\* tilts the reference's next token by the rise in value ([D9.2]):
#
# $$\pi^\ast(a|h)=\pi_{\rm ref}(a|h)\,e^{(V(ha)-V(h))/\beta}.$$
#
# **Predict before you run.** There are two first tokens, equally likely under the reference, and $\beta=1$. After `coin` the reference tosses a coin that pays $+1$ or $-1$. After `sure` the reward is $0.1$, whatever follows. On average `coin` pays less. Which of the two does π\* prefer?

# %%
even = torch.full((2, 2), 0.25, dtype=torch.float64).log()  # rows: coin, sure
reward = torch.tensor([[1.0, -1.0], [0.1, 0.1]], dtype=torch.float64)
optimal = dpo.optimal_logps(even.flatten(), reward.flatten(), beta=1.0).view(2, 2)
average, soft = reward.mean(-1), dpo.soft_value(even.log_softmax(-1), reward, beta=1.0)
first = {
    "reference": even.exp().sum(-1),
    "tilted by\naverage reward": average.softmax(-1),
    "tilted by\nsoft value": soft.softmax(-1),
    "π*": optimal.exp().sum(-1),
}
print("average reward", average.tolist(), " soft value", soft.round(decimals=3).tolist())

# %%
figure, axes = plt.subplots()
colours = [figures.REFERENCE, figures.ORANGE, figures.GREEN, figures.OPTIMUM]
for place, (chance, colour) in enumerate(zip(first.values(), colours)):
    axes.bar(place, chance[0], 0.6, color=colour)
    axes.text(place, chance[0].clamp(min=0.5) + 0.01, f"{chance[0]:.3f}", ha="center")
axes.axhline(0.5, color=figures.BLACK, linestyle=":")
axes.set(xticks=range(4), xticklabels=first, xlabel="law of the first token")
axes.set(ylabel="probability of coin", ylim=(0, 0.7))
figures.show(figure, "6.c")

# %% [markdown] tags=["outcome"]
# **What happened.** π\* prefers the coin, because it will also choose the *second* token well: a coin can be tilted, a sure thing can't. The soft value knows this, the average reward under the reference does not ([D9.4]).

# %% [markdown]
# ### Exercise 6.4: the value of a prefix
#
# *3 minutes.* It is the soft value of notebook 2, once more. After each of $P$ prefixes one more token ends the completion. Given the reference's log-probabilities of that token and the rewards of the completions it makes, return the values of the prefixes.


# %% tags=["exercise"]
def soft_values(ref_logps, rewards, beta):
    """(P, V) next-token log-probabilities, (P, V) rewards -> (P,) values, in units of reward (D9.2)."""
    ### BEGIN SOLUTION
    return beta * (ref_logps + rewards / beta).logsumexp(-1)
    ### END SOLUTION


# %% tags=["check"]
check("6.4", soft_values)

# %% [markdown]
# ## A GPT becomes π\*
#
# Now the experiment. Two prompts, fifteen completions of each, rewards drawn at random and without any pattern that a network could guess. Completions are compared along random rings, each pair with the exact probabilities of Bradley–Terry. The reference is the GPT from above; the policy starts as its copy.

# %%
beta, generator = 0.5, torch.Generator().manual_seed(0)
ref_logps = table
rewards = torch.randn(2, Y, generator=generator, dtype=torch.float64)
optimal = dpo.optimal_logps(ref_logps, rewards, beta=beta)
exists = torch.ones(2, Y, dtype=torch.bool)
slate = dpo.random_cycles(exists, cycles=3, generator=generator)
pairs = dpo.expected_pairs(rewards, slate)
gpt = copy.deepcopy(reference).requires_grad_(True)
policy = dpo.EnumeratedPolicy(gpt, prompts, completions)
print(f"{sum(weight.numel() for weight in gpt.parameters())} weights for {exists.sum()} probabilities")
print(f"{len(slate.items)} pairs out of {Y * (Y - 1)}")

# %% [markdown]
# `EnumeratedPolicy` returns the table of all $\log\pi(y|x)$, as a function of the GPT's weights. The loss is that of notebook 3, to the letter.


# %%
def objective(pairs):
    """The DPO loss of the GPT on weighted pairs, and its distance from π*."""
    logps = policy()
    loss, _ = dpo_objective(logps, ref_logps, pairs, beta=beta)
    return loss, {"kl": dpo.kl_divergence(logps.detach(), optimal).mean()}


# %%
def descend(objective, model, data, steps, learning_rate):
    """Adam, with a rate that grows over 20 steps and then falls to zero -> a record for each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps)
    )
    return list(dpo.train(objective, optimizer, [data] * steps, scheduler=schedule))


records = descend(objective, policy, pairs, steps=500, learning_rate=3e-3)

# %% [markdown]
# **Predict before you run.** The GPT has thousands of weights, and every completion shares all of them. It was shown a fraction of the pairs. How near will its thirty probabilities come to those of π\*?

# %%
logps = policy().detach()
print(f"KL(π‖π*): {records[0]['kl']:.2f} nats at the start, {records[-1]['kl']:.0e} at the end")
print(f"largest error of a log-probability: {(logps - optimal).abs().max():.0e}")

# %%
figure, (left, right) = plt.subplots(1, 2)
left.semilogy([record["kl"] for record in records], color=figures.BLUE)
left.set(xlabel="training step", ylabel="KL(π‖π*) (nats)")
right.loglog(optimal.exp().flatten(), ref_logps.exp().flatten(), "^", color=figures.BLACK, mfc="none")
right.loglog(optimal.exp().flatten(), logps.exp().flatten(), "o", color=figures.BLUE)
right.axline((0.01, 0.01), (0.1, 0.1), color=figures.BLUE, linestyle=":", linewidth=1.5)
right.set(xlabel="π*(y|x)", ylabel="π(y|x): ○ GPT, △ reference")
figures.show(figure, "6.d")

# %% [markdown] tags=["outcome"]
# **What happened.** All points lie on the diagonal. The proof of notebook 3 asked that the policy may be anything; this GPT is large enough to be anything *on thirty completions*. That its weights are shared changes the path of training and not its end.

# %% [markdown]
# ## Token by token
#
# Only whole completions were compared, but the trained GPT has an opinion about every token: its log-ratio $\log\frac{\pi(y_t|x,y_{<t})}{\pi_{\rm ref}(y_t|x,y_{<t})}$. Take the logarithm of $\pi^\ast(a|h)$ above: β times these log-ratios are steps of the value, and the steps add up ([D9.3]):
#
# $$\beta\sum_{s\le t}\log\frac{\pi^\ast(y_s|x,y_{<s})}{\pi_{\rm ref}(y_s|x,y_{<s})}=V(y_{\le t})-V(x),\qquad V(x)=\beta\log Z(x).$$
#
# **Predict before you run.** The next figure follows the best, a middling and the worst completion of three tokens from left to right: lines are π\*, open markers the GPT. Where does each line start, and where must it end?

# %%
lengths = completions.lengths
steps_of = dpo.next_token_logps(optimal, completions.ids, lengths)
steps_of -= dpo.next_token_logps(ref_logps, completions.ids, lengths)
values = beta * steps_of[0].cumsum(-1)  # V(prefix) - V(prompt), for the prompt ab
learnt = dpo.token_logps(gpt, batch).detach() - dpo.token_logps(reference, batch)
learnt = beta * learnt[:, 2:].cumsum(-1)  # behind the prompt's two tokens
ranked = rewards[0].masked_fill(lengths < 3, torch.nan).argsort()[: (lengths == 3).sum()]
shown = ranked[[-1, len(ranked) // 2, 0]].tolist()
ends = rewards[0] - dpo.soft_value(ref_logps, rewards, beta=beta)[0]
print({texts[y]: f"r - β log Z = {ends[y]:.2f}" for y in shown})

# %%
figure, axes = plt.subplots()
for y, colour, marker in zip(shown, [figures.BLUE, figures.GREEN, figures.RED], "os^"):
    axes.plot(range(4), [0, *values[y].tolist()], color=colour)
    axes.plot(range(4), [0, *learnt[y].tolist()], marker, color=colour, mfc="none", markersize=13)
    axes.text(3.08, values[y, 2], texts[y], color=colour, va="center")
axes.set(xticks=range(4), xlim=(-0.1, 3.4), xlabel="tokens read", ylabel="value above V(x) (units of reward)")
figures.show(figure, "6.e")

# %% [markdown] tags=["outcome"]
# **What happened.** Lines are $V(y_{\le t})-V(x)$, and the GPT's markers lie on them. All start at zero and end at $r(y)-\beta\log Z(x)$, as the cell prints. In between, the GPT says after each token how well it is going, although nobody labelled a token.

# %% [markdown]
# ## The same on text
#
# On text the steps are the same: text becomes tokens, each side of a pair becomes a row, the rows become log-probabilities. What is new is that nobody can enumerate. Here is the whole pipeline in miniature. One prompt, four completions, one token for each letter (a byte):

# %%
tokenizer = byte_tokenizer()
prompt = tokenizer.encode("The film")
answers = [" was a joy.", " made me laugh.", " was a bore.", " made me yawn."]
coded = [prompt + tokenizer.encode(answer) + [tokenizer.eot] for answer in answers]
width = max(map(len, coded))
padded = torch.tensor([row + [0] * (width - len(row)) for row in coded])
texts_batch = dpo.SequenceBatch(padded, torch.full((4,), len(prompt)), torch.tensor([*map(len, coded)]))
print(padded.shape, texts_batch.prompt_lengths.tolist(), texts_batch.lengths.tolist())
print(padded[0].tolist())

# %% [markdown]
# First the reference: a GPT learns the four texts, by maximising the very same $\log\pi(y|x)$. That is supervised fine-tuning, SFT.


# %%
def negative_log_likelihood(batch):
    """The SFT loss: the mean of -log π(y|x)."""
    return -dpo.sequence_logps(writer, batch).mean(), {}


torch.manual_seed(0)
config = dpo.GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32)
writer = dpo.GPT(config).double()
records = descend(negative_log_likelihood, writer, texts_batch, steps=400, learning_rate=5e-3)
sft_logps = dpo.sequence_logps(writer, texts_batch).detach()[None]
floor = torch.tensor(4.0).log()  # four texts, equally frequent
print(
    f"SFT loss {records[0]['loss']:.1f} -> {records[-1]['loss']:.2f}; no policy is below log 4 = {floor:.2f}"
)
print("probabilities", *(f"{logp.exp():.3f}" for logp in sft_logps[0]), f" sum {sft_logps.exp().sum():.2f}")

# %% [markdown]
# Then DPO: all pairs of the four, with the preferences of rewards $+1$ for the first two and $-1$ for the last two, and β = 0.5 as before. We train three times, with three learning rates.


# %%
def trained(learning_rate):
    """A copy of the writer after DPO on the four texts -> its last loss, its (1, 4) log π."""
    model = copy.deepcopy(writer)

    def text_objective(pairs):
        logps = dpo.sequence_logps(model, texts_batch)[None]
        return dpo_objective(logps, sft_logps, pairs, beta=beta)[0], {}

    records = descend(text_objective, model, text_pairs, 150, learning_rate)
    return records[-1]["loss"], dpo.sequence_logps(model, texts_batch).detach()[None]


text_rewards = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
text_pairs = dpo.expected_pairs(text_rewards, dpo.all_sets(text_rewards.isfinite()))
runs = {f"{rate:g}": trained(rate) for rate in (3e-4, 1e-3, 3e-3)}

# %%
least = dpo_objective(text_rewards, 0 * text_rewards, text_pairs, beta=1.0)[
    0
]  # as if log-ratios were rewards: the true margins
print(f"least possible loss {least:.4f}")
for rate, (loss, logps) in runs.items():
    implicit = beta * (logps - sft_logps)[0]
    wrong = (implicit - implicit.mean() - text_rewards[0]).abs().max()
    print(f"learning rate {rate}: loss {loss:.4f}, implicit rewards right to 0.01: {bool(wrong < 0.01)}")

# %% [markdown]
# All three have reached the minimum of the loss. (Implicit rewards are compared with the true ones after their mean is taken away: a constant cancels in every pair.)
#
# **Predict before you run.** The four texts were all that the reference ever said: their probabilities sum to one. What do they sum to after each of the three trainings?

# %%
figure, axes = plt.subplots()
sums = {"reference": sft_logps.exp().sum()} | {rate: logps.exp().sum() for rate, (_, logps) in runs.items()}
axes.bar(sums.keys(), sums.values(), 0.6, color=[figures.REFERENCE, *[figures.ORANGE] * 3])
for place, total in enumerate(sums.values()):
    axes.text(place, total + 0.02, f"{total:.2f}", ha="center")
axes.set(xlabel="policy: reference, or DPO with learning rate", ylabel="probability of the four texts")
axes.set(ylim=(0, 1.1))
figures.show(figure, "6.f")

# %% [markdown] tags=["outcome"]
# **What happened.** Three policies, one loss. Every comparison that was made is fitted. But a GPT that writes bytes can write other texts, nobody compared those, and the loss does not know how much probability they get: add the same number to all four log-probabilities, and every margin stays. The rest went to texts in no pair, and how much that is depends on the path of the optimiser. In the enumerated world every completion was in some pair, so this could not happen ([D13.2]).

# %% [markdown]
# In practice the pairs are samples of the reference itself, so that what it says often is compared often. In a terminal,
#
#     python -m dpo_minimal dpo
#
# does all this with film reviews: SFT, pairs of the model's own samples judged with the noise of Bradley–Terry, then DPO. It takes about a minute and a half, and prints samples before and after, the true reward, and the divergence from the reference. `python -m dpo_minimal score --model runs/dpo-001` then shows for any pair which tokens carry the margin, in colour.

# %% [markdown]
# ## An open question
#
# Real completions are far too many for each to be in a pair. What keeps the unseen ones in place while a language model is trained by DPO? The loss does not ([D13.2]). The network's way of generalising from seen to unseen texts, the step size and the early end of training do something; we know of no theorem that says how much.
