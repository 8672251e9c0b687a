# %% [markdown]
# # 11 · Reading a training log
#
# **Before this:** notebooks 3 and 4, or what they show: the DPO loss of a margin $u$, β times the difference of a pair's log-ratios, and the pull σ(−u) of a pair ·
# **Read:** 25 minutes · **Solve:** 30 minutes · **Difficulty:** ●●○ · **Derivations:** [D2.1], [D2.2], [D4.1], [D4.3], [D4.4], [D5.1], [D13.1], [D13.4], [D13.7]
#
# **The claim.** A trainer writes a dozen numbers every few steps, and most of them are tied to one another by identities. Where an identity is broken, there is a mistake in the program, whatever the data are. Where none is broken, the numbers say how good a policy is, and a loss that no longer falls may be as low as people's contradictions allow.

# %% tags=["setup"]
import json
import math

import torch
import torch.nn.functional as F
from dpo_course import figures, training_logs
from dpo_course.checks import check
from matplotlib import pyplot as plt

import dpo_minimal as dpo

figures.use_style()


# %% [markdown]
# ## What is written
#
# A trainer averages over the pairs of a step. `loss` is the mean of $-\log\sigma(u)$ (Eq. 7, [D4.3]). `logps/chosen` is the mean of $\log\pi(y_w|x)$, `rewards/chosen` that of the implicit reward ([D4.1]), and the same for the rejected completions; `rewards/margins` is the mean of $u$, and `rewards/accuracies` the share of pairs with $u>0$:
#
# $$\hat r(x,y)=\beta\log\frac{\pi(y|x)}{\pi_{\rm ref}(y|x)},\qquad u=\hat r(x,y_w)-\hat r(x,y_l).$$
#
# The names are those of TRL's `DPOTrainer`; this package writes the same. Names that begin with `eval_` are of held-out pairs, the same ones every time. The next cell trains a small policy on pairs that 400 people labelled, and reads its log. All six runs of this notebook say that they use $\beta=\frac12$.


# %%
def read(path):
    """A log file -> the records of training, and those of evaluation."""
    records = json.loads(path.read_text())["log_history"]
    return [r for r in records if "loss" in r], [r for r in records if "eval_loss" in r]


training, evaluation = read(training_logs.write_log("B"))
for record in (training[1], training[-1]):
    print({name: round(value, 3) for name, value in record.items()})

# %% [markdown]
# **Predict before you run.** The first record was written before the first update, when policy and reference were the same. Which of its numbers do you know without looking? And one of them looks like a very bad result, although it is none: which?

# %%
figure, (left, right) = plt.subplots(1, 2)
steps = [record["step"] for record in training]
left.plot(steps, [record["loss"] for record in training], color=figures.BLUE)
left.set(xlabel="step", ylabel="loss (nats)")
for name, colour, style in (("chosen", figures.BLUE, "-"), ("rejected", figures.RED, "--")):
    right.plot(steps, [r[f"rewards/{name}"] for r in training], style, color=colour, label=name)
right.set(xlabel="step", ylabel="implicit reward (nats)")
right.legend()
figures.show(figure, "11.a")
print({name: round(value, 3) for name, value in training[0].items()})

# %% [markdown] tags=["outcome"]
# **What happened.** All rewards are 0, because $\pi=\pi_{\rm ref}$; so every margin is 0 and the loss is $\log2=0.693$, whatever the pairs are. The accuracy is 0 as well: it counts margins *above* zero, and a tie is none. After one update it is near its later value. Only the log-probabilities depend on the model.

# %% [markdown]
# ## Identities
#
# What holds for every pair and is linear holds for means too: `rewards/margins` is `rewards/chosen` minus `rewards/rejected`, in every record. The loss is not linear in the margin. But $-\log\sigma$ is convex, and the mean of a convex function is at least the function of the mean (Jensen's inequality, [D13.7]). What does this say about `loss` and `rewards/margins`?
#
# ### Exercise 11.1: can this record be right?
#
# *5 minutes.* The losses and the mean margins of $T$ records come in. Which records are possible? Return a mask: `True` where *some* margins have this mean and this mean loss.


