# %% [markdown]
# # 5 · Rankings: Plackett–Luce
#
# **Before this:** notebooks 1 and 3, or what they show: Bradley–Terry, σ(r₁ − r₂), and the DPO loss, which puts β log(π/π_ref) in place of a reward ·
# **Read:** 30 minutes · **Solve:** 30 minutes · **Difficulty:** ●●○ · **Derivations:** [D8.1], [D8.2], [D8.3], [D8.4]
#
# **The claim.** People may rank K answers instead of choosing between two. The Plackett–Luce model builds a ranking from the top, and for K = 2 it is Bradley–Terry. All that made DPO work is still there: Z cancels, what is left is a loss of log-ratios, and its optimum is the same π\*.

# %% tags=["setup"]

from itertools import permutations

import torch
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.bandit import plackett_luce_objective, safe_learning_rate
from dpo_minimal.laws.finite_data import standard_errors

figures.use_style()

# %% [markdown]
# ## From the top
#
# Give each completion a strength, $e^r$. Choose the best of all with probability proportional to strength; strike it off; choose the best of those left; and so on. Three completions with strengths 3, 2 and 1:

# %%
strengths = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
rewards = strengths.log()
print("first place:                 ", strengths / strengths.sum())
print("second place, y₁ being first:", strengths[1:] / strengths[1:].sum())
print("y₁ before y₂ before y₃:      ", 3 / 6 * 2 / 3 * 1 / 1)

# %% [markdown]
# **Predict before you run.** There are six orders. Which is the least likely? How likely is $y_3$, the weakest, to come second?

# %%
orders = torch.tensor(list(permutations(range(3))))
chances = dpo.plackett_luce_logprob(rewards[orders]).exp()
names = [" ".join(f"y{'₁₂₃'[y]}" for y in order) for order in orders]
figure, axes = plt.subplots()
bars = axes.bar(range(6), chances, 0.6, color=figures.BLUE)
axes.bar_label(bars, fmt="%.3f", padding=3)
axes.set(xticks=range(6), xticklabels=names, ylim=(0, 0.4))
axes.set(xlabel="order, best first", ylabel="probability")
figures.show(figure, "5.a")
print(f"sum over all orders: {chances.sum():.12f}; y₃ comes second: {chances[[1, 3]].sum():.4f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The order by strength is the most likely and its reverse the least. $y_3$ comes second more often than first: whoever has been struck off no longer stands in its way. The six sum to one, as they must: at every place, someone is chosen.

# %% [markdown]
# With $\tau(k)$ the completion in place $k$, the probability of a ranking is the product over its places (Eq. 18, [D8.1]):
#
# $$p(\tau\mid y_1,\dots,y_K,x)=\prod_{k=1}^K\frac{e^{r(x,y_{\tau(k)})}}{\sum_{j=k}^Ke^{r(x,y_{\tau(j)})}}.$$
#
# The sum begins at $j=k$: those already placed take no part. The last factor is 1. With $K=2$ only the first factor is left, and it is $\sigma(r_{\tau(1)}-r_{\tau(2)})$: Bradley–Terry.

# %% [markdown]
# ### Exercise 5.1: the probability of a ranking
#
# *10 minutes · central.* The rewards come in as they were ranked, best place first, along the last axis. Return the logarithm of Eq. 18.


# %% tags=["exercise"]
def plackett_luce_logprob(ranked_rewards):
    """(..., K) rewards, best place first -> (...) log-probabilities, in nats (Eq. 18)."""
    ### BEGIN SOLUTION
    still_there = ranked_rewards.flip(-1).logcumsumexp(-1).flip(-1)  # entry k: over all j >= k
    return (ranked_rewards - still_there).sum(-1)
    ### END SOLUTION


# %% tags=["check"]
check("5.1", plackett_luce_logprob)

# %% [markdown]
# ## DPO for rankings
#
# A reward is $r(x,y)=\beta\log\frac{\pi_r(y|x)}{\pi_{\rm ref}(y|x)}+\beta\log Z(x)$, with $\pi_r$ its optimal policy (Eq. 5). Put that into Eq. 18. Every strength of the prompt has the same factor $Z(x)^\beta$, in each numerator once and in each denominator once. It cancels at every place (Eq. 19, [D8.3]).
#
# **Predict before you run.** Below, the six orders' probabilities come once from the rewards and once from the policy that is optimal for them, without $Z$. How far apart are they?

# %%
ref_logps = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
beta = 0.5
optimal = dpo.optimal_logps(ref_logps, rewards, beta=beta)
implicit = dpo.implicit_reward(optimal, ref_logps, beta=beta)
print("rewards         ", rewards)
print("implicit rewards", implicit)

# %%
from_policy = dpo.plackett_luce_logprob(implicit[orders]).exp()
figure, axes = plt.subplots()
axes.bar(range(6), chances, 0.6, color=figures.BLACK, label="from the rewards")
axes.plot(range(6), from_policy, "o", color=figures.ORANGE, label="from π*, without Z")
axes.set(xticks=range(6), xticklabels=names, ylim=(0, 0.4))
axes.set(xlabel="order, best first", ylabel="probability")
axes.legend()
figures.show(figure, "5.b")

# %% [markdown] tags=["outcome"]
# **What happened.** They agree: the implicit rewards are the rewards less one constant, and a constant changes no probability of Eq. 18.

# %% [markdown]
# Minus the logarithm, with the policy being trained in place of $\pi_r$, is the loss of one ranking (Eq. 20):
#
# $$\ell=-\log\prod_{k=1}^K\frac{e^{\hat r(y_{\tau(k)})}}{\sum_{j=k}^Ke^{\hat r(y_{\tau(j)})}},\qquad\hat r(y)=\beta\log\frac{\pi_\theta(y|x)}{\pi_{\rm ref}(y|x)}.$$

# %% [markdown]
# ### Exercise 5.2: the loss of rankings
#
# *5 minutes.* Log-probabilities of $B$ rankings of $K$ completions come in, best place first. Return the $B$ losses.


# %% tags=["exercise"]
def plackett_luce_dpo_loss(policy_logps, ref_logps, beta):
    """(B, K) log-probabilities, best place first -> (B,) losses, in nats (Eq. 20)."""
    ### BEGIN SOLUTION
    rewards = beta * (policy_logps - ref_logps)
    still_there = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    return (still_there - rewards).sum(-1)
    ### END SOLUTION


# %% tags=["check"]
check("5.2", plackett_luce_dpo_loss)

# %% [markdown]
# With $K=2$ it is the loss of notebook 3:

# %%
policy, reference = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.5]])
print("rankings of two:", dpo.plackett_luce_dpo_loss(policy, reference, beta=beta))
print("DPO of the pair:", dpo.dpo_loss(*policy.T, *reference.T, beta=beta).losses)

