# %% [markdown]
# # 8 · What DPO is compared with
#
# **Before this:** notebooks 1 to 3, or what they show: Bradley–Terry, π\* = π_ref exp(r/β) / Z, and that DPO's loss leads to π\* · **Read:** 28 minutes · **Solve:** 32 minutes · **Difficulty:** ●●○ · **Derivations:** [D10.1], [D10.2], [D10.3], [D10.4], [D10.5], [D7.3], [D7.7], [D11.5], [D11.19], [D11.22], [D13.4]
#
# **The claim.** More reward costs divergence from the reference, and there is a best price: a curve that no policy can be above, however it was trained. Best of n, fine-tuning on chosen completions, PPO and DPO all lie on it or below, and on a table we can say exactly where.

# %% tags=["setup"]

import torch
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.laws import designs
from dpo_minimal.laws.sampling_laws import kl_law
from dpo_minimal.rivals import baselines
from dpo_minimal.rivals.evaluate import exact_win_rate

figures.use_style()

# %% [markdown]
# ## A curve that nobody crosses
#
# A policy over three completions is three numbers. Two numbers about it are what everybody reports: its mean reward, and how far it is from the reference, $\mathrm{KL}(\pi\Vert\pi_{\rm ref})$. Below are two thousand random policies, and the reference.

# %%
ref_logps = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
rewards = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
generator = torch.Generator().manual_seed(0)
noise = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
policies = (1.5 * noise).log_softmax(-1)
kl, reward = dpo.kl_divergence(policies, ref_logps.expand_as(policies)), policies.exp() @ rewards
print("the reference: reward", (ref_logps.exp() @ rewards).item(), "at 0 nats")
print(f"the most reward of a random policy: {reward.max():.2f}, at {kl[reward.argmax()]:.2f} nats")

# %% [markdown]
# **Predict before you run.** All of these are tables that somebody might have trained. We add the optima $\pi^\ast$ of Eq. 4 for many values of β as a line. Where does the line run through the cloud?

# %%
betas = torch.logspace(-1, 1.5, 60, dtype=torch.float64)
best_kl, best_reward = dpo.reward_kl_frontier(ref_logps, rewards, betas)
figure, axes = plt.subplots()
axes.scatter(kl, reward, s=6, color=figures.SKY)
axes.plot(best_kl, best_reward, color=figures.OPTIMUM)
axes.plot(0, ref_logps.exp() @ rewards, "o", color=figures.REFERENCE)
axes.text(-0.04, ref_logps.exp() @ rewards, "π_ref", va="center", ha="right")
axes.text(0.5, 1.75, "π* for all β", color=figures.OPTIMUM, ha="right")
axes.set(xlabel="KL(π‖π_ref) (nats)", ylabel="mean reward", xlim=(-0.25, 1.7))
figures.show(figure, "8.a")

# %% [markdown] tags=["outcome"]
# **What happened.** Along the cloud's upper edge. No dot is above the line. (Reward can also be thrown away: the cloud reaches down to 0.)

# %% [markdown]
# Here is why. For *any* policy and any β, completing the divergence (notebook 2) gives
#
# $$E_\pi[r]=\beta\log Z_\beta+\beta\,\mathrm{KL}(\pi\Vert\pi_{\rm ref})-\beta\,\mathrm{KL}(\pi\Vert\pi^\ast_\beta)\le\beta\log Z_\beta+\beta\,\mathrm{KL}(\pi\Vert\pi_{\rm ref}).$$
#
# So each β is a straight line in this picture, with slope β, that no policy is above, and $\pi^\ast_\beta$ lies on it ([D10.1]). The curve made of all $\pi^\ast_\beta$ is the *reward–KL frontier*.

# %% [markdown]
# ### Exercise 8.1: a point of the frontier
#
# *5 minutes.* Return the divergence and the mean reward of $\pi^\ast$ for one β, in this order.


# %% tags=["exercise"]
def frontier_point(ref_logps, rewards, beta):
    """(Y,) log-probabilities, (Y,) rewards -> (KL(π*‖π_ref), mean reward of π*), two scalars (Eq. 4)."""
    ### BEGIN SOLUTION
    logps = (ref_logps + rewards / beta).log_softmax(-1)
    chances = logps.exp()
    return chances @ (logps - ref_logps), chances @ rewards
    ### END SOLUTION


