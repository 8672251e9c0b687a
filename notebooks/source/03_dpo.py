# %% [markdown]
# # 3 · Direct Preference Optimization
#
# **Before this:** notebooks 1 and 2, or what they show: Bradley–Terry, and π\* = π_ref exp(r/β) / Z ·
# **Read:** 25 minutes · **Solve:** 30 minutes · **Difficulty:** ●●○ · **Derivations:** [D4.1], [D4.2], [D4.3], [D4.4], [D6.2], [D6.3], [D6.4], [D6.5]
#
# **The claim.** A policy that is optimal for *some* reward carries that reward inside it. So we need not fit a reward model and then search for its best policy: we can write the reward model's loss for the policy itself, and minimise that. Nothing is approximated on the way.

# %% tags=["setup"]

import torch
import torch.nn.functional as F
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.bandit import dpo_objective, safe_learning_rate

figures.use_style()

# %% [markdown]
# ## A reward, hidden in a policy
#
# Take the optimum of notebook 2, $\pi_r=\pi_{\rm ref}\,e^{r/\beta}/Z$, and solve it for the reward (Eq. 5, [D4.1]):
#
# $$r(x,y)=\beta\log\frac{\pi_r(y|x)}{\pi_{\rm ref}(y|x)}+\beta\log Z(x).$$
#
# The last term needs a sum over everything a model could say. It is also the same for all completions of a prompt.
#
# **Predict before you run.** Below, each completion has a true reward (black), and we print from the optimal policy only $\beta\log\frac{\pi}{\pi_{\rm ref}}$ (blue). How do the two sets of bars differ?

# %%
ref_logps = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
rewards = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
beta = 0.5
optimal = dpo.optimal_logps(ref_logps, rewards, beta=beta)
implicit = beta * (optimal - ref_logps)
print("reward          ", rewards)
print("β log(π*/π_ref) ", implicit.round(decimals=4))
print("their difference", (rewards - implicit).round(decimals=4))
print("β log Z         ", dpo.soft_value(ref_logps, rewards, beta=beta).round(decimals=4))

# %%
figure, axes = plt.subplots()
places = torch.arange(3)
axes.bar(places - 0.2, rewards, 0.4, color=figures.BLACK, label="true reward r")
axes.bar(places + 0.2, implicit, 0.4, color=figures.BLUE, label="β log(π*/π_ref)")
axes.set(
    xticks=places, xticklabels=["y₁", "y₂", "y₃"], xlabel="completion", ylabel="reward (nats of log-odds)"
)
axes.legend()
figures.show(figure, "3.a")

# %% [markdown] tags=["outcome"]
# **What happened.** The blue bars are the black ones, all lower by the same $\beta\log Z$. Every *difference* of rewards is there, and differences are all that a comparison depends on (notebook 1).

# %% [markdown]
# ## What people choose, from a policy alone
#
# Bradley–Terry asks for a difference of two rewards of one prompt. In it $\beta\log Z(x)$ cancels (Eq. 6, [D4.2]):
#
# $$p(y_1\succ y_2)=\sigma\Big(\beta\log\frac{\pi(y_1)}{\pi_{\rm ref}(y_1)}-\beta\log\frac{\pi(y_2)}{\pi_{\rm ref}(y_2)}\Big).$$
#
# Put it into the log-likelihood of what people chose, and you have the DPO loss (Eq. 7, [D4.3]): for a pair with chosen $y_w$ and rejected $y_l$
#
# $$\ell_{\rm DPO}=-\log\sigma(u),\qquad u=\beta\log\frac{\pi_\theta(y_w)}{\pi_{\rm ref}(y_w)}-\beta\log\frac{\pi_\theta(y_l)}{\pi_{\rm ref}(y_l)}.$$
#
# Here $\pi_\theta$ is the policy that is being trained, and $u$ is the *margin*: by how much the policy's implicit reward puts the chosen completion above the rejected one.

# %% [markdown]
# ### Exercise 3.1: the loss
#
# *10 minutes · central.* Log-probabilities of $B$ pairs come in as four tensors of shape $(B,)$. Return the $B$ losses; whoever calls it takes the mean.


# %% tags=["exercise"]
def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """(B,) log-probabilities -> (B,) losses, in nats (Eq. 7)."""
    ### BEGIN SOLUTION
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return -F.logsigmoid(margin)
    ### END SOLUTION


# %% tags=["check"]
check("3.1", dpo_loss)

# %% [markdown] tags=["answer"]
# `F.logsigmoid` and not `torch.sigmoid(...).log()`: at a margin of −800 the second is log 0.