# %% [markdown]
# ## How hard each place pulls
#
# In the DPO loss of a pair the chosen completion is pulled up and the rejected one down, by the same gradient weight. In a ranking each place has a weight of its own, the coefficient of $-\nabla\log\pi(y_{\tau(k)})$ ([D8.4]):
#
# $$w_k=\beta\Big(1-\sum_{i\le k}P\big(y_{\tau(k)}\ \mathrm{takes\ place}\ i\mid\mathrm{those\ left\ at\ place}\ i\big)\Big).$$
#
# Each completion is pulled up once, for the place it took, and down for all the places for which it was considered.
#
# **Predict before you run.** Five completions are ranked, and the policy is the reference. Which places are pulled up? Is the first pulled up as hard as the last is pulled down?

# %%
places = torch.arange(1, 6)
ladder = torch.tensor([[4.0, 2.0, 0.0, -2.0, -4.0]], dtype=torch.float64)  # log-ratios, best place first
kinds = {"at the reference": 0 * ladder, "sure of this order": ladder, "sure of the reverse": -ladder}
styles = [(figures.BLACK, "o-"), (figures.GREEN, "s--"), (figures.RED, "^:")]
figure, axes = plt.subplots()
for (name, logratios), (colour, style) in zip(kinds.items(), styles):
    weights = dpo.plackett_luce_gradient_weights(logratios, torch.zeros(1, 5).double(), beta=1.0)[0]
    axes.plot(places, weights, style, color=colour, label=name)
    print(f"{name}: the weights sum to {weights.sum().abs():.1e}")
axes.set(xticks=places, xlabel="place in the ranking", ylabel="gradient weight ÷ β")
axes.legend()
figures.show(figure, "5.c")

# %% [markdown] tags=["outcome"]
# **What happened.** At the reference the front is pulled up and the back down, but not evenly. The first was considered once, and its weight is β at most; the last was considered at every place and passed over at all but one, so it is pulled down hardest. A policy that is sure of this order is hardly pulled at all, and one that is sure of the reverse is pulled hardest. The weights always sum to zero.

# %% [markdown]
# ## Training finds π\*, again
#
# Six completions, exact probabilities of all rankings of all sets of $K$ of them, gradient descent on a table of logits from the reference.
#
# **Predict before you run.** Compare $K=2$ (pairs), $K=3$ and $K=6$ (everybody is ranked). Do they end at the same policy? (Each $K$ has its own longest safe step. So compare where the lines end, not how steep they are.)


