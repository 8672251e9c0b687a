# %% [markdown]
# # 7 · Noise, and the loss zoo
#
# **Before this:** notebook 3, or what it shows: the DPO loss $-\log\sigma(u)$ of a margin $u$ ends at π\* on exact preferences ·
# **Read:** 25 minutes · **Solve:** 35 minutes · **Difficulty:** ●●○ · **Derivations:** [D2.3], [D12.1], [D12.2], [D12.3], [D12.4], [D12.5], [D12.6], [D12.8], [D13.4]
#
# **The claim.** DPO believes its labels. Where some are wrong it ends at another policy, and where all agree it never ends. Its relatives change the loss of a pair to repair the one or the other, or to do without a reference. All of them say to prefer the chosen completion, and most take their first step in the same direction. What tells them apart is where they end.

# %% tags=["setup"]

import torch
from dpo_course import figures
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.bandit import loss_on_table, safe_learning_rate
from dpo_minimal.zoo.kto import kto_on_table

figures.use_style()

# %% [markdown]
# ## Labels that were flipped
#
# Take two completions whose rewards differ by $r_1-r_2$. People choose the first with probability $p=\sigma(r_1-r_2)$. Then something goes wrong, a slip of the finger or a wrong column, and a share $\varepsilon$ of all labels is reversed ([D2.3]):
#
# $$\tilde p=(1-\varepsilon)\,p+\varepsilon\,(1-p)=\varepsilon+(1-2\varepsilon)\,p.$$
#
# DPO does not know. For a single pair its best margin is $u=\mathrm{logit}(\tilde p)$, the log-odds of the labels as they are. Without flips that is $r_1-r_2$.
#
# **Predict before you run.** One label in twenty is reversed, or only one in a hundred. Does that matter for completions of nearly equal reward? For very different ones?

# %%
difference = torch.linspace(0, 8, 81, dtype=torch.float64)  # of the true rewards
p = torch.sigmoid(difference)
flips = [0.0, 0.01, 0.05, 0.2]
margins = {flip: torch.logit(flip + (1 - 2 * flip) * p) for flip in flips}
for flip, margin in margins.items():
    print(f"{flip:4.0%} flipped: rewards that differ by 4 get a margin of {margin[40]:.2f}")

# %%
figure, axes = plt.subplots()
for (flip, margin), style in zip(margins.items(), ["-", "--", "-.", ":"]):
    axes.plot(difference, margin, style, label=f"{flip:.0%}")
    axes.text(8.1, margin[-1], f"{flip:.0%}", va="center")
axes.set(xlabel="true difference of rewards (nats)", ylabel="margin that DPO finds (nats)", xlim=(0, 8.8))
figures.show(figure, "7.a")

# %% [markdown] tags=["outcome"]
# **What happened.** With few flips, small differences hardly change. Large ones are cut off at $\log\frac{1-\varepsilon}\varepsilon$: if the worse completion wins every twentieth time, it cannot be much worse. With three completions or more there is another harm: flipped labels are no longer those of *any* rewards ([D2.3]), and DPO ends at a compromise.

# %% [markdown]
# ### Exercise 7.1: the flips behind a margin
#
# *6 minutes.* Read the figure the other way. The rewards of two completions are known to differ by `difference`, say because experts agreed on them; crowd workers label the pair again and again, and DPO trained on their labels finds the margin `margin`, smaller and of the same sign. Which share of the labels was reversed? (One pair is enough to say.)


# %% tags=["exercise"]
def flips_behind(difference, margin):
    """(B,) true differences, (B,) margins that DPO finds, in nats -> (B,) shares of reversed labels (D2.3)."""
    ### BEGIN SOLUTION
    p, share = torch.sigmoid(difference), torch.sigmoid(margin)  # clean, and as the labels have it
    return (p - share) / (2 * p - 1)
    ### END SOLUTION


# %% tags=["check"]
check("7.1", flips_behind)

