# %% [markdown]
# # 10 · Your own loss
#
# **Before this:** notebook 7, or what it shows: DPO's loss is $-\log\sigma(u)$ of a margin $u$, β times the difference of a pair's log-ratios, and other losses end at other policies than π\* ·
# **Read:** 22 minutes · **Solve:** 38 minutes · **Difficulty:** ●●● · **Derivations:** [D2.3], [D4.4], [D5.1], [D11.1], [D11.11], [D11.12], [D12.1], [D13.4], [D13.6]
#
# **The claim.** A preference loss is invented in a line, and nearly any will train: the loss falls, the margins grow. Where it ends is decided before any training, by one equation about the loss itself. So a new loss can be examined in minutes, with a few questions that each have a number for an answer.

# %% tags=["setup"]

import torch
import torch.nn.functional as F
from dpo_course import figures
from dpo_course.checks import check
from dpo_course.exercises.your_own_loss import proper_loss
from matplotlib import pyplot as plt

import dpo_minimal as dpo

figures.use_style()

# %% [markdown]
# ## An invention
#
# In many data sets most pairs are easy: any policy soon orders them correctly. A detector of objects has the same trouble with background, and the *focal loss* (Lin et al., 2017) multiplies the loss of an example by a power of the probability that the model still gives to the wrong answer. The same idea for pairs, with the first power:
#
# $$\ell_{\rm focal}(u)=-\sigma(-u)\,\log\sigma(u).$$
#
# An easy pair, with a large margin $u$, has a small factor $\sigma(-u)$. A hard one keeps its loss. What trains is not the loss but its slope: call $w(u)=-\ell'(u)$ the *pull* of a loss at the margin $u$. For DPO it is $\sigma(-u)$.
#
# The next cell writes the loss as the library writes losses: four log-probabilities of $B$ pairs in, $B$ losses out.


# %%
def focal_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta
):
    """(B,) log-probabilities -> (B,) losses."""
    logratios = policy_chosen_logps - reference_chosen_logps
    margin = beta * (logratios - (policy_rejected_logps - reference_rejected_logps))
    return -torch.sigmoid(-margin) * F.logsigmoid(margin)


def dpo_losses(*four, beta):
    """The same of the library's DPO, for comparison."""
    return dpo.dpo_loss(*four, beta=beta).losses


def pulls_at(loss, margins):
    """(N,) margins -> (N,) losses and pulls; log-probabilities u, 0, 0, 0 and beta = 1 make the margin u."""
    u, zero = margins.clone().requires_grad_(), torch.zeros_like(margins)
    losses = loss(u, zero, zero, zero, beta=1.0)
    return losses.detach(), -torch.autograd.grad(losses.sum(), u)[0]


# %% [markdown]
# **Predict before you run.** The left picture has both losses, the right one both pulls. Which loss pulls harder at the reference, $u=0$? Which at $u=4$, and by how much? And on the far left?


# %%
u = torch.linspace(-5, 5, 201, dtype=torch.float64)
figure, (left, right) = plt.subplots(1, 2)
kinds = {"DPO": (dpo_losses, "-", figures.BLUE), "focal": (focal_loss, "--", figures.RED)}
for name, (loss, style, colour) in kinds.items():
    for axes, line in zip((left, right), pulls_at(loss, u)):
        axes.plot(u, line, style, color=colour, label=name)
left.set(xlabel="margin u (nats)", ylabel="loss (nats)")
right.set(xlabel="margin u (nats)", ylabel="pull w(u)")
right.legend(loc="upper right")
figures.show(figure, "10.a")

# %%
at = torch.tensor([-5.0, 0.0, 4.0], dtype=torch.float64)
for name, (loss, _, _) in kinds.items():
    print(f"{name:5} pulls at -5, 0 and 4:", *(f"{w:.4f}" for w in pulls_at(loss, at)[1]))

# %% [markdown] tags=["outcome"]
# **What happened.** It does what it was made for. On hard pairs the focal loss pulls as DPO does, and a little harder; at the reference it pulls a little less; and an easy pair at $u=4$ gets less than a twentieth of DPO's pull. Nothing in these pictures looks wrong. Is it?

