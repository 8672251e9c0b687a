# %% [markdown]
# # 9 · What goes wrong
#
# **Before this:** notebook 3 and, for exhibit D, 7, or what they show: the DPO loss −log σ(u), with the margin u = β times the difference of the pair's log-ratios, and KTO's loss · **Read:** 30 minutes · **Solve:** 25 minutes · **Difficulty:** ●●○ · **Derivations:** [D13.1], [D13.2], [D13.4], [D13.5], [D13.6], [D14.4], [D11.6], [D11.9], [D12.4]
#
# **The claim.** Wrong code for preferences seldom crashes. It trains, and ends at another policy. But right code has properties that can be tested, and each bug below breaks at least one of them. And where the code is right, the data may still ask for something else than people think.

# %% tags=["setup"]

import torch
import torch.nn.functional as F
from dpo_course import figures
from dpo_course.checks import check
from dpo_course.exercises.what_goes_wrong import PROPERTIES
from matplotlib import pyplot as plt

import dpo_minimal as dpo
from dpo_minimal.bandit import dpo_objective, safe_learning_rate

figures.use_style()

# %% [markdown]
# ## Exhibit A: a tidy average
#
# Six exhibits follow, each a few lines that look right. Where we know a public report of the same mistake, it is linked; where we know none, we say so. In the first, the log-probabilities of tokens are made into one of a completion by a mean. Whether DPO should do so was asked in [an issue of TRL](https://github.com/huggingface/trl/issues/789) and in [one of the DPO paper's code](https://github.com/eric-mitchell/direct-preference-optimization/issues/48); users who tried it reported there that training collapses, or that β has to be a hundred times as large.


# %%
def exhibit_a(token_logps, scored):
    """(B, T) log-probabilities of tokens, (B, T) which count -> (B,)."""
    return (token_logps * scored).sum(-1) / scored.sum(-1)


letters = torch.tensor([0.2, 0.8], dtype=torch.float64).log()  # 0 is "stop", 1 is "go on"
token_logps = letters[torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])]
scored = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
averaged = exhibit_a(token_logps, scored).exp()
print("after exhibit A:", averaged.round(decimals=3))

# %% [markdown]
# This model says "stop" with probability 0.2 or else "go on", and is cut after three tokens. So there are four completions: *stop*, *go stop*, *go go stop*, *go go go*. A completion's probability is the product of its tokens' ([D13.5]):
#
# $$\log\pi(y|x)=\sum_{t}\log\pi(y_t|x,y_{<t}).$$
#
# **Predict before you run.** The black bars are the products. To what do they add up, and the hatched bars of exhibit A?

# %%
products = torch.tensor([0.2, 0.8 * 0.2, 0.8 * 0.8 * 0.2, 0.8 * 0.8 * 0.8])
figure, axes = plt.subplots()
places, names = torch.arange(4), ["stop", "go stop", "go go stop", "go go go"]
axes.bar(places - 0.2, products, 0.4, color=figures.BLACK, label=f"products: sum {products.sum():.2f}")
axes.bar(
    places + 0.2, averaged, 0.4, color=figures.RED, hatch="/", label=f"exhibit A: sum {averaged.sum():.2f}"
)
axes.set(xticks=places, xticklabels=names, xlabel="completion", ylabel="probability", ylim=(0, 1))
axes.legend(loc="upper left")
figures.show(figure, "9.a")

# %% [markdown] tags=["outcome"]
# **What happened.** The products sum to one, exhibit A's numbers don't: they are no probabilities of anything. Long completions gain most.

# %% [markdown]
# ### Exercise 9.1: repair exhibit A
#
# *2 minutes.* Return the log-probability of each row's scored tokens.


# %% tags=["exercise"]
def completion_logp(token_logps, scored):
    """(B, T) log-probabilities of tokens, (B, T) which count -> (B,), in nats."""
    ### BEGIN SOLUTION
    return (token_logps * scored).sum(-1)
    ### END SOLUTION


# %% tags=["check"]
check("9.1", completion_logp)