# %% [markdown]
# ## Two answers to noise
#
# Write $\ell(u)=-\log\sigma(u)$ for DPO's loss of a margin $u$; then $\ell(-u)=\ell(u)+u$ is the loss of the opposite label. If a label is wrong with probability $\varepsilon$, two things come to mind.
#
# *Conservative* DPO trusts each label less, and mixes in the loss of the opposite one ([D12.2]):
#
# $$\ell_{\rm cDPO}(u)=(1-\varepsilon)\,\ell(u)+\varepsilon\,\ell(-u)=\ell(u)+\varepsilon u.$$
#
# *Robust* DPO subtracts what the flips have added ([D12.3]):
#
# $$\ell_{\rm rob}(u)=\frac{(1-\varepsilon)\,\ell(u)-\varepsilon\,\ell(-u)}{1-2\varepsilon}=\ell(u)-\frac{\varepsilon}{1-2\varepsilon}\,u.$$
#
# The margin is that of notebook 3: $u=\beta h$, with the difference of log-ratios $h=\log\frac{\pi_\theta(y_w)}{\pi_{\rm ref}(y_w)}-\log\frac{\pi_\theta(y_l)}{\pi_{\rm ref}(y_l)}$.

# %% [markdown]
# Where does robust DPO come from? Ask for a loss whose average over a flipped label is $\ell(u)$, whichever of the two the true label is. These are two equations for two unknown losses, and $\ell_{\rm rob}$ of either label is their solution.
#
# Now a pair that people would decide nine times in ten for the first, with one label in five reversed. We average each loss over the labels that come in, as a function of the margin.

# %%
p, eps = torch.tensor(0.9, dtype=torch.float64), 0.2
u = torch.linspace(-1, 5, 601, dtype=torch.float64)
zero = torch.zeros_like(u)
share = eps + (1 - 2 * eps) * p  # of labels that say "first"
zoo = {
    "DPO": lambda *four: dpo.dpo_loss(*four, beta=1.0),
    "cDPO": lambda *four: dpo.cdpo_loss(*four, beta=1.0, label_smoothing=eps),
    "robust DPO": lambda *four: dpo.robust_dpo_loss(*four, beta=1.0, flip_probability=eps),
}
average = {}
for name, loss in zoo.items():  # log-probabilities u, 0, 0, 0 and beta = 1 make the margin u
    average[name] = share * loss(u, zero, zero, zero).losses + (1 - share) * loss(zero, u, zero, zero).losses

# %% [markdown]
# **Predict before you run.** The true margin is $\mathrm{logit}(0.9)$. Order the three minima. Which loss finds the true one? Is cDPO, told the right $\varepsilon$, nearer to it than DPO?

# %%
figure, axes = plt.subplots()
for (name, curve), style in zip(average.items(), ["-", "--", "-."]):
    (line,) = axes.plot(u, curve, style)
    axes.text(5.05, curve[-1], name, color=line.get_color(), va="center")
    axes.plot(u[curve.argmin()], curve.min(), "o", color=line.get_color())
axes.axvline(torch.logit(p), color=figures.BLACK, linestyle=":")
axes.text(torch.logit(p) + 0.1, 1.75, "true margin")
axes.set(xlabel="margin u (nats)", ylabel="average loss (nats)", xlim=(-1, 6.2))
figures.show(figure, "7.b")

# %%
least = {name: f"{u[curve.argmin()]:.2f}" for name, curve in average.items()}
print(f"true margin {torch.logit(p):.2f}, minima {least}")

# %% [markdown] tags=["outcome"]
# **What happened.** Robust DPO finds the truth, at any $\varepsilon<\frac12$ and for any number of completions: averaged over flips, it *is* DPO's loss of the clean labels ([D12.3]). cDPO is *further* from the truth than DPO. It does not undo noise, it adds some: to minimise it is to train DPO on labels that were flipped once more ([D12.2]). What it is good for comes next.

# %% [markdown]
# ### Exercise 7.2: an experiment: robust DPO is told a wrong ε
#
# *10 minutes.* Nobody knows ε. In the picture above the loss was told the truth; now change that. A share `flip` of the labels is reversed, and robust DPO is told `told`. **Predict before you run.** What becomes of a pair that people decide nine times in ten, if no label is reversed and robust DPO is told 0.2? Then return the margin at which the average loss is least, for pairs with the probabilities `p`. Where the average loss has no minimum, return the infinity that the margin runs to (`torch.inf` or minus that). By a formula, by a search or by training: three digits are enough.


# %% tags=["exercise"]
def robust_margin(p, flip, told):
    """(B,) probabilities that the first is preferred, the rate of flips, the rate told -> (B,) margins."""
    ### BEGIN SOLUTION
    share = flip + (1 - 2 * flip) * p  # of labels that say "first"
    left = (share - told) / (1 - 2 * told)  # the average loss is DPO's for labels like this
    return torch.logit(left.clamp(0, 1))
    ### END SOLUTION


