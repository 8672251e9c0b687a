# %% [markdown]
# # 6 · Sequences: from a table to a GPT-2
#
# **Before this:** notebooks 2 and 3, or what they show: π\* = π_ref exp(r/β) / Z, and that DPO on a table finds it ·
# **Read:** 30 minutes · **Solve:** 30 minutes · **Difficulty:** ●●○ · **Derivations:** [D9.1], [D9.2], [D9.3], [D9.4], [D13.2], [D13.5]
#
# **The claim.** So far a policy was a table: one number for each completion. A language model has no such table. It writes a completion token by token, and $\log\pi(y|x)$ is a sum over the tokens. Nothing else changes: a small GPT, trained by DPO on comparisons of whole completions, ends at the same π\*. On text nobody can list all completions; there, too, the same loss makes a small GPT write better reviews, and shows what the loss leaves open.

# %% tags=["setup"]

import copy
import json
import tempfile
from itertools import permutations
from pathlib import Path

import torch
import torch.nn.functional as F
from dpo_course import figures
from dpo_course.checks import check
from dpo_course.training import descend, logps_of_rows, small_gpt
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.bandit import dpo_objective
from dpo_minimal.text.adapters import adapters_of, add_adapter, learnt, merge
from dpo_minimal.zoo.ipo import averaged_dpo_optimum

figures.use_style()

# %% [markdown]
# ## One row of tokens
#
# Three tokens are enough: `a`, `b`, and `.`, which ends the text. Below is the row of a batch. Its prompt is `ab`, its completion is `ba.`, and two tokens of padding fill it up to the width of the batch. The padding is `.` too; so only the lengths can say where the completion ends.
#
# At each position a GPT returns a logit for every token that may come *next*. `gather` then takes, at each position, the entry of the token that did come.

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
# ### Exercise 6.1: log π(y|x)
#
# *8 minutes · central.* Rows are padded on the right. `prompt_lengths` holds the number of prompt tokens of each row, `lengths` that of prompt and completion together. Logits at position $t$ predict the token at position $t+1$. Return the log-probability of each row's completion.


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
check("6.1", sequence_logps)

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
# **What happened.** Only the sum gives a distribution. A mean over tokens is a geometric mean of probabilities, which is at least their product. Without end-of-text every completion counts for more than its probability: by how much, the next exercise asks. Such scores may define useful losses, but with other optima; exercise 6.4 finds one.

# %% [markdown]
# ### Exercise 6.2: change the score: no end-of-text
#
# *4 minutes.* Predict the second bar without a model. Given are all completions there are, `texts` (those that end with `.` have ended, the others were cut), and their log-probabilities `logps`, end-of-text included. Return the sum of exp(score) over the texts, where the score leaves end-of-text out.
#
# **Predict before you run.** Of which event is exp(score) of `ab.` the probability? If the policy writes `ab.`, for how many of the texts has that event happened? What would a policy do that is trained to raise this score?


# %% tags=["exercise"]
def sum_without_end(texts, logps):
    """Y texts, (Y,) log-probabilities -> the sum of exp(score), end-of-text left out of the score."""
    ### BEGIN SOLUTION
    said = torch.tensor([len(text.rstrip(".")) for text in texts], dtype=torch.float64)
    return 1 + logps.exp() @ said  # each text counts once for every beginning, the empty one included
    ### END SOLUTION


# %% tags=["check"]
check("6.2", sum_without_end)

# %% [markdown] tags=["outcome"]
# **What happened.** Without end-of-text, exp(score) of `ab.` is the probability that the policy's text *begins* with `ab`. A text `ab.` begins with nothing, with `a` and with `ab`, so it is counted three times: once more than it has tokens before the end. The sum is one plus the average number of these tokens. What the policy writes after `ab` does not change this score, so training on it never teaches the model to stop.

# %% [markdown]
# ## π\* has next-token probabilities too
#
# π\* was defined for whole completions. What would a language model that *is* π\* do after a prefix? Like every distribution over completions it has conditionals: the probability of a prefix is the sum over the completions that begin with it, and the next token's is a ratio of two such sums. The library's `next_token_logps` does this for any set of completions; here you do it for those of two tokens.