# %% tags=["check"]
check("8.1", frontier_point)

# %% [markdown]
# ## The price of a nat
#
# A curve with a line of slope β touching it has the slope β there ([D10.2]):
#
# $$\frac{d\,E[r]}{d\,\mathrm{KL}}=\beta.$$
#
# **Predict before you run.** For three values of β we draw the line $\beta\log Z_\beta+\beta\,\mathrm{KL}$. Where does the line for β = 1 meet the axis KL = 0, above the reference or below?

# %%
figure, axes = plt.subplots()
axes.plot(best_kl, best_reward, color=figures.OPTIMUM)
axes.plot(0, ref_logps.exp() @ rewards, "o", color=figures.REFERENCE)
for beta, colour in [(0.25, figures.GREEN), (0.5, figures.ORANGE), (1.0, figures.RED)]:
    point_kl, point_reward = dpo.reward_kl_frontier(ref_logps, rewards, [beta])
    span = torch.tensor([0.0, 1.6], dtype=torch.float64)
    line = dpo.soft_value(ref_logps, rewards, beta=beta) + beta * span
    axes.plot(span, line, "--", color=colour)
    axes.plot(point_kl, point_reward, "o", color=colour)
    axes.text(-0.04, line[0], f"β = {beta:g}", color=colour, va="center", ha="right")
axes.set(xlabel="KL(π‖π_ref) (nats)", ylabel="mean reward", xlim=(-0.3, 1.65), ylim=(0.6, 2.3))
figures.show(figure, "8.b")

# %% [markdown] tags=["outcome"]
# **What happened.** Above: at KL = 0 the line is at $\beta\log Z$, the soft value, which is more than the reference's reward unless all rewards are equal. β is the exchange rate between reward and nats. Where the curve is steep, nats are cheap; training with β stops where the next nat would bring less than β.

# %% [markdown]
# ## Best of n
#
# The simplest way to more reward needs no training: draw $n$ completions from the reference and keep the best. That is a policy too, and its law is known ([D10.3]). The best has reward at most $v$ if all $n$ have. With $F(v)$ the reference's probability of a reward of at most $v$, and $p(v)$ that of exactly $v$,
#
# $$\pi_n(y)=\frac{\pi_{\rm ref}(y)}{p(r_y)}\Big[F(r_y)^n-\big(F(r_y)-p(r_y)\big)^n\Big].$$
#
# The first factor shares a tie among those tied, in proportion to the reference.

# %% [markdown]
# Best of $n$ was never told a β, and it looks only at the *order* of the rewards. Now a world of forty completions, with random rewards.
#
# **Predict before you run.** How far below the frontier is the best of 2, 4, 8, ...? And how many nats more does it cost to double $n$, from 8 to 16 and from 16 to 32?

# %%
world = dpo.random_bandit(1, 40, generator=generator)
many = [1, 2, 4, 8, 16, 32]
best = torch.stack([dpo.best_of_n_logps(world.ref_logps, world.rewards, n=n) for n in many])
stand = baselines.frontier_gap(best, world.ref_logps, world.rewards)
print(" n   KL (nats)   at most   reward   below the frontier")
for i, n in enumerate(many):
    bound = baselines.best_of_n_kl_bound(n)
    row = f"{stand.kl[i]:9.3f} {bound:9.3f} {stand.reward[i]:8.2f}"
    print(f"{n:2d} {row} {abs(stand.reward_gap[i]):14.2f}")

# %%
ref, prices = world.ref_logps, torch.logspace(-1.2, 2, 60, dtype=torch.float64)
curve = [t.squeeze(-1) for t in dpo.reward_kl_frontier(ref, world.rewards, prices)]
figure, axes = plt.subplots()
axes.plot(*curve, color=figures.OPTIMUM)
axes.plot(stand.kl, stand.reward, "s", color=figures.RED)
for i, n in enumerate(many[1:], start=1):
    axes.text(stand.kl[i] + 0.04, stand.reward[i] - 0.04, f"best of {n}", color=figures.RED, va="top")
