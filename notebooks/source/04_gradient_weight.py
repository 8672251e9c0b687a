# %% [markdown]
# # 4 · The gradient weight
#
# **Before this:** notebook 3, or what it shows: the DPO loss −log σ(u) of the margin u, β times the chosen completion's log-ratio minus the rejected one's ·
# **Read:** 20 minutes · **Solve:** 40 minutes · **Difficulty:** ●●○ · **Derivations:** [D5.1], [D5.3], [D5.4], [D12.7], [D14.5]
#
# **The claim.** Training follows the gradient, so the gradient *is* what DPO does. Each pair pulls its chosen completion up and its rejected one down, and one number says how hard: the *gradient weight*. It is large where the policy orders the pair wrongly and fades where it is right and sure. Because it fades, training comes to rest.

# %% tags=["setup"]

import torch
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.bandit import loss_on_table, safe_learning_rate

figures.use_style()

# %% [markdown]
# ## One pair, one step
#
# The prompt is "Why is the sky blue?", and there are three completions:
#
# - $y_1$: "Nobody knows."
# - $y_2$: "It reflects the sea."
# - $y_3$: "Air scatters blue light more than red."
#
# The policy is a table of logits, $\pi=\mathrm{softmax}(\theta)$. The data are one pair: somebody preferred $y_3$ to $y_2$. We start at the reference and take a single step of gradient descent on the DPO loss.
#
# **Predict before you run.** Which of the three logits move? Which of the three log-probabilities?

# %%
answers = ["Nobody knows.", "It reflects\nthe sea.", "Air scatters\nblue light."]
ref_logps = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
beta, step_size, chosen, rejected = 0.5, 4.0, [2], [1]  # numbered from 0
theta = ref_logps.clone().requires_grad_()
logps = theta.log_softmax(-1)
four = logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected]
out = dpo.dpo_loss(*four, beta=beta)
(gradient,) = torch.autograd.grad(out.losses, theta)
print("gradient of the loss", gradient)
print("gradient weight     ", out.gradient_weights)

# %%
moved = theta.detach() - step_size * gradient
changes = {"logit": moved - theta.detach(), "log-probability": moved.log_softmax(-1) - ref_logps}
figure, axes = plt.subplots()
figures.bars_side_by_side(axes, answers, changes, [figures.BLACK, figures.BLUE], fmt="%+.2f")
axes.set(xlabel="completion: no pair, rejected, chosen", ylabel="change in one step (nats)", ylim=(-1.6, 1.6))
figures.show(figure, "4.a")

# %% [markdown] tags=["outcome"]
# **What happened.** The chosen logit went up and the rejected one down *by the same amount*: the gradient weight times the length of the step. No other logit moved. The log-probabilities moved as the logits did, less one number for all three: the change of the softmax's normaliser, in logarithms. So even $y_1$, which is in no pair, lost a little.

# %% [markdown]
# ## The gradient, by hand
#
# Differentiate $-\log\sigma(u)$ with respect to whatever parameters $\theta$ the policy has, by the chain rule (Eq. 21 and 22, [D5.1]):
#
# $$\nabla_\theta\,\ell_{\rm DPO}=-\frac{\sigma'(u)}{\sigma(u)}\nabla_\theta u,\qquad u=\beta\log\frac{\pi_\theta(y_w)}{\pi_{\rm ref}(y_w)}-\beta\log\frac{\pi_\theta(y_l)}{\pi_{\rm ref}(y_l)}.$$
#
# Two facts finish it. The slope of σ is $\sigma'(u)=\sigma(u)\,\sigma(-u)$. And the reference does not depend on $\theta$, so it drops out of $\nabla_\theta u$, though it stays inside σ. Put both in, and what is left has the form
#
# $$\nabla_\theta\,\ell_{\rm DPO}=-\,\text{weight}\cdot\big(\nabla_\theta\log\pi_\theta(y_w)-\nabla_\theta\log\pi_\theta(y_l)\big).$$

# %% [markdown]
# ### Exercise 4.1: the weight
#
# *8 minutes · central.* Take the last step, and return the weight of each of $B$ pairs. When a DPO run behaves oddly, it is a good number to look at first.