# %% tags=["check"]
check("7.2", robust_margin)

# %%
for told in [0.0, 0.05, 0.09, 0.2]:
    left = (p - told) / (1 - 2 * told)
    ends = f"margin {torch.logit(left):.2f}" if left < 1 else "no end"
    print(f"clean labels, nine in ten; told {told:4.2f}: as if {left:.3f} said 'first', {ends}")

# %% [markdown] tags=["outcome"]
# **What happened.** Robust DPO takes the share `told` of flips out of the labels, also where fewer were put in. The mean loss is DPO's for labels of which $\frac{\tilde p-\varepsilon'}{1-2\varepsilon'}$ say "first", if the rate $\varepsilon'$ was told. Told too little, it corrects too little, and stays on the safe side, between DPO and the truth. Told more than the rate at which the worse completion wins at all, it asks for labels of more than 100 %: the mean loss falls for ever, and that pair runs away, with all its noise still in it. So the clearest pairs are the first to be lost. Better tell it too little than too much.

# %% [markdown]
# ## Labels without noise
#
# Suppose all labels agree: the better completion is chosen every time, as when a rule or another model judges. The log-odds are infinite, and so is DPO's best margin ([D13.4]). *Identity Preference Optimization* wants a fixed, finite difference of log-ratios instead ([D12.1]):
#
# $$\ell_{\rm IPO}=\Big(h-\frac1{2\beta}\Big)^2.$$
#
# DPO's margin is $u=\beta h$, so IPO's target is $u=\frac12$. (Its paper calls its β τ. Log-probabilities are sums over tokens; programs that call the mean over tokens IPO minimise another loss, with another optimum.)

# %% [markdown]
# **Predict before you run.** One pair, always decided the same way. We train its margin by gradient descent with each of four losses, all with β = 0.5; cDPO and robust DPO are told ε = 0.1. Which margins stop, and which run away? Which of them fastest?

# %%
beta, eps, steps = 0.5, 0.1, 3000
zoo = {
    "DPO": (dpo.dpo_loss, {}),
    "cDPO": (dpo.cdpo_loss, dict(label_smoothing=eps)),
    "robust DPO": (dpo.robust_dpo_loss, dict(flip_probability=eps)),
    "IPO": (dpo.ipo_loss, {}),
}
zero = torch.zeros(1, dtype=torch.float64)


# %%
def margins_of(loss, options):
    """The margin of one pair after each step of gradient descent on h."""
    h, path = zero, []
    for _ in range(steps):
        path.append(beta * h.item())
        h = h + 0.2 * loss(h, zero, zero, zero, beta=beta, **options).gradient_weights  # minus the slope
    return path


paths = {name: margins_of(loss, options) for name, (loss, options) in zoo.items()}
for name, path in paths.items():
    print(f"{name}: margin {path[steps // 2]:.2f} after half of the steps, {path[-1]:.2f} at the end")

# %%
figure, axes = plt.subplots()
for (name, path), style in zip(paths.items(), ["-", "--", "-.", ":"]):
    (line,) = axes.semilogx(range(1, steps + 1), path, style)
    axes.text(1.07 * steps, min(path[-1], 10), name, color=line.get_color(), va="center")
axes.set(xlabel="gradient step", ylabel="margin u (nats)", ylim=(0, 10.3), xlim=(1, 13000))
figures.show(figure, "7.c")

# %% [markdown] tags=["outcome"]
# **What happened.** IPO stops at $\frac12$ and cDPO at $\log\frac{1-\varepsilon}\varepsilon$. DPO never stops: its weight falls as the margin grows, and the margin grows like the logarithm of the number of steps. Robust DPO runs away at constant speed. It was told that a tenth of the labels is wrong and finds none that is; so it concludes that the truth is beyond certainty. The slope of its loss in $u$ never falls below $\frac{\varepsilon}{1-2\varepsilon}$ in size.

# %% [markdown]
# ### Exercise 7.3: an experiment: another β for IPO
#
# *9 minutes.* IPO's β is not DPO's. **Predict before you run.** With a β of its own, can IPO end where DPO ends, on labels that do not all agree? On a single pair it can. Of its labels a share `p` says "first"; DPO with `beta` ends at a certain $h$. Return the β with which IPO's average loss is least at the same $h$.