axes.plot(0, stand.reward[0], "o", color=figures.REFERENCE)
axes.set(xlabel="KL(π‖π_ref) (nats)", ylabel="mean reward", xlim=(-0.1, 3.2), ylim=(-0.1, 2))
figures.show(figure, "8.c")

# %% [markdown] tags=["outcome"]
# **What happened.** Never above, and in this world less than a tenth of a unit of reward below. The column "at most" is $\log n-\frac{n-1}n$, a bound for every world, approached where no single completion has much probability. A doubling costs up to about $\log 2$, as long as the table has better completions left, and twice as many completions have to be written for each answer. DPO and PPO write one.

# %% [markdown]
# ### Exercise 8.2: an experiment: how many draws is a β worth?
#
# *10 minutes.* Somebody wants the mean reward of π\* at a certain β, but no training. **Predict before you run.** In the world of forty completions, how many draws replace training with β = 1, with 0.5, with 0.25? Then return two numbers: the smallest $n$ whose best of $n$ has at least the mean reward of π\*, and how many nats more it costs, $\mathrm{KL}(\pi_n\Vert\pi_{\rm ref})-\mathrm{KL}(\pi^\ast\Vert\pi_{\rm ref})$. The library has `dpo.best_of_n_logps(ref_logps, rewards, n=n)`.


# %% tags=["exercise"]
def draws_worth(ref_logps, rewards, beta):
    """(Y,) log-probabilities, (Y,) rewards -> (number of draws, nats more than those of π*)."""
    ### BEGIN SOLUTION
    optimal, n = dpo.optimal_logps(ref_logps, rewards, beta=beta), 1
    while (best := dpo.best_of_n_logps(ref_logps, rewards, n=n)).exp() @ rewards < optimal.exp() @ rewards:
        n += 1
    return n, dpo.kl_divergence(best, ref_logps) - dpo.kl_divergence(optimal, ref_logps)
    ### END SOLUTION


# %% tags=["check"]
check("8.2", draws_worth)

# %%
one, worth, draws = ref[0], world.rewards[0], torch.arange(1, 500)
tables = torch.stack([dpo.best_of_n_logps(one, worth, n=int(n)) for n in draws])
for beta in [2.0, 1.0, 0.5, 0.25]:
    optimum = dpo.optimal_logps(one, worth, beta=beta)
    place = (tables.exp() @ worth >= optimum.exp() @ worth).nonzero()[0, 0]
    more = dpo.kl_divergence(tables[place], one) - dpo.kl_divergence(optimum, one)
    print(
        f"β = {beta:<4g}: {draws[place]:3d} draws, {more:.3f} nats more than {dpo.kl_divergence(optimum, one):.3f}"
    )

# %% [markdown] tags=["outcome"]
# **What happened.** A few draws replace a mild β; the smaller β is, the faster the number grows, because the last part of the reward is in completions that the reference seldom writes. In divergence best of $n$ costs 0.1 to 0.2 nats more, a part of it only because $n$ is a whole number. So what training saves is not divergence but writing: its cost is paid once, that of best of $n$ with every answer.

# %% [markdown]
# ## Fine-tuning on what was chosen
#
# The simplest training: throw the rejected completions away and fine-tune on the chosen ones, *Preferred-FT*. It ends at the law of winners ([D10.4]). If both completions of a pair are drawn from the reference, that is
#
# $$\pi_{\rm FT}(y)=2\,\pi_{\rm ref}(y)\sum_{y'}\pi_{\rm ref}(y')\,\sigma\big(r(y)-r(y')\big).$$
#
# **Predict before you run.** We multiply all rewards by 10, then by 100. How far from the reference can Preferred-FT get?

# %%
for scale in [1, 10, 100]:
    wins = dpo.preference_matrix(scale * world.rewards)[0] @ ref[0].exp()
    winners = ref[0] + (2 * wins).log()
    gap = baselines.frontier_gap(winners[None], ref, scale * world.rewards)
    print(
        f"rewards times {scale:3d}: KL {gap.kl:.3f} nats, mean reward {scale} times {gap.reward / scale:.2f}"
    )