# %% tags=["exercise"]
def is_possible(losses, margins):
    """(T,) mean losses, (T,) mean margins -> (T,) booleans."""
    ### BEGIN SOLUTION
    return losses >= F.softplus(-margins)
    ### END SOLUTION


# %% tags=["check"]
check("11.1", is_possible)

# %% [markdown] tags=["answer"]
# Equality needs margins that are all equal. There is no upper bound: the further apart the margins are, the larger is the loss. So a record below the bound shows that the loss was not computed from the margins that are logged.

# %% [markdown]
# ### Exercise 11.2: which β was used?
#
# *5 minutes.* The reference stays where it is. So between two evaluations on the same pairs its log-probabilities cancel, and rewards and log-probabilities change together. Return the β of a run. It need not have begun at the reference, so that the first reward need not be 0.


# %% tags=["exercise"]
def beta_used(rewards, logps):
    """(T,) rewards of chosen completions in T evaluations, (T,) their log-probabilities -> β."""
    ### BEGIN SOLUTION
    return (rewards[-1] - rewards[0]) / (logps[-1] - logps[0])
    ### END SOLUTION


# %% tags=["check"]
check("11.2", beta_used)

# %% [markdown]
# ## As good as it can be
#
# The loss of the run above fell to 0.5 and stayed there, and the accuracy is below 0.8. Is the learning rate too small? Should it train longer?
#
# People contradict themselves. If a share $p$ of them prefers the first completion of a pair, the mean loss of its labels is $-p\log\sigma(u)-(1-p)\log\sigma(-u)$, which is least at $\sigma(u)=p$ ([D2.1], [D2.2]). No policy comes below that, and a policy at that margin is right: it is π\*'s ([D4.4]).
#
# ### Exercise 11.3: the least loss and the best accuracy
#
# *7 minutes.* $N$ pairs are labelled by endlessly many people, and pair $i$'s first completion is preferred with probability $p_i$. What are the least mean loss and the largest accuracy that any policy can have?


# %% tags=["exercise"]
def best_possible(chances):
    """(N,) probabilities p -> (the least loss in nats, the largest accuracy)."""
    ### BEGIN SOLUTION
    entropy = -(chances * chances.log() + (1 - chances) * (1 - chances).log())
    return entropy.mean(), torch.maximum(chances, 1 - chances).mean()
    ### END SOLUTION


# %% tags=["check"]
check("11.3", best_possible)

# %% [markdown]
# **Predict before you run.** The people of this run are known, so both bounds are. How far above the first is the loss at the end? Can the loss of a *batch* be below it?