# %% [markdown]
# Does it matter in training? Three completions have rewards 0, 1 and 0.9 and lengths of 1, 1 and 10 tokens; the reference is uniform and β is 1. We minimise the DPO loss over all pairs of a table, with log-ratios as they are, and divided by lengths.
#
# **Predict before you run.** Which completion is the most likely in the end, with each of the two?


# %%
def trained(divisor):
    """The policy that minimises the loss of all pairs, its log-ratios divided by something."""
    rewards, even = torch.tensor([[0.0, 1.0, 0.9]]).double(), torch.full((1, 3), 1 / 3).double().log()
    pairs = dpo.expected_pairs(rewards, dpo.all_sets(even > -9))
    theta = even.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.02)
    for _ in range(2000):
        ratios = pairs.gather((theta.log_softmax(-1) - even) / divisor)
        theta.grad = torch.autograd.grad(-pairs.weight @ F.logsigmoid(-ratios.diff(dim=-1)[:, 0]), theta)[0]
        optimizer.step()
    return theta.detach().softmax(-1)[0]


print("sums:    ", trained(1).round(decimals=2))
print("averages:", trained(torch.tensor([1, 1, 10])).round(decimals=2))

# %% [markdown] tags=["outcome"]
# **What happened.** With averages the long completion overtakes the one with the highest reward. Each completion then has a β of its own, β divided by its length ([D13.5]).

# %% [markdown]
# ## Exhibit B: half a β
#
# A published derivation writes the loss "in another form" and loses a β on the way ([D14.4]). Of public code we know the opposite slip, [a β too many in MaxText](https://github.com/AI-Hypercomputer/maxtext/issues/1530).


# %%
def exhibit_b(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """(B,) log-probabilities -> (B,) losses."""
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected))


# %% [markdown]
# **Predict before you run.** Before training, policy and reference are the same. We draw the loss of one pair there, against β, for a reference that prefers the chosen completion four to one. For which β is exhibit B right?

# %%
chosen, rejected = torch.tensor([[0.8], [0.2]], dtype=torch.float64).log()
betas = torch.linspace(0.05, 1.5, 60).tolist()
start_b = [exhibit_b(chosen, rejected, chosen, rejected, beta).item() for beta in betas]
start = [dpo.dpo_loss(chosen, rejected, chosen, rejected, beta=beta).losses.item() for beta in betas]
figure, axes = plt.subplots()
axes.plot(betas, start_b, "--", color=figures.RED)
axes.text(0.42, 1.25, "exhibit B", color=figures.RED)
axes.plot(betas, start, color=figures.BLACK)
axes.text(1.1, 0.73, "DPO: log 2")
axes.set(xlabel="β", ylabel="loss before training (nats)", ylim=(0, 1.6))
figures.show(figure, "9.b")

# %% [markdown] tags=["outcome"]
# **What happened.** Only at β = 1, or where the reference is indifferent: just what one likes to test with. The loss before training is the cheapest alarm there is ([D13.6]). Trained to the end, exhibit B reaches $\pi_{\rm ref}^{1/\beta}e^{r/\beta}$, normalised: the reference to the wrong power. Exercise 3.1 was its repair.

# %% [markdown]
# ## Exhibit C: a mean of means
#
# A batch that does not fit into memory is split into micro-batches. Each gives the gradient of *its* mean loss, and the step needs that of the whole batch. The mean of these means was reported for tokens in the place of rows, in [a pull request to MLX LM](https://github.com/ml-explore/mlx-lm/pull/1413): a micro-batch of short completions counted as much as one of long ones. In short:


# %%
def exhibit_c(gradients, counts):
    """(M, P) gradients of the micro-batches' mean losses, (M,) their rows -> (P,)."""
    return gradients.mean(0)


# %% [markdown]
# **Predict before you run.** Ten rows are split into micro-batches of 4, 4 and 2. Each row should have a tenth of the say. How much does each have?

# %%
rows = torch.eye(10, dtype=torch.float64)  # row i has gradient 1 in parameter i, 0 elsewhere
counts = [4, 4, 2]
means = torch.stack([part.mean(0) for part in rows.split(counts)])
say = exhibit_c(means, torch.tensor(counts))