print(f"best of 2:         KL {stand.kl[1]:.3f} nats, mean reward {stand.reward[1]:.2f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The average of σ is at most 1, so no completion more than doubles its probability, and the divergence is at most $\log2$ whatever the rewards are. As judges err less and less, it becomes best of 2. There is no β to ask for more.

# %% [markdown]
# ## Policy gradient and PPO
#
# Reinforcement learning climbs the objective of Eq. 3 itself. For a table, $\pi=\mathrm{softmax}(\theta)$, and with the penalised reward $\tilde R_y=r_y-\beta\log\frac{\pi(y)}{\pi_{\rm ref}(y)}$ its gradient is ([D7.3])
#
# $$\frac{\partial J}{\partial\theta_y}=\pi(y)\big(\tilde R_y-E_\pi\tilde R\big).$$
#
# It is zero where $\tilde R$ is the same for all completions, that is at $\pi^\ast$. A language model cannot sum over all completions, so it draws some and takes an average. PPO takes several steps on the same draws. It corrects for the policy having moved by the ratio $\rho=\frac{\pi_\theta(y)}{\pi_{\rm old}(y)}$ to the policy that drew them, and stops where the ratio has moved by more than $c$ in the direction that the *advantage* $A$ asks for: the penalised reward, less a *baseline*, an average of what earlier draws got ([D7.7]):
#
# $$\ell_{\rm PPO}=-\min\big(\rho A,\ \mathrm{clip}(\rho,1-c,1+c)\,A\big).$$

# %% [markdown]
# **Predict before you run.** We draw the loss of one sample against its ratio, once for $A=1$ and once for $A=-1$. Grey are the ratios from $1-c$ to $1+c$. Each curve has one flat part. On which side of the ratio 1?

# %%
old = torch.zeros(200, dtype=torch.float64)
ratio = torch.linspace(0.4, 1.6, 200, dtype=torch.float64)
figure, axes = plt.subplots()
for A, colour, style in [(1.0, figures.BLUE, "-"), (-1.0, figures.RED, "--")]:
    loss = baselines.clipped_surrogate(ratio.log(), old, A + old, clip=0.2)
    axes.plot(ratio, loss, style, color=colour)
    axes.text(0.42, loss[0] + 0.12, f"A = {A:g}", color=colour)
axes.axvspan(0.8, 1.2, color=figures.BLACK, alpha=0.08)
axes.set(xlabel="ratio ρ of new to old probability", ylabel="loss (units of reward)", ylim=(-1.4, 1.8))
figures.show(figure, "8.d")

# %% [markdown] tags=["outcome"]
# **What happened.** For $A=1$ beyond $1+c$, for $A=-1$ below $1-c$: where the sample has been moved far enough in the direction it asked for, nothing pulls any more. On the other side the slope stays, so a ratio that went the wrong way is pulled back.

# %% [markdown]
# ### Exercise 8.3: an experiment: a clip that is too tight
#
# *9 minutes.* PPO takes several steps on the same samples. **Predict before you run.** Ten steps of gradient descent on the loss above, from ρ = 1: is the ratio between $1-c$ and $1+c$ in the end? And with a $c$ that is much smaller than what one step moves? Then return the ratios after `steps` steps of gradient descent of length `step_size` in $\log\pi(y)$, each sample by itself. (The library has `baselines.clipped_surrogate(logps, old_logps, advantages, clip=clip)`; or do without.)


# %% tags=["exercise"]
def ratios_after(advantages, clip, step_size, steps):
    """(B,) advantages, the clip, length and number of steps in log π -> (B,) ratios ρ after the last step."""
    ### BEGIN SOLUTION
    logps = torch.zeros_like(advantages)  # the ratio is one at first, whatever log π is
    for _ in range(steps):
        logps.requires_grad_()
        losses = baselines.clipped_surrogate(logps, torch.zeros_like(logps), advantages, clip=clip)
        (slope,) = torch.autograd.grad(losses.sum(), logps)
        logps = logps.detach() - step_size * slope
    return logps.exp()
    ### END SOLUTION


# %% tags=["check"]
check("8.3", ratios_after)

# %%
for clip in [0.2, 0.01]:
    rho, path = torch.ones((), dtype=torch.float64), []
    for _ in range(10):  # one sample, A = 1, steps of 0.05
        rho = rho * (0.05 * rho * (rho <= 1 + clip)).exp()
        path.append(f"{rho:.2f}")
    print(f"c = {clip}: ρ after each step", *path)

# %% [markdown] tags=["outcome"]
# **What happened.** The clip bounds no ratio. It takes away the slope of a sample that has moved by more than $c$; the step before may have carried it far beyond, and there it stays. With a $c$ below the length of a step the first step of each batch counts and all others do nothing: PPO has become the policy gradient at many times the price, and all samples look "clipped" in its log.

# %% [markdown]
# Now PPO on a small table. It asks the true reward for every completion that it draws, and needs no preferences. It starts at the reference.
#
# **Predict before you run.** Where in the picture does it end, for three values of β? Can PPO end above the frontier, because it knows the true reward?


# %%
def climb(world, beta, iterations=300):
    """PPO with the true reward: its records, and the policy that it ends with."""
    policy = dpo.TabularPolicy(world.ref_logps)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=iterations)
    options = dict(iterations=iterations, samples=64, scheduler=slower)
    options |= dict(generator=torch.Generator().manual_seed(1))
    controller = baselines.AdaptiveKL(beta)  # without a target, β stays as it is
    records = list(baselines.ppo(policy, world.ref_logps, world.rewards, optimizer, controller, **options))
    return records, policy().detach()