# %%
def distances(size, world, steps=60):
    """KL(π || π*) along the path of training on rankings of that many completions."""
    rankings = dpo.expected_rankings(world.rewards, dpo.all_sets(world.exists, size=size))
    target = dpo.optimal_logps(world.ref_logps, world.rewards, beta=beta)
    theta, path = world.ref_logps.clone().requires_grad_(), []
    for _ in range(steps):
        logps = theta.log_softmax(-1)
        loss, _ = plackett_luce_objective(logps, world.ref_logps, rankings, beta=beta)
        (gradient,) = torch.autograd.grad(loss, theta)
        path.append(dpo.kl_divergence(logps.detach(), target).item())
        theta.data -= safe_learning_rate(rankings, beta=beta) * gradient  # never too long a step [D5.2]
    return path


# %%
world = dpo.random_bandit(1, 6, generator=torch.Generator().manual_seed(1))
figure, axes = plt.subplots()
for size, style in [(2, "-"), (3, "--"), (6, ":")]:
    path = distances(size, world)
    axes.semilogy(path, style, label=f"K = {size}")
    print(f"K = {size}: after {len(path)} steps KL(π‖π*) = {path[-1]:.1e} nats")
axes.set(xlabel="gradient step", ylabel="KL(π‖π*) (nats)", ylim=(1e-14, 10))
axes.legend()
figures.show(figure, "5.d")

# %% [markdown] tags=["outcome"]
# **What happened.** Same end, different paths. The argument is that of pairs: the expected loss exceeds the entropy of people's rankings by a divergence, which is zero exactly where the implicit rewards are the true ones up to a constant.

# %% [markdown]
# ## Where the model comes from
#
# There is a second picture, with no places in it. Each completion makes an impression $r_y+G_y$ with independent noise, and people sort their impressions. If the noise follows Gumbel's law, $P(G\le g)=e^{-e^{-g}}$, both pictures give every ranking the same probability. For two completions that takes one integral ([D8.2]): if $G_1=g$, the first is preferred where $G_2\le g+r_1-r_2$, so
#
# $$\int_{-\infty}^\infty e^{-g-e^{-g}}\,e^{-e^{-(g+r_1-r_2)}}\,dg=\int_0^\infty e^{-t(1+e^{r_2-r_1})}\,dt=\sigma(r_1-r_2),\qquad t=e^{-g}.$$
#
# So rankings can be drawn by sorting, all places at once. To draw the noise, turn the law around: $G=-\log(-\log U)$ with $U$ uniform between 0 and 1.

# %% [markdown]
# ### Exercise 5.3: draw rankings
#
# *5 minutes.* The rewards of $K$ completions and $N$ rows of noise come in. Return $N$ rankings: completion numbers, best first.


# %% tags=["exercise"]
def rank(rewards, gumbel_noise):
    """(K,) rewards, (N, K) noise -> (N, K) completion numbers, best first."""
    ### BEGIN SOLUTION
    return (rewards + gumbel_noise).argsort(-1, descending=True)
    ### END SOLUTION


# %% tags=["check"]
check("5.3", rank)

# %% [markdown]
# Twenty thousand draws by sorting, once with Gumbel's noise and once with normal noise of the same variance, which is $\pi^2/6$.
#
# **Predict before you run.** Does it matter which noise it is?

# %%
generator = torch.Generator().manual_seed(1)
draws, one_prompt = 20_000, torch.zeros(20_000, dtype=torch.long)
uniform = torch.rand(draws, 3, generator=generator, dtype=torch.float64)
gumbel = -(-uniform.log()).log()
normal = torch.randn(draws, 3, generator=generator, dtype=torch.float64) * torch.pi / 6**0.5
shares = []
for noise in (gumbel, normal):
    drawn = dpo.tally(one_prompt, (rewards + noise).argsort(-1, descending=True))  # how often each order came
    assert torch.equal(drawn.order, orders)
    shares.append(drawn.weight / draws)
two_errors = 2 * (chances * (1 - chances) / draws).sqrt()

# %%
figure, axes = plt.subplots()
axes.bar(range(6), chances, 0.8, color=figures.SKY, label="Plackett–Luce")
ways = [("o", figures.BLACK, "Gumbel noise"), ("x", figures.RED, "normal noise")]
for side, share, (marker, colour, name) in zip([-0.15, 0.15], shares, ways):
    at = torch.arange(6) + side
    axes.errorbar(at, share, two_errors, fmt=marker, color=colour, label=f"{name} ± 2 errors", capsize=6)
axes.set(xticks=range(6), xticklabels=names, ylim=(0, 0.4))
axes.set(xlabel="order, best first", ylabel="probability")
axes.legend()
figures.show(figure, "5.e")