# %% [markdown]
# ## Question 1: what does it say at the reference?
#
# Before training, policy and reference are the same, and every margin is zero. So a loss of margins has *one* value there, whatever the pair. This costs one line, and it finds a lost reference and a β that stands on one side only ([D13.6]). It does not find whatever treats policy and reference alike, such as averages where sums are meant.

# %%
generator = torch.Generator().manual_seed(0)
chosen, rejected = torch.randn(2, 4, generator=generator, dtype=torch.float64) - 9
forgetful = -F.logsigmoid(0.5 * (chosen - rejected))  # DPO's loss without a reference
print("focal:", *(f"{x:.4f}" for x in focal_loss(chosen, rejected, chosen, rejected, beta=0.5)))
print("without a reference:", *(f"{x:.4f}" for x in forgetful))
print(f"log 2 is {torch.tensor(2.0).log():.4f}, half of it {torch.tensor(2.0).log() / 2:.4f}")

# %% [markdown]
# The focal loss says $\frac12\log2$ for every pair, as its formula does. The other line differs from pair to pair.
#
# ## Question 2: whom does it pull, and how hard?
#
# A loss may contain the two log-probabilities other than by their difference. Then a pair has *two* pulls ([D5.1]): minus the slope in $\log\pi(y_w)$, which raises the chosen completion, and the slope in $\log\pi(y_l)$, which lowers the rejected one. For a loss of margins they are equal. In the next cell a second term is added to DPO's loss, to keep the chosen completion from falling (notebook 9): α times the average negative log-probability of the chosen completion, of $\vert y_w\vert$ tokens. The sum is known as RPO (Pang et al., 2024).
#
# $$\ell=-\log\sigma(u)-\frac\alpha{\vert y_w\vert}\log\pi_\theta(y_w).$$

# %%
four = [torch.tensor([-4.0], dtype=torch.float64, requires_grad=k < 2) for k in range(4)]
tokens, alpha = 8, 1.0
for name, loss in {"DPO": dpo_losses(*four, beta=0.5), "focal": focal_loss(*four, beta=0.5)}.items():
    up, down = torch.autograd.grad(loss, four[:2], retain_graph=True)
    print(f"{name:13} up {-up.item():.4f}, down {down.item():.4f}")
up, down = torch.autograd.grad(dpo_losses(*four, beta=0.5) - alpha / tokens * four[0], four[:2])
print(f"{'with a second':13} up {-up.item():.4f}, down {down.item():.4f}")

# %% [markdown]
# ### Exercise 10.1: both pulls
#
# *4 minutes.* Return the two pulls of this loss, for each of $B$ pairs, without autograd. The first is the coefficient of $-\nabla\log\pi(y_w)$ in its gradient, the second that of $+\nabla\log\pi(y_l)$.


# %% tags=["exercise"]
def both_pulls(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, beta, alpha):
    """(B,) log-probabilities, (B,) tokens of the chosen completions -> (chosen, rejected) pulls, (B,) each."""
    ### BEGIN SOLUTION
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    weight = beta * torch.sigmoid(-margin)
    return weight + alpha / chosen_lengths, weight
    ### END SOLUTION


# %% tags=["check"]
check("10.1", both_pulls)

# %% [markdown]
# Such a second term never rests: it pulls where the margin is right already. So it ends at a compromise, and in general not at π\*.
#
# ## Question 3: does a pair's loss depend on the other pairs?
#
# Some inventions subtract a *baseline*, computed from the batch. Here is one: only what a margin has above the mean of its batch counts.
#
# $$\ell_i=-\log\sigma(u_i-\bar u),\qquad\bar u=\frac1B\sum_ju_j.$$
#
# The test is to compute the loss of a pair twice, in two batches.

# %%
margins = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
for name, batch in {"the pair alone": margins[:1], "with two others": margins}.items():
    print(f"{name}: DPO {-F.logsigmoid(batch)[0]:.4f}, ", end="")
    print(f"with a baseline {-F.logsigmoid(batch - batch.mean())[0]:.4f}")

# %% [markdown]
# Then results change with the size of the batch, with how rows are shuffled, and with the number of processors. And there is worse. **Predict before you run** the check below: by how much does one step of training change the *mean* margin of the batch?
#
# ### Exercise 10.2: the pulls of a batch
#
# *4 minutes.* Return minus the slope of the *mean* loss of the batch, $\frac1B\sum_i\ell_i$, in each of the $B$ margins, without autograd.