# %% [markdown]
# ### Exercise 3.2: the preferences that a policy implies
#
# *5 minutes.* Return the matrix whose entry $[i,j]$ is the probability that $y_i$ is preferred to $y_j$, by Eq. 6.


# %% tags=["exercise"]
def implied_preferences(logps, ref_logps, beta):
    """(Y,) log-probabilities of one prompt -> (Y, Y) probabilities (Eq. 6)."""
    ### BEGIN SOLUTION
    reward = beta * (logps - ref_logps)
    return torch.sigmoid(reward[:, None] - reward[None, :])
    ### END SOLUTION


# %% tags=["check"]
check("3.2", implied_preferences)

# %% [markdown]
# ## Training finds π\*
#
# Now forget the rewards. All that is left of them are people's choices: here all pairs with their exact probabilities, so that no luck of sampling blurs the picture. We minimise the DPO loss of a table of logits by gradient descent, starting at the reference.
#
# **Predict before you run.** Where does the loss start, whatever β and the rewards are? Does it go to zero?

# %%
shown = dpo.all_sets(torch.ones(1, 3, dtype=torch.bool))
pairs = dpo.expected_pairs(rewards[None], shown)  # every outcome, with its probability
theta, (chosen, rejected) = ref_logps.clone().requires_grad_(), pairs.order.T
losses, path = [], []
for _ in range(120):
    logps = theta.log_softmax(-1)
    four = logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected]
    loss = pairs.weight @ dpo.dpo_loss(*four, beta=beta).losses
    (gradient,) = torch.autograd.grad(loss, theta)
    losses.append(loss.item())
    path.append(logps.detach().exp())
    theta.data -= 2 / beta**2 * gradient  # a step that never raises the loss

# %%
floor = pairs.weight @ dpo.bradley_terry_loss(rewards[chosen], rewards[rejected])
print(f"last loss {losses[-1]:.6f}, entropy of the choices {floor:.6f}")
print(f"largest error of a log-probability: {(path[-1].log() - optimal).abs().max():.0e}")

# %%
figure, (left, right) = plt.subplots(1, 2)
left.plot(losses, color=figures.BLUE)
for level, name in ((torch.tensor(2.0).log(), "log 2"), (floor, "entropy of the choices")):
    left.axhline(level, color=figures.BLACK, linestyle=":")
    left.text(120, level - 0.004, name, va="top", ha="right")
left.set(xlabel="gradient step", ylabel="loss (nats)", ylim=(0.49, 0.71))
for y, colour in enumerate([figures.BLUE, figures.ORANGE, figures.GREEN]):
    right.plot([p[y] for p in path], color=colour)
    right.axhline(optimal[y].exp(), color=colour, linestyle=":")
    right.text(122, path[-1][y], f"y{'₁₂₃'[y]}", color=colour, va="center")
right.set(xlabel="gradient step", ylabel="π(y), dotted: π*", ylim=(0, 1))
figures.show(figure, "3.b")

# %% [markdown] tags=["outcome"]
# **What happened.** The margin is zero at the reference, so the loss starts at $-\log\sigma(0)=\log2$. It ends at the *entropy* of people's choices: they contradict themselves, and no policy can predict better than the coin they toss ([D4.4]). Only labels without noise would let it go to zero, and then no finite policy is best.

# %% [markdown]
# ### Exercise 3.3: one step
#
# *10 minutes.* Write one step of gradient descent on the loss of a single pair, for a table: $\pi=\mathrm{softmax}(\theta)$. You may differentiate by hand (notebook 4 does) or let autograd do it. Return the new $\theta$; leave the old one as it was.


# %% tags=["exercise"]
def dpo_step(theta, ref_logps, chosen, rejected, beta, learning_rate):
    """(Y,) logits, two completion numbers -> (Y,) logits after one step."""
    ### BEGIN SOLUTION
    theta = theta.clone().requires_grad_()
    logratios = theta.log_softmax(-1) - ref_logps
    loss = -F.logsigmoid(beta * (logratios[chosen] - logratios[rejected]))
    (gradient,) = torch.autograd.grad(loss, theta)
    return (theta - learning_rate * gradient).detach()
    ### END SOLUTION


# %% tags=["check"]
check("3.3", dpo_step)

# %% [markdown]
# ## It does not matter which pairs you show
#
# The closed form does not know which pairs people were asked about, so neither may the answer: as long as the pairs connect all completions, people choose by Bradley–Terry, their probabilities are exact, and the policy may be any table ([D4.4]). Below only neighbours on a ring are compared, and some of them ten times as often as others.
#
# **Predict before you run.** Which of these changes: the path of training, its speed, its end?