# %%
figure, axes = plt.subplots()
colours = [figures.SKY] * 4 + [figures.BLUE] * 4 + [figures.RED] * 2
axes.bar(torch.arange(1, 11), say, color=colours)
axes.axhline(0.1, color=figures.BLACK, linestyle="--")
axes.text(0.5, 0.105, "a tenth")
for border in [4.5, 8.5]:
    axes.axvline(border, color=figures.BLACK, linestyle=":")
axes.set(
    xticks=range(1, 11), xlabel="row (dotted: borders of micro-batches)", ylabel="its share of the gradient"
)
figures.show(figure, "9.c")

# %% [markdown] tags=["outcome"]
# **What happened.** Rows of the last, smaller micro-batch count twice as much as others. With micro-batches of one size nothing shows; an epoch's end, or tokens instead of rows, brings it out.

# %% [markdown]
# ### Exercise 9.2: repair exhibit C
#
# *5 minutes.* Return the gradient of the mean loss over all rows.


# %% tags=["exercise"]
def step_gradient(gradients, counts):
    """(M, P) gradients of the micro-batches' mean losses, (M,) their rows -> (P,)."""
    ### BEGIN SOLUTION
    return (counts[:, None] * gradients).sum(0) / counts.sum()
    ### END SOLUTION


# %% tags=["check"]
check("9.2", step_gradient)

# %% [markdown]
# ## Exhibit D: re-paired too late
#
# KTO's loss of a good completion is $1-\sigma(\beta(\rho-z_0))$, where $\rho$ is its log-ratio and $z_0$ an estimate of the divergence, from prompts put together with *other* prompts' completions ([D12.4]). The code below is a mistake of our own. A smaller relative of it was reported [in an issue of TRL](https://github.com/huggingface/trl/issues/1911): re-paired by reversing the batch, the middle one of an odd number keeps its own completion.


# %%
def exhibit_d(policy, reference):
    """(B, B) log-probabilities, row: prompt, column: completion -> z0, a scalar."""
    logratios = (policy - reference).diagonal()
    others = logratios.roll(1)  # put each prompt together with the completion of another one
    return others.mean().clamp(min=0)


# %% [markdown]
# **Predict before you run.** Four prompts have a good completion each. Training makes all four more likely after their own prompts, by the number of nats on the axis, and changes nothing else. What does exhibit D's loss do?

# %%
generator = torch.Generator().manual_seed(0)
reference = torch.randn(4, 4, generator=generator, dtype=torch.float64) - 9
policy = reference + 0.5 * torch.randn(4, 4, generator=generator, dtype=torch.float64).abs()
raises, own = torch.linspace(0, 4, 40).tolist(), (policy - reference).diagonal()
late = [exhibit_d(policy + up * torch.eye(4), reference) for up in raises]
losses_d = [torch.sigmoid(z0 - own - up).mean() for z0, up in zip(late, raises)]
losses_left = [torch.sigmoid(late[0] - own - up).mean() for up in raises]

# %%
figure, axes = plt.subplots()
axes.plot(raises, losses_d, "--", color=figures.RED)
axes.text(2.0, 0.53, "exhibit D", color=figures.RED)
axes.plot(raises, losses_left, color=figures.BLACK)
axes.text(2.0, 0.17, "z₀ left where it was")
axes.set(xlabel="rise of the good completions (nats)", ylabel="KTO's loss, β = 1", ylim=(0, 0.6))
figures.show(figure, "9.d")

# %% [markdown] tags=["outcome"]
# **What happened.** Nothing. A mean does not see in which order it adds up, so `roll` does nothing, and $z_0$ is the mean log-ratio of the very completions that are being trained. Whatever they gain, $z_0$ gains as well.

# %% [markdown]
# ### Exercise 9.3: repair exhibit D
#
# *6 minutes.* Entry $[i,j]$ of the tables belongs to prompt $i$ and completion $j$. Put each prompt together with the completion of the *next* prompt, the last prompt with the first completion. Return their mean log-ratio, or zero if it is negative.