# %% tags=["exercise"]
def batch_pulls(margins):
    """(B,) margins -> (B,) minus the slopes of the mean of -log sigma(margin - mean margin)."""
    ### BEGIN SOLUTION
    weights = torch.sigmoid(margins.mean() - margins)
    return (weights - weights.mean()) / len(margins)
    ### END SOLUTION


# %% tags=["check"]
check("10.2", batch_pulls)

# %% [markdown] tags=["outcome"]
# **What happened.** The pulls sum to zero: what a pair below the mean gains, others lose. Add one number to all margins and no loss changes. So such a loss cannot make all margins of a batch large, only equal. A baseline must be a constant for the gradient (`detach`), or come from somewhere else.

# %% [markdown]
# ## Question 4: where does it end?
#
# Now endless data: all pairs of four completions, each with the exact probability that people prefer one to the other. DPO ends at π\* ([D4.4]). We train a table with both losses.
#
# **Predict before you run.** The focal loss is DPO's with small factors on what is easy. Does it end at π\*? If not, is it further from the reference than π\*, or nearer to it?


# %%
def trained(loss, pairs, steps=1000, step_size=16.0):
    """The table (1, Y) where gradient descent from the reference ends."""
    theta = ref_logps.clone().requires_grad_()
    for _ in range(steps):
        columns = [*pairs.gather(theta.log_softmax(-1)).T, *pairs.gather(ref_logps).T]
        (slope,) = torch.autograd.grad(pairs.weight @ loss(*columns, beta=beta), theta)
        theta.data -= step_size * slope
    return theta.detach().log_softmax(-1)


ref_logps = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
rewards, beta = torch.tensor([[0.0, 1.0, 0.5, 2.0]], dtype=torch.float64), 0.5
pairs = dpo.expected_pairs(rewards, dpo.all_sets(rewards.isfinite()))
optimal = dpo.optimal_logps(ref_logps, rewards, beta=beta)

# %%
kinds = {"π_ref": ref_logps, "focal": trained(focal_loss, pairs), "DPO": trained(dpo_losses, pairs)}
kinds["π*"] = optimal
looks = zip([figures.BLACK, figures.RED, figures.SKY, figures.BLUE], ["", "/", ".", ""])
figure, axes = plt.subplots()
for place, ((name, logps), (colour, hatch)) in enumerate(zip(kinds.items(), looks)):
    places = torch.arange(4) + 0.2 * place - 0.3
    axes.bar(places, logps[0].exp(), 0.2, label=name, color=colour, hatch=hatch, edgecolor="white")
names = [f"reward {reward:g}" for reward in rewards[0].tolist()]
axes.set(xticks=range(4), xticklabels=names, xlabel="completion", ylabel="probability")
axes.legend(loc="upper left")
figures.show(figure, "10.b")

# %%
for name in ("focal", "DPO"):
    kl = dpo.kl_divergence(kinds[name], optimal).item()
    print(f"{name:5} gives the best completion {kinds[name][0, -1].exp():.4f}; KL to π* {kl:.4f}")
print(f"π*    gives it {optimal[0, -1].exp():.4f}")

# %% [markdown] tags=["outcome"]
# **What happened.** It ends at another policy, about half way to π\*: the best completion has 0.36 instead of 0.63, although the data were endless and the training was not cut short. No log of its training shows that: the loss has fallen to its minimum and the gradient is zero.

# %% [markdown]
# ### Why: the balance of a pair
#
# Two completions meet again and again, and a share $p$ of the labels says "the first". The mean loss of the margin $u$ is $p\,\ell(u)+(1-p)\,\ell(-u)$, and its slope is zero where the two labels pull equally hard:
#
# $$p\,w(u)=(1-p)\,w(-u).$$
#
# The margin should come to rest where it is right, at $u=\mathrm{logit}(p)$; then $\frac p{1-p}=e^u$. This must hold for every $p$, hence for every $u$. So a loss of margins ends at the margins of Bradley–Terry *if and only if*
#
# $$\frac{w(u)}{w(-u)}=e^{-u}\quad\text{for all }u.$$
#
# Such losses are called *proper*. The equation is about the loss alone: no data, no policy, no training.