# %%
p, late = training_logs.chances(), training[len(training) // 2 :]
floor, ceiling = -(p * p.log() + (1 - p) * (1 - p).log()).mean(), torch.maximum(p, 1 - p).mean()
figure, (left, right) = plt.subplots(1, 2)
for axes, name, bound in ((left, "loss", floor), (right, "rewards/accuracies", ceiling)):
    axes.plot(steps, [record[name] for record in training], color=figures.BLUE)
    axes.axhline(bound, color=figures.BLACK, linestyle="--")
    axes.set(xlabel="step")
left.set(ylabel="loss (nats)")
right.set(ylabel="accuracy")
figures.show(figure, "11.b")

# %%
for name, bound in (("loss", floor), ("rewards/accuracies", ceiling)):
    print(f"{name:18} {sum(r[name] for r in late) / len(late):.3f} in the second half; bound {bound:.3f}")

# %% [markdown] tags=["outcome"]
# **What happened.** The loss has reached its floor and goes up and down around it: a batch of 64 labels contains more or fewer contradictions than the average, by chance. The accuracy does the same around its ceiling. Nothing is wrong, and nothing is left to gain. Before you change a learning rate, ask how often people agree: have some pairs labelled twice.

# %% [markdown]
# ## Six logs
#
# The run above is one of six, "B". The others differ from it in one thing each; D also trains three times as long. They are trained on pairs of the same people, and three of them have a mistake in the program.
#
# **Predict before you run.** For each of the five other logs below: what is the matter, and is it a mistake at all? Look at the first value, at whether both rewards move, and compare with log B.

# %%
paths = {letter: training_logs.write_log(letter) for letter in "ABCDEF"}
logs = {letter: read(path) for letter, path in paths.items()}
lines = {"loss": (figures.BLACK, ":"), "rewards/chosen": (figures.BLUE, "-")}
lines["rewards/rejected"] = (figures.RED, "--")

# %%
figure, panels = plt.subplots(2, 3, figsize=(13, 7))
for (letter, (training, _)), axes in zip(logs.items(), panels.flat):
    steps = [record["step"] for record in training]
    for name, (colour, style) in lines.items():
        axes.plot(steps, [record[name] for record in training], style, color=colour, label=name)
    axes.set(title=f"log {letter}", xlabel="step", ylabel="nats")
panels[0, 0].legend()
figures.show(figure, "11.c")

# %% [markdown]
# The same in numbers: the first record, and the last evaluation.

# %%
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
print("       ", *(f"{name:>18}" for name in NAMES))
for letter, (training, evaluation) in logs.items():
    print(f"{letter} first ", *(f"{training[0][name]:18.3f}" for name in NAMES))
    print(f"{letter} last  ", *(f"{evaluation[-1]['eval_' + name]:18.3f}" for name in NAMES))

# %% [markdown]
# Now ask the library. `dpo.diagnose` reads a log and checks what must hold; on the command line it is `python -m dpo_minimal doctor FILE`. A healthy log has no finding.

# %%
for letter, path in paths.items():
    findings = dpo.diagnose(path, beta=training_logs.BETA)
    print(f"log {letter}:", "no finding" if not findings else "")
    for finding in findings:
        print(f"   {finding.name}: {finding.seen}\n      {finding.meaning}")

# %% [markdown] tags=["outcome"]
# **What happened.** A, C and E are mistakes. In A no reward ever moves although both log-probabilities do: the reference is not a copy, it is the policy itself. In C the first loss is not $\log2$: the reference is another model than the one from which training starts; look at its last numbers, which nobody could tell from B's. In E the rewards move by a tenth of what the log-probabilities do: β is 0.1 and not 0.5, so the policy goes five times as far. D and F have right programs. In D one person labelled each pair, so that every pair can be satisfied and no margin is large enough. In F the completions share a parameter.
#
# ### Prove it
#
# A diagnosis is right if the finding goes when its cause goes. The next cell undoes in each run the one thing that was planted, trains again with the same seed, and asks again. Then A, C, E and F are run B, and D is B with more steps.

# %%
for letter in "ACDEF":
    path = training_logs.write_log(letter, repaired=True)
    found = [finding.name for finding in dpo.diagnose(path, beta=training_logs.BETA)]
    last = read(path)[1][-1]
    print(f"log {letter}, repaired: {found or 'no finding'}; loss of held-out pairs {last['eval_loss']:.3f}")

# %% [markdown]
# ## Log F: both fall
#
# The chosen completions of log F become less likely, while loss and accuracy look well. People ask about this more often than about anything else, and the usual advice is a smaller learning rate. Notebook 9 has the reason: a network has no number of its own for each completion. In log F there is a single weight $v$, and completion $y$ has the logit $v\,\phi_y$ besides its old one. A step that raises $v$ because the chosen completion has more of the feature helps a third completion, in no pair, that has most of it ([D13.1]).
#
# ### Exercise 11.4: do smaller steps prevent it?
#
# *10 minutes.* **Predict first**: with a tenth of the learning rate and ten times as many steps, does the chosen completion fall less, more, or by about the same? Then train it. One prompt has three completions, equally likely at first, and the logits $v\,\phi$; the first is chosen, the second rejected, the third in no pair. Start at $v=0$, which is the reference, and go down the gradient of the DPO loss. Return how much the log-probability of the chosen completion has changed after `steps` steps of `rate`, and after `10 * steps` steps of `rate / 10`.


# %% tags=["exercise"]
def large_and_small_steps(features, beta, rate, steps):
    """(3,) features -> two changes of log pi(chosen), in nats."""

    ### BEGIN SOLUTION
    def change(rate, steps):
        v = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            logratios = (v * features).log_softmax(-1) + math.log(3)
            loss = -F.logsigmoid(beta * (logratios[0] - logratios[1]))
            (slope,) = torch.autograd.grad(loss, v)
            v.data -= rate * slope
        return ((v * features).log_softmax(-1) + math.log(3))[0].detach()

    return change(rate, steps), change(rate / 10, 10 * steps)
    ### END SOLUTION


# %% tags=["check"]
check("11.4", large_and_small_steps)

# %% [markdown]
# **Predict before you run.** The next figure follows both trainings: the change of the chosen completion against the *margin* that has been reached. Are the two lines the same?

# %%
phi, paths = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64), {}
for rate in (1.0, 0.1):
    v, paths[rate] = 0.0, []
    for _ in range(round(12 / rate)):
        change = (v * phi).log_softmax(-1)[0] + math.log(3)
        paths[rate].append([v, change])  # with beta = 1 and features 1 and 0 the margin is v
        v += rate * torch.sigmoid(torch.tensor(-v)).item()