# %% tags=["exercise"]
def kto_z0(policy, reference):
    """(B, B) log-probabilities, row: prompt, column: completion -> z0, a scalar."""
    ### BEGIN SOLUTION
    prompts = torch.arange(len(policy))
    others = prompts.roll(-1)
    return (policy - reference)[prompts, others].mean().clamp(min=0)
    ### END SOLUTION


# %% tags=["check"]
check("9.3", kto_z0)

# %% [markdown]
# ## Exhibit E: the padding's twin
#
# GPT-2 has no padding token, so end-of-text is often used to fill rows up. Then padding is taken out by its id. This was found in two trainers of TRL ([a pull request](https://github.com/huggingface/trl/pull/6357)), and behind models that don't stop writing ([an issue of a course](https://github.com/mlabonne/llm-course/issues/33)).
#
# **Predict before you run.** Below, 0 is end-of-text. The first row has a prompt of one token and the completion `7 8 0`, the second a prompt of two and `7 9 8 0`; the rest is padding. Which tokens get no mark?


# %%
def exhibit_e(ids, prompt_lengths, eos):
    """(B, T) ids, right-padded with eos, (B,) -> (B, T) which tokens are scored."""
    in_prompt = torch.arange(ids.shape[1]) < prompt_lengths[:, None]
    return ~in_prompt & (ids != eos)


ids = torch.tensor([[5, 7, 8, 0, 0, 0], [5, 6, 7, 9, 8, 0]])  # 0 is end-of-text, and the padding
marks = exhibit_e(ids, torch.tensor([1, 2]), 0)
for row, mark in zip(ids.tolist(), marks.tolist()):
    print("ids   ", *row, "\nscored", *("^" if m else " " for m in mark))

# %% [markdown] tags=["outcome"]
# **What happened.** The end of each completion is lost with the padding. It is a part of the completion: it says "stop here". It is not scored, so nothing teaches the model to stop.

# %% [markdown]
# ### Exercise 9.4: repair exhibit E
#
# *3 minutes.* Mask by length, as in notebook 6: an id does not say what a token is for. `lengths` counts prompt and completion together, end-of-text included. Return True where a token belongs to the completion.


# %% tags=["exercise"]
def scored_tokens(prompt_lengths, lengths, width):
    """(B,) lengths of prompts, (B,) of prompts and completions, columns -> (B, width), True or False."""
    ### BEGIN SOLUTION
    places = torch.arange(width)
    return (places >= prompt_lengths[:, None]) & (places < lengths[:, None])
    ### END SOLUTION


# %% tags=["check"]
check("9.4", scored_tokens)

# %% [markdown]
# ## Exhibit F: a reference that follows
#
# A loss that stays at 0.6931 was reported in [an issue of TRL](https://github.com/huggingface/trl/issues/1962): the reference's log-probabilities had been computed in advance, and were then not used. There are several ways to get that loss; the one below, a copy that is none, is our own.


# %%
def exhibit_f(theta, chosen, rejected, beta, learning_rate, steps):
    """(Y,) logits, a pair -> (Y,) logits of the policy and of the reference after training."""
    policy = theta.clone().requires_grad_()
    reference = policy.detach()
    for _ in range(steps):
        logratios = policy.log_softmax(-1) - reference.log_softmax(-1)
        loss = -F.logsigmoid(beta * (logratios[chosen] - logratios[rejected]))
        (gradient,) = torch.autograd.grad(loss, policy)
        policy.data -= learning_rate * gradient
    return policy.detach(), reference


# %% [markdown]
# **Predict before you run.** The loss never moves. Does the policy?

# %%
losses, logps = [], []
for steps in range(61):
    pair = exhibit_f(torch.zeros(3), 0, 1, 0.5, 1.0, steps)
    policy, reference = (logits.log_softmax(-1) for logits in pair)
    four = policy[[0]], policy[[1]], reference[[0]], reference[[1]]
    losses.append(dpo.dpo_loss(*four, beta=0.5).losses.item())
    logps.append(policy[1])

# %%
figure, (left, right) = plt.subplots(1, 2)
left.plot(losses, color=figures.RED)
left.text(30, 0.72, "log 2")
left.set(xlabel="gradient step", ylabel="loss (nats)", ylim=(0, 1))
right.plot(logps, color=figures.RED)
right.set(xlabel="gradient step", ylabel="log π(rejected) (nats)")
figures.show(figure, "9.e")

