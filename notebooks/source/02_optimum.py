# %% [markdown]
# # 2 · The KL-regularised optimum
#
# **Before this:** notebook 1, or what it shows: completions have rewards ·
# **Read:** 20 minutes · **Solve:** 30 minutes · **Difficulty:** ●●○ · **Derivations:** [D3.1], [D3.2], [D3.3], [D3.4], [D3.5], [D7.1], [D10.1]
#
# **The claim.** We want high reward, and we want to stay close to the model we started from. Put a price β on each nat of distance. Then exactly one policy is best, and it can be written down: π\* = π_ref · exp(r/β) / Z, the reference tilted towards reward. No search and no training is needed to know it.

# %% tags=["setup"]

import torch
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo

figures.use_style()

# %% [markdown]
# ## How far apart two policies are
#
# A *policy* $\pi$ gives each completion $y$ of a prompt a probability. The *reference* $\pi_{\rm ref}$ is the policy that we start from. How far a policy has moved is measured by the *Kullback–Leibler divergence*: the average of $\log\frac{\pi}{\pi_{\rm ref}}$, taken under $\pi$ ([D3.1]).
#
# $$\mathrm{KL}(\pi\Vert\pi')=\sum_y\pi(y)\log\frac{\pi(y)}{\pi'(y)},\qquad0\log0=0.$$
#
# It is never negative, and zero only if the two policies are the same. Its unit is the *nat*, that of natural logarithms. Below are two completions. The reference seldom says the second.

# %%
reference = torch.tensor([0.8, 0.2], dtype=torch.float64)
policy = torch.tensor([0.5, 0.5], dtype=torch.float64)
print("log(π/π_ref) ", (policy / reference).log().round(decimals=4))
print("KL(π‖π_ref)  ", dpo.kl_divergence(policy.log(), reference.log()).round(decimals=4))
print("KL(π_ref‖π)  ", dpo.kl_divergence(reference.log(), policy.log()).round(decimals=4))

# %% [markdown]
# **Predict before you run.** Let $p$ be the probability of the second completion under $\pi$, from 0 to 1. Where are the two divergences zero? Which of them grows without bound as $p$ goes to 0 or 1?

# %%
p = torch.linspace(-18, 18, 2001, dtype=torch.float64).sigmoid()  # closest together near 0 and 1
coins = torch.stack([1 - p, p], -1).log()  # (2001, 2): all policies over two completions
fixed = reference.log().expand_as(coins)
figure, axes = plt.subplots()
axes.plot(p, dpo.kl_divergence(coins, fixed), label="KL(π‖π_ref)")
axes.plot(p[1:-1], dpo.kl_divergence(fixed, coins)[1:-1], "--", label="KL(π_ref‖π)")
axes.axvline(0.2, color=figures.REFERENCE, linestyle=":")
axes.text(0.21, 2.2, "π_ref")
axes.set(xlabel="p, the probability of y₂ under π", ylabel="divergence (nats)", ylim=(0, 2.5))
axes.legend(loc="upper center")
figures.show(figure, "2.a")

# %% [markdown] tags=["outcome"]
# **What happened.** Both are zero where $\pi=\pi_{\rm ref}$. Elsewhere they differ, but for one point where they happen to cross: the divergence is not symmetric. $\mathrm{KL}(\pi\Vert\pi_{\rm ref})$ stays finite where $\pi$ gives up a completion, because $0\log0=0$. $\mathrm{KL}(\pi_{\rm ref}\Vert\pi)$ does not: it averages under the reference, which goes on saying what $\pi$ never says.

# %% [markdown]
# ### Exercise 2.1: the divergence
#
# *5 minutes.* Log-probabilities of $X$ prompts with $Y$ completions come in. The first policy may have zeros, so its logarithms may be −∞; the second has none. Return one divergence for each prompt.


# %% tags=["exercise"]
def kl(logps, other_logps):
    """(X, Y) and (X, Y) log-probabilities -> (X,) divergences KL(first‖second), in nats."""
    ### BEGIN SOLUTION
    possible = logps > -torch.inf
    logratios = torch.where(possible, logps - other_logps, 0)  # 0 log 0 = 0
    return (logps.exp() * logratios).sum(-1)
    ### END SOLUTION