# %% [markdown]
# ### Exercise 6.3: from completions to next tokens
#
# *4 minutes.* Entry $[a,b]$ of a $V\times V$ table is the log-probability of the completion $ab$. Return two tensors: the log-probabilities of the first token, and those of the second given the first (one row for each first token).


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
# **What happened.** π\* prefers the coin, because it will also choose the *second* token well: it can make the good side of a coin more likely, and a sure reward leaves nothing to choose. The soft value knows this, the average reward under the reference does not ([D9.4]).

# %% [markdown]
# ## A GPT becomes π\*
#
# Now the experiment. Two prompts, fifteen completions of each, rewards drawn at random and without any pattern that a network could guess. Which pairs are compared? `random_cycles` puts the completions of a prompt on a ring, in random order, and takes the pairs of neighbours, here on three rings. Such a list of pairs is called a *slate*; `expected_pairs` gives each pair the exact probabilities of Bradley–Terry. The reference is the GPT from above; the policy starts as its copy.

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
# `EnumeratedPolicy` returns the table of all $\log\pi(y|x)$, as a function of the GPT's weights. The loss is that of notebook 3, unchanged.


# %%
def objective(pairs):
    """The DPO loss of the GPT on weighted pairs, and its distance from π*."""
    logps = policy()
    loss, _ = dpo_objective(logps, ref_logps, pairs, beta=beta)
    return loss, {"kl": dpo.kl_divergence(logps.detach(), optimal).mean()}


# %% [markdown]
# `descend` is Adam with a learning rate that rises over 20 steps and then falls to zero, one step a batch. Here every batch holds all pairs.

# %%
records = descend(objective, policy.parameters(), [pairs] * 500, learning_rate=3e-3)

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
# ### Exercise 6.4: change the score: the mean
#
# *8 minutes.* Many divide a log-ratio by the completion's number of tokens, so that long completions have no advantage. *Train* a table that way: one prompt, $Y$ completions, the exact probabilities of all pairs ($\sigma(r_i-r_j)$), and the DPO loss with $\beta\log\frac{\pi(y)}{\pi_{\rm ref}(y)}\big/|y|$ in place of the implicit reward. Return the average length of the policy where training ends, in tokens. You may use `descend`; the objective returns the loss and a dict, and 150 steps with a learning rate of 0.2 are enough. (The check allows 1 %, and takes some seconds.)
#
# **Predict before you run.** The cell after the check has four equally likely completions: three with one token, of rewards 1, 0 and 0, and one of ten tokens with reward 0.9. Which one does π\* prefer? Which one will the mean prefer?


# %% tags=["exercise"]
def length_trained_on_means(ref_logps, rewards, lengths, beta):
    """(Y,) log-probabilities, (Y,) rewards, (Y,) tokens -> the trained policy's average length."""
    ### BEGIN SOLUTION
    theta, preferred = ref_logps.clone().requires_grad_(), dpo.preference_matrix(rewards)

    def objective(_):
        scores = beta * (theta.log_softmax(-1) - ref_logps) / lengths
        return -(preferred * F.logsigmoid(scores[:, None] - scores)).mean(), {}

    descend(objective, [theta], 150 * [None], learning_rate=0.2)
    return theta.detach().softmax(-1) @ lengths.double()
    ### END SOLUTION


# %% tags=["check"]
check("6.4", length_trained_on_means)

# %%
four = torch.tensor([[1.0, 0.0, 0.0, 0.9]], dtype=torch.float64)
even, tokens_each = torch.full((1, 4), 0.25, dtype=torch.float64).log(), torch.tensor([[1, 1, 1, 10]])
all_pairs = dpo.expected_pairs(four, dpo.all_sets(four.isfinite()))
by_sum = dpo.optimal_logps(even, four, beta=1.0)
by_mean = averaged_dpo_optimum(all_pairs, even, beta=1.0, lengths=tokens_each)
for name, logps in (("π* (sums)", by_sum), ("means", by_mean)):
    print(
        f"{name:<9}",
        logps.exp()[0].round(decimals=3).tolist(),
        f"{logps.exp()[0] @ tokens_each[0].double():.1f} tokens",
    )

