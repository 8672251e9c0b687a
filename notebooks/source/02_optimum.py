# %% [markdown]
# # 2 · The KL-regularised optimum
#
# **Before this:** notebook 1, or what it shows: completions have rewards ·
# **Read:** 20 minutes · **Solve:** 35 minutes · **Difficulty:** ●●○ · **Derivations:** [D3.1], [D3.2], [D3.3], [D3.4], [D3.5], [D7.1], [D10.1]
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
# It is never negative, and zero only if the two policies are the same. Its unit is the *nat*, that of natural logarithms. Below are two completions of the prompt *Why is the sky blue?* The reference says "The air scatters light." four times in five. It seldom says "The air scatters blue light more than red."

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
coins = torch.stack([1 - p, p], -1).log()  # (2001, 2): policies over two completions
fixed = reference.log().expand_as(coins)
both = {"KL(π‖π_ref)": dpo.kl_divergence(coins, fixed), "KL(π_ref‖π)": dpo.kl_divergence(fixed, coins)}
labels = {"xlabel": "p, the probability of the second", "ylabel": "divergence (nats)", "ylim": (0, 2.5)}
figure, axes = figures.lines(p, both, **labels)
axes.axvline(0.2, color=figures.REFERENCE, linestyle="-.", linewidth=1)
axes.text(0.21, 2.2, "π_ref")
figures.show(figure, "2.a")

# %% [markdown] tags=["outcome"]
# **What happened.** Both are zero where $\pi=\pi_{\rm ref}$. Elsewhere they differ, but for one point where they happen to cross: the divergence is not symmetric. $\mathrm{KL}(\pi\Vert\pi_{\rm ref})$ stays finite where $\pi$ gives up a completion, because $0\log0=0$. $\mathrm{KL}(\pi_{\rm ref}\Vert\pi)$ does not: it averages under the reference, which goes on saying what $\pi$ never says.

# %% [markdown]
# ### Exercise 2.1: a filter
#
# *8 minutes.* The simplest way to better completions is a filter: it reads what the reference says, throws some completions away, and lets the others pass. What passes is a policy of its own, the reference *given* that the filter keeps the completion. How far is it from the reference, $\mathrm{KL}(\pi\Vert\pi_{\rm ref})$? Guess first: does it depend on how probable the single completions are, or only on the filter's total? Log-probabilities of $X$ prompts come in, and for each completion whether it is kept; one at least is. A policy's logarithm may be −∞.


# %% tags=["exercise"]
def filtered_kl(ref_logps, kept):
    """(X, Y) log-probabilities of the reference, (X, Y) booleans -> (X,) divergences, in nats."""
    ### BEGIN SOLUTION
    policy = ref_logps.masked_fill(~kept, -torch.inf).log_softmax(-1)
    logratios = torch.where(kept, policy - ref_logps, 0)  # 0 log 0 = 0
    return (policy.exp() * logratios).sum(-1)
    ### END SOLUTION


# %% tags=["check"]
check("2.1", filtered_kl)

# %% [markdown] tags=["answer"]
# Every completion that is kept becomes more probable by the same factor, 1 / π_ref(kept). So all log-ratios are the same number, and so is their average: the divergence is −log π_ref(kept), whatever the single probabilities are. A filter that lets half of the reference's draws pass costs log 2 nats.

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
axes.set(xlabel="p, the probability of the second", ylabel="J (units of reward)", xlim=(0, 1.18))
figures.show(figure, "2.b")

# %% [markdown] tags=["outcome"]
# **What happened.** Each curve has its maximum between the reference ($p=0.2$, where the divergence is zero and all curves meet) and the best completion ($p=1$). The larger $\beta$, the closer the maximum is to the reference.

# %% [markdown]
# ### Exercise 2.2: is it worth it?
#
# *7 minutes.* Somebody offers you a trained policy. It has more reward than the reference, and it is some distance away. Whether it is better depends on your $\beta$. At which $\beta$ are policy and reference worth exactly the same, $J(\pi)=J(\pi_{\rm ref})$? Above it, you would rather keep the reference. All probabilities are positive here, and no policy is the reference.