# %% [markdown]
# ### Exercise 10.3: the probability for which a margin is right
#
# *4 minutes.* Turn the balance round. `pull` is $w(u)$ and `opposite_pull` is $w(-u)$, both positive. Return the $p$ at which a pair rests at this margin.


# %% tags=["exercise"]
def fitting_probability(pull, opposite_pull):
    """(N,) pulls at margins and at their negatives -> (N,) probabilities."""
    ### BEGIN SOLUTION
    return opposite_pull / (pull + opposite_pull)
    ### END SOLUTION


# %% tags=["check"]
check("10.3", fitting_probability)

# %% [markdown]
# Five losses: DPO, the focal loss, $e^{-u/2}$ (as in boosting), the hinge $\max(0,1-u)$, and IPO, which in units of DPO's margin is $(u-\frac12)^2$. For each the next figure draws that probability.
#
# **Predict before you run.** Which of them coincide with σ, and so end at the right margins?

# %%
losses_of = {
    "DPO": lambda u: -F.logsigmoid(u),
    "focal": lambda u: -torch.sigmoid(-u) * F.logsigmoid(u),
    "exp(-u/2)": lambda u: (-u / 2).exp(),
    "hinge": lambda u: (1 - u).clamp(min=0),
    "IPO": lambda u: (u - 0.5) ** 2,
}
colours = dict(zip(losses_of, [figures.BLUE, figures.RED, figures.GREEN, figures.ORANGE, figures.PURPLE]))
pull = {}
for name, loss in losses_of.items():
    margin = u.clone().requires_grad_()
    pull[name] = -torch.autograd.grad(loss(margin).sum(), margin)[0]

# %%
figure, axes = plt.subplots()
axes.plot(u, torch.sigmoid(u), color=figures.BLACK, alpha=0.2, linewidth=9, label="σ(u)")
for (name, w), style in zip(pull.items(), ["-", "--", "o", "-.", ":"]):
    balance = w.flip(0) / (w + w.flip(0))
    if name == "IPO":
        balance[u.abs() > 0.5] = torch.nan  # beyond, one of its pulls is negative: it rests nowhere
    axes.plot(u, balance, style, color=colours[name], label=name, markevery=10, markersize=5)
axes.set(xlabel="margin u (nats)", ylabel="p with which it rests there", ylim=(-0.05, 1.05))
axes.legend(loc="lower right")
figures.show(figure, "10.c")

# %% [markdown] tags=["outcome"]
# **What happened.** DPO and $e^{-u/2}$ are proper. The focal loss rests at margin 2 only if the first completion wins 97 of 100, where 88 would be right; so with 88 of 100 it stays at a smaller margin: it is too modest. The hinge goes to margin 1 or −1, by majority. IPO rests at $u=p-\frac12$: chances to win, not rewards ([D12.1]).

# %% [markdown]
# ## The repair
#
# Which pulls are proper? Divide $w(u)$ by DPO's pull, and call the quotient $k(u)=w(u)/\sigma(-u)$. Because $\sigma(u)=e^u\sigma(-u)$,
#
# $$w(-u)=e^{u}w(u)\iff\frac{w(-u)}{\sigma(u)}=\frac{w(u)}{\sigma(-u)}\iff k(-u)=k(u).$$
#
# **The proper losses of margins are those whose pull is DPO's, times a positive *even* function of the margin.** (Statistics has known them for long: Buja, Stuetzle and Shen, 2005.) And on endless data each of them ends at π\*, for any number of completions. At any rewards $s$ the mean pull of a pair is then
#
# $$p\,w(u)-(1-p)\,w(-u)=k(u)\,\big(p-\sigma(u)\big),$$
#
# positive where $u$ is below $\mathrm{logit}(p)$, negative above. So walking from $s$ straight to the true rewards lowers the loss of every pair, all the way: there is no other place to rest, though the loss need not be convex.
#
# **Predict before you run.** The next figure has $k$ for three of the losses above. For which is it even?