# %% [markdown] tags=["outcome"]
# **What happened.** The mean prefers the long one, though its reward is lower. Training ends where $\beta\log\frac{\pi(y)}{\pi_{\rm ref}(y)}=|y|\,(r(y)+c)$, with one number $c$ for all completions of the prompt ([D13.5]). So the length does not drop out: it multiplies. Long completions are raised further if they are good and lowered further if they are bad, as if each had a β of its own, $\beta/|y|$. What was meant to take the advantage from long completions gives one to the good ones among them.

# %% [markdown]
# ## Token by token
#
# Only whole completions were compared, but the trained GPT has an opinion about every token: its log-ratio $\log\frac{\pi(y_t|x,y_{<t})}{\pi_{\rm ref}(y_t|x,y_{<t})}$. Take the logarithm of $\pi^\ast(a|h)$ above: β times these log-ratios are steps of the value, and the steps add up ([D9.3]):
#
# $$\beta\sum_{s\le t}\log\frac{\pi^\ast(y_s|x,y_{<s})}{\pi_{\rm ref}(y_s|x,y_{<s})}=V(y_{\le t})-V(x),\qquad V(x)=\beta\log Z(x).$$
#
# **Predict before you run.** The next figure follows the best, the median and the worst completion of three tokens from left to right: lines are π\*, open markers the GPT. Where does each line start, and where must it end?