# %% [markdown] tags=["outcome"]
# **What happened.** It runs away. `detach` makes a second name for the same numbers, and `policy.data -=` changes them under both names. So the log-ratio is always zero, every step pulls as hard as the first, and the rejected completion falls for ever. The flat loss shows none of it.

# %% [markdown]
# ### Exercise 9.5: repair exhibit F
#
# *3 minutes.* Return the logits of the policy and of the reference after training. Leave `theta` as it was.


# %% tags=["exercise"]
def train_pair(theta, chosen, rejected, beta, learning_rate, steps):
    """(Y,) logits, a pair -> (Y,) logits of the policy and of the reference after training (Eq. 7)."""
    ### BEGIN SOLUTION
    policy, reference = theta.clone().requires_grad_(), theta.clone()
    for _ in range(steps):
        logratios = policy.log_softmax(-1) - reference.log_softmax(-1)
        loss = -F.logsigmoid(beta * (logratios[chosen] - logratios[rejected]))
        (gradient,) = torch.autograd.grad(loss, policy)
        policy.data -= learning_rate * gradient
    return policy.detach(), reference
    ### END SOLUTION


# %% tags=["check"]
check("9.5", train_pair)

# %% [markdown]
# ## Which property does it break?
#
# A bug is found by a property that the right program has and the wrong one hasn't. None of these needs a known answer to compare with:

# %%
for name, meaning in PROPERTIES.items():
    print(f"{name:20} {meaning}")

# %% [markdown]
# ### Exercise 9.6: diagnosis
#
# *9 minutes.* For each exhibit, "A" to "F", return the name of a property that it breaks, as printed above. A program with this exhibit in it, and everything else right, is tested on random inputs: your answer is right if that test fails. Some exhibits break more than one of these, some of these are broken by none.


# %% tags=["exercise"]
def diagnosis(exhibit):
    """A letter -> the name of a property that this exhibit breaks."""
    ### BEGIN SOLUTION
    found = {"A": "sums to one", "B": "starts at log 2", "C": "micro-batches agree"}
    found |= {"D": "good ones count", "E": "sums to one", "F": "reference stays"}
    return found[exhibit]
    ### END SOLUTION


# %% tags=["check"]
check("9.6", diagnosis)

# %% [markdown] tags=["answer"]
# Exhibit E is the one that misleads: it treats padding with care, and padding is ignored indeed. But without their end, *stop* is contained in *go stop*, and the probabilities of all completions sum to more than one.

# %% [markdown]
# ## No bug: both fall
#
# The rest of this notebook is about right code. Why does the log-probability of the *chosen* completion fall? This was asked in [an issue of the DPO paper's code](https://github.com/eric-mitchell/direct-preference-optimization/issues/32), where one of its authors answers, and in [one of TRL](https://github.com/huggingface/trl/issues/800). The loss contains only the difference of the two, and where completions share parameters, a step along what sets the chosen one apart may help a third completion, which has more of it, even more.
#
# The smallest example: each completion has one feature $\phi_y$ and the logit $v\,\phi_y$, with a single parameter $v$. The chosen one has $\phi=1$, the rejected one 0, and a third, which is in no pair, 3. A small step makes the chosen one fall if and only if ([D13.1])
#
# $$\langle\phi_w,\delta\rangle<E_\pi\langle\phi,\delta\rangle,\qquad\delta=\phi_w-\phi_l.$$
#
# **Predict before you run.** At the start, all three are equally likely. Does the chosen one fall?

# %%
features, v = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
path, losses = [], []
for _ in range(25):
    v.requires_grad_()
    logps = (v * features).log_softmax(-1)
    ratios = logps - torch.zeros(3, dtype=torch.float64).log_softmax(-1)
    loss = -F.logsigmoid(ratios[0] - ratios[1])  # beta = 1
    (slope,) = torch.autograd.grad(loss, v)
    v = v.detach() - 0.2 * slope
    path.append(logps.detach())
    losses.append(loss.item())