# %% tags=["exercise"]
def break_even(logps, ref_logps, rewards):
    """(X, Y) log-probabilities of policy and reference, (X, Y) rewards -> (X,) values of β (Eq. 3)."""
    ### BEGIN SOLUTION
    gain = ((logps.exp() - ref_logps.exp()) * rewards).sum(-1)
    distance = (logps.exp() * (logps - ref_logps)).sum(-1)
    return gain / distance  # units of reward per nat; J of the reference is its reward: it is at no distance
    ### END SOLUTION


# %% tags=["check"]
check("2.2", break_even)

# %% [markdown]
# ## Completing the divergence
#
# Where is the maximum of $J$, with any number of completions? The trick is to make $J$ look like a divergence, because we know where a divergence is least. Both parts of $J$ are averages under $\pi$. Divide by $-\beta$, which turns the greatest into the least ([D3.3]):
#
# $$-\tfrac1\beta J(\pi)=E_\pi\Big[\log\frac{\pi(y)}{\pi_{\rm ref}(y)\,e^{r(y)/\beta}}\Big].$$
#
# What stands in the denominator is positive but does not sum to one. So divide it by its sum, the *partition function* $Z(x)=\sum_y\pi_{\rm ref}(y|x)\,e^{r(x,y)/\beta}$, and correct for it:
#
# $$J(\pi)=\beta\log Z-\beta\,\mathrm{KL}(\pi\Vert\pi^\ast),\qquad\pi^\ast(y|x)=\frac1{Z(x)}\,\pi_{\rm ref}(y|x)\,e^{r(x,y)/\beta}.$$
#
# $Z$ does not depend on $\pi$. The divergence is least, namely zero, at $\pi=\pi^\ast$ and nowhere else. So $\pi^\ast$ is the one policy that is best (Eq. 4, [D3.4]), and it is worth $\beta\log Z$.
#
# **Predict before you run.** We draw 400 random policies over the four completions below. Each becomes a point: to the right its divergence from $\pi^\ast$, upwards its $J$. What shape do the points form?

# %%
answers = {  # a short name for the figures: the completion, its probability under π_ref, its reward
    "sea": ("It reflects the sea.", 0.5, 0.0),
    "air": ("The air scatters light.", 0.3, 1.0),
    "both": ("It reflects the sea, and the air scatters light.", 0.15, 0.5),
    "blue light": ("The air scatters blue light more than red.", 0.05, 2.0),
}
names, (_, chances, rewards) = list(answers), zip(*answers.values())
ref_logps, rewards = torch.tensor(chances).double().log(), torch.tensor(rewards).double()
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
# **What happened.** All points lie on one line that begins at $\pi^\ast$, at height $\beta\log Z$, and falls with slope $-\beta$. Every policy falls short of $\pi^\ast$ by exactly $\beta$ times its divergence from it. No calculus was needed, and there is no second maximum in which a search could end.

# %% [markdown]
# ### Exercise 2.3: the optimum
#
# *10 minutes · central.* Return the log-probabilities of $\pi^\ast$ for each of $X$ prompts. The library and this course keep log-probabilities everywhere: a long completion may have a probability that rounds to zero.


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
# **Predict before you run.** Below are the same four completions. What is $\pi^\ast$ when $\beta$ is very large, and when it is very small? And "air", which has the second best reward: as $\beta$ falls, does its bar grow, shrink, or first one and then the other?


# %%
def draw_bars(axes, beta):
    """The reference in black, the optimum for this beta in blue."""
    optimum = dpo.optimal_logps(ref_logps, rewards, beta=beta).exp()
    pair = {"π_ref": ref_logps.exp(), "π*": optimum}
    figures.bars_side_by_side(axes, names, pair, (figures.REFERENCE, figures.OPTIMUM))
    axes.set(ylim=(0, 1), xlabel="completion", ylabel="probability", title=f"β = {beta}")
    axes.tick_params(axis="x", labelsize=11)
    axes.legend(loc="upper center")


# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 4.5), sharey=True)
for axes, price in zip(panels, (5, 0.5, 0.1)):
    draw_bars(axes, price)
    axes.label_outer()
print("rewards", dict(zip(names, rewards.tolist())))
figures.show(figure, "2.d")

# %% [markdown]
# With `ipywidgets` you can move $\beta$ yourself.


# %%
def one_picture(beta):
    """What the slider shows."""
    figure, axes = plt.subplots()
    draw_bars(axes, beta)
    return figure