# %%
lengths = completions.lengths
steps_of = dpo.next_token_logps(optimal, completions.ids, lengths)
steps_of -= dpo.next_token_logps(ref_logps, completions.ids, lengths)
values = beta * steps_of[0].cumsum(-1)  # V(prefix) - V(prompt), for the prompt ab
of_gpt = dpo.token_logps(gpt, batch).detach() - dpo.token_logps(reference, batch)
of_gpt = beta * of_gpt[:, 2:].cumsum(-1)  # behind the prompt's two tokens
ranked = rewards[0].masked_fill(lengths < 3, torch.nan).argsort()[: (lengths == 3).sum()]
shown = ranked[[-1, len(ranked) // 2, 0]].tolist()
ends = rewards[0] - dpo.soft_value(ref_logps, rewards, beta=beta)[0]
print({texts[y]: f"r - β log Z = {ends[y]:.2f}" for y in shown})

# %%
figure, axes = plt.subplots()
for y, colour, marker in zip(shown, [figures.BLUE, figures.GREEN, figures.RED], "os^"):
    axes.plot(range(4), [0, *values[y].tolist()], color=colour)
    axes.plot(range(4), [0, *of_gpt[y].tolist()], marker, color=colour, mfc="none", markersize=13)
    axes.text(3.08, values[y, 2], texts[y], color=colour, va="center")
axes.set(xticks=range(4), xlim=(-0.1, 3.4), xlabel="tokens read", ylabel="value above V(x) (units of reward)")
figures.show(figure, "6.e")

# %% [markdown] tags=["outcome"]
# **What happened.** Lines are $V(y_{\le t})-V(x)$, and the GPT's markers lie on them. All start at zero and end at $r(y)-\beta\log Z(x)$, as the cell prints. In between, the GPT gives a value to the text so far after each token, although nobody labelled a token.

# %% [markdown]
# ## A GPT that writes words
#
# On text the steps are the same: text becomes tokens, each side of a pair becomes a row, the rows become log-probabilities. What is new is that nobody can list all completions. Here are all the steps at a small size, with a vocabulary of words. The prompts are `the film`, `the plot` and `the music`; people have written reviews of one clause or two. The *true reward* is the sum of what the clauses say. Training never sees it.

# %%
clauses = {"was a joy": 1, "made us laugh": 1, "was in colour": 0, "was a bore": -1, "made us yawn": -1}
openings = ["the film", "the plot", "the music"]
endings = [*clauses] * 2 + [f"{first} and {second}" for first, second in permutations(clauses, 2)]
reviews = [f"{opening} {ending} ." for opening in openings for ending in endings]
words = sorted({word for review in reviews for word in review.split()})
number = {word: place for place, word in enumerate(words)}
print(len(reviews), "reviews;", len(words), "words:", *words)


def true_reward(text):
    """The sum over the clauses that a text contains."""
    return sum(value for clause, value in clauses.items() if clause in text)


# %%
def encode(text):
    """Text -> token numbers."""
    return [number[word] for word in text.split()]


def batch_of(texts):
    """Texts that begin with a prompt of two words -> rows, filled up with "." on the right."""
    rows = [encode(text) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [number["."]] * int(lengths.max() - len(row)) for row in rows])
    return dpo.SequenceBatch(ids, torch.full((len(rows),), 2), lengths)


# %% [markdown]
# First the reference: a GPT learns the reviews, by maximising the very same $\log\pi(y|x)$. That is supervised fine-tuning, SFT. Then it writes.


# %%
def sft_loss(batch):
    """The mean of -log π(y|x)."""
    return -dpo.sequence_logps(writer, batch).mean(), {}


torch.manual_seed(0)
config = dpo.GPTConfig(vocab_size=len(words), block_size=16, n_layer=1, n_head=2, n_embd=48)
writer = dpo.GPT(config).double()
records = descend(sft_loss, writer.parameters(), [batch_of(reviews)] * 150, learning_rate=1e-2)
writer.requires_grad_(False)
least = -sum(torch.tensor(endings.count(ending) / 30).log() for ending in endings) / 30
print(f"SFT loss {records[0]['loss']:.2f} -> {records[-1]['loss']:.2f} nats; no policy is below {least:.2f}")


# %%
def write(model, count, seed):
    """Reviews that the model writes, `count` for each prompt."""
    prompts = [encode(opening) for opening in openings for _ in range(count)]
    generator = torch.Generator().manual_seed(seed)
    drawn = dpo.generate(model, prompts, max_new_tokens=12, eos=number["."], generator=generator)
    return [" ".join(words[token] for token in prompt + ids) for prompt, ids in zip(prompts, drawn)]


for text in write(writer, 2, seed=0):
    print(f"{true_reward(text):+d}  {text}")

# %% [markdown]
# ## A file of preferences
#
# Pairs of the reference's own samples are shown to people, who choose by Bradley–Terry on the true reward. The answers go into a file, one JSON object a line, as most preference data come. `dpo.load_preferences` reads it, and checks it: a row whose two completions are equal, for instance, is an error that names file and row; so such pairs are left out here.


# %%
def row_of(chosen, rejected):
    """Two reviews of one prompt as a row of a preference file."""
    cut = len(" ".join(chosen.split()[:2]))  # a prompt has two words
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


first, second = write(writer, 100, seed=1), write(writer, 100, seed=2)
gaps = torch.tensor([float(true_reward(a) - true_reward(b)) for a, b in zip(first, second)])
prefers_first = torch.rand(len(gaps), generator=torch.Generator().manual_seed(3)) < torch.sigmoid(gaps)
answers = [(a, b) if wins else (b, a) for a, b, wins in zip(first, second, prefers_first) if a != b]

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row_of(*answer)) for answer in answers))
    pairs = dpo.load_preferences(file)
print(len(pairs), "pairs, such as", *pairs[:2], sep="\n")

# %% [markdown]
# **Predict before you run.** The model reads each pair as two rows. How many of the boxes below will be coloured, because their log-probability counts?

# %%
sides = [batch_of([pair.prompt + pair[place] for pair in pairs]) for place in (1, 2)]  # chosen, rejected
figure, axes = plt.subplots(figsize=(12, 3))
shown = [[field[pair] for field in side] for pair in (0, 1) for side in sides]
as_words = [[words[token] for token in ids] for ids, _, _ in shown]
figures.rows_of_words(axes, as_words, [row[1] for row in shown], [row[2] for row in shown])
for place, side in enumerate(("chosen", "rejected") * 2):
    axes.text(-0.2, 0.4 - place, side, ha="right", va="center")
