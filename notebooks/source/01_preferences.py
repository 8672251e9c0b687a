# %% [markdown]
# # 1 · Preferences
#
# **Before this:** probability, and a little PyTorch ·
# **Read:** 20 minutes · **Solve:** 30 minutes · **Difficulty:** ●○○ · **Derivations:** [D2.1], [D2.2], [D2.4], [D6.2], [D11.1]
#
# **The claim.** People can seldom say *how good* a completion is, but they can say which of two is better. They contradict themselves, and that is what makes it possible to measure: how often one completion is chosen over another tells how far apart their *rewards* are. Enough comparisons determine every difference of rewards, and nothing else.

# %% tags=["setup"]
import math

import torch
import torch.nn.functional as F
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.laws.finite_data import standard_errors

figures.use_style()

# %% [markdown]
# ## From rewards to choices
#
# A *prompt* $x$ is what a language model is asked, a *completion* $y$ is what it answers. Below, one prompt has three completions. Each has a *reward* $r(y)$, a number that says how good it is, and a *strength* $e^{r(y)}$, which is positive. Of two completions, each is chosen with a probability proportional to its strength. This is the model of Bradley and Terry (Eq. 1, [D2.1]); read $y_1\succ y_2$ as "$y_1$ is preferred to $y_2$":
#
# $$p(y_1\succ y_2)=\frac{e^{r(y_1)}}{e^{r(y_1)}+e^{r(y_2)}}=\sigma\big(r(y_1)-r(y_2)\big),\qquad\sigma(u)=\frac1{1+e^{-u}}.$$
#
# The second form follows if numerator and denominator are divided by the numerator.

# %%
rewards = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
strengths = rewards.exp()
print("strengths            ", strengths.round(decimals=4))
print("share of y₂ in y₂, y₁", (strengths[1] / (strengths[1] + strengths[0])).round(decimals=4))
print("σ(r₂ - r₁)           ", torch.sigmoid(rewards[1] - rewards[0]).round(decimals=4))
print("all, row over column:", dpo.preference_matrix(rewards).round(decimals=4), sep="\n")

# %% [markdown]
# **Predict before you run.** We let people choose 50 times at each of nine differences of rewards. The bars reach one standard error up and down. A normal variable is further than one standard error from its mean 32 % of the time. So how many of the nine points do you expect to miss the curve by more than their bar?

# %%
generator, choices = torch.Generator().manual_seed(9), 50
gaps, line = torch.linspace(-4, 4, 9), torch.linspace(-5, 5, 200)
chances = torch.sigmoid(gaps)
fractions = (torch.rand(choices, 9, generator=generator) < chances).double().mean(0)
errors = (chances * (1 - chances) / choices).sqrt()
figure, axes = plt.subplots()
axes.plot(line, torch.sigmoid(line), color=figures.BLACK, label="σ(r₁ - r₂)")
axes.errorbar(gaps, fractions, errors, fmt="o", capsize=5, label=f"in {choices} choices")
axes.set(xlabel="difference of rewards r₁ - r₂ (nats)", ylabel="share that chose y₁")
axes.legend(loc="upper left")
figures.show(figure, "1.a")
print(f"{((fractions - chances).abs() > errors).sum()} of 9 points miss the curve by more than their bar")

# %% [markdown] tags=["outcome"]
# **What happened.** In the long run about one point in three misses its curve by more than one standard error. That is chance, and no fault of the model. At a difference of zero people toss a coin. Far out they almost always agree, and a choice tells little.

# %% [markdown]
# ### Exercise 1.1: the probability of a preference
#
# *5 minutes.* Rewards of the two completions of $B$ comparisons come in. Return the $B$ probabilities that the first is preferred to the second.


# %% tags=["exercise"]
def bradley_terry(first, second):
    """(B,) and (B,) rewards -> (B,) probabilities that the first is preferred (Eq. 1)."""
    ### BEGIN SOLUTION
    return torch.sigmoid(first - second)
    ### END SOLUTION


# %% tags=["check"]
check("1.1", bradley_terry)

# %% [markdown] tags=["answer"]
# `torch.sigmoid` and not a ratio of exponentials: at a reward of 800 the second is ∞ / ∞.