# %% tags=["exercise"]
def ipo_beta(p, beta):
    """(B,) shares of labels that say "first", none of them one half, DPO's beta -> (B,) IPO's betas."""
    ### BEGIN SOLUTION
    h = torch.logit(p) / beta  # where DPO ends
    return (2 * p - 1) / (2 * h)  # IPO ends at the mean of the targets, p/(2β) - (1 - p)/(2β)
    ### END SOLUTION


# %% tags=["check"]
check("7.3", ipo_beta)

# %%
for share in torch.tensor([0.55, 0.75, 0.9, 0.99], dtype=torch.float64):
    print(
        f"p = {share:.2f}: DPO with β = 1 ends where IPO does with β = {(share - 0.5) / torch.logit(share):.3f}"
    )

# %% [markdown] tags=["outcome"]
# **What happened.** Each pair needs another β: near one half a quarter of DPO's, less and less as labels agree. IPO averages its targets, so that it ends at $h=\frac{2p-1}{2\beta}$, a *chance to win*; DPO at $\frac1\beta\mathrm{logit}(p)$, a difference of *rewards*. No single β turns the one into the other for two different pairs. So where several completions are compared, IPO cannot be tuned to π\*, only near it, and best where rewards differ little.

# %% [markdown]
# ## The zoo
#
# Six relatives of DPO, and what each wants. A completion has $\vert y\vert$ tokens.
#
# - **cDPO** ([D12.2]): $\ell(u)+\varepsilon u$. DPO with its labels flipped on purpose. Needs the reference.
# - **Robust DPO** ([D12.3]): $\ell(u)-\frac{\varepsilon}{1-2\varepsilon}u$. DPO with the flips taken out. Needs the reference, and the right ε.
# - **IPO** ([D12.1]): $\big(h-\frac1{2\beta}\big)^2$. A finite difference, whoever agrees. Needs the reference.
# - **KTO** ([D12.4]): $1-\sigma(\beta(\rho-z_0))$ for a good completion and $1-\sigma(\beta(z_0-\rho))$ for a bad one, with $\rho=\log\frac{\pi_\theta(y)}{\pi_{\rm ref}(y)}$ and an estimate $z_0$ of $\mathrm{KL}(\pi_\theta\Vert\pi_{\rm ref})$. Needs no pairs, only marks.
# - **ORPO** ([D12.5]): $-a_w-\lambda\log\sigma(o_w-o_l)$, with the average log-probability $a=\frac1{\vert y\vert}\log\pi_\theta(y)$ and the log-odds $o=a-\log(1-e^a)$. No reference, no β.
# - **SimPO** ([D12.6]): $-\log\sigma(\beta a_w-\beta a_l-\gamma)$. No reference; a margin γ is wanted.
#
# How hard a pair pulls is the *gradient weight*, minus the slope of its loss (notebook 4).
#
# **Predict before you run.** The next figure has DPO and the first four. Which of them pull *back* a pair whose margin is large? Which gives up on a pair that is far on the wrong side?

# %%
u = torch.linspace(-6, 6, 241, dtype=torch.float64)
zero, good = torch.zeros_like(u), torch.ones_like(u, dtype=torch.bool)
four = (u, zero, zero, zero)
kto = dpo.kto_loss(u, zero, good, 0.0, beta=1.0, desirable_weight=1.0, undesirable_weight=1.0)
curves = {
    "DPO": dpo.dpo_loss(*four, beta=1.0),
    "cDPO": dpo.cdpo_loss(*four, beta=1.0, label_smoothing=0.2),
    "robust DPO": dpo.robust_dpo_loss(*four, beta=1.0, flip_probability=0.2),
    "IPO": dpo.ipo_loss(*four, beta=1.0),
    "KTO, one good completion": kto,
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5.5))
for (name, out), style in zip(curves.items(), ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]):
    left.plot(u, out.losses, linestyle=style, label=name)
    right.plot(u, out.gradient_weights, linestyle=style)
left.set(xlabel="margin u, KTO: βρ (nats)", ylabel="loss", ylim=(-2, 6))
right.axhline(0, color=figures.BLACK, linewidth=1)
right.set(xlabel="margin u, KTO: βρ (nats)", ylabel="gradient weight", ylim=(-0.8, 1.6))
figure.legend(loc="outside upper center", ncols=3)
figures.show(figure, "7.d")