figures.show(figure, "6.f")
print("tokens that count:", [int(length - prompt) for _, prompt, length in shown])

# %% [markdown] tags=["outcome"]
# **What happened.** Grey is the prompt, which both sides of a pair share, and hatched the padding. In colour: the completion, its end included. With your own files, `python -m dpo_minimal audit --data pairs.jsonl` shows what will be read of them, and what is wrong.

# %% [markdown]
# ## DPO on words
#
# The loss of notebook 3, batches of 32 pairs, β = 0.5. What is recorded of each batch has the names that TRL gives it, the library in which most people train.

# %%
in_the_reference = [dpo.sequence_logps(writer, side) for side in sides]


def objective_of(policy):
    """From the numbers of some pairs to their mean DPO loss and what a training log shows of them."""

    def objective(some):
        batches = [dpo.SequenceBatch(*(field[some] for field in side)) for side in sides]
        logps = [dpo.sequence_logps(policy, batch) for batch in batches]
        out = dpo.dpo_loss(*logps, *(reference[some] for reference in in_the_reference), beta=beta)
        margins = out.chosen_rewards - out.rejected_rewards
        means = {"rewards/chosen": out.chosen_rewards, "rewards/rejected": out.rejected_rewards}
        means |= {"rewards/margins": margins, "rewards/accuracies": (margins > 0).double()}
        means |= {"logps/chosen": logps[0], "logps/rejected": logps[1]}
        return out.losses.mean(), {name: value.mean() for name, value in means.items()}

    return objective


# %%
generator = torch.Generator().manual_seed(4)
batches = [torch.randperm(len(pairs), generator=generator)[:32] for _ in range(100)]
runs = {}
for rate in (3e-4, 1e-3, 3e-3):
    policy = copy.deepcopy(writer).requires_grad_(True)
    runs[rate] = policy, descend(objective_of(policy), policy.parameters(), batches, rate)
policy, log = runs[3e-4]
print({name: round(value, 2) for name, value in log[-1].items()})

# %% [markdown]
# **Predict before you run.** What do the rewards of the chosen and of the rejected completions do while the loss falls? (Implicit rewards: both are zero at the reference.) At which share of pairs in the right order do you expect the run to end, if people often contradict themselves?

# %%
figure, (left, right) = plt.subplots(1, 2)
steps = torch.arange(5, len(log) - 4)
curves = {"rewards/chosen": left, "rewards/rejected": left, "rewards/accuracies": right}
for (name, axes), colour in zip(curves.items(), [figures.BLUE, figures.ORANGE, figures.GREEN]):
    values = torch.tensor([record[name] for record in log])
    axes.plot(steps, values.unfold(0, 10, 1).mean(-1), color=colour, label=name)  # means over ten batches
left.set(xlabel="training step", ylabel="implicit reward (nats)")
right.set(xlabel="training step", ylabel="share of the batch", ylim=(0, 1))
for axes in (left, right):
    axes.legend(loc="lower left")
figures.show(figure, "6.g")

# %% [markdown] tags=["outcome"]
# **What happened.** The distance between the two grows, and mostly because the rejected completions become less likely; the chosen ones hardly become more likely. That is what most logs look like, and no mistake: the loss knows the difference only. The accuracy rises above one half and stays well below one, because some labels contradict the others: no policy can obey all of them.

# %% [markdown]
# Before and after, from the same random numbers, with the true reward:

# %%
for before, after in zip(write(writer, 2, seed=0), write(policy, 2, seed=0)):
    print(f"before {true_reward(before):+d}  {before}\n after {true_reward(after):+d}  {after}")

# %% [markdown]
# ## What the loss does not see
#
# We trained three times, with three learning rates. Each policy now writes 600 reviews.
#
# **Predict before you run.** A larger learning rate brings the loss further down. Does it raise the true reward further? And are the texts still reviews, such as SFT has taught them?

