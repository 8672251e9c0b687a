# %% [markdown]
# # 3 · Direct Preference Optimization
#
# **Before this:** notebooks 1 and 2, or what they show: Bradley–Terry, and π\* = π_ref exp(r/β) / Z ·
# **Read:** 25 minutes · **Solve:** 35 minutes · **Difficulty:** ●●○ · **Derivations:** [D3.5], [D4.1], [D4.2], [D4.3], [D4.4], [D5.1], [D6.2], [D6.3], [D6.4], [D6.5]
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
# **Predict before you run.** Below are three completions of *Why is the sky blue?* Each has a true reward (black), and from the optimal policy we print only $\beta\log\frac{\pi}{\pi_{\rm ref}}$ (blue). How do the two sets of bars differ?

# %%
answers = {  # a short name for the figures: the completion, its probability under π_ref, its reward
    "sea": ("It reflects the sea.", 0.5, 1.0),
    "air": ("The air scatters light.", 0.3, 2.0),
    "blue light": ("The air scatters blue light more than red.", 0.2, 3.0),
}
names, (_, chances, rewards) = list(answers), zip(*answers.values())
ref_logps, rewards = torch.tensor(chances).double().log(), torch.tensor(rewards).double()
beta = 0.5
optimal = dpo.optimal_logps(ref_logps, rewards, beta=beta)
implicit = beta * (optimal - ref_logps)
for name, reward, value in zip(names, rewards, implicit):
    print(f"{name:10} reward {reward:.0f}   β log(π*/π_ref) {value:7.4f}   difference {reward - value:.4f}")

# %%
print(f"β log Z = {dpo.soft_value(ref_logps, rewards, beta=beta):.4f}")
figure, axes = plt.subplots()
pair = {"true reward r": rewards, "β log(π*/π_ref)": implicit}
figures.bars_side_by_side(axes, names, pair, (figures.REFERENCE, figures.OPTIMUM))
axes.set(xlabel="completion", ylabel="reward (nats of log-odds)")
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
# *8 minutes · central.* Log-probabilities of $B$ pairs come in as four tensors of shape $(B,)$. Return the $B$ losses; whoever calls it takes the mean.


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
# Now forget the rewards. All that is left of them are people's choices: here all pairs with their exact probabilities, so that nothing depends on what was sampled. We minimise the DPO loss of a table of logits by gradient descent, starting at the reference.
#
# **Predict before you run.** Where does the loss start, whatever β and the rewards are? Does it go to zero?

# %%
slate = dpo.all_sets(torch.ones(1, 3, dtype=torch.bool))  # all pairs of the three are shown, alike
pairs = dpo.expected_pairs(rewards[None], slate)  # every outcome, with its probability
theta, (chosen, rejected) = ref_logps.clone().requires_grad_(), pairs.order.T
losses, path = [], []
for _ in range(400):
    logps = theta.log_softmax(-1)
    four = logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected]
    loss = pairs.weight @ dpo.dpo_loss(*four, beta=beta).losses
    (gradient,) = torch.autograd.grad(loss, theta)
    losses.append(loss.item())
    path.append(logps.detach().exp())
    theta.data -= 0.3 / beta**2 * gradient  # up to 2 / β² a step never raises the loss

# %%
floor = pairs.weight @ dpo.bradley_terry_loss(rewards[chosen], rewards[rejected])
print(f"last loss {losses[-1]:.6f}, entropy of the choices {floor:.6f}")
print(f"largest error of a log-probability: {(path[-1].log() - optimal).abs().max():.0e}")

# %%
figure, (left, right) = plt.subplots(1, 2)  # the first 80 steps
left.plot(losses[:80], color=figures.BLUE)
for level, name in ((torch.tensor(2.0).log(), "log 2"), (floor, "entropy of the choices")):
    left.axhline(level, color=figures.BLACK, linestyle=":")
    left.text(80, level - 0.004, name, va="top", ha="right")
left.set(xlabel="gradient step", ylabel="loss (nats)", ylim=(0.49, 0.71))
for y, colour in enumerate([figures.BLUE, figures.ORANGE, figures.GREEN]):
    right.plot([p[y] for p in path[:80]], color=colour)
    right.axhline(optimal[y].exp(), color=colour, linestyle=":")
    right.text(50, optimal[y].exp() + 0.03, names[y], color=colour)
right.set(xlabel="gradient step", ylabel="π(y), dotted: π*", ylim=(0, 1))
figures.show(figure, "3.b")

# %% [markdown] tags=["outcome"]
# **What happened.** The margin is zero at the reference, so the loss starts at $-\log\sigma(0)=\log2$. It ends at the *entropy* of people's choices: they contradict themselves, and no policy can predict better than their own probabilities do ([D4.4]). Only labels without noise would let it go to zero, and then no finite policy is best.

# %% [markdown]
# ### Exercise 3.3: train
#
# *12 minutes.* Now train yourself, on real counts: `wins[i, j]` is how often $y_i$ was chosen over $y_j$. The policy is a table, $\pi=\mathrm{softmax}(\theta)$. Start at the reference, take `steps` steps of gradient descent on the mean loss of all choices, and return the policy's log-probabilities. Use autograd, or find the gradient by hand (notebook 4 does). Your own 3.1 may help. Predict first: if "sea" won 3 of 3 against "air", and nobody was asked about "blue light", what happens to the probability of "blue light"?