# %%
small = dpo.random_bandit(1, 8, generator=torch.Generator().manual_seed(1))
curve = [t.squeeze(-1) for t in dpo.reward_kl_frontier(small.ref_logps, small.rewards, betas)]
figure, axes, ends = *plt.subplots(), {}
axes.plot(*curve, color=figures.OPTIMUM)
for beta, colour in [(0.25, figures.GREEN), (0.5, figures.ORANGE), (1.0, figures.RED)]:
    records, ends[beta] = climb(small, beta)
    path = [(r["kl/policy_reference"], r["reward"]) for r in records]
    axes.plot(*zip(*path), ".:", color=colour)
    axes.plot(*path[-1], "o", color=colour)
    axes.text(path[-1][0] - 0.03, path[-1][1] + 0.03, f"β = {beta:g}", color=colour, ha="right")
axes.set(xlabel="KL(π‖π_ref) (nats)", ylabel="mean reward")
figures.show(figure, "8.e")

# %%
for beta, end in ends.items():
    target = dpo.optimal_logps(small.ref_logps, small.rewards, beta=beta)
    distance = dpo.kl_divergence(end, target).item()
    print(f"β = {beta:<4g}: PPO ends {distance:.0e} nats from π*")

# %% [markdown] tags=["outcome"]
# **What happened.** On the curve, at the $\pi^\ast$ of its β or very near. Reinforcement learning and DPO have one optimum; they differ in what they ask for. At $\pi^\ast$ every completion has the same penalised reward. With that number as the baseline every advantage is zero, whichever completions are drawn: the noise of sampling fades on the way.

# %% [markdown]
# **Predict before you run.** The same PPO with twenty short steps on each batch, once with $c=0.2$ and once with 0.01. Which is nearer to π\* after ten batches, and after forty?

# %%
beta = 0.5
target = dpo.optimal_logps(small.ref_logps, small.rewards, beta=beta)
for clip in [0.2, 0.01]:
    policy = dpo.TabularPolicy(small.ref_logps)
    options = dict(iterations=40, samples=64, epochs=20, clip=clip)
    options |= dict(generator=torch.Generator().manual_seed(1))
    adam, controller = torch.optim.Adam(policy.parameters(), lr=0.02), baselines.AdaptiveKL(beta)
    for record in baselines.ppo(policy, small.ref_logps, small.rewards, adam, controller, **options):
        if record["step"] in (10, 40):
            gap = dpo.kl_divergence(policy().detach(), target).item()
            print(f"c = {clip}: {gap:.4f} nats from π* after {record['step']} batches")

# %% [markdown] tags=["outcome"]
# **What happened.** At first the tight clip throws most of each batch's steps away, and is many times further behind. Later the order turns: near π\* the samples' noise is what remains, and the tight clip, which follows a batch less far, follows less of its noise. So a clip is tuned like a step size, and the share of clipped samples tells whether it does anything.