# %% [markdown]
# ## Why the exponential
#
# Why $e^r$, and not another positive function? Because odds should chain. If $i$ beats $j$ twice as often as not, and $j$ beats $k$ three times as often as not, then $i$ should beat $k$ with odds of six to one. The *odds* of something with probability $p$ are $\frac p{1-p}$. Odds multiply along a chain exactly if their logarithms, the *log-odds*, add:
#
# $$\log\frac{p_{ik}}{p_{ki}}=\log\frac{p_{ij}}{p_{ji}}+\log\frac{p_{jk}}{p_{kj}}.$$
#
# Then fix any $k$ and call the log-odds of $i$ against it the reward $r_i$. It follows that $p_{ij}=\sigma(r_i-r_j)$, which is Bradley–Terry ([D2.4]). So the unit of a reward is the *nat* of log-odds, the unit of natural logarithms.
#
# **Predict before you run.** Below are all chains $i,j,k$ of five completions. Blue choices are Bradley–Terry's. Orange ones are the same, but one label in ten has been flipped by mistake ([D2.3]). Do their log-odds still add?

# %%
five = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
exact = dpo.preference_matrix(five)
chains = torch.cartesian_prod(*[torch.arange(5)] * 3)
i, j, k = chains[(chains.diff(dim=-1) != 0).all(-1) & (chains[:, 0] != chains[:, 2])].T
figure, axes = plt.subplots()
for name, matrix, marker in (("exact", exact, "o"), ("one in ten flipped", 0.9 * exact + 0.1 * exact.T, "^")):
    log_odds = torch.logit(matrix)
    axes.plot(log_odds[i, j] + log_odds[j, k], log_odds[i, k], marker, label=name)
axes.axline((0, 0), slope=1, color=figures.BLACK, linewidth=1)
axes.set(xlabel="i over j, plus j over k (nats)", ylabel="i over k (nats)")
axes.legend()
figures.show(figure, "1.b")

# %% [markdown] tags=["outcome"]
# **What happened.** The exact log-odds add, so all blue points lie on the diagonal. The orange ones do not: a completion's chance of winning never exceeds nine in ten, however far ahead it is. No reward explains all of them exactly: Bradley–Terry is an assumption, and data can contradict it.

# %% [markdown]
# ## From choices to rewards
#
# Now the other way round: given people's choices, which rewards explain them best? *Maximum likelihood* says: those under which what happened was most probable. If $y_w$ (the winner) was chosen over $y_l$ (the loser), its probability was $\sigma(r_w-r_l)$. Probabilities of independent choices multiply, so their logarithms add. Minus their average is the loss of a *reward model* (Eq. 2, [D2.2]):
#
# $$\mathcal L_R(r)=-E_{(x,y_w,y_l)}\big[\log\sigma(r(x,y_w)-r(x,y_l))\big].$$
#
# **Predict before you run.** Two completions were compared seven times. Where is the loss least if the first won 5 of 7? And if it won 7 of 7?


# %%
def two_completions(gap, won, lost):
    """The loss of the difference of two rewards, in nats per comparison."""
    return -(won * F.logsigmoid(gap) + lost * F.logsigmoid(-gap)) / (won + lost)


# %%
line = torch.linspace(-2, 6, 801, dtype=torch.float64)
even, unanimous = two_completions(line, 5, 2), two_completions(line, 7, 0)
best = even.argmin()
figure, axes = plt.subplots()
axes.plot(line, even, color=figures.BLUE, label="5 wins, 2 losses")
axes.plot(line, unanimous, "--", color=figures.ORANGE, label="7 wins, 0 losses")
axes.plot(line[best], even[best], "o", color=figures.BLUE)
axes.set(xlabel="difference of rewards r₁ - r₂ (nats)", ylabel="loss (nats)", ylim=(0, 2.5))
axes.legend(loc="upper center")
figures.show(figure, "1.c")
print(f"5 wins, 2 losses: least at {line[best]:.2f} nats; log(5/2) = {math.log(5 / 2):.2f}")

# %% [markdown] tags=["outcome"]
# **What happened.** With 5 wins and 2 losses the loss is least where the model's odds are the observed ones, five to two. With 7 wins to none it falls for ever: whatever the difference of rewards, a larger one explains the data better. There is no best reward.

