# %% [markdown]
# # 1 · Preferences
#
# **Before this:** probability, and a little PyTorch ·
# **Read:** 25 minutes · **Solve:** 35 minutes · **Difficulty:** ●○○ · **Derivations:** [D2.1], [D2.2], [D2.3], [D2.4], [D6.2], [D11.1]
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
# ## Which answer is better?
#
# Somebody asks a language model: *Why is the sky blue?* It gives two answers.
#
# | A | B |
# |---|---|
# | The air scatters light. | The air scatters blue light more than red. |
#
# Which one do you choose? Say that most people choose B, because it explains the colour, and some choose A, because it is shorter. Nobody can say how many points B is worth, but everybody can choose. This course is about how a model learns from such choices.

# %%
figures.show(figures.pipeline(), "1.a")

# %% [markdown]
# In *supervised fine-tuning* (SFT) a language model imitates good answers. The result is the *reference* $\pi_{\rm ref}$. It gives two answers to a prompt, and people choose one of them, many times. Then there are two ways. The upper one fits a *reward model* to the choices (this notebook). Then it looks for the policy with the highest reward that stays close to the reference (notebook 2), by reinforcement learning such as *PPO* (notebook 8). The lower one, *Direct Preference Optimization* (DPO), trains the same policy on the choices directly (notebook 3).

# %% [markdown]
# ## From rewards to choices
#
# A *prompt* $x$ is what a language model is asked, a *completion* $y$ is what it answers. Below, our prompt has five completions. Each has a *reward* $r(y)$, a number that says how good it is, and a *strength* $e^{r(y)}$, which is positive. Of two completions, each is chosen with a probability proportional to its strength. This is the model of Bradley and Terry (Eq. 1, [D2.1]); read $y_1\succ y_2$ as "$y_1$ is preferred to $y_2$":
#
# $$p(y_1\succ y_2)=\frac{e^{r(y_1)}}{e^{r(y_1)}+e^{r(y_2)}}=\sigma\big(r(y_1)-r(y_2)\big),\qquad\sigma(u)=\frac1{1+e^{-u}}.$$
#
# The second form follows if numerator and denominator are divided by the numerator.

# %%
answers = {  # a short name for the figures: the completion, and its reward
    "unknown": ("I do not know.", -2.0),
    "colour": ("It is blue because blue is its colour.", -1.0),
    "sea": ("It reflects the sea.", 0.0),
    "air": ("The air scatters light.", 1.0),
    "blue light": ("The air scatters blue light more than red.", 2.0),
}
names, rewards = list(answers), torch.tensor([reward for _, reward in answers.values()]).double()
strengths = rewards.exp()
for name, strength in zip(names, strengths):
    print(f"{answers[name][0]:45} reward {answers[name][1]:4}   strength {strength:.4f}")

# %%
print("share of the air's strength in that of air and sea", f"{strengths[3] / strengths[2:4].sum():.4f}")
print("σ of the difference of their rewards              ", f"{torch.sigmoid(rewards[3] - rewards[2]):.4f}")
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
figures.show(figure, "1.b")
print(f"{((fractions - chances).abs() > errors).sum()} of 9 points miss the curve by more than their bar")

# %% [markdown] tags=["outcome"]
# **What happened.** In the long run about one point in three misses its curve by more than one standard error. That is chance, and no fault of the model. At a difference of zero each is chosen half of the time. Far out people almost always agree, and a choice tells little.

# %% [markdown]
# ### Exercise 1.1: a chain
#
# *7 minutes.* We do not know any reward. We know that the first of three completions is chosen over the second with probability $p$, and the second over the third with probability $q$. People choose by Bradley–Terry. With which probability do they choose the first over the third? Guess it for $p=q=0.8$ before you calculate. $B$ such chains come in.


# %% tags=["exercise"]
def chained(first_over_second, second_over_third):
    """(B,) and (B,) probabilities -> (B,) probabilities that the first is preferred to the third."""
    ### BEGIN SOLUTION
    lead = torch.logit(first_over_second) + torch.logit(second_over_third)  # logit is the inverse of σ
    return torch.sigmoid(lead)
    ### END SOLUTION


# %% tags=["check"]
check("1.1", chained)

# %% [markdown] tags=["answer"]
# Turn each probability into the difference of rewards that makes it, add the differences, and turn the sum back. For $p=q=0.8$ the strengths are as 16 to 4 to 1, so the answer is 16/17. The product of the two chances is far too low: two clear preferences do not make a doubtful one.