# %% [markdown] tags=["outcome"]
# **What happened.** IPO and cDPO pull back: their weights cross zero. Robust DPO pulls on for ever. KTO's pull is a bell: it leaves alone what is far on either side, the easy and the hopeless alike. (Its axis is $\beta\rho$ of a single completion, with $z_0=0$. IPO's weight is a straight line and leaves the picture.)

# %% [markdown]
# ## Where each of them ends
#
# One prompt, four completions with different lengths, all pairs with exact probabilities. Every method trains the same table of logits, from the same reference.

# %%
ref_logps = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
rewards = torch.tensor([[0.0, 1.0, 0.5, 2.0]], dtype=torch.float64)
lengths = torch.tensor([[2.0, 3.0, 4.0, 6.0]], dtype=torch.float64)
optimal = dpo.optimal_logps(ref_logps, rewards, beta=beta)
slate = dpo.all_sets(rewards.isfinite())
print("π*", *(f"{chance:.3f}" for chance in optimal[0].exp()))
zoo["ORPO"] = dpo.orpo_loss, dict(lam=1.0)
zoo["SimPO"] = dpo.simpo_loss, dict(gamma=0.0)


# %%
def mean_loss(name, logps, pairs):
    """The expected loss of a table (1, Y) by the method of that name."""
    if name == "KTO":
        even = dict(desirable_weight=1.0, undesirable_weight=1.0)
        return pairs.weight @ kto_on_table(logps, ref_logps, pairs, beta=beta, **even).losses.sum(-1)
    loss, options = zoo[name]
    options = options if name == "ORPO" else options | dict(beta=beta)
    return pairs.weight @ loss_on_table(loss, logps, ref_logps, pairs, lengths=lengths, **options).losses


# %%
def trained(name, pairs, steps=600):
    """The table (1, Y) that the method ends at, by Adam from the reference."""
    policy = dpo.TabularPolicy(ref_logps)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def objective(pairs):
        return mean_loss(name, policy(), pairs), {}

    list(dpo.train(objective, optimizer, [pairs] * steps, scheduler=schedule))
    return policy().detach()


# %% [markdown]
# First a look at the *first step*. At the reference the margin of every pair is zero, so that each method that has a reference weighs all pairs alike; its step goes along $w-l$, how often a completion is chosen less how often it is rejected ([D12.8]).

# %%
clean = dpo.expected_pairs(rewards, slate)
methods = ["DPO", "robust DPO", "cDPO", "IPO", "KTO", "SimPO", "ORPO"]
first = {}
for name in methods:
    theta = ref_logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_loss(name, theta.log_softmax(-1), clean), theta)
    first[name] = -gradient[0]
for name, step in first.items():
    print(f"{name:10} cosine with DPO's first step {torch.cosine_similarity(step, first['DPO'], 0):.4f}")

# %% [markdown]
# The methods with a reference all start in the same direction; ORPO and SimPO do not.
#
# **Predict before you run.** All labels are clean, and robust DPO and cDPO are told ε = 0.1 though nothing was flipped. Which of the seven end at π\*? Which give some completions no probability at all?

# %%
ends = {name: trained(name, clean) for name in methods}
names = [name.replace(" ", "\n") for name in methods]
looks = list(zip("os^D", [figures.BLUE, figures.ORANGE, figures.GREEN, figures.RED]))
figure, axes = plt.subplots(figsize=(9, 5))
for y, (marker, colour) in enumerate(looks):
    axes.axhline(optimal[0, y].exp(), color=colour, linestyle=":")
    chances = [ref_logps[0, y].exp(), *(end[0, y].exp() for end in ends.values())]
    axes.plot(range(8), chances, marker, color=colour, label=f"reward {rewards[0, y]:g}")
axes.set(xticks=range(8), xticklabels=["π_ref", *names], xlabel="method", ylabel="π(y), dotted: π*")
figure.legend(loc="outside upper center", ncols=4)
figures.show(figure, "7.e")

# %% [markdown] tags=["outcome"]
# **What happened.** Only DPO ends at π\*. Robust DPO overshoots and cDPO undershoots, each as if its ε were true. IPO stays near the reference: it tilts by chances to win, which lie between 0 and 1, and not by rewards. (Its β has another unit: with a smaller one it goes further and can come near π\*, but not to it.) KTO sorts: what is below a threshold ends at zero, and the rest share everything, not as π\* would. ORPO and SimPO have no reference to remember, and SimPO with completions of different lengths gives nearly everything to one.