# %% tags=["check"]
check("2.1", kl)

# %% [markdown]
# ## What we want
#
# High reward, close to the reference: each nat of divergence costs $\beta$ units of reward (Eq. 3, [D3.2]). A reward may have any unit here; if people choose by Bradley–Terry, as in notebook 1, it is the nat.
#
# $$J(\pi)=E_\pi[r(x,y)]-\beta\,\mathrm{KL}(\pi\Vert\pi_{\rm ref}),\qquad\beta>0.$$
#
# **Predict before you run.** The first completion has reward 0, the second 1. The reward is greatest at $p=1$, the divergence least at the reference. Where is $J$ greatest: at one of the two, or between them? Does a larger $\beta$ move that point to the left or to the right?

# %%
earned, moved = coins.exp() @ torch.tensor([0.0, 1.0]).double(), dpo.kl_divergence(coins, fixed)
figure, axes = plt.subplots()
axes.plot(p, earned, ":", color=figures.BLACK)
axes.text(1.02, 1, "reward", va="center")
for beta, colour, style in ((0.25, figures.BLUE, "-"), (0.5, figures.ORANGE, "--"), (1, figures.GREEN, "-.")):
    J = earned - beta * moved
    axes.plot(p, J, style, color=colour)
    axes.plot(p[J.argmax()], J.max(), "o", color=colour)
    axes.text(1.02, J[-1], f"β = {beta}", color=colour, va="center")
axes.set(xlabel="p, the probability of y₂ under π", ylabel="J (units of reward)", xlim=(0, 1.18))
figures.show(figure, "2.b")

# %% [markdown] tags=["outcome"]
# **What happened.** Each hill has its top between the reference ($p=0.2$, where moving costs nothing and all curves meet) and the best completion ($p=1$). The larger $\beta$, the closer the top is to the reference.

# %% [markdown]
# ### Exercise 2.2: the objective
#
# *5 minutes.* Return $J$ for each of $X$ prompts. All probabilities are positive here.


# %% tags=["exercise"]
def objective(logps, ref_logps, rewards, beta):
    """(X, Y) log-probabilities of policy and reference, (X, Y) rewards -> (X,) values (Eq. 3)."""
    ### BEGIN SOLUTION
    penalty = beta * (logps - ref_logps)
    return (logps.exp() * (rewards - penalty)).sum(-1)  # both parts are averages under the policy
    ### END SOLUTION


# %% tags=["check"]
check("2.2", objective)

# %% [markdown]
# ## Completing the divergence
#
# Where is the top of the hill, with any number of completions? The trick is to make $J$ look like a divergence, because we know where a divergence is least. Both parts of $J$ are averages under $\pi$. Divide by $-\beta$, which turns the greatest into the least ([D3.3]):
#
# $$-\tfrac1\beta J(\pi)=E_\pi\Big[\log\frac{\pi(y)}{\pi_{\rm ref}(y)\,e^{r(y)/\beta}}\Big].$$
#
# What stands in the denominator is positive but does not sum to one. So divide it by its sum, the *partition function* $Z(x)=\sum_y\pi_{\rm ref}(y|x)\,e^{r(x,y)/\beta}$, and make good for it:
#
# $$J(\pi)=\beta\log Z-\beta\,\mathrm{KL}(\pi\Vert\pi^\ast),\qquad\pi^\ast(y|x)=\frac1{Z(x)}\,\pi_{\rm ref}(y|x)\,e^{r(x,y)/\beta}.$$
#
# $Z$ does not depend on $\pi$. The divergence is least, namely zero, at $\pi=\pi^\ast$ and nowhere else. So $\pi^\ast$ is the one policy that is best (Eq. 4, [D3.4]), and it is worth $\beta\log Z$.
#
# **Predict before you run.** We draw 400 random policies over four completions. Each becomes a point: to the right its divergence from $\pi^\ast$, upwards its $J$. What shape does the cloud have?

# %%
ref_logps = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
rewards = torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=torch.float64)
beta = 0.5
optimal = dpo.optimal_logps(ref_logps, rewards, beta=beta)
print("π_ref", ref_logps.exp().round(decimals=3).tolist())
print("π*   ", optimal.exp().round(decimals=3).tolist())