# %% tags=["answer"]
chance = torch.tensor(0.8, dtype=torch.float64)
print(f"16/17 = {16 / 17:.4f}, σ of twice the log-odds = {torch.sigmoid(2 * torch.logit(chance)):.4f}")

# %% [markdown]
# ## Why the exponential
#
# Why $e^r$, and not another positive function? The *odds* of something with probability $p$ are $\frac p{1-p}$. If $i$ beats $j$ with odds of two to one, and $j$ beats $k$ with odds of three to one, then it is natural that $i$ beats $k$ with odds of six to one. Odds multiply along a chain exactly if their logarithms, the *log-odds*, add:
#
# $$\log\frac{p_{ik}}{p_{ki}}=\log\frac{p_{ij}}{p_{ji}}+\log\frac{p_{jk}}{p_{kj}}.$$
#
# Then fix any $k$ and call the log-odds of $i$ against it the reward $r_i$. It follows that $p_{ij}=\sigma(r_i-r_j)$, which is Bradley–Terry ([D2.4]). So the unit of a reward is the *nat* of log-odds, the unit of natural logarithms.
#
# **Predict before you run.** Below are all chains $i,j,k$ of the five completions. Circles are Bradley–Terry's choices. Triangles are the same, but one label in ten has been flipped by mistake ([D2.3]). Do their log-odds still add?

# %%
exact = dpo.preference_matrix(rewards)
chains = torch.cartesian_prod(*[torch.arange(5)] * 3)
i, j, k = chains[(chains.diff(dim=-1) != 0).all(-1) & (chains[:, 0] != chains[:, 2])].T
figure, axes = plt.subplots()
for name, matrix, marker in (("exact", exact, "o"), ("one in ten flipped", 0.9 * exact + 0.1 * exact.T, "^")):
    log_odds = torch.logit(matrix)
    axes.plot(log_odds[i, j] + log_odds[j, k], log_odds[i, k], marker, label=name)
axes.axline((0, 0), slope=1, color=figures.BLACK, linewidth=1)
axes.set(xlabel="i over j, plus j over k (nats)", ylabel="i over k (nats)")
axes.legend()
figures.show(figure, "1.c")

# %% [markdown] tags=["outcome"]
# **What happened.** The exact log-odds add, so all circles lie on the diagonal. The triangles do not: a completion's chance of winning never exceeds nine in ten, however far ahead it is. No reward explains all of them exactly: Bradley–Terry is an assumption, and data can contradict it.

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
curves = {f"{w} wins, {l} losses": two_completions(line, w, l) for w, l in ((5, 2), (7, 0))}
labels = {"xlabel": "difference of rewards r₁ - r₂ (nats)", "ylabel": "loss (nats)", "ylim": (0, 2.5)}
figure, axes = figures.lines(line, curves, **labels)
best = curves["5 wins, 2 losses"].argmin()
axes.plot(line[best], curves["5 wins, 2 losses"][best], "o", color=figures.BLUE)
figures.show(figure, "1.d")
print(f"5 wins, 2 losses: least at {line[best]:.2f} nats; log(5/2) = {math.log(5 / 2):.2f}")

# %% [markdown] tags=["outcome"]
# **What happened.** With 5 wins and 2 losses the loss is least where the model's odds are the observed ones, five to two. With 7 wins to none it falls for ever: whatever the difference of rewards, a larger one explains the data better. There is no best reward.

# %% [markdown]
# ### Exercise 1.2: the loss of a reward model
#
# *8 minutes.* The choices about one prompt come in as a table: `wins[i, j]` is how often $y_i$ was chosen over $y_j$; the diagonal is zero. Return the loss, the average over all comparisons.


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
# *8 minutes.* What does the loss want? Its slope in the reward of $y_i$ is the number of wins that the model *expects* of $y_i$ in the games it played, minus the number of wins *observed*, divided by the number of all comparisons ([D2.2]). So where it is zero, every completion wins as often under the model as it really did. Write that slope without autograd; the check compares it with autograd.


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
# We draw choices between our five completions, then forget the rewards and fit others to the choices, by gradient descent on the loss. Some words of the library:
#
# - A *slate* says which completions are put side by side, and how often. `dpo.all_sets(exists)` is the slate of all pairs alike, of those completions that exist.
# - `dpo.sample_pairs` shows pairs of a slate to people who choose by Bradley–Terry. It returns `Rankings`: which completion was chosen, which rejected, and as `weight` how often.
# - `data.gather(scores)` takes the two scores of every choice out of a table, the chosen one's first, and `data.normalised()` divides the weights by their sum.


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
    number: dpo.sample_pairs(rewards[None], number, slate=dpo.all_sets(exists), generator=generator)
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
places = torch.arange(5)
axes.hlines(rewards, places - 0.3, places + 0.3, color=figures.BLACK, label="true reward")
for (number, data), shift, marker in zip(samples.items(), (-0.12, 0.12), "os"):
    fitted = fit(data)
    error = standard_errors(fitted, data)[0]
    axes.errorbar(places + shift, fitted[0], error, fmt=marker, ms=5, capsize=5, label=f"{number:,} choices")
    print(f"{number:6,} choices: standard errors from {error.min():.3f} to {error.max():.3f} nats")