# %%
figure, axes = plt.subplots()
looks = [("DPO", "-", (3, 1.1)), ("focal", "--", (3, 0.25)), ("exp(-u/2)", ":", (1.1, 2.6))]
for name, style, place in looks:
    axes.plot(u, pull[name] / torch.sigmoid(-u), style, color=colours[name])
    axes.text(*place, name, color=colours[name])
axes.set(xlabel="margin u (nats)", ylabel="k(u), pull in units of DPO's", ylim=(0, 4), xlim=(-5, 5))
figures.show(figure, "10.d")

# %% [markdown] tags=["outcome"]
# **What happened.** Only the focal loss has a $k$ that is not even. That is its purpose: it takes pull from easy pairs and leaves it to hard ones. But a pair that is easy with one label is hard with the other. Who weakens one of the two labels more than the other has changed what the labels say.

# %% [markdown]
# So an invention must weaken $u$ and $-u$ alike. Take $k(u)=4\,\sigma(u)\,\sigma(-u)$. It is 1 at the reference and small for pairs that are far on *either* side: also for those that look hopeless, which may well be labels that are wrong. The pull is
#
# $$w(u)=\sigma(-u)\cdot4\,\sigma(u)\,\sigma(-u).$$
#
# ### Exercise 10.4: the loss of a pull
#
# *6 minutes.* Which loss has this pull? It should tend to zero for large margins. (Hint: with $s=\sigma(-u)$, $\mathrm ds=-s(1-s)\,\mathrm du$.)


# %% tags=["exercise"]
def repaired_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """(B,) log-probabilities -> (B,) losses, whose slope in the margin u is -4 sigma(u) sigma(-u)^2."""
    ### BEGIN SOLUTION
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return 2 * torch.sigmoid(-margin) ** 2
    ### END SOLUTION


# %% tags=["check"]
check("10.4", repaired_loss)

# %% [markdown] tags=["answer"]
# $w\,\mathrm du=-4s\,\mathrm ds$, so the loss is $2s^2=2\,(1-\sigma(u))^2$. It is the *Brier score* of 1950, with which weather forecasts are judged: the squared errors of both outcomes' probabilities, added up. It is bounded, and not convex.

# %% [markdown]
# The cells below use the course's own copy of it, `proper_loss`, so they run before you have solved the exercise.
#
# **Predict before you run.** All pairs, and then only the pairs of neighbours (first and second, second and third, third and fourth). For which losses does it matter which pairs people are shown?