# %%
logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
others = (2 * logits).log_softmax(-1)
same = {"ref_logps": ref_logps.expand_as(others), "rewards": rewards.expand_as(others)}
J = dpo.rlhf_objective(others, **same, beta=beta)
best = dpo.rlhf_objective(optimal, ref_logps, rewards, beta=beta)
figure, axes = plt.subplots()
axes.plot(dpo.kl_divergence(others, optimal.expand_as(others)), J, ".", color=figures.ORANGE)
axes.plot(0, best, "*", color=figures.OPTIMUM, markersize=20)
axes.text(0.1, best, "π*", color=figures.OPTIMUM)
axes.set(xlabel="KL(π‖π*) (nats)", ylabel="J (units of reward)")
figures.show(figure, "2.c")
print(f"J(π*) = {best:.4f}, the best of 400 random policies has {J.max():.4f}")

# %% [markdown] tags=["outcome"]
# **What happened.** It is no cloud: all points lie on a line that begins at $\pi^\ast$, at height $\beta\log Z$, and falls with slope $-\beta$. Every policy falls short of $\pi^\ast$ by exactly $\beta$ times its divergence from it. There was no need for calculus, and no lower hilltop to get stuck on.

# %% [markdown]
# ### Exercise 2.3: the optimum
#
# *15 minutes · central.* Return the log-probabilities of $\pi^\ast$ for each of $X$ prompts. The library and this course keep log-probabilities everywhere: a long completion may have a probability that rounds to zero.


# %% tags=["exercise"]
def optimal_logps(ref_logps, rewards, beta):
    """(X, Y) log-probabilities of the reference, (X, Y) rewards -> (X, Y) of the optimum (Eq. 4)."""
    ### BEGIN SOLUTION
    return (ref_logps + rewards / beta).log_softmax(-1)  # log_softmax subtracts log Z
    ### END SOLUTION


# %% tags=["check"]
check("2.3", optimal_logps)

# %% [markdown]
# ## What β does
#
# Rewards and $\beta$ enter only through $r/\beta$ ([D3.5]): twice the reward at twice the price leaves $\pi^*$ as it is.
#
# **Predict before you run.** Below are the same four completions. What is $\pi^\ast$ when $\beta$ is very large, and when it is very small? And $y_2$, which has the second best reward: as $\beta$ falls, does its bar grow, shrink, or first one and then the other?

# %%
names = ["y₁", "y₂", "y₃", "y₄"]


def draw_bars(axes, beta):
    """The reference in black, the optimum for this beta in blue."""
    optimum = dpo.optimal_logps(ref_logps, rewards, beta=beta).exp()
    places = torch.arange(4)
    axes.bar(places - 0.2, ref_logps.exp(), 0.4, color=figures.REFERENCE, label="π_ref")
    axes.bar(places + 0.2, optimum, 0.4, color=figures.OPTIMUM, label="π*")
    axes.set(xticks=places, xticklabels=names, ylim=(0, 1), xlabel="completion", ylabel="probability")
    axes.set_title(f"β = {beta}")


# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 4.5), sharey=True)
for axes, price in zip(panels, (5, 0.5, 0.1)):
    draw_bars(axes, price)
    axes.label_outer()
panels[0].legend()
print("rewards", dict(zip(names, rewards.tolist())))
figures.show(figure, "2.d")

# %% [markdown]
# With `ipywidgets` you can move $\beta$ yourself.


# %%
def one_picture(beta):
    """What the slider shows."""
    figure, axes = plt.subplots()
    draw_bars(axes, beta)
    axes.legend(loc="upper center")
    return figure