# %% tags=["exercise"]
def gradient_weights(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """(B,) log-probabilities -> (B,) gradient weights, between 0 and beta (Sec. 4, Eq. 21)."""
    ### BEGIN SOLUTION
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return beta * torch.sigmoid(-margin)
    ### END SOLUTION


# %% tags=["check"]
check("4.1", gradient_weights)

# %% [markdown]
# So this is the gradient of the paper's Section 4:
#
# $$\nabla_\theta\,\ell_{\rm DPO}=-\underbrace{\beta\,\sigma(-u)}_{\rm weight}\ \Big(\underbrace{\nabla_\theta\log\pi_\theta(y_w)}_{\rm up}-\underbrace{\nabla_\theta\log\pi_\theta(y_l)}_{\rm down}\Big).$$
#
# If you follow along in print: in the paper's Appendix A.4 the two completions have changed places in $u$. Such slips happen to everyone; Eq. 7, Section 4 and the code in Appendix B all have the chosen one first, as here ([D14.5]).

# %% [markdown]
# ## A table of logits
#
# For a table, $\log\pi(y)=\theta_y-\log\sum_{y'}e^{\theta_{y'}}$. Hence $\nabla_\theta\log\pi(y)=e_y-\pi$, where $e_y$ is one at $y$ and zero elsewhere. In the difference $\pi$ cancels ([D5.1]):
#
# $$\nabla_\theta\,\ell_{\rm DPO}=-\beta\,\sigma(-u)\,(e_w-e_l).$$
#
# That is the figure above. The gradient of a mean over many pairs is the mean of such vectors. (The softmax's normaliser cancels inside the margin, too.)

# %% [markdown]
# ### Exercise 4.2: the gradient of many pairs
#
# *8 minutes.* One prompt, $Y$ completions, $B$ pairs. `chosen` and `rejected` hold completion numbers, and the same completion may be in several pairs. Return the gradient of the mean loss in the logits, without autograd.


# %% tags=["exercise"]
def tabular_gradient(theta, ref_logps, chosen, rejected, beta):
    """(Y,) logits, (B,) completion numbers -> (Y,) gradient of the mean loss (Eq. 21)."""
    ### BEGIN SOLUTION
    logratios = theta - ref_logps  # the normaliser of the softmax cancels in every margin
    pulls = beta * torch.sigmoid(-beta * (logratios[chosen] - logratios[rejected])) / len(chosen)
    return torch.zeros_like(theta).index_add(0, chosen, -pulls).index_add(0, rejected, pulls)
    ### END SOLUTION


# %% tags=["check"]
check("4.2", tabular_gradient)

# %% [markdown] tags=["answer"]
# `gradient[chosen] -= pulls` would not do: where a completion number stands twice in `chosen`, only one of the two writes survives. `index_add` adds them all.

# %% [markdown]
# ## Reading the weight
#
# For a given β the weight depends on the margin alone ([D5.4]).
#
# **Predict before you run.** Where is it $\beta/2$? Which pairs are above that? How far can it rise, how far fall?

# %%
margins = torch.linspace(-8, 8, 161, dtype=torch.float64)
nothing = torch.zeros_like(margins)
out = dpo.dpo_loss(margins / beta, nothing, nothing, nothing, beta=beta)
figure, axes = plt.subplots()
axes.axvspan(-8, 0, color=figures.ORANGE, alpha=0.15)
axes.plot(margins, out.gradient_weights / beta, color=figures.BLUE)
axes.plot(0, 0.5, "o", color=figures.BLACK)
axes.text(0.3, 0.52, "the reference: β/2")
axes.text(-7.7, 0.1, "wrong order")
axes.set(xlabel="margin u (nats)", ylabel="gradient weight ÷ β", xlim=(-8, 8))
figures.show(figure, "4.b")

# %% [markdown] tags=["outcome"]
# **What happened.** At the reference every margin is zero and every weight is $\beta/2$. A pair is above $\beta/2$ exactly if the implicit rewards put it in the wrong order. A pair that is badly wrong pulls with nearly $\beta$ and no more; one that is right and sure pulls with nearly nothing. So $\sigma(-u)>0$ does not mean "wrong": σ is always positive. The sign to watch is that of $\sigma(-u)-\frac12$.

# %% [markdown]
# ## What β does to the weight
#
# Fix how far the policy has moved on a pair, that is its difference of log-ratios $h=\log\frac{\pi(y_w)}{\pi_{\rm ref}(y_w)}-\log\frac{\pi(y_l)}{\pi_{\rm ref}(y_l)}$, and turn β up. The weight is $\beta\,\sigma(-\beta h)$: β makes it larger in front and, if $h>0$, smaller inside σ.
#
# **Predict before you run.** Which wins, for a pair in the wrong order ($h<0$), at the reference ($h=0$), in the right order ($h>0$)?

# %%
betas = torch.linspace(0.01, 4, 4000, dtype=torch.float64)
figure, axes = plt.subplots()
for h, style, label in [(-1, "-", 1.3), (0, "--", 2.15), (0.4, "-", 4), (0.7, "--", 4), (1.4, ":", 4)]:
    weights = betas * torch.sigmoid(-betas * h)
    axes.plot(betas, weights, style)
    axes.text(label + 0.05, weights[betas <= label][-1], f"h = {h}", va="center" if h > 0 else "top")
    if h > 0:
        top = weights.argmax()
        axes.plot(betas[top], weights[top], "o", color=figures.BLACK)
        print(f"h = {h}: largest at β = {betas[top]:.3f}, where the margin βh is {betas[top] * h:.3f}")
axes.set(xlabel="β", ylabel="gradient weight", xlim=(0, 4.6), ylim=(-0.06, 1.2))
figures.show(figure, "4.c")

# %% [markdown] tags=["outcome"]
# **What happened.** At first the factor in front always wins. Pairs in the wrong order, and those at the reference, pull harder with every increase of β. Pairs in the right order do so only up to a peak (black dots), and the peak always lies at the same margin.

# %% [markdown]
# ### Exercise 4.3: the slope of the weight in β
#
# *8 minutes.* How fast does the weight grow with β, if the policy stays where it is? Return the derivative of $\beta\,\sigma(-\beta h)$ in β for each of $B$ pairs.


# %% tags=["exercise"]
def weight_slope_in_beta(h, beta):
    """(B,) differences of log-ratios -> (B,) derivatives of the weights in beta."""
    ### BEGIN SOLUTION
    margin = beta * h
    return torch.sigmoid(-margin) * (1 - margin * torch.sigmoid(margin))
    ### END SOLUTION


# %% tags=["check"]
check("4.3", weight_slope_in_beta)

# %% [markdown]
# The sign of that slope depends on the margin $t=\beta h$ alone: it is positive exactly while $t\,\sigma(t)<1$ ([D5.3]). Does your derivative say so? The cell below finds the margin where it ends; compare the dots.

# %%
low, high = 1.0, 2.0
for _ in range(60):  # halve the interval, and keep the half with the root
    middle = (low + high) / 2
    grows = middle * torch.sigmoid(torch.tensor(middle, dtype=torch.float64)) < 1
    low, high = (middle, high) if grows else (low, middle)
print(f"the weight grows with β while the margin is below {low:.9f}")

# %% [markdown]
# ## Weights while training
#
# Now a whole run: eight completions, four hundred pairs that were drawn at random and labelled by Bradley–Terry, gradient descent from the reference. We record the weight of every pair at every step.
#
# Four names of the library: a *slate* is the list of the sets that people may be asked about, and `all_sets` makes the one with every pair. `sample_pairs` draws the answers; equal ones are kept once, with their number as `weight`. `normalised()` divides these by their sum, so that the loss is a mean. `loss_on_table` computes a loss on every pair of a table at once.
#
# **Predict before you run.** All weights begin at $\beta/2$. Do they all go to zero?

# %%
generator = torch.Generator().manual_seed(0)
world = dpo.random_bandit(1, 8, reward_scale=2.5, generator=generator)
data = dpo.sample_pairs(world.rewards, 400, slate=dpo.all_sets(world.exists), generator=generator)
theta = world.ref_logps.clone().requires_grad_()
rate = 0.2 * safe_learning_rate(data.normalised(), beta=beta)
history = []
for _ in range(2000):
    out = loss_on_table(dpo.dpo_loss, theta.log_softmax(-1), world.ref_logps, data, beta=beta)
    (gradient,) = torch.autograd.grad(data.normalised().weight @ out.losses, theta)
    history.append(out.gradient_weights)
    theta.data -= rate * gradient
weights = torch.stack(history).repeat_interleave(data.weight.long(), -1)  # equal pairs were merged

# %%
figure, (left, right) = plt.subplots(1, 2)
steps = torch.arange(1, len(weights) + 1)
for share, style, x, y in [(0.95, "--", 200, 0.73), (0.5, "-", 25, 0.3), (0.1, ":", 1.6, 0.18)]:
    left.semilogx(steps, weights.quantile(share, -1) / beta, style, color=figures.BLUE)
    left.text(x, y, f"{share:.0%}")
wrong, silent = (weights > beta / 2).double(), (weights < beta / 20).double()
right.semilogx(steps[1:], wrong.mean(-1)[1:], color=figures.ORANGE, label="wrong order: above β/2")
right.semilogx(steps, silent.mean(-1), "--", color=figures.GREEN, label="nearly silent: below β/20")
left.set(xlabel="gradient step", ylabel="quantiles of weight ÷ β", ylim=(-0.03, 1))
right.set(xlabel="gradient step", ylabel="share of the pairs", ylim=(-0.03, 1))
right.legend(loc="upper left")
figures.show(figure, "4.d")

# %% [markdown] tags=["outcome"]
# **What happened.** The weights fan out. More and more pairs fall nearly silent: they are *saturated*, and training has little more to learn from them. But a share stays in the wrong order to the end. These are the labels that contradict what all the data together say. People contradict themselves, so no policy can obey every label.

# %% [markdown]
# **Predict before you run.** The weights do not vanish, yet training has come to rest. How can that be?

# %%
sums = torch.zeros(2, 8, dtype=torch.float64)  # up and down, of each completion
for side in (0, 1):
    sums[side].index_add_(0, data.order[:, side], history[-1] * data.weight)
print(f"mean weight ÷ β: {weights[-1].mean() / beta:.3f}")
print(f"largest difference of two bars: {(sums[0] - sums[1]).abs().max():.1e}")
figure, axes = plt.subplots()
pulls = {"up, where chosen": sums[0], "down, where rejected": sums[1]}
figures.bars_side_by_side(axes, range(8), pulls, [figures.BLACK, figures.ORANGE])
axes.set(xlabel="completion, numbered from 0", ylabel="sum of the weights of its pairs", ylim=(0, 7))
figures.show(figure, "4.e")

# %% [markdown] tags=["outcome"]
# **What happened.** Taken over all pairs, every completion is pulled up as hard as it is pulled down. A few pairs in the wrong order, with large weights, balance many in the right order with small ones. The gradient is zero, the weights are not.

# %% [markdown]
# ### Exercise 4.4: change the data
#
# *10 minutes.* An experiment of your own. There are two completions only. In `wins` answers the first was chosen over the second, in `losses` answers the second over the first; both are at least 1. Train to the end, with a loop or on paper, and return the mean gradient weight of all these pairs there. (The check allows an error of 0.001.)
#
# **Predict before you run.** With 9 wins and 1 loss, is the mean weight that is left nearest to $0$, to $0.1\beta$, to $0.2\beta$ or to $0.5\beta$? Can more training make it smaller? And what does it tell about the people?


# %% tags=["exercise"]
def weight_left(wins, losses, beta):
    """Two counts -> the mean gradient weight of all wins + losses pairs at the minimum of the loss."""
    ### BEGIN SOLUTION
    share = wins / (wins + losses)  # at rest σ(u) is the share of the wins
    return beta * (share * (1 - share) + (1 - share) * share)
    ### END SOLUTION


# %% tags=["check"]
check("4.4", weight_left)

# %% [markdown] tags=["answer"]
# At rest the `wins` pairs pull with $\beta\,\sigma(-u)$ each, the `losses` pairs with $\beta\,\sigma(u)$, and both sides equally hard together. So $\sigma(u)$ is the share $p$ of the wins, and the mean weight is $2\beta\,p(1-p)$.

# %% [markdown] tags=["outcome"]
# **What happened.** With 9 wins and 1 loss, $0.18\beta$ is left: the one contradiction pulls as hard as the nine others together, so it counts as much as they do. More training does not change it. The weight that is left measures how much people contradict each other: it is zero if they never do, and $\beta/2$, as at the start, if they toss coins. (On real data most pairs are different from each other. A mean weight that falls on and on there is a sign that single labels are being memorised.)

# %% [markdown]
# ### Exercise 4.5: the weight from the loss
#
# *5 minutes.* A log file holds the losses of single pairs, but neither margins nor weights. Recover the weights. (What is $e^{-\ell}$, if $\ell=-\log\sigma(u)$?)


# %% tags=["exercise"]
def loss_to_weight(losses, beta):
    """(B,) DPO losses, in nats -> (B,) gradient weights (Eq. 7 and 21)."""
    ### BEGIN SOLUTION
    return -beta * torch.expm1(-losses)  # σ(-u) = 1 - σ(u) = 1 - e^-loss
    ### END SOLUTION


# %% tags=["check"]
check("4.5", loss_to_weight)

# %% [markdown]
# ## Without the weight
#
# What if every pair pulled with the same strength β? The paper warns of it in Section 4, and shows in its Table 3 what a model trained that way writes. The gradient $-\beta\,(\nabla\log\pi(y_w)-\nabla\log\pi(y_l))$ belongs to the loss $-u$, which up to a constant is β times *unlikelihood*, $-\log\pi(y_w)+\log\pi(y_l)$ ([D12.7]).
#
# Below, both losses are trained on the three answers about the sky, whose rewards are 0, 1 and 2. Instead of a sample we take all pairs with their exact probabilities (`expected_pairs`), as if infinitely many people had been asked. We draw the implicit rewards, shifted to mean zero.
#
# **Predict before you run.** Both start with the same direction. Where does each end?

# %%
rewards = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
pairs = dpo.expected_pairs(rewards, dpo.all_sets(torch.ones(1, 3, dtype=torch.bool)))


def implicit_rewards_while_training(loss, steps=50):
    """(steps, 3) implicit rewards of mean zero, at each step of gradient descent on a table."""
    theta, rows = ref_logps[None].clone().requires_grad_(), []
    for _ in range(steps):
        logps = theta.log_softmax(-1)
        out = loss_on_table(loss, logps, ref_logps[None], pairs, beta=beta)
        (gradient,) = torch.autograd.grad(pairs.weight @ out.losses, theta)
        rows.append(dpo.implicit_reward(logps.detach(), ref_logps[None], beta=beta)[0])
        theta.data -= 0.2 * safe_learning_rate(pairs, beta=beta) * gradient
    return torch.stack(rows) - torch.stack(rows).mean(-1, keepdim=True)


# %%
losses = {"with the weight": dpo.dpo_loss, "without": dpo.unweighted_dpo_loss}
figure, both = plt.subplots(1, 2, sharey=True)
for axes, (name, loss) in zip(both, losses.items()):
    rows = implicit_rewards_while_training(loss)
    for y, colour in enumerate([figures.BLUE, figures.ORANGE, figures.GREEN]):
        axes.plot(rows[:, y], color=colour)
        axes.axhline(rewards[0, y] - 1, color=colour, linestyle=":")
        end = (rows[:, y].abs() < 2.7).nonzero().max()  # where the line leaves the picture
        axes.text(end + 1, rows[end, y], f"y{'₁₂₃'[y]}", color=colour, va="bottom")
    axes.set(title=name, xlabel="gradient step", ylabel="implicit reward (nats)", xlim=(0, 55), ylim=(-3, 3))
    print(f"{name}: after {len(rows)} steps π = {(ref_logps + rows[-1] / beta).softmax(-1)}")
figures.show(figure, "4.f")

# %% [markdown] tags=["outcome"]
# **What happened.** With the weight, training stops where the implicit rewards are the true ones. Without it neither the direction nor the speed ever changes: the pull on each completion is how often it wins minus how often it loses, whatever the policy already does. The logits grow in straight lines without end, and almost all probability goes to one completion. The weight alone makes the difference.

# %% [markdown]
# ## An open question
#
# A pair that the policy has not learned yet and a pair whose label is wrong look alike: both are in the wrong order, and both get the largest weights. Can the two be told apart while training, say by how their weights move, and should the second kind be pulled less? Notebook 7 has losses that try; none of them is always the best.