# %% [markdown]
# **Predict before you run.** Now a tenth of all labels is flipped. Which bars of the next figure are zero, with clean and with flipped labels? Which method does not care?

# %%
noisy = dpo.expected_pairs(rewards, slate, flip_probability=eps)
distance = {"clean labels": [], "10 % flipped": []}
for name in methods:
    for kind, end in zip(distance, (ends[name], trained(name, noisy))):
        distance[kind].append(dpo.kl_divergence(end, optimal).item())
    print(f"{name:10}", "  ".join(f"{kind}: KL {numbers[-1]:.3f}" for kind, numbers in distance.items()))

# %%
figure, axes = plt.subplots()
places = torch.arange(len(methods))
axes.bar(places - 0.2, distance["clean labels"], 0.4, color=figures.BLUE, label="clean labels")
hollow = dict(color="none", edgecolor=figures.RED, hatch="//")
axes.bar(places + 0.2, distance["10 % flipped"], 0.4, label="10 % flipped", **hollow)
axes.set(xticks=places, xticklabels=names, xlabel="method", ylabel="KL(π‖π*) at the end (nats)")
axes.legend(loc="upper left")
figures.show(figure, "7.f")

# %% [markdown] tags=["outcome"]
# **What happened.** DPO and robust DPO have changed places. KTO does not care: it asks of each completion whether it is chosen more often than rejected, and flips turn $w-l$ into $(1-2\varepsilon)(w-l)$, which has the same sign. SimPO is even nearer with flips: it had gone too far, and they hold it back. Being far from this π\* is no verdict on a loss: with a few sampled pairs DPO may have no optimum at all, where IPO and cDPO have one. But it is good to know, before choosing a loss, what it would find if it had all the data in the world.

# %% [markdown]
# ### Exercise 7.4: train with a wrong ε
#
# *10 minutes.* One prompt with $Y$ completions. Train a table of logits, from the reference, on all pairs with exact probabilities of which a share `flip` was reversed, by robust DPO that is told `told`, which here is too little. Return the log-probabilities at the end, right to three digits. A hundred steps of gradient descent are enough, with `safe_learning_rate(pairs, beta=beta)` (the set-up has imported it, and `loss_on_table`). **Predict before you run.** In which direction from π\* is the end?


# %% tags=["exercise"]
def trained_on_flips(ref_logps, rewards, beta, flip, told):
    """(Y,) log-probabilities, (Y,) rewards, three numbers -> (Y,) log-probabilities at the end of training."""
    ### BEGIN SOLUTION
    ref, every = ref_logps[None], dpo.all_sets(rewards[None].isfinite())
    pairs = dpo.expected_pairs(rewards[None], every, flip_probability=flip)
    theta, step = ref.clone().requires_grad_(), safe_learning_rate(pairs, beta=beta)
    rates = dict(beta=beta, flip_probability=told)
    for _ in range(100):
        out = loss_on_table(dpo.robust_dpo_loss, theta.log_softmax(-1), ref, pairs, **rates)
        (slope,) = torch.autograd.grad(pairs.weight @ out.losses, theta)
        theta.data -= step * slope
    return theta.detach().log_softmax(-1)[0]
    ### END SOLUTION


# %% tags=["check"]
check("7.4", trained_on_flips)

# %%
for told in [0.0, 0.08, 0.1, 0.12]:
    zoo["robust DPO"] = dpo.robust_dpo_loss, dict(flip_probability=told)
    end = trained("robust DPO", noisy)
    print(f"told {told:4.2f}: KL {dpo.kl_divergence(end, optimal).item():.4f}, best {end[0, 3].exp():.3f}")
print(f"π*: best {optimal[0, 3].exp():.3f}")

# %% [markdown] tags=["outcome"]
# **What happened.** Told too little, it ends nearer to the reference than π\*, told too much, beyond: a rate that is wrong by 0.02 costs far less than not to be told at all. The end is that of DPO on labels with $\frac{\varepsilon-\varepsilon'}{1-2\varepsilon'}$ of flips left in, or, below zero, with flips taken out that were never there.

# %% [markdown]
# ## An open question
#
# Robust DPO needs the right ε, and nobody tells it. Flipped labels of three completions of different rewards fit no rewards at all ([D2.3]), so the labels themselves say something about ε. How many pairs does it take to estimate it well enough to be better off than with plain DPO? And what if ε is not one number, because some pairs are easier to confuse than others?