prices = (10, 5, 2, 1, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
figures.slide(one_picture, prices, "β", "2.g")

# %% [markdown] tags=["outcome"]
# **What happened.** At a high price $\pi^\ast$ stays at the reference. At a low one it gathers on the best completion. In between, a completion gains as $\beta$ falls while its reward is above the average under $\pi^\ast$, and loses once that average has overtaken it: "air" does both. One thing no price can do: a completion that the reference never gives stays impossible, for $e^{r/\beta}$ multiplies a zero ([D3.4]).

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
# **What happened.** None can: at its own divergence, $\pi^\ast$ has the most reward that any policy can have ([D10.1]). The slope of the curve at the point of $\beta$ is $\beta$ ([D10.2]): the first nats add much reward, the last ones little.

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
# **What happened.** The soft value is a smooth maximum. Where a nat costs almost nothing, it is close to the greatest reward. Where a nat costs much, it is close to the average reward of the reference. In between it only falls.

# %% [markdown]
# ## When the reward is only believed
#
# In practice nobody knows the reward. A reward model believes one, and is wrong somewhere. Ours is right about three completions, but it likes long ones: to "both", which is half wrong, it gives 2.3 instead of 0.5. We can only optimise what it believes. Below, $\beta$ falls from left to right, and the believed reward of the optimum rises.

# %%
believed = torch.tensor([0.0, 1.0, 2.3, 2.0], dtype=torch.float64)
falling = torch.logspace(1, -1, 60, dtype=torch.float64)
optima = dpo.optimal_logps(ref_logps.expand(60, 4), believed / falling[:, None], beta=1.0)  # only r/β counts
nats = dpo.kl_divergence(optima, ref_logps.expand(60, 4))
curve = {"believed reward": optima.exp() @ believed}
labels = {"xlabel": "KL(π‖π_ref) (nats)", "ylabel": "expected reward (its units)"}
figures.show(figures.lines(nats, curve, **labels)[0], "2.h")

# %% [markdown]
# **Predict before you run.** Now the *true* reward of the same policies. Does it rise as well, rise more slowly, or something else? Which $\beta$ would you choose?

# %% [markdown]
# ### Exercise 2.4: optimise what is believed
#
# *10 minutes.* Change the experiment: optimise the believed reward for each of the given values of $\beta$, which fall, and pay the true reward. Return two numbers: the greatest expected true reward on the way, and the one at the last $\beta$. For the world above, find out where the greatest is, and explain the difference of the two numbers in a sentence.


# %% tags=["exercise"]
def overoptimise(ref_logps, rewards, believed, betas):
    """(Y,) log-probabilities, true and believed rewards, (K,) values of β -> greatest, last true reward."""
    ### BEGIN SOLUTION
    optima = (ref_logps + believed / betas[:, None]).log_softmax(-1)  # (K, Y)
    earned = optima.exp() @ rewards
    return earned.max(), earned[-1]
    ### END SOLUTION


# %% tags=["check"]
check("2.4", overoptimise)

# %%
curve["true reward"] = optima.exp() @ rewards
figures.show(figures.lines(nats, curve, **labels)[0], "2.i")
best = curve["true reward"].argmax()
print(f"true reward: {curve['true reward'][0]:.3f} at β = {falling[0]:.1f},", end=" ")
print(f"greatest {curve['true reward'][best]:.3f} at β = {falling[best]:.2f},", end=" ")
print(f"{curve['true reward'][-1]:.3f} at β = {falling[-1]:.1f}")

# %% [markdown] tags=["outcome"]
# **What happened.** First both rewards rise: better completions gain, whoever judges them. Then $\pi^\ast$ gathers on the completion that the reward model likes best, which is the one it is most wrong about. The believed reward goes on rising, the true one falls. This is *over-optimisation*, or *reward hacking*, and one reason for the penalty: $\beta$ is not only the price of distance, it limits how far one trusts a reward. DPO has no separate reward model, but it has this problem too: its implicit reward is fitted to the same finite choices (notebook 3).

# %% [markdown]
# ## An open question
#
# We know the optimum, but can we use it? $Z$ sums over everything that a model could say, and a GPT-2 can say more texts of fifty tokens than there are atoms in the universe. One way around the sum is to draw from the reference, and to prefer the draws of high reward, as *best of n* does ([D10.3]). How many draws does it take to come close to $\pi^\ast$, and how does that number grow as $\beta$ falls? (Notebook 3 takes another way: it learns $\pi^\ast$ from comparisons, and never needs $Z$.)