# %% tags=["exercise"]
def train_dpo(ref_logps, wins, beta, learning_rate, steps):
    """(Y,) log-probabilities, (Y, Y) counts -> (Y,) log-probabilities after training."""
    ### BEGIN SOLUTION
    theta = ref_logps.clone().requires_grad_()
    for _ in range(steps):
        rewards = beta * (theta.log_softmax(-1) - ref_logps)
        margins = rewards[:, None] - rewards[None, :]
        loss = -(wins * F.logsigmoid(margins)).sum() / wins.sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta.data -= learning_rate * gradient
    return theta.detach().log_softmax(-1)
    ### END SOLUTION


# %% tags=["check"]
check("3.3", train_dpo)

# %% [markdown]
# The same with the library, for the counts of the question.

# %%
pair = dpo.tally(torch.zeros(3, dtype=torch.long), torch.tensor([[0, 1]] * 3))  # sea over air, three times
policy = dpo.TabularPolicy(ref_logps[None])
optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
for _ in range(20):
    loss, _ = dpo_objective(policy(), ref_logps[None], pair, beta=beta)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("before", ref_logps.exp().round(decimals=3).tolist())
print("after ", policy().detach()[0].exp().round(decimals=3).tolist())

# %% [markdown] tags=["outcome"]
# **What happened.** Each choice pushes two logits, the winner's up and the loser's down by as much ([D5.1]). The logit of "blue light" does not move. Its probability changes all the same, because the three must sum to one: what nobody was asked about is decided by the normalisation, and not by people.

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
world = dpo.random_bandit(1, 6, generator=generator)  # six completions, reference and rewards at random
ring = dpo.random_cycles(world.exists, cycles=1, generator=generator)
uneven = ring._replace(weight=ring.weight * torch.tensor([1, 10, 1, 10, 1, 10.0]))
slates = {"all pairs": dpo.all_sets(world.exists), "a ring": ring, "a ring, unevenly": uneven}
curves = {name: distances(slate, world) for name, slate in slates.items()}
labels = {"xlabel": "gradient step", "ylabel": "KL(π‖π*) (nats)", "yscale": "log", "ylim": (1e-12, 10)}
figure, _ = figures.lines(range(900), curves, **labels)
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
axes.set(xticks=range(3), xticklabels=names, xlabel="completion", ylabel="reward (nats)")
figures.show(figure, "3.d")

# %% [markdown] tags=["outcome"]
# **What happened.** All to the same place: adding $c$ to the reward adds $c$ to $\beta\log Z$, and the two cancel.

# %% [markdown]
# ## A second round
#
# Training has found $\pi^\ast$. Why stop? Let $\pi^\ast$ write new pairs, ask the same people again, and train again, with the same $\beta$, and with $\pi^\ast$ as the new reference. This is often done; so-called iterative or online DPO trains in such rounds.
#
# **Predict before you run.** The people, their reward and $\beta$ have not changed. Does the second round change anything? If it does: where do many rounds lead?

# %% [markdown]
# ### Exercise 3.4: after many rounds
#
# *10 minutes.* Change the experiment. Return the log-probabilities of the policy after the given number of rounds. Each is trained to its end, on all pairs with exact probabilities, and the policy of each is the reference of the next. You may train, or find where training must end. Then say in a sentence: which *single* round would have led to the same policy?


# %% tags=["exercise"]
def after_rounds(ref_logps, rewards, beta, rounds):
    """(Y,) log-probabilities of the first reference, (Y,) rewards -> (Y,) after the last round."""
    ### BEGIN SOLUTION
    policy = ref_logps
    for _ in range(rounds):
        policy = (policy + rewards / beta).log_softmax(-1)  # this round's optimum (Eq. 4)
    return policy
    ### END SOLUTION


# %% tags=["check"]
check("3.4", after_rounds)

# %% [markdown]
# Below the rounds are trained, with 300 steps each.

# %%
reference = ref_logps
for number in range(1, 5):
    theta = reference.clone().requires_grad_()
    for _ in range(300):
        logps = theta.log_softmax(-1)
        four = logps[chosen], logps[rejected], reference[chosen], reference[rejected]
        (gradient,) = torch.autograd.grad(pairs.weight @ dpo.dpo_loss(*four, beta=beta).losses, theta)
        theta.data -= 2 / beta**2 * gradient
    reference = theta.detach().log_softmax(-1)
    moved = dpo.kl_divergence(reference, ref_logps)
    print(f"round {number}:", reference.exp().round(decimals=4).tolist(), f"KL(π‖π_ref) = {moved:.3f} nats")

# %% [markdown] tags=["outcome"]
# **What happened.** Every round multiplies by $e^{r/\beta}$ once more, so $n$ rounds at $\beta$ are one round at $\beta/n$ ([D3.5]). The penalty keeps a round close to *its* reference, and nothing keeps it close to the first. Many rounds lead to the best completion alone. So rounds are no way to find $\pi^\ast$ better: that takes the *first* reference in every round, and new pairs. Such pairs are useful where the reference hardly ever says what $\pi^\ast$ says ([D11.22]).

# %% [markdown]
# ## An open question
#
# Everything here held for a table, which can be any policy at all. A GPT-2 of a few million weights can't. Its loss still has a minimum; is it the policy closest to π\*? In what sense of "close", and does it still not matter which pairs are shown? ([D13.3] has the beginning of an answer.)