# %%
figure, axes = plt.subplots()
for (rate, path), style in zip(paths.items(), ("o", "-")):
    axes.plot(*torch.tensor(path).T, style, label=f"learning rate {rate:g}")
axes.set(xlabel="margin (nats)", ylabel="change of log π(chosen) (nats)")
axes.legend()
figures.show(figure, "11.d")
print(f"at a margin of 1: {phi.log_softmax(-1)[0] + math.log(3):.2f} nats, whatever the steps were")

# %% [markdown] tags=["outcome"]
# **What happened.** They are one line. With one weight the margin says where $v$ is, and so where everything is; the steps only say how soon. A smaller rate over the same number of steps falls less because it *learns* less. What helps is a model that can tell the third completion from the chosen one, pairs in which the third one is rejected, or a term that holds the chosen one.

# %% [markdown]
# ## Log D: accuracy 1
#
# In log D the accuracy of training is 1 and that of held-out pairs is near 0.7, where 0.79 is possible. One label per pair is what most data sets have.
#
# ### Exercise 11.5: what the accuracy of training promises
#
# *7 minutes.* A pair is labelled by $n$ people, each of whom says "the first" with probability $p$, and a policy learns to order it as most of them do. What accuracy does it have *on these labels*, on average over the labels that may come? For $n=1$ it is 1. **Predict** it for $p=0.7$ and $n=2$, and what it tends to as $n$ grows.


# %% tags=["exercise"]
def accuracy_seen(chance, people):
    """p, n -> the expected share of the n labels that agree with their majority."""
    ### BEGIN SOLUTION
    total = 0.0
    for k in range(people + 1):
        probability = math.comb(people, k) * chance**k * (1 - chance) ** (people - k)
        total += probability * max(k, people - k) / people
    return total
    ### END SOLUTION


# %% tags=["check"]
check("11.5", accuracy_seen)

# %%
people, seen = range(1, 31), {0.7: [], 0.5: []}
for chance, line in seen.items():
    for n in people:
        said = torch.arange(n + 1, dtype=torch.float64)
        odds = torch.distributions.Binomial(n, torch.tensor(chance, dtype=torch.float64)).log_prob(said)
        line.append((odds.exp() * torch.maximum(said, n - said)).sum().item() / n)

# %%
figure, axes = plt.subplots()
for (chance, line), style in zip(seen.items(), ("-", "--")):
    axes.plot(people, line, style, label=f"p = {chance}")
    print(f"p = {chance}:", ", ".join(f"{n} people {line[n - 1]:.3f}" for n in (1, 2, 10, 30)))
axes.set(xlabel="people who label a pair", ylabel="accuracy on their labels", ylim=(0.48, 1.02))
axes.legend()
figures.show(figure, "11.e")

# %% [markdown] tags=["answer"]
# With two people it is 0.79 for $p=0.7$: half of the promise of a single label is gone, and the truth, $p$, is reached from above. Pairs about which nothing can be known look as if a policy had learnt them: the accuracy on a coin's labels is 1 with one person and still 0.57 with thirty. So compare accuracies only on pairs that were not trained on, and margins too.

# %% [markdown]
# ## An open question
#
# The bounds of this notebook need the probabilities $p$, and real data have one label a pair. Two labels for a few hundred pairs would give an estimate of the floor ([D11.18] tests such data for more). How many pairs have to be labelled twice before you can say, with an error of a hundredth of a nat, that a loss is at its floor?