# %%
print(f"φ_w δ = {features[0]:.2f}, and its mean over the policy at the start: {features.mean():.2f}")
figure, (left, right) = plt.subplots(1, 2)
left.plot(losses, color=figures.BLUE)
left.set(xlabel="gradient step", ylabel="loss (nats)")
kinds = [("chosen", figures.BLUE, "-"), ("rejected", figures.RED, "--"), ("in no pair", figures.PURPLE, ":")]
for y, (name, colour, style) in enumerate(kinds):
    line = [logps[y] for logps in path]
    right.plot(line, style, color=colour)
    right.text(25, line[-1], name, color=colour, va="center")
right.set(xlabel="gradient step", ylabel="log π(y) (nats)", xlim=(0, 40))
figures.show(figure, "9.f")

# %% [markdown] tags=["outcome"]
# **What happened.** It falls, because the mean is larger. The rejected one falls further, so the margin grows and the loss is content. All that both lose goes to a completion nobody was asked about. With one pair in a *table* this cannot happen ([D13.1]), so it is the network that does it, not the loss alone. Log both log-probabilities, not only the loss.

# %% [markdown]
# ## No bug: what was never compared
#
# Pairs say nothing about completions that are in none of them. Gradient descent on a table then has a definite end ([D11.9]). With $\bar r_C$ the plain average of the rewards of all completions that comparisons connect with $y$,
#
# $$\theta^\infty_y=\theta_{{\rm ref},y}+\frac{r_y-\bar r_C}\beta,$$
#
# and a completion without comparisons keeps its logit. (Not its probability: that depends on all logits.)
#
# **Predict before you run.** Four completions have rewards 0, 0, 3 and 4; the last one is never shown. What becomes of it? And does it matter which optimiser is used, if both reach the same loss?


# %%
def ends(optimizer_class, pairs, ref_logps, steps=500, **options):
    """The policy and the loss at the end of training on pairs, beta = 1."""
    policy = dpo.TabularPolicy(ref_logps)
    optimizer = optimizer_class(policy.parameters(), **options)
    for _ in range(steps):
        loss, _ = dpo_objective(policy(), ref_logps, pairs, beta=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy().detach().exp()[0], loss.item()


ref_logps = torch.tensor([[0.1, 0.3, 0.4, 0.2]], dtype=torch.float64).log()

# %%
rewards = torch.tensor([[0.0, 0.0, 3.0, 4.0]], dtype=torch.float64)
pairs = dpo.expected_pairs(rewards, dpo.all_sets(torch.tensor([[True, True, True, False]])))
descent, loss = ends(torch.optim.SGD, pairs, ref_logps, lr=safe_learning_rate(pairs, beta=1.0))
adam, loss_of_adam = ends(torch.optim.Adam, pairs, ref_logps, lr=0.1)
optimal = dpo.optimal_logps(ref_logps, rewards, beta=1.0).exp()[0]
kinds = {"π_ref": ref_logps.exp()[0], "gradient descent": descent, "Adam": adam, "π*": optimal}
looks = zip([figures.BLACK, figures.ORANGE, figures.GREEN, figures.BLUE], ["", "/", ".", ""])
print(f"loss at the end: gradient descent {loss:.6f}, Adam {loss_of_adam:.6f}")
mean = rewards[0, :3].mean()
limit = torch.cat([ref_logps[0, :3] + rewards[0, :3] - mean, ref_logps[0, 3:]]).softmax(-1)
print("the formula", limit.round(decimals=4), "\ndescent    ", descent.round(decimals=4))

# %%
figure, axes = plt.subplots()
for place, ((name, chances), (colour, hatch)) in enumerate(zip(kinds.items(), looks)):
    places = torch.arange(4) + 0.2 * place - 0.3
    axes.bar(places, chances, 0.2, label=name, color=colour, hatch=hatch, edgecolor="white")
names = ["reward 0", "reward 0", "reward 3", "reward 4,\nnever shown"]
axes.set(xticks=range(4), xticklabels=names, xlabel="completion", ylabel="probability")
axes.legend(loc="upper left")
figures.show(figure, "9.g")

# %% [markdown] tags=["outcome"]
# **What happened.** The best completion *falls*, because the logit of a good one that was shown has risen past it. It falls by different amounts, at the same loss: each step of gradient descent raises one logit as much as it lowers another, which keeps the sum of the three logits; Adam rescales every logit's gradient by itself and does not keep it. The data leave open how the shown and the unshown compare, and the optimiser decides. Only pairs that contain the completion can help, and what the reference seldom says is seldom in any ([D13.2]).

# %% [markdown]
# ## No bug: labels without noise
#
# Suppose that the same completion is always chosen. Then the loss of the pair has no minimum: each larger margin is better ([D13.4]). With a step of length $\eta$ on a table, and $c=2\eta\beta^2$, the margin is pinned between two laws at every step $t$ ([D11.6]):
#
# $$1+ct\le u_t+e^{u_t}\le1+ct\,e^{c/2},$$
#
# so that $u_t$ grows like $\log(ct)$ and $\pi(y_l)/\pi(y_w)$ falls like $t^{-1/\beta}$.
#
# **Predict before you run.** One pair, once always won by the first completion and once nine times in ten. Where do the margins go? And which β destroys the loser faster, 1 or 0.5, when $\eta\beta^2$ is the same?


# %%
def margins(beta, won, steps=1000):
    """Training on one pair with c = 1: the margin before each step."""
    even, path = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), []
    both = torch.tensor([[0, 1], [1, 0]])
    pairs = dpo.Rankings(torch.zeros(2).long(), both, torch.tensor([won, 1 - won]).double())
    theta = even.clone().requires_grad_()
    for _ in range(steps):
        path.append(beta * (theta[0, 0] - theta[0, 1]).item())
        loss, _ = dpo_objective(theta.log_softmax(-1), even, pairs, beta=beta)
        theta.data -= 0.5 / beta**2 * torch.autograd.grad(loss, theta)[0]
    return torch.tensor(path, dtype=torch.float64)


