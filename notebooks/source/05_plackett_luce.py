# %% [markdown]
# # 5 · Rankings: Plackett–Luce
#
# **Before this:** notebooks 1 and 3, or what they show: Bradley–Terry, σ(r₁ − r₂), and the DPO loss, which puts β log(π/π_ref) in place of a reward ·
# **Read:** 25 minutes · **Solve:** 35 minutes · **Difficulty:** ●●○ · **Derivations:** [D8.1], [D8.2], [D8.3], [D8.4]
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
# The prompt is "Why is the sky blue?" again, with three completions:
#
# - $y_1$: "Air scatters blue light more than red."
# - $y_2$: "It reflects the sea."
# - $y_3$: "Nobody knows."
#
# Give each a strength, $e^r$. Choose the best of all with probability proportional to strength; take it off the list; choose the best of those left; and so on. Let the strengths be 3, 2 and 1:

# %%
answers = ["air", "sea", "nobody"]
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
names = ["\n".join(answers[y] for y in order) for order in orders]
figure, axes = plt.subplots()
bars = axes.bar(range(6), chances, 0.6, color=figures.BLUE)
axes.bar_label(bars, fmt="%.3f", padding=3)
axes.set(xticks=range(6), xticklabels=names, ylim=(0, 0.4))
axes.set(xlabel="order, best on top", ylabel="probability")
figures.show(figure, "5.a")
print(f"sum over all orders: {chances.sum():.12f}; y₃ comes second: {chances[[1, 3]].sum():.4f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The order by strength is the most likely and its reverse the least. $y_3$ comes second more often than first, because the strongest is often gone by then. The six sum to one, as they must: at every place, one is chosen.

# %% [markdown]
# ### Exercise 5.1: the probability of a ranking
#
# *8 minutes · central.* Do for any number $K$ of completions what the first cell did for three. The rewards come in as they were ranked, best place first, along the last axis. Return the logarithm of the ranking's probability.


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
# In symbols, with $\tau(k)$ the completion in place $k$ (Eq. 18, [D8.1]):
#
# $$p(\tau\mid y_1,\dots,y_K,x)=\prod_{k=1}^K\frac{e^{r(x,y_{\tau(k)})}}{\sum_{j=k}^Ke^{r(x,y_{\tau(j)})}}.$$
#
# The sum begins at $j=k$: those already placed take no part. The last factor is 1. With $K=2$ only the first factor is left, and it is $\sigma(r_{\tau(1)}-r_{\tau(2)})$: Bradley–Terry.

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
axes.bar(range(6), chances, 0.6, color=figures.SKY, label="from the rewards")
axes.plot(range(6), from_policy, "o", color=figures.BLACK, label="from π*, without Z")
axes.set(xticks=range(6), xticklabels=names, ylim=(0, 0.4))
axes.set(xlabel="order, best on top", ylabel="probability")
axes.legend()
figures.show(figure, "5.b")

# %% [markdown] tags=["outcome"]
# **What happened.** They agree: the implicit rewards are the rewards less one constant, and a constant changes no probability of Eq. 18.

# %% [markdown]
# Minus the logarithm, with the policy being trained in place of $\pi_r$, is the loss of one ranking (Eq. 20):
#
# $$\ell=-\log\prod_{k=1}^K\frac{e^{\hat r(y_{\tau(k)})}}{\sum_{j=k}^Ke^{\hat r(y_{\tau(j)})}},\qquad\hat r(y)=\beta\log\frac{\pi_\theta(y|x)}{\pi_{\rm ref}(y|x)}.$$

# %% [markdown]
# With $K=2$ it is the loss of notebook 3:

# %%
policy, reference = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.5]])
print("rankings of two:", dpo.plackett_luce_dpo_loss(policy, reference, beta=beta))
print("DPO of the pair:", dpo.dpo_loss(*policy.T, *reference.T, beta=beta).losses)