axes.set(xlabel="completion", xticks=places, xticklabels=names, ylabel="reward (nats)")
axes.legend(loc="upper left")
figures.show(figure, "1.e")

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
candidates = {"r + 7": rewards + 7, "2r": 2 * rewards, "r - max(r)": rewards - rewards.max()}
for name, candidate in candidates.items():
    preferences = dpo.preference_matrix(candidate)
    change = (preferences - true).abs().max()
    print(f"{name:12} air beats sea: {preferences[3, 2]:.4f}   largest change: {change:.4f}")

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
runs = {"7 : 0": trained(7, 0), "7½ : ½, a prior": trained(7.5, 0.5), "5 : 2": trained(5, 2)}
labels = {"xlabel": "gradient step", "ylabel": "r₁ - r₂ (nats)", "xscale": "log"}
figures.show(figures.lines(range(1, 5001), runs, **labels)[0], "1.f")

# %%
unanimous = dpo.tally(torch.zeros(7, dtype=torch.long), torch.tensor([[0, 1]] * 7))
try:
    dpo.maximum_likelihood(unanimous, torch.ones(1, 2, dtype=torch.bool))
except dpo.InputError as error:
    print("refused:", str(error).partition("(")[2].partition(";")[0])

# %% [markdown] tags=["outcome"]
# **What happened.** The line of 7 : 0 never stops: each time the number of steps doubles, it rises by about as much again, $\log2$ ([D11.6]). Where it stands when training ends says how long we trained, not what people think. The library refuses such data, and names a completion at fault (it counts from 0). With the prior the odds stay finite.

# %% [markdown]
# ## One reward for two groups
#
# People differ. Say that seven readers in ten want a full explanation: for them "blue light" is ahead of "air" by 2 nats. The other three want a short answer, and for them it is behind by 2 nats. Each group chooses by Bradley–Terry. The reward model does not know the groups: it gets all choices in one pool, and there are very many.
#
# **Predict before you run.** By how much does the reward model put "blue light" ahead: by 2, which is what most people want, by $0.7\cdot2-0.3\cdot2=0.8$, the average, by more than that, or by less?

# %% [markdown]
# ### Exercise 1.5: another population
#
# *8 minutes.* Change the population. There are $G$ groups with given shares, and in group $g$ the first completion is ahead by `gaps[g]`. Return by how much the reward model puts it ahead in the limit of many choices. You may train, as in the last section, or find out where training must end. Then explain your number for the two groups above in a sentence.


# %% tags=["exercise"]
def pooled_gap(shares, gaps):
    """(G,) shares that sum to one, (G,) differences of rewards in nats -> the learned difference."""
    ### BEGIN SOLUTION
    wins = (shares * torch.sigmoid(gaps)).sum()  # the share of all choices that the first one wins
    return torch.logit(wins)
    ### END SOLUTION


# %% tags=["check"]
check("1.5", pooled_gap)

# %% [markdown]
# The cell below trains on the pool, for several sizes of the first group.

# %%
for share in (1.0, 0.9, 0.7, 0.6):
    wins = share * torch.sigmoid(torch.tensor(2.0)) + (1 - share) * torch.sigmoid(torch.tensor(-2.0))
    learned = trained(wins.item(), 1 - wins.item(), steps=500)[-1]
    print(
        f"share {share}: learned {learned:5.2f} nats, average reward {share * 2 - (1 - share) * 2:5.2f} nats"
    )

# %% [markdown] tags=["outcome"]
# **What happened.** Less than the average, in each of these pools of two groups. Training ends where the model's share of wins is the pool's ([D2.2]), so it is *probabilities* that are averaged, and the reward is the log-odds of their average. A group that is already sure can add little to a probability, however strongly it feels. So nobody in the pool has the learned reward, and it is no average of rewards. A pool of two groups with opposite rewards is the same as one group with flipped labels ([D2.3]).

# %% [markdown]
# ## An open question
#
# With two completions some reward explains the pool exactly. With three or more, in general none does: log-odds of averages do not add along a chain. The loss still has a minimum. What does that reward mean, and how does it depend on which pairs were shown?