# %%
policies = {"reference": writer} | {f"DPO, {rate:g}": model for rate, (model, _) in runs.items()}
written = {name: write(model, 200, seed=5) for name, model in policies.items()}
rewards_of = [sum(map(true_reward, texts)) / len(texts) for texts in written.values()]
known = [sum(text in reviews for text in texts) / len(texts) for texts in written.values()]
for rate, (_, log) in runs.items():
    print(
        f"learning rate {rate:g}: mean loss of the last ten batches {sum(r['loss'] for r in log[-10:]) / 10:.3f}"
    )
print("of the last policy:", *[text for text in written["DPO, 0.003"] if text not in reviews][:3], sep="\n  ")

# %%
figure, axes = plt.subplots()
heights = {"true reward, mean": rewards_of, "share that are reviews": known}
figures.bars_side_by_side(axes, written, heights, [figures.BLUE, figures.ORANGE], fmt="%.2f")
axes.set(xlabel="policy: reference, or DPO with learning rate", ylabel="reward, or share", ylim=(0, 1.6))
figures.show(figure, "6.h")

# %% [markdown] tags=["outcome"]
# **What happened.** All three write what people like better, the third no better than the second. But the larger the step, the fewer of the texts are reviews. In the enumerated world every completion was in some pair, so this could not happen. Here the policy can write texts that are in no pair, nobody compared them, and the loss does not know how much probability they get ([D13.2]): lower all completions of the pairs by the same amount, and every margin stays. So a falling loss and a rising margin do not tell whether a run has gone too far. Samples tell, and the divergence from the reference: look at both.

# %% [markdown]
# ## Reading TRL's code
#
# TRL's `DPOTrainer` computes what you have just computed. Its names (of version 1.16), and ours:
#
# | in TRL | here |
# |---|---|
# | `DPOConfig(beta=0.1)` | β |
# | `loss_type="sigmoid"` | `dpo.dpo_loss`, −log σ(u) |
# | `loss_type="sigmoid_norm"` | DPO on means, exercise 6.4 |
# | `completion_mask` | the coloured boxes of figure 6.f |
# | `chosen_logps`, `rejected_logps` | `dpo.sequence_logps` of the two sides |
# | `ref_chosen_logps`, `ref_rejected_logps` | the same under the reference, without gradient |
# | `chosen_logratios`, `rejected_logratios` | log π(y\|x) − log π_ref(y\|x) |
# | `delta_score` | h, the difference of the two; β h is the margin u |
# | `logps/chosen` in the log | mean of log π(y_w\|x): a sum over tokens, so it depends on the length |
# | `rewards/chosen`, `rewards/rejected` | means of β log π/π_ref: implicit rewards, not the true ones |
# | `rewards/margins`, `rewards/accuracies` | mean of u, share of pairs with u > 0 |
#
# What its log does not show is the gradient weight of notebook 4, β σ(−u); from the loss of a pair exercise 4.5 finds it.

# %% [markdown]
# ## A pretrained model, and an adapter
#
# In practice the reference is no model of your own. `dpo.GPT.from_pretrained("gpt2")` fetches the weights of GPT-2 once, by the package `huggingface_hub`; the same function reads any folder in Hugging Face's layout. Below, our writer goes into such a folder and comes back.
#
# Large models are often trained with *adapters* (LoRA). All weights $W_0$ are frozen, and beside each linear map a product of two narrow matrices is trained: $W=W_0+\frac\alpha r BA$, where $A$ has $r$ rows and $B$ has $r$ columns. $B$ starts at zero.
#
# **Predict before you run.** How many numbers does an adapter of rank 8 train beside GPT-2's 124 million? What is the log-ratio of every completion before the first step? And where is the reference, if no copy of the model is made?

# %%
with tempfile.TemporaryDirectory() as folder:
    writer.save_pretrained(folder)
    again = dpo.GPT.from_pretrained(folder)  # "gpt2" in place of the folder: OpenAI's weights
away = dpo.sequence_logps(again, sides[0]) - in_the_reference[0]
print(f"read back, in float32; largest difference of a log-probability: {away.detach().abs().max():.0e}")
config = dpo.GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
with torch.device("meta"):  # shapes without memory
    gpt2 = add_adapter(dpo.GPT(config), r=8, alpha=16)