# %% [markdown]
# ### Exercise 5.2: only the first places
#
# *8 minutes.* Who is shown eight answers may rank the best two and leave the others alone. The probability of that is the *sum* over all orders of the others. Return minus its logarithm, with implicit rewards as above: log-probabilities of $B$ rankings of $K$ completions come in, of which the first $m$ are in order, best first, and the others are not. Is there a way without the sum? ($m=1$: only the best was named. $m=K$: Eq. 20.)


# %% tags=["exercise"]
def first_places_loss(policy_logps, ref_logps, m, beta):
    """(B, K) log-probabilities, the first m by place -> (B,) losses, in nats (from Eq. 20)."""
    ### BEGIN SOLUTION
    rewards = beta * (policy_logps - ref_logps)
    still_there = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    return (still_there - rewards)[:, :m].sum(-1)  # the factors of the other places sum to one
    ### END SOLUTION


# %% tags=["check"]
check("5.2", first_places_loss)

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
# **What happened.** At the reference the front is pulled up and the back down, but not evenly. The first was considered once, and its weight is β at most; the last was considered at every place and not chosen at all but one, so it is pulled down hardest. A policy that is sure of this order is hardly pulled at all, and one that is sure of the reverse is pulled hardest. The weights always sum to zero.

# %% [markdown]
# ## Training finds π\*, again
#
# Six completions, gradient descent on a table of logits from the reference. The loss is the exact mean over all rankings of all sets of $K$ completions (`expected_rankings`), as if infinitely many people had been asked.
#
# **Predict before you run.** Compare $K=2$ (pairs), $K=3$, $K=6$ (all are ranked), and $K=6$ where people name the best one only. Do all four end at the same policy? (Each has its own longest safe step. So compare where the lines end, not how steep they are.)


# %%
def loss_and_safe_step(logps, world, rankings, only_the_best):
    """The loss, and a length of step that never raises it [D5.2]."""
    if only_the_best:
        ranked = rankings.gather(dpo.implicit_reward(logps, world.ref_logps, beta=beta))
        return -rankings.weight @ ranked.log_softmax(-1)[:, 0], 2 / beta**2
    loss, _ = plackett_luce_objective(logps, world.ref_logps, rankings, beta=beta)
    return loss, safe_learning_rate(rankings, beta=beta)


# %%
def distances(size, world, only_the_best=False, steps=40):
    """KL(π || π*) along the path of training on rankings of that many completions."""
    rankings = dpo.expected_rankings(world.rewards, dpo.all_sets(world.exists, size=size))
    target = dpo.optimal_logps(world.ref_logps, world.rewards, beta=beta)
    theta, path = world.ref_logps.clone().requires_grad_(), []
    for _ in range(steps):
        logps = theta.log_softmax(-1)
        loss, step = loss_and_safe_step(logps, world, rankings, only_the_best)
        path.append(dpo.kl_divergence(logps.detach(), target).item())
        theta.data -= step * torch.autograd.grad(loss, theta)[0]
    return path


# %%
world = dpo.random_bandit(1, 6, generator=torch.Generator().manual_seed(1))
ways = {"K = 2": (2, "-"), "K = 3": (3, "--"), "K = 6": (6, ":"), "K = 6, only the best is named": (6, "-.")}
figure, axes = plt.subplots()
for name, (size, style) in ways.items():
    path = distances(size, world, only_the_best="only" in name)
    axes.semilogy(path, style, label=name)
    print(f"{name}: after {len(path)} steps KL(π‖π*) = {path[-1]:.1e} nats")
axes.set(xlabel="gradient step", ylabel="KL(π‖π*) (nats)")
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
# So rankings can be drawn by sorting, all places at once. To draw the noise, solve $U=e^{-e^{-G}}$ for $G$: $G=-\log(-\log U)$ with $U$ uniform between 0 and 1.

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
axes.set(xlabel="order, best on top", ylabel="probability")
axes.legend()
figures.show(figure, "5.e")