prices = (10, 5, 2, 1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
figures.slide(one_picture, prices, "β", "2.g")

# %% [markdown] tags=["outcome"]
# **What happened.** At a high price $\pi^\ast$ stays at the reference. At a low one it gathers on the best completion. In between, a completion gains as $\beta$ falls while its reward is above the average under $\pi^\ast$, and loses once that average has overtaken it: $y_2$ does both. One thing no price can do: a completion that the reference never gives stays impossible, for $e^{r/\beta}$ multiplies a zero ([D3.4]).

# %% [markdown]
# ## The frontier
#
# The price $\beta$ stands for a choice: how much distance to accept for how much reward. All choices together make the *reward–KL frontier*, the curve of $\pi^\ast$ for all $\beta$.
#
# **Predict before you run.** We add our 400 random policies. Can any of them lie above the curve?

# %%
prices = torch.logspace(-1.5, 1.5, 200, dtype=torch.float64)
distance, reward = dpo.reward_kl_frontier(ref_logps, rewards, prices)
spent, earned = dpo.kl_divergence(others, same["ref_logps"]), others.exp() @ rewards
figure, axes = plt.subplots()
axes.plot(spent, earned, ".", color=figures.ORANGE)
axes.plot(distance, reward, color=figures.OPTIMUM)
for price in (1.0, 0.5, 0.2):
    nats, worth = dpo.reward_kl_frontier(ref_logps, rewards, [price])
    axes.plot(nats, worth, "o", color=figures.OPTIMUM)
    axes.text(nats[0] - 0.05, worth[0] + 0.06, f"β = {price}", ha="right", color=figures.OPTIMUM)
axes.set(xlabel="KL(π‖π_ref) (nats)", ylabel="expected reward (its units)", xlim=(-0.4, 3.1), xticks=range(4))
figures.show(figure, "2.e")

# %% [markdown] tags=["outcome"]
# **What happened.** None can: at its own divergence, $\pi^\ast$ has the most reward that any policy can have ([D10.1]). The slope of the curve at the point of $\beta$ is $\beta$ ([D10.2]): the first nats buy much reward, the last ones little.

# %% [markdown]
# ## What the optimum is worth
#
# The greatest value of $J$ is called the *soft value* ([D7.1]). It is what the paper subtracts from the reward in Eq. 10 ([D7.2]):
#
# $$\max_\pi J(\pi)=\beta\log Z(x)=\beta\log\sum_y\pi_{\rm ref}(y|x)\,e^{r(x,y)/\beta}.$$
#
# **Predict before you run.** Dotted lines show the greatest reward and the reference's average reward, which is what doing nothing is worth. Where is the soft value for small $\beta$, and where for large?

# %%
prices = torch.logspace(-2, 2, 100, dtype=torch.float64)
values = [dpo.soft_value(ref_logps, rewards, beta=price) for price in prices]
figure, axes = plt.subplots()
axes.semilogx(prices, values, color=figures.OPTIMUM)
for level, place, name in ((rewards.max(), 10, "max r"), (ref_logps.exp() @ rewards, 0.01, "E_ref[r]")):
    axes.axhline(level, color=figures.BLACK, linestyle=":")
    axes.text(place, level + 0.05, name)
axes.set(xlabel="β (units of reward per nat)", ylabel="β log Z (units of reward)", ylim=(0, 2.3))
figures.show(figure, "2.f")

# %% [markdown] tags=["outcome"]
# **What happened.** The soft value is a smooth maximum. Where distance is nearly free it is close to the greatest reward, where distance is dear to the average reward of the reference, and on the way it only falls.

# %% [markdown]
# ### Exercise 2.4: the soft value
#
# *5 minutes.* Return $\beta\log Z$ for each of $X$ prompts.


# %% tags=["exercise"]
def soft_value(ref_logps, rewards, beta):
    """(X, Y) log-probabilities of the reference, (X, Y) rewards -> (X,) values of the optimum (Eq. 10)."""
    ### BEGIN SOLUTION
    return beta * (ref_logps + rewards / beta).logsumexp(-1)
    ### END SOLUTION


# %% tags=["check"]
check("2.4", soft_value)

# %% [markdown] tags=["answer"]
# `logsumexp` and not `.exp().sum().log()`: at a small β the exponentials overflow.

# %% [markdown]
# ## An open question
#
# We know the optimum, but can we use it? $Z$ sums over everything that a model could say, and a GPT-2 can say more texts of fifty tokens than there are atoms in the universe. One way around the sum is to draw from the reference, and to prefer the draws of high reward, as *best of n* does ([D10.3]). How many draws does it take to come close to $\pi^\ast$, and how does that number grow as $\beta$ falls? (Notebook 3 takes another way: it learns $\pi^\ast$ from comparisons, and never needs $Z$.)