# %% [markdown]
# ## Win rates
#
# People seldom state rewards; they say which of two completions is better. The *win rate* of a policy against another is the probability that its completion has the higher reward, a tie counting one half ([D10.5]):
#
# $$W(\pi,\pi')=\sum_{y,y'}\pi(y)\,\pi'(y')\Big[\mathbf 1\{r(y)>r(y')\}+\tfrac12\mathbf 1\{r(y)=r(y')\}\Big].$$

# %% [markdown]
# **Predict before you run.** In mean reward, best of $n$ was always below the frontier. Here are the same policies again, with the win rate against the reference in place of the reward. Who is above now?

# %%
optima = torch.stack([dpo.optimal_logps(ref, world.rewards, beta=b.item()) for b in prices])
rates = exact_win_rate(optima, ref.expand_as(optima), world.rewards.expand_as(optima))
best_rates = exact_win_rate(best, ref.expand_as(best), world.rewards.expand_as(best))
figure, axes = plt.subplots()
optima_kl = dpo.kl_divergence(optima, ref.expand_as(optima))
axes.plot(optima_kl, rates, color=figures.OPTIMUM)
axes.text(2.6, 0.93, "π* for all β", color=figures.OPTIMUM, va="top")
axes.plot(stand.kl, best_rates, "s", color=figures.RED)
for i, n in enumerate(many[1:5], start=1):
    axes.text(stand.kl[i] + 0.05, best_rates[i] - 0.02, f"best of {n}", color=figures.RED, va="top")
axes.set(xlabel="KL(π‖π_ref) (nats)", ylabel="win rate against π_ref", xlim=(-0.1, 3.2), ylim=(0.48, 1.02))
figures.show(figure, "8.f")

# %% [markdown] tags=["outcome"]
# **What happened.** From $n=4$ on, best of $n$. The frontier is for mean reward. A win rate is another objective, with a frontier of its own: to win, a completion must be better, not much better. So π\* may be below, and here it mostly is. That is also why win rates saturate. All are close to 1 in the right part of the picture, while the reward still rises.

# %% [markdown]
# ### Exercise 8.4: an experiment: a judge that likes length
#
# *8 minutes.* Win rates are often given by a language model as the judge, and judges like long answers. Suppose that in a share $\lambda$ of all comparisons the judge does not read and calls the *longer* completion the better one, and otherwise judges by the reward; ties, of rewards or of lengths, count one half. Of two policies one is better and writes shorter. **Predict before you run.** If it wins 60 % by reward and 40 % by length, how large must $\lambda$ be to hide that it is better? Then return the $\lambda$ at which the judge calls any two such policies even, 50 % each. (`exact_win_rate(logps, other_logps, scores)` counts by the higher score, whatever the score is.)


# %% tags=["exercise"]
def bias_that_hides(logps, other_logps, rewards, lengths):
    """(Y,) log-probabilities of two policies, (Y,) rewards, (Y,) lengths -> the share λ, a scalar."""
    ### BEGIN SOLUTION
    by_reward, by_length = (exact_win_rate(logps, other_logps, scores) for scores in (rewards, lengths))
    return (by_reward - 0.5) / (by_reward - by_length)
    ### END SOLUTION


# %% tags=["check"]
check("8.4", bias_that_hides)