# %% [markdown]
# ### Exercise 1.2: the loss of a reward model
#
# *10 minutes.* The choices about one prompt come in as a table: `wins[i, j]` is how often $y_i$ was chosen over $y_j$; the diagonal is zero. Return the loss, the average over all comparisons.


# %% tags=["exercise"]
def reward_loss(rewards, wins):
    """(Y,) rewards, (Y, Y) counts -> the loss, a single number in nats per comparison (Eq. 2)."""
    ### BEGIN SOLUTION
    leads = rewards[:, None] - rewards[None, :]
    return -(wins * F.logsigmoid(leads)).sum() / wins.sum()
    ### END SOLUTION


# %% tags=["check"]
check("1.2", reward_loss)

# %% [markdown]
# ### Exercise 1.3: its gradient
#
# *10 minutes.* What does the loss want? Its slope in the reward of $y_i$ is the number of wins that the model *expects* of $y_i$ in the games it played, minus the number of wins *observed*, divided by the number of all comparisons ([D2.2]). So where it is zero, every completion wins as often under the model as it really did. Write that slope without autograd; the check compares it with autograd.


# %% tags=["exercise"]
def reward_gradient(rewards, wins):
    """(Y,) rewards, (Y, Y) counts -> (Y,) slopes of the loss of Eq. 2."""
    ### BEGIN SOLUTION
    games = wins + wins.T
    chances = torch.sigmoid(rewards[:, None] - rewards[None, :])
    expected, observed = (games * chances).sum(-1), wins.sum(-1)
    return (expected - observed) / wins.sum()
    ### END SOLUTION


# %% tags=["check"]
check("1.3", reward_gradient)

# %% [markdown]
# ## A reward, measured
#
# We draw choices between five completions whose rewards we know, then forget the rewards and fit others to the choices, by gradient descent on the loss. The library keeps choices as `Rankings`: which completion was chosen, which rejected, and how often.


# %%
def fit(data, steps=400):
    """The rewards that minimise the loss of the data, by gradient descent from zero."""
    scores = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        chosen, rejected = data.gather(scores).T
        loss = data.normalised().weight @ dpo.bradley_terry_loss(chosen, rejected)
        (gradient,) = torch.autograd.grad(loss, scores)
        scores.data -= 2 * gradient
    return scores.detach()


# %%
exists = torch.ones(1, 5, dtype=torch.bool)  # one prompt has all five completions
generator = torch.Generator().manual_seed(1)
samples = {
    number: dpo.sample_pairs(five[None], number, slate=dpo.all_sets(exists), generator=generator)
    for number in (100, 1600)
}
for number, data in samples.items():
    newton = dpo.maximum_likelihood(data, exists)
    print(f"{number} choices: fitted rewards {fit(data)[0].round(decimals=2).tolist()}")
    print(f"  Newton's method finds the same, within {(fit(data) - newton).abs().max():.0e} nats")

# %% [markdown]
# **Predict before you run.** The bars reach one standard error up and down. By what factor are they shorter with 1,600 choices than with 100?

# %%
figure, axes = plt.subplots()
places, names = torch.arange(5), ["y₁", "y₂", "y₃", "y₄", "y₅"]
axes.hlines(five, places - 0.3, places + 0.3, color=figures.BLACK, label="true reward")
for (number, data), shift, marker in zip(samples.items(), (-0.12, 0.12), "os"):
    fitted = fit(data)
    error = standard_errors(fitted, data)[0]
    axes.errorbar(places + shift, fitted[0], error, fmt=marker, ms=5, capsize=5, label=f"{number:,} choices")
    print(f"{number:6,} choices: standard errors from {error.min():.3f} to {error.max():.3f} nats")
axes.set(xlabel="completion", xticks=places, xticklabels=names, ylabel="reward (nats)")
axes.legend(loc="upper left")
figures.show(figure, "1.d")

# %% [markdown] tags=["outcome"]
# **What happened.** Sixteen times as many choices make the bars about four times shorter: errors shrink like one over the square root of the number of choices ([D11.3]).