trained, together = (sum(w.numel() for w in some) for some in (learnt(gpt2), gpt2.parameters()))
print(f"GPT-2 has {together - trained:,} weights; the adapter trains {trained:,}")

# %%
adapted = add_adapter(writer, r=4, alpha=8)  # a second GPT, with the writer's own weights
chosen, reference_logps = sides[0], in_the_reference[0]
logratios = {"at the start": dpo.sequence_logps(adapted, chosen) - reference_logps}
descend(objective_of(adapted), learnt(adapted), batches, learning_rate=2e-3)
logratios["after training"] = dpo.sequence_logps(adapted, chosen) - reference_logps
logratios["after training, without the adapter"] = dpo.sequence_logps(writer, chosen) - reference_logps
for name, values in logratios.items():
    print(f"largest log-ratio {name}: {values.detach().abs().max():.2f}")
print(len(adapters_of(adapted)), "linear maps have an adapter; added to their weights, the model writes:")
print(*(f"{true_reward(text):+d}  {text}" for text in write(merge(adapted), 2, seed=0)), sep="\n")

# %% [markdown] tags=["outcome"]
# **What happened.** An adapter has about one hundredth of the weights. At the start every log-ratio is zero, whatever $A$ is, and the loss is log 2. The reference is the model *without* the adapter: one set of weights serves as both, and the reference cannot move, because what it consists of is frozen. In the end the product $BA$ is added to $W_0$ (`merge`), and a plain GPT is left.

# %% [markdown]
# ### Exercise 6.5: change the experiment: the adapter left on
#
# *6 minutes.* Libraries switch the adapter off while they compute the reference's log-probabilities. Suppose that code forgets to: then the reference is the policy itself, as it is at each step, without gradient. *Train* a small GPT that way. The policy starts as `small_gpt(seed)`. `chosen` and `rejected` are rows of tokens, the first of which is the prompt; `logps_of_rows(model, rows)` gives their $\log\pi$. Take `steps` steps of plain gradient descent of length `rate` on the mean DPO loss. Return, for each pair, how far the policy has come from where it began: the chosen completion's log-ratio to `small_gpt(seed)` less the rejected one's.
#
# **Predict before you run.** Which loss does the log show at each step? Does the policy stay where it is?


# %% tags=["exercise"]
def moved_with_the_adapter_left_on(seed, chosen, rejected, beta, steps, rate):
    """A seed, (B, T) and (B, T) tokens -> (B,) differences of log-ratios after training, in nats."""
    ### BEGIN SOLUTION
    policy, start = small_gpt(seed), small_gpt(seed)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    for _ in range(steps):
        logps = logps_of_rows(policy, chosen), logps_of_rows(policy, rejected)
        loss = dpo.dpo_loss(*logps, *(value.detach() for value in logps), beta=beta).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    leads = [logps_of_rows(model, chosen) - logps_of_rows(model, rejected) for model in (policy, start)]
    return (leads[0] - leads[1]).detach()
    ### END SOLUTION


# %% tags=["check"]
check("6.5", moved_with_the_adapter_left_on)

# %% [markdown] tags=["outcome"]
# **What happened.** The log shows log 2 at every step, a margin of zero and an accuracy of zero: it looks as if nothing were learnt. But the gradient is not zero. Every pair pulls with the weight β/2, at each step, however far the policy has come: this is the training without the weight of notebook 4, and it never comes to rest. Whoever sees a loss that stays at exactly log 2 should look at the reference first.

# %% [markdown]
# In a terminal, without data or network,
#
#     python -m dpo_minimal dpo
#
# does what the second half of this notebook did, with a larger model and longer film reviews. `python -m dpo_minimal score --model runs/dpo-001` then shows for any pair which tokens carry the margin, in colour.

# %% [markdown]
# ## An open question
#
# Real completions are far too many for each to be in a pair. What keeps the unseen ones in place while a language model is trained by DPO? The loss does not ([D13.2]). The network's way of generalising from seen to unseen texts, the step size and the early end of training do something; we know of no theorem that says how much.