# %%
near = (pairs.order.diff(dim=-1).abs() == 1)[:, 0]
neighbours = dpo.Rankings(*(field[near] for field in pairs)).normalised()
for loss in (dpo_losses, focal_loss, proper_loss):
    ends = [trained(loss, data) for data in (pairs, neighbours)]
    kl = [dpo.kl_divergence(end, optimal).item() for end in ends]
    print(f"{loss.__name__:11} KL to π*: all pairs {kl[0]:.6f}, neighbours only {kl[1]:.6f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The repaired loss ends at π\*, with either set of pairs. So does DPO. The focal loss ends at two places, if only a little apart: its best margins of single pairs do not add up (the best margin from the first to the third completion is not the sum of the two between), so it ends at a compromise, which depends on what is weighed against what. For a proper loss there is nothing to compromise about.

# %% [markdown]
# ## Question 5: is there an end, on your data?
#
# On data that are not endless, the share $p$ of a pair may be 1: all labels agree. Then only one label pulls, and the margin rests where $w(u)=0$.
#
# **Predict before you run.** DPO, focal, repaired, $e^{-u/2}$, IPO: which rest at a finite margin?

# %%
pull["repaired"] = 4 * torch.sigmoid(u) * torch.sigmoid(-u) ** 2
for name in ("DPO", "focal", "repaired", "exp(-u/2)", "IPO"):
    print(f"{name:9} pulls at 0, 1, 3, 5:", *(f"{pull[name][place]:.5f}" for place in (100, 120, 160, 200)))

# %% [markdown] tags=["outcome"]
# **What happened.** Only IPO rests: its pull is zero at $\frac12$ and negative beyond. No proper loss can rest, since its pull is positive everywhere; where people are unanimous, Bradley–Terry's margin is infinite, and a proper loss finds it ([D13.4]). One has to choose: margins that are right, or margins that are always finite.

# %% [markdown]
# With several completions more can happen than a unanimous pair. Draw an arrow from $i$ to $j$ if $i$ was chosen over $j$ at least once. DPO's loss has a minimum, at exactly one policy, if and only if a chain of arrows leads from every completion to every other ([D11.1]). If not, some group never beat the rest; pushing the group down costs nothing, for ever, or the two were never compared and nothing says how far apart they are. IPO's target is finite, so that every comparison holds both completions, whoever won; it has exactly one optimum if and only if comparisons *connect* all completions ([D12.1]).

# %% [markdown]
# ### Exercise 10.5: is there an optimum?
#
# *8 minutes.* `wins[i, j]` counts how often completion $i$ was chosen over $j$. Return two booleans: whether exactly one policy minimises DPO's loss of these data, and whether exactly one minimises IPO's.


# %% tags=["exercise"]
def has_one_optimum(wins):
    """(Y, Y) counts -> (bool for DPO, bool for IPO)."""
    ### BEGIN SOLUTION
    answers = []
    for arrows in (wins > 0, (wins + wins.T) > 0):
        chains = (arrows | torch.eye(len(wins), dtype=torch.bool)).double()
        answers.append(bool((torch.linalg.matrix_power(chains, len(wins)) > 0).all()))
    return tuple(answers)
    ### END SOLUTION


# %% tags=["check"]
check("10.5", has_one_optimum)

# %% [markdown]
# ## The card
#
# The library asks all these questions at once, and some more, in exact worlds with several completions. Its answer is one page, the loss's *card*.
#
# **Predict before you run.** What will the card of the focal loss say about the optimum, about the pairs, about unanimous labels? And that of the repaired one?

# %%
card = dpo.loss_card(focal_loss, options={"beta": 0.5}, quick=True)
print(card.text())

# %%
repaired = dpo.loss_card(proper_loss, options={"beta": 0.5}, quick=True)
print(f"the repaired loss {repaired.verdict}")
for key in ("value_at_reference", "kl_to_optimal", "best_beta", "kl_after_flips"):
    print(f"{key:18} focal {card.json()[key]:.3g}, repaired {repaired.json()[key]:.3g}")
print(f"squared error over the Cramér-Rao bound, repaired {repaired.json()['efficiency']:.2f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The first verdict has what was found above by hand, and one thing more: the focal loss ends *near* the optimum of β = 0.89. Its curve in the figure of question 4 is close to $\sigma(1.8\,u)$, so its margins are right but for a factor of about 1.8. With a β divided by that factor it would nearly do; but the factor is nobody's choice, and the remainder depends on the pairs. The repaired loss ends at π\*, needs hardly more data than DPO, and with a tenth of the labels flipped it is a little nearer to π\* than DPO is. Both lose their end where one label is never contradicted, as every proper loss does.

# %% [markdown]
# ## Your own loss, to its end
#
# ### Exercise 10.6: a loss, and where it ends
#
# *12 minutes.* Invent a loss of a pair: of the margin, or of both log-ratios, with or without the reference. It may be a bad one; it may not be DPO's. **Predict before you run.** Does it have an end? Is it π\* of some β, near it, or something else?
#
# Then return the loss, a function of four columns of log-probabilities, and its end: the log-probabilities at which training rests, if all pairs of the $Y$ completions are compared with the exact probabilities of Bradley–Terry; or `None`, if the loss falls for ever. Find the end by the balance of the pulls, by the card, or by a few lines of training, such as `trained` above. The check trains your loss as well, from the end that you claim, and sees whether it stays there.


# %% tags=["exercise"]
def my_invention(ref_logps, rewards):
    """(Y,) log-probabilities, (Y,) rewards -> (your loss, (Y,) log-probabilities where it ends, or None)."""
    ### BEGIN SOLUTION
    pairs = dpo.expected_pairs(rewards[None], dpo.all_sets(rewards[None].isfinite()))

    def cautious(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
        h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
        return -F.logsigmoid(h) + h**2 / 10  # DPO, and a term that holds every pair near the reference

    theta, reference = ref_logps[None].clone().requires_grad_(), pairs.gather(ref_logps[None]).T
    for _ in range(100):
        columns = pairs.gather(theta.log_softmax(-1)).T
        (slope,) = torch.autograd.grad(pairs.weight @ cautious(*columns, *reference), theta)
        theta.data -= 2 * slope
    return cautious, theta.detach().log_softmax(-1)[0]
    ### END SOLUTION


# %% tags=["check"]
check("10.6", my_invention)

# %% [markdown] tags=["answer"]
# This one rests where $p\,w(h)=(1-p)\,w(-h)$ with $w(h)=\sigma(-h)-\frac h5$, that is at $p-\sigma(h)=\frac h5$: its margins are too small, and with several completions it ends at a compromise. The card would say "ends elsewhere". What it has for that is an end on unanimous labels too, where $\sigma(-h)=\frac h5$. Others: $e^{-h}$ ends at π\* of β = 2, by the equation of question 4; $-h$ has no end; $-\sigma(h)$ has none either, since its average falls for ever in the direction of the commoner label; and $-\log\pi_\theta(y_w)$, which is no loss of a margin, ends at the law of winners (notebook 8).

# %% [markdown]
# ## Another penalty
#
# "Ends at π\*" is no verdict on a loss as such: π\* belongs to the penalty β KL(π‖π_ref). With another penalty there is another optimum, and another loss for it. Exchange the two policies in the divergence (the *forward* KL, [D11.11]). With a multiplier λ for $\sum_y\pi_y=1$, the best policy has the same slope in each $\pi_y$:
#
# $$r_y+\beta\frac{\pi_{{\rm ref},y}}{\pi_y}=\lambda\quad\Longrightarrow\quad\pi_y=\frac{\beta\,\pi_{{\rm ref},y}}{\lambda-r_y}.$$
#
# λ cancels in differences of rewards, as $\log Z$ did in DPO. So with $\rho=\pi_\theta/\pi_{\rm ref}$ the margin $m=\beta\,(1/\rho_l-1/\rho_w)$ takes the place of $u$, and $-\log\sigma(m)$ is a loss for this penalty ([D11.12]; Wang et al., 2023, have it for a whole family of divergences).
#
# **Predict before you run.** Which of the two optima gives the worst completion more? Where does this loss end, and are its two pulls equal?


# %%
def forward_kl_losses(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
    """(B,) log-probabilities -> (B,) losses."""
    won, lost = (ref_chosen - policy_chosen).exp(), (ref_rejected - policy_rejected).exp()
    return -F.logsigmoid(beta * (lost - won))


forward = dpo.divergence_optimal_logps(ref_logps, rewards, beta=beta, divergence="forward_kl")
end = trained(forward_kl_losses, pairs, step_size=1.0)
for name, logps in {"optimum, reverse KL": optimal, "optimum, forward KL": forward, "its loss": end}.items():
    print(f"{name:19}", *(f"{chance:.4f}" for chance in logps[0].exp()))
moved = [torch.tensor([p], dtype=torch.float64).log().requires_grad_(p != 0.3) for p in (0.6, 0.1, 0.3, 0.3)]
up, down = torch.autograd.grad(forward_kl_losses(*moved, beta=0.5), moved[:2])
print(f"pulls of a pair: up {-up.item():.4f}, down {down.item():.4f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The forward KL leaves the worst completion twice as much, and the best one more as well; the second best pays for both. It punishes $\log\frac{\pi_{\rm ref}}\pi$, which explodes where a completion of the reference is given up, and hardly minds where one is made likelier. Its loss ends exactly there, and the card would say "ends elsewhere" of it, rightly: elsewhere than π\*. The two pulls are unequal, $\sigma(-m)\,\beta/\rho_w$ up and $\sigma(-m)\,\beta/\rho_l$ down: a completion that has become unlikely is moved faster.

# %% [markdown]
# ## An open question
#
# There is a proper loss for every positive even $k$, and on endless clean data they all end at π\*. DPO's $k=1$ is maximum likelihood, so with many clean labels no other needs fewer. But real labels are flipped, by a share that nobody knows, and then every proper loss ends elsewhere: with three completions or more, no rewards fit flipped labels ([D2.3]), and each $k$ makes its own compromise. Is there a $k$ that needs hardly more labels than DPO where they are clean, and is hurt less where they are not, whatever the rewards? The card has a line for each of the two. We know of no $k$ that is best, and of no proof that there is none.