# %%
def distances(slate, world, steps=900):
    """KL(π || π*) along the path of training on the pairs of a slate."""
    policy, pairs = dpo.TabularPolicy(world.ref_logps), dpo.expected_pairs(world.rewards, slate)
    optimizer = torch.optim.SGD(policy.parameters(), lr=safe_learning_rate(pairs, beta=beta))
    target = dpo.optimal_logps(world.ref_logps, world.rewards, beta=beta)

    def objective(pairs):
        logps = policy()
        loss, _ = dpo_objective(logps, world.ref_logps, pairs, beta=beta)
        return loss, {"kl": dpo.kl_divergence(logps, target).mean()}

    return [record["kl"] for record in dpo.train(objective, optimizer, [pairs] * steps)]


# %%
generator = torch.Generator().manual_seed(0)
world = dpo.random_bandit(1, 6, generator=generator)
ring = dpo.random_cycles(world.exists, cycles=1, generator=generator)
uneven = ring._replace(weight=ring.weight * torch.tensor([1, 10, 1, 10, 1, 10.0]))
slates = {"all pairs": dpo.all_sets(world.exists), "a ring": ring, "a ring, unevenly": uneven}
figure, axes = plt.subplots()
for name, slate in slates.items():
    axes.semilogy(distances(slate, world), label=name)
axes.set(xlabel="gradient step", ylabel="KL(π‖π*) (nats)", ylim=(1e-12, 10))
axes.legend()
figures.show(figure, "3.c")

# %% [markdown] tags=["outcome"]
# **What happened.** The path and the speed change, the end does not: whatever pairs connect all completions determine all differences of rewards, and so the policy. Uneven pairs only take longer.

# %% [markdown]
# ## One reward of each kind
#
# Rewards that differ by a constant for each prompt make the same preferences (Lemma 1 of the paper, [D6.2]) and have the same optimal policy (Lemma 2, [D6.3]). So no amount of data tells them apart, and we may take whichever we like. The implicit reward takes one for us: of all $r+c$ it is the one with $Z=1$ (Eq. 8 and 9, [D6.4]):
#
# $$f(r)=r-\beta\log Z,\qquad\sum_y\pi_{\rm ref}(y|x)\,e^{f(r)(x,y)/\beta}=1.$$
#
# That sum is no condition on the policy. It says that $\pi_{\rm ref}\,e^{f(r)/\beta}$ is a policy already, with nothing left to normalise. So every reward has an equivalent one of the form $\beta\log\frac{\pi}{\pi_{\rm ref}}$, if the reference gives every completion some probability (Theorem 1, [D6.5]): writing rewards that way loses nothing.
#
# **Predict before you run.** Below are three equivalent rewards. Where does $f$ send each of them?

# %%
kinds = {"r": rewards, "r + 1": rewards + 1, "r - 3": rewards - 3}
figure, axes = plt.subplots()
for (name, kind), style in zip(kinds.items(), ["o-", "s--", "^:"]):
    projected = dpo.canonical_reward(kind, ref_logps, beta=beta)
    axes.plot(kind, style, color=figures.BLACK)
    axes.text(2.06, kind[2], name, va="center")
    axes.plot(projected, style, color=figures.BLUE)
    print(f"f({name})".ljust(9), projected.round(decimals=4).tolist())
axes.text(2.06, projected[2], "f of each", color=figures.BLUE, va="center")
axes.set(xticks=range(3), xticklabels=["y₁", "y₂", "y₃"], xlabel="completion", ylabel="reward (nats)")
figures.show(figure, "3.d")

# %% [markdown] tags=["outcome"]
# **What happened.** All to the same place: adding $c$ to the reward adds $c$ to $\beta\log Z$, and the two cancel.

# %% [markdown]
# ### Exercise 3.4: the reward with Z = 1
#
# *5 minutes.* Return $f(r)$ for each of $X$ prompts, by Eq. 8. What is projected comes first: mind the order of the arguments.


# %% tags=["exercise"]
def canonical_reward(rewards, ref_logps, beta):
    """(X, Y) rewards, (X, Y) log-probabilities of the reference -> (X, Y) rewards with Z = 1 (Eq. 8)."""
    ### BEGIN SOLUTION
    log_Z = (ref_logps + rewards / beta).logsumexp(-1, keepdim=True)
    return rewards - beta * log_Z
    ### END SOLUTION


# %% tags=["check"]
check("3.4", canonical_reward)

# %% [markdown]
# ## An open question
#
# Everything here held for a table, which can be any policy at all. A GPT-2 of a few million weights can't. Its loss still has a minimum; is it the policy closest to π\*? In what sense of "close", and does it still not matter which pairs are shown? ([D13.3] has the beginning of an answer.)