# %% [markdown]
# ## Only differences matter
#
# Add the same number to all rewards of a prompt. Both rewards of a comparison move, and their difference stays. This is Lemma 1 of the paper ([D6.2]): such rewards are *equivalent*, they make the same preferences. The converse holds too: preferences give back every difference, as log-odds. So people's choices determine a reward up to one constant for each prompt, and we may choose the constant; the fits above have mean zero.
#
# **Predict before you run.** The next cell changes $r$ in three ways. Which of the three no longer makes the preferences of $r$?

# %%
true = dpo.preference_matrix(rewards)
candidates = {"r + 7": rewards + 7, "2r": 2 * rewards, "r - mean(r)": rewards - rewards.mean()}
for name, candidate in candidates.items():
    preferences = dpo.preference_matrix(candidate)
    change = (preferences - true).abs().max()
    print(f"{name:12} y₃ beats y₁: {preferences[2, 0]:.4f}   largest change: {change:.4f}")

# %% [markdown] tags=["outcome"]
# **What happened.** Doubling changes the differences, and so the preferences: the scale of a reward is determined, its zero is not.

# %% [markdown]
# ### Exercise 1.4: the way back
#
# *5 minutes.* Given the exact probabilities of all preferences of a prompt, find rewards that explain them. Any constant may be added; the check accepts all right answers.


# %% tags=["exercise"]
def recover_rewards(preferences):
    """(Y, Y) probabilities that i is preferred to j -> (Y,) rewards that make them (Eq. 1)."""
    ### BEGIN SOLUTION
    return torch.logit(preferences).mean(-1)  # or [:, 0]: the log-odds against any one completion
    ### END SOLUTION


# %% tags=["check"]
check("1.4", recover_rewards)

# %% [markdown]
# ## When there is no estimate
#
# Exact probabilities determine the rewards; a finite number of choices need not. We have seen that 7 wins to none have no best reward. In general a best reward exists, and is unique up to the constant, exactly if every group of completions, short of all of them, has won at least once against the rest ([D11.1]). A single completion is such a group, and so are all the others together: everybody must have won, and everybody must have lost.
#
# The remedies are more choices, or a *prior*: imaginary choices, say half a win each way.
#
# **Predict before you run.** We train the difference of two rewards, by gradient descent from zero. Without the prior, does it stop growing at some point?


# %%
def trained(won, lost, steps=5000):
    """The difference of two rewards along gradient descent from zero."""
    gap, path = torch.zeros((), dtype=torch.float64, requires_grad=True), []
    for _ in range(steps):
        (slope,) = torch.autograd.grad(two_completions(gap, won, lost), gap)
        gap.data -= slope
        path.append(gap.item())
    return path


# %%
figure, axes = plt.subplots()
steps = range(1, 5001)
axes.semilogx(steps, trained(7, 0), "--", label="7 : 0")
axes.semilogx(steps, trained(7.5, 0.5), ":", label="7 : 0 with a prior, 7½ : ½")
axes.semilogx(steps, trained(5, 2), label="5 : 2")
axes.set(xlabel="gradient step", ylabel="r₁ - r₂ (nats)")
axes.legend(loc="upper left")
figures.show(figure, "1.e")

# %%
unanimous = dpo.tally(torch.zeros(7, dtype=torch.long), torch.tensor([[0, 1]] * 7))
try:
    dpo.maximum_likelihood(unanimous, torch.ones(1, 2, dtype=torch.bool))
except dpo.InputError as error:
    print("refused:", str(error).partition("(")[2].partition(";")[0])

# %% [markdown] tags=["outcome"]
# **What happened.** The dashed line never stops: each time the number of steps doubles, it rises by about as much again, $\log2$ ([D11.6]). Where it stands when training ends says how long we trained, not what people think. The library refuses such data, and names a completion at fault (it counts from 0). With the prior the odds stay finite.

# %% [markdown]
# ## An open question
#
# Let two groups of people each choose by Bradley–Terry, with rewards of their own, and pool their choices. (The flipped labels above were such a pool: one person in ten had the opposite reward.) In general no reward explains the pool exactly. The loss still has a minimum. What does that reward mean, whose is it, and how does it depend on which pairs were shown?