# %%
figure, (left, right) = plt.subplots(1, 2)
for won, name, colour, style in [(1.0, "always", figures.RED, "-"), (0.9, "9 in 10", figures.BLUE, "--")]:
    left.semilogx(margins(1.0, won), style, color=colour)
    left.text(*(6, 4.6) if won == 1 else (40, 1.4), name, color=colour)
left.set(xlabel="gradient step", ylabel="margin u (nats)", xlim=(1, 1200), ylim=(0, 8))
for beta, colour, style in [(1.0, figures.RED, "-"), (0.5, figures.PURPLE, "--")]:
    right.loglog((-margins(beta, 1.0) / beta).exp(), style, color=colour)
    right.text(*(40, 0.05) if beta == 1 else (3, 1e-4), f"β = {beta:g}", color=colour)
right.set(xlabel="gradient step", ylabel="π(loser) / π(winner)", xlim=(1, 1200))
figures.show(figure, "9.h")

# %%
path = margins(1.0, 1.0)
for t in [10, 100, 999]:
    low, high = 1 + t, 1 + t * torch.tensor(0.5).exp()
    print(f"step {t:3d}: {low:.1f} <= {path[t] + path[t].exp():.1f} <= {high:.1f}")
print(f"nine in ten: the margin ends at {margins(1.0, 0.9)[-1]:.4f}; log 9 is {torch.tensor(9.0).log():.4f}")

# %% [markdown] tags=["outcome"]
# **What happened.** A few contradicting labels give the margin a place to stop, the logarithm of the odds. Without any, it grows like $\log t$ for ever, and β does not hold the policy back: the same margin is a log-ratio of $u/\beta$, so half the β destroys the loser with twice the power of $t$. What keeps such training finite is where it is stopped. (IPO and cDPO have an optimum here, [D13.4].)

# %% [markdown]
# ## An open question
#
# Eight properties, six exhibits. One may ask the other way round: is there a wrong program that all eight accept, and whose training ends at another policy? Find one, and a property that it breaks. Then again. Does this end? A short list of properties that *only* right programs have would be worth more than any number of examples; for the loss alone [D13.6] has a beginning, a description of a world that finds common mistakes. For a whole program, with its tokeniser, its padding and its floating-point numbers, we know of none.