# %%
answers = ["Yes.", "Yes, by train.", "It depends on the day.", "Yes, by train, at nine, from platform two."]
length = torch.tensor([len(answer.split()) for answer in answers], dtype=torch.float64)
value = torch.tensor([2.0, 3.0, 0.0, 1.0], dtype=torch.float64)  # to whoever asks "Can I get there?"
old = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64).log()
new = dpo.optimal_logps(old, value, beta=2.0)
for share in [0.0, 0.25, 0.5, 0.75]:
    rates = [exact_win_rate(new, old, scores) for scores in (value, length)]
    print(f"λ = {share:.2f}: the judge sees a win rate of {(1 - share) * rates[0] + share * rates[1]:.3f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The judged win rate moves on a straight line from the true one to that by length, so that a policy which wins as much by reward as it loses by length is called even when half of the comparisons go by length. The same line says more: a policy that only learns to write longer *gains* by this judge without any reward. So look at lengths beside win rates, or compare answers of like length.

# %% [markdown]
# ## How many pairs is a reward function worth?
#
# PPO asked the reward again and again. DPO gets $N$ comparisons, each at most one bit. The rewards estimated from them have errors of covariance $I^+/N$ for large $N$, with $I$ the Fisher information of one comparison (what it says about the rewards) and $I^+$ its pseudo-inverse, and the policy made of them is away from $\pi^\ast$ by ([D11.5])
#
# $$E\,\mathrm{KL}(\hat\pi\Vert\pi^\ast)\approx\frac{\mathrm{tr}(\Sigma I^+)}{2\beta^2N},\qquad\Sigma=\mathrm{diag}(\pi^\ast)-\pi^\ast\pi^{\ast\top}.$$
#
# On a table the end of DPO's training is known without training: the most likely rewards, put into Eq. 4 (notebook 3). So we can afford thirty data sets of each size.
#
# **Predict before you run.** We draw DPO's distance from π\* against the number of comparisons, and PPO's, for trainings of different lengths, against the number of times that it asked for a reward. Small dots are single data sets. Which of the two is a straight line on logarithmic axes, and with which slope?

# %%
five, beta = dpo.random_bandit(1, 5, generator=torch.Generator().manual_seed(3)), 0.5
slate, target = dpo.all_sets(five.exists), dpo.optimal_logps(five.ref_logps, five.rewards, beta=beta)
law, _ = kl_law(target, five.ref_logps, dpo.expected_pairs(five.rewards, slate), beta=beta)
sizes, gaps = [100, 300, 1000, 3000, 10_000, 30_000], []
for size in sizes:
    draws = [dpo.sample_pairs(five.rewards, size, slate=slate, generator=generator) for _ in range(30)]
    estimates = torch.cat([dpo.maximum_likelihood(data, five.exists) for data in draws])
    trained = dpo.optimal_logps(five.ref_logps.expand_as(estimates), estimates, beta=beta)
    gaps.append(dpo.kl_divergence(trained, target.expand_as(trained)))
    print(f"{size:6,} pairs: {gaps[-1].mean():.5f} nats, the law says {law.item() / size:.5f}")

# %%
lengths = [5, 10, 20, 50, 100]
after = torch.cat([climb(five, beta, iterations=length)[1] for length in lengths])
of_ppo = dpo.kl_divergence(after, target.expand_as(after))
for length, distance in list(zip(lengths, of_ppo))[2:]:
    print(f"{64 * length:5,} rewards: PPO is {distance:.0e} nats from π*")
    print(f"{64 * length:5,} pairs: DPO is {law.item() / (64 * length):.4f} nats from π*, by the law")

# %%
figure, axes = plt.subplots()
for size, each in zip(sizes, gaps):
    axes.loglog([size] * len(each), each, ".", color=figures.SKY)
axes.loglog(sizes, [each.mean() for each in gaps], "o", color=figures.ORANGE, label="DPO, mean of 30")
axes.loglog(sizes, [law.item() / size for size in sizes], "--", color=figures.BLACK, label="the law")
axes.loglog([64 * n for n in lengths], of_ppo, "s-", color=figures.GREEN, label="PPO, true reward")
axes.set(xlabel="comparisons, or rewards asked", ylabel="KL(π‖π*) (nats)", ylim=(1e-9, 1))
axes.legend(loc="lower left")
figures.show(figure, "8.g")

# %% [markdown] tags=["outcome"]
# **What happened.** DPO's, with slope −1: ten times as many pairs make the distance ten times smaller, no more. PPO's falls faster and faster. An answer to "which is better" is at most one bit, and sometimes the wrong one; a reward, asked directly, is exact. (On a table of five completions, asking for five rewards would be enough. PPO does not know that.) What DPO saves is the reward function, which for people's taste nobody can write down. There one has comparisons only, and on a table, a reward model fitted to them makes the same errors.

# %% [markdown]
# ## Rounds on the policy's own samples
#
# The law above has one more use. $I$, what one comparison says, depends on *which* pairs people see. In a data set made once they come from the reference. In *rounds* the policy trained so far draws the next pairs ([D11.22]), with the same reference and all labels so far.
#
# **Predict before you run.** By which factor do four rounds reduce the labels that are needed for the same distance from π\*? Here with a small β, where π\* is far from the reference.

# %%
beta, forty = 0.25, world.ref_logps
target = dpo.optimal_logps(forty, world.rewards, beta=beta)
samplers = {"pairs of the reference": designs.sampler_pairs("reference", forty, forty, beta=beta)}
samplers["four rounds"] = designs.average_design("policy", forty, target, forty, beta=beta, rounds=4)
samplers["the best pairs"] = designs.best_design(target, forty, beta=beta)[0]
for name, slate in samplers.items():
    law = designs.design_law(slate, target, forty, beta=beta).item()
    print(f"{name:22} {law:8.1f} / N nats, so {law / 0.01:8,.0f} labels for 0.01 nats")

# %% [markdown] tags=["outcome"]
# **What happened.** Rounds need several times fewer labels: pairs of the reference seldom contain the completions among which the trained policy chooses, and labels about what it no longer writes are wasted. **When to use them:** where labels can be asked for while training goes on (a judge, a rule, people who stay), and where π\* is far from the reference. With a fixed file of pairs, near the reference, or where each round would wait for weeks, one round is as good. And keep the first reference: with the last policy as the new reference the goal moves, two rounds end at the π\* of half the β ([D11.22]).

# %% [markdown]
# ## Rewards that can be verified
#
# For sums, programs and proofs nobody need be asked: a program checks the answer. The reward is 1 where it passes and 0 where it doesn't, and reinforcement learning with it needs no reward model. Its optimum is still Eq. 4. With $p$ the reference's probability of passing, $Z=1-p+pe^{1/\beta}$, so that the odds of passing grow by one factor,
#
# $$\frac{p^\ast}{1-p^\ast}=e^{1/\beta}\,\frac p{1-p},$$
#
# and right answers keep their proportions among one another, as do wrong ones.
#
# **Predict before you run.** In practice a group of $G=16$ answers to one prompt is drawn, and the group's mean reward is the baseline (as in *GRPO*). How many groups teach nothing, if the reference passes once in a thousand times, and if every second time? And what does DPO do with pairs of a right and a wrong answer?

# %%
answers = ["56", "It is 56.", "54", "63"]  # to "What is 7 times 8?"
passes, start = torch.tensor([1.0, 1, 0, 0]).double(), torch.tensor([0.05, 0.05, 0.6, 0.3]).double().log()
end = dpo.optimal_logps(start, passes, beta=0.25).exp()
print("π*:", *(f"{answer!r} {chance:.3f}" for answer, chance in zip(answers, end)))
odds = [chances[:2].sum() / chances[2:].sum() for chances in (start.exp(), end)]
print(f"odds of passing: {odds[0]:.3f}, then {odds[1]:.3f}; the factor is {odds[1] / odds[0]:.1f}")
for p in [0.001, 0.5]:
    print(f"passes {p:g}: groups of 16 that are all alike {p**16 + (1 - p) ** 16:.5f}")

# %%
right_first = torch.tensor([[0, 2], [0, 3], [1, 2], [1, 3]])
labels = dpo.Rankings(torch.zeros(4).long(), right_first, torch.ones(4))
try:
    dpo.maximum_likelihood(labels, torch.ones(1, 4).bool(), (("7 times 8",), (tuple(answers),)))
except ValueError as error:
    print(error)

# %% [markdown] tags=["outcome"]
# **What happened.** The odds grew by $e^4$, a factor that β alone decides. A group that is all wrong or all right has no advantage, so a prompt which the reference hardly ever solves teaches nothing for a long time, and needs easier prompts, a better reference or larger groups. DPO on pairs of a right and a wrong answer has labels without noise: no optimum ([D13.4]), it is stopped somewhere. **When to use which:** a verifiable reward and samples of one's own, where a check exists; DPO, where there is no check and only comparisons.

# %% [markdown]
# ## An open question
#
# The law's constant $\mathrm{tr}(\Sigma I^+)$ depends on which pairs are shown, because $I$ does. If people are paid by the comparison, which pairs should they be shown to make it smallest? One would need to know the rewards, which is what the comparisons are for. And for a language model, whose completions can't be listed: should one compare what the reference says often, what the current policy says, or what is closest? ([D13.2] shows what happens to a completion that is never shown.)