# %% [markdown] tags=["outcome"]
# **What happened.** Error bars are two standard errors, $2\sqrt{p(1-p)/N}$. With Gumbel's noise the shares agree with Eq. 18 within chance. With normal noise most do not: that is another model of rankings.

# %% [markdown]
# ### Exercise 5.3: change the noise
#
# *5 minutes.* Take the model with normal noise. Each of two completions makes an impression: its reward plus noise of its own, which is normal with mean 0 and variance $\pi^2/6$ (here π is the number). Return the probability that the first one's impression is the larger. (`torch.special.ndtr` is the distribution function Φ of a standard normal variable.)
#
# **Predict before you run.** Noise of the same variance: does this differ from Bradley–Terry by more than 0.1 anywhere? The cell after the check measures it.


# %% tags=["exercise"]
def preference_with_normal_noise(first, second):
    """(B,) and (B,) rewards -> (B,) probabilities that the first makes the larger impression."""
    ### BEGIN SOLUTION
    deviation = (2 * torch.pi**2 / 6) ** 0.5  # of the difference of two noises: variances add
    return torch.special.ndtr((first - second) / deviation)
    ### END SOLUTION


# %% tags=["check"]
check("5.3", preference_with_normal_noise)

# %%
gaps = torch.linspace(-6, 6, 25, dtype=torch.float64)
noise = normal[:, 0] - normal[:, 1]  # of the draws above
away = (gaps + noise[:, None] > 0).double().mean(0) - torch.sigmoid(gaps)
worst = away.abs().argmax()
print(f"largest difference from σ: {away[worst]:+.3f}, where rewards differ by {gaps[worst]:.1f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The two never differ by more than some 0.02. With pairs alone it takes thousands of answers to tell the two models apart. With rankings of three, the figure above did it: which model is right matters more, the more completions are ranked.

# %% [markdown]
# ## A ranking and its pairs
#
# A ranking of $K$ holds $K(K-1)/2$ pairs: who stands above whom. What is the chance that $y_i$ stands above $y_j$, if others are ranked with them?

# %% [markdown]
# ### Exercise 5.4: two of a ranking
#
# *7 minutes.* Sum the probabilities of all orders in which $y_i$ stands above $y_j$. The check compares your sum with something much shorter.


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
# We ask fifty people to rank six completions, estimate the rewards by maximum likelihood, and repeat that 200 times to see the errors. Three ways: from the rankings; from their 15 pairs each; and from as many pairs that really are independent. (`tally` counts equal answers, and each repetition is a prompt of its own, so that all 200 are estimated at once.)


# %%
def answers_to(truth, people=50, repeats=200):
    """Rankings of all completions, by sorting impressions -> (rankings, Y), and whose they are."""
    uniform = torch.rand(repeats * people, len(truth), generator=generator, dtype=torch.float64)
    order = (truth - (-uniform.log()).log()).argsort(-1, descending=True)
    return order, torch.arange(repeats).repeat_interleave(people)


def pairs_of(order, repetition):
    """Every ranking cut into its pairs, which then count as independent answers."""
    above, below = torch.triu_indices(*2 * [order.shape[-1]], offset=1)
    pairs = torch.stack([order[:, above], order[:, below]], -1)  # (rankings, pairs of each, 2)
    return dpo.tally(repetition.repeat_interleave(len(above)), pairs.flatten(0, 1))


# %%
def true_and_claimed(data, truth, repeats=200):
    """How far the estimates are from the truth, and how far they claim to be: root mean squares."""
    exists = torch.ones(repeats, len(truth), dtype=torch.bool)
    estimate = dpo.maximum_likelihood(data, exists)  # mean zero
    away = estimate - (truth - truth.mean())
    return torch.stack([error.square().mean().sqrt() for error in (away, standard_errors(estimate, data))])


truth = torch.linspace(0, 2, 6, dtype=torch.float64)
order, repetition = answers_to(truth)
chances = torch.sigmoid(truth[:, None] - truth)[*torch.triu_indices(6, 6, offset=1)]
wins = torch.rand(len(order), 15, generator=generator) < chances
first, second = torch.triu_indices(6, 6, offset=1).expand(len(order), 2, 15).unbind(1)
fresh = torch.stack([torch.where(wins, first, second), torch.where(wins, second, first)], -1)

# %% [markdown]
# **Predict before you run.** The true error of the estimates, and the standard error that the same likelihood claims: where do the two disagree?

# %%
ways = {
    "rankings": dpo.tally(repetition, order),
    "their pairs": pairs_of(order, repetition),
    "independent pairs": dpo.tally(repetition.repeat_interleave(15), fresh.flatten(0, 1)),
}
found = torch.stack([true_and_claimed(data, truth) for data in ways.values()])
figure, axes = plt.subplots()
errors = {"true error": found[:, 0], "claimed error": found[:, 1]}
figures.bars_side_by_side(axes, ways, errors, [figures.BLACK, figures.ORANGE], fmt="%.3f")
axes.set(xlabel="what the rewards were estimated from", ylabel="error of a reward (nats)", ylim=(0, 0.3))
figures.show(figure, "5.f")

# %% [markdown] tags=["outcome"]
# **What happened.** Cut into pairs, rankings still lead to the rewards, and the estimate loses little. What is wrong is the error that it claims: one person's ranking is counted as fifteen opinions, and the claim is the one that fifteen independent answers would deserve. The likelihood of whole rankings claims about the error that it makes.

# %% [markdown]
# ### Exercise 5.5: change the number of ranked completions
#
# *7 minutes.* Here $K$ completions are equally good, everybody ranks all of them, and the rankings are cut into pairs as above. By what factor is the claimed error too small: true error ÷ claimed error? At equal rewards the estimate of $r_y$ is proportional to how many others $y$ stands above. So compare the standard deviation of that number in a random order with the one it would have if $y$ had met each of the $K-1$ others in an independent toss of a fair coin. Derive the factor, count all orders, or simulate (the check allows 2 %).
#
# **Predict before you run.** Is the factor for $K=2$ one? Does it grow with $K$ without end?


# %% tags=["exercise"]
def times_too_small(K):
    """Completions in a ranking -> true error ÷ the error claimed from its pairs, at equal rewards."""
    ### BEGIN SOLUTION
    in_a_ranking = (K**2 - 1) / 12  # variance of a uniform number from 0 to K - 1
    by_coins = (K - 1) / 4
    return (in_a_ranking / by_coins) ** 0.5
    ### END SOLUTION


# %% tags=["check"]
check("5.5", times_too_small)

# %%
for K in (2, 4, 8):
    equal = torch.zeros(K, dtype=torch.float64)
    true, claimed = true_and_claimed(pairs_of(*answers_to(equal)), equal)
    print(f"K = {K}: true error {true:.3f}, claimed {claimed:.3f}, factor {true / claimed:.2f}")

# %% [markdown] tags=["answer"]
# The factor is $\sqrt{(K+1)/3}$: one at $K=2$, and without a bound.

# %% [markdown] tags=["outcome"]
# **What happened.** With two completions a ranking is a pair, and nothing is wrong. With eight, the errors are more than one and a half times as large as claimed, and the factor goes on growing: a ranking of $K$ holds $K(K-1)/2$ pairs, but a smaller and smaller share of them is new information. Training on the pairs of rankings works; its error bars do not. In a mean over pairs, moreover, a prompt with a long ranking has more terms than others, and so more influence than it has information.

# %% [markdown]
# ## An open question
#
# Let two of the ranked completions be paraphrases of each other. Plackett–Luce gives each its own share of first place, so an answer gains by being listed twice. People who see that the two say the same would not choose so. Language models sample paraphrases all the time. Which model of rankings would know about them, and could its loss still be written for a policy, with $Z$ cancelled?