# %% [markdown] tags=["outcome"]
# **What happened.** Error bars are two standard errors, $2\sqrt{p(1-p)/N}$. With Gumbel's noise the shares agree with Eq. 18 within chance. With normal noise most do not: that is another model of rankings, and its pairs are not Bradley–Terry.

# %% [markdown]
# ## A ranking and its pairs
#
# A ranking of $K$ holds $K(K-1)/2$ pairs: who stands above whom. What is the chance that $y_i$ stands above $y_j$, if others are ranked with them?

# %% [markdown]
# ### Exercise 5.4: two of a ranking
#
# *10 minutes.* Sum the probabilities of all orders in which $y_i$ stands above $y_j$. The check compares your sum with something much shorter.


# %% tags=["exercise"]
def preference_from_rankings(rewards, i, j):
    """(K,) rewards, two completion numbers -> probability that i stands above j (Eq. 18, summed)."""
    ### BEGIN SOLUTION
    orders = torch.tensor(list(permutations(range(len(rewards)))))
    place = orders.argsort(-1)  # entry [order, y]: the place of y
    return dpo.plackett_luce_logprob(rewards[orders[place[:, i] < place[:, j]]]).exp().sum()
    ### END SOLUTION


# %% tags=["check"]
check("5.4", preference_from_rankings)

# %% [markdown]
# Every pair within a ranking is Bradley–Terry, whoever else is there ([D8.1]). Then why not cut rankings into pairs, and train on them as if each had been a question of its own? Because the pairs of one ranking are not independent: from $y_1$ above $y_2$ and $y_2$ above $y_3$ the third pair follows.
#
# We ask fifty people to rank six completions, estimate the rewards by maximum likelihood, and repeat that 200 times to see the errors. Three ways: from the rankings; from their 15 pairs each; and from as many pairs that really are independent.

# %%
truth = torch.linspace(0, 2, 6, dtype=torch.float64)
repeats, people = 200, 50
uniform = torch.rand(repeats * people, 6, generator=generator, dtype=torch.float64)
order = (truth - (-uniform.log()).log()).argsort(-1, descending=True)
world_of = torch.arange(repeats).repeat_interleave(people)  # each repetition is a prompt of its own
rankings = dpo.Rankings(world_of, order, torch.ones(len(order), dtype=torch.float64))
above, below = torch.triu_indices(6, 6, offset=1)
pairs = torch.stack([order[:, above], order[:, below]], -1)  # (rankings, 15, 2)
first_wins = torch.rand(len(order), 15, generator=generator) < torch.sigmoid(truth[above] - truth[below])
fresh = torch.where(first_wins[..., None], torch.stack([above, below], -1), torch.stack([below, above], -1))


# %%
def true_and_claimed(data):
    """How far the estimates are from the truth, and how far they claim to be: root mean squares."""
    estimate = dpo.maximum_likelihood(data, torch.ones(repeats, 6, dtype=torch.bool))  # mean zero
    away = estimate - (truth - truth.mean())
    return torch.stack([error.square().mean().sqrt() for error in (away, standard_errors(estimate, data))])


def as_pairs(pairs):
    """(rankings, 15, 2) completion numbers -> comparisons that count as independent."""
    return dpo.tally(world_of.repeat_interleave(15), pairs.flatten(0, 1))


# %% [markdown]
# **Predict before you run.** Black is the true error, orange the standard error that the same likelihood claims. Where do the two disagree?

# %%
ways = {"rankings": rankings, "their pairs": as_pairs(pairs), "independent pairs": as_pairs(fresh)}
found = torch.stack([true_and_claimed(data) for data in ways.values()])
figure, axes = plt.subplots()
for column, colour, name in [(0, figures.BLACK, "true error"), (1, figures.ORANGE, "claimed error")]:
    bars = axes.bar(torch.arange(3) + 0.4 * column - 0.2, found[:, column], 0.36, color=colour, label=name)
    axes.bar_label(bars, fmt="%.3f", padding=3)
axes.set(xticks=range(3), xticklabels=ways, xlabel="what the rewards were estimated from")
axes.set(ylabel="error of a reward (nats)", ylim=(0, 0.3))
axes.legend()
figures.show(figure, "5.f")

# %% [markdown] tags=["outcome"]
# **What happened.** Cut into pairs, rankings still lead to the rewards, and the estimate loses little. What is wrong is the error that it claims: one person's ranking is counted as fifteen opinions, and the claim is the one that fifteen independent answers would deserve. The likelihood of whole rankings claims about the error that it makes.

# %% [markdown]
# ## An open question
#
# Let two of the ranked completions be paraphrases of each other. Plackett–Luce gives each its own share of first place, so an answer gains by being listed twice. People who see that the two say the same would not choose so. Language models sample paraphrases all the time. Which model of rankings would know about them, and could its loss still be written for a policy, with $Z$ cancelled?
