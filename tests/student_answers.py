"""Answers as students write them, to the central exercises and to many others: right ones, and the mistakes
of many.

They are written without a look at the checks' own mistakes: with loops, in another order, by another formula.
Each wrong one stands beside a part of the name that the check must find for it.
"""

import functools
import math

import torch
from dpo_course.training import logps_of_rows, small_gpt

# ------------------------------------------------------------------------------- 1 preferences


def chain_by_odds(first_over_second, second_over_third):
    odds = (first_over_second / (1 - first_over_second)) * (second_over_third / (1 - second_over_third))
    return odds / (1 + odds)


def chain_as_two_coins(p, q):
    return [float(a * b) for a, b in zip(p, q)]


def chain_of_odds(p, q):
    return (1 / p - 1) ** -1 * (1 / q - 1) ** -1


def pool_by_training(shares, gaps):
    gap = torch.zeros((), dtype=torch.float64, requires_grad=True)
    won = sum(share / (1 + torch.exp(-g)) for share, g in zip(shares, gaps))
    for _ in range(60):  # Newton's steps on the loss of the pool
        chance = torch.sigmoid(gap.detach())
        gap.data -= (chance - won) / (chance * (1 - chance))
    return gap.detach()


def pool_averaged(shares, gaps):
    return sum(share * gap for share, gap in zip(shares, gaps))


def pool_as_a_share(shares, gaps):
    return sum(share * math.exp(gap) / (1 + math.exp(gap)) for share, gap in zip(shares, gaps))


# ------------------------------------------------------------------------------- 2 the optimum


def filter_by_its_mass(ref_logps, kept):
    return torch.stack([-torch.log(row[stays].exp().sum()) for row, stays in zip(ref_logps, kept)])


def filter_the_other_way(ref_logps, kept):
    return -torch.log((ref_logps.exp() * ~kept).sum(-1))


def filter_not_normalised(ref_logps, kept):
    policy = ref_logps.exp() * kept
    return (policy * (ref_logps - ref_logps)).sum(-1)


def price_from_two_values_of_J(logps, ref_logps, rewards):
    def advantage(beta):
        value = ((rewards - beta * (logps - ref_logps)) * logps.exp()).sum(-1)
        return value - (rewards * ref_logps.exp()).sum(-1)

    return advantage(0) / (advantage(0) - advantage(1))


def price_without_the_references_reward(logps, ref_logps, rewards):
    return (logps.exp() * rewards).sum(-1) / (logps.exp() * (logps - ref_logps)).sum(-1)


def overoptimise_by_loops(ref_logps, rewards, believed, betas):
    earned = []
    for beta in betas:
        parts = [math.exp(p + b / beta) for p, b in zip(ref_logps, believed)]
        earned.append(sum(part * r for part, r in zip(parts, rewards)) / sum(parts))
    return max(earned), earned[-1]


def overoptimise_what_is_true(ref_logps, rewards, believed, betas):
    return overoptimise_by_loops(ref_logps, rewards, rewards, betas)


def optimum_by_loops(ref_logps, rewards, beta):
    table = torch.empty_like(ref_logps)
    for x in range(len(ref_logps)):
        strengths = [math.exp(p) * math.exp(r / beta) for p, r in zip(ref_logps[x], rewards[x])]
        for y, strength in enumerate(strengths):
            table[x, y] = math.log(strength / sum(strengths))
    return table


def optimum_with_beta_upside_down(ref_logps, rewards, beta):
    p = ref_logps.exp() * (rewards * beta).exp()
    return (p / p.sum(-1, keepdim=True)).log()


def optimum_without_reference(ref_logps, rewards, beta):
    p = (rewards / beta).exp()
    return (p / p.sum(-1, keepdim=True)).log()


def optimum_not_normalised(ref_logps, rewards, beta):
    return (ref_logps.exp() * (rewards / beta).exp()).log()


def optimum_as_probabilities(ref_logps, rewards, beta):
    p = ref_logps.exp() * (rewards / beta).exp()
    return p / p.sum(-1, keepdim=True)


def optimum_of_one_big_table(ref_logps, rewards, beta):
    p = ref_logps.exp() * (rewards / beta).exp()
    return (p / p.sum()).log()


def optimum_tilted_backwards(ref_logps, rewards, beta):
    return torch.log_softmax(ref_logps - rewards / beta, dim=1)


# ------------------------------------------------------------------------------- 3.1 the DPO loss


def loss_by_softplus(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    return torch.nn.functional.softplus(beta * (policy_rejected - policy_chosen + ref_chosen - ref_rejected))


def loss_with_beta_on_the_policy_only(pc, pr, rc, rr, beta):
    return -torch.log(torch.sigmoid(beta * pc - beta * pr - rc + rr))


def loss_scaled(pc, pr, rc, rr, beta):
    return -beta * torch.log(torch.sigmoid(pc - rc - pr + rr))


def loss_without_reference(pc, pr, rc, rr, beta):
    return torch.log(1 + torch.exp(-beta * (pc - pr)))


def loss_of_the_wrong_winner(pc, pr, rc, rr, beta):
    return torch.log(1 + torch.exp(beta * (pc - rc) - beta * (pr - rr)))


def loss_without_log(pc, pr, rc, rr, beta):
    return -1 / (1 + torch.exp(-beta * (pc - rc - pr + rr)))


def loss_averaged(pc, pr, rc, rr, beta):
    return torch.mean(torch.log(1 + torch.exp(-beta * (pc - rc - pr + rr))))


def loss_of_ratios(pc, pr, rc, rr, beta):
    return torch.log(1 + torch.exp(-beta * (pc / rc - pr / rr)))


def loss_as_a_hinge(pc, pr, rc, rr, beta):
    return torch.relu(1 - beta * (pc - rc - pr + rr))


def loss_centred(pc, pr, rc, rr, beta):
    margin = beta * (pc - rc - pr + rr)
    return torch.log(1 + torch.exp(margin.mean() - margin))


# ------------------------------------------------------------------------------- 3.3 training, 3.4 rounds


def train_by_backward(ref_logps, wins, beta, learning_rate, steps, clear=True):
    theta = torch.nn.Parameter(ref_logps.clone())
    chosen, rejected = wins.nonzero().T
    counts = wins[chosen, rejected]
    for _ in range(steps):
        if clear:
            theta.grad = None
        logps = torch.log_softmax(theta, 0)
        h = (logps - ref_logps)[chosen] - (logps - ref_logps)[rejected]
        (counts @ torch.nn.functional.softplus(-beta * h) / counts.sum()).backward()
        with torch.no_grad():
            theta -= learning_rate * theta.grad
    return torch.log_softmax(theta.detach(), 0)


def train_without_clearing(*given):
    return train_by_backward(*given, clear=False)


def train_on_every_pair_alike(ref_logps, wins, *settings):
    return train_by_backward(ref_logps, (wins > 0).double(), *settings)


def rounds_by_products(ref_logps, rewards, beta, rounds):
    parts = ref_logps.exp() * torch.exp(rewards / beta) ** rounds
    return torch.log(parts / parts.sum())


def rounds_that_cost_more(ref_logps, rewards, beta, rounds):
    parts = ref_logps.exp() * torch.exp(rewards / (beta * rounds))
    return torch.log(parts / parts.sum())


def rounds_that_stop(ref_logps, rewards, beta, rounds):
    return rounds_by_products(ref_logps, rewards, beta, 1)


# ------------------------------------------------------------------------------- 4.1 the gradient weight


def weight_from_the_loss(pc, pr, rc, rr, beta):
    return beta * (1 - torch.exp(-loss_by_softplus(pc, pr, rc, rr, beta)))


def weight_of_the_confident(pc, pr, rc, rr, beta):
    return beta / (1 + torch.exp(-beta * ((pc - rc) - (pr - rr))))


def weight_without_beta_in_front(pc, pr, rc, rr, beta):
    return 1 / (1 + torch.exp(beta * ((pc - rc) - (pr - rr))))


def weight_without_beta_inside(pc, pr, rc, rr, beta):
    return beta / (1 + torch.exp((pc - rc) - (pr - rr)))


def weight_without_reference(pc, pr, rc, rr, beta):
    return beta * torch.sigmoid(beta * (pr - pc))


def weight_with_its_sign(pc, pr, rc, rr, beta):
    return -beta * torch.sigmoid(beta * ((pr - rr) - (pc - rc)))


def weight_as_the_slope_of_sigma(pc, pr, rc, rr, beta):
    chance = torch.sigmoid(beta * ((pc - rc) - (pr - rr)))
    return beta * chance * (1 - chance)


def weight_of_the_chosen_alone(pc, pr, rc, rr, beta):
    return beta / (1 + torch.exp(beta * (pc - rc)))


# ------------------------------------------------------------------------------- 4.4 what is left


def left_by_training(wins, losses, beta):
    margin, mean = 0.0, 1 / (wins + losses)
    for _ in range(500):
        agree, contradict = 1 / (1 + math.exp(margin)), 1 / (1 + math.exp(-margin))
        margin += mean * (wins * agree - losses * contradict)
    return mean * beta * (wins * agree + losses * contradict)


def left_after_one_step(wins, losses, beta):
    return beta * min(wins, losses) / (wins + losses)


# ------------------------------------------------------------------------------- 5.1 Plackett-Luce


def ranking_by_loops(ranked_rewards):
    total = torch.zeros(ranked_rewards.shape[:-1], dtype=torch.float64)
    for k in range(ranked_rewards.shape[-1]):
        strengths = ranked_rewards[..., k:].exp()
        total = total + (strengths[..., 0] / strengths.sum(-1)).log()
    return total


def ranking_with_all_in_every_place(ranked_rewards):
    return torch.log_softmax(ranked_rewards, -1).sum(-1)


def ranking_from_the_wrong_end(ranked_rewards):
    strengths = ranked_rewards.exp()
    return (strengths / strengths.cumsum(-1)).log().sum(-1)


def ranking_by_pairs(ranked_rewards):
    K = ranked_rewards.shape[-1]
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    return sum(torch.sigmoid(ranked_rewards[..., i] - ranked_rewards[..., j]).log() for i, j in pairs)


def ranking_probability(ranked_rewards):
    return ranking_by_loops(ranked_rewards).exp()


def ranking_loss(ranked_rewards):
    return -ranking_by_loops(ranked_rewards)


def ranking_of_the_winner_only(ranked_rewards):
    return torch.log(ranked_rewards[..., 0].exp() / ranked_rewards.exp().sum(-1))


# ------------------------------------------------------------------------------- 5.2 to 5.5


def first_places_one_by_one(policy_logps, ref_logps, m, beta):
    strengths = (beta * (policy_logps - ref_logps)).exp()
    chance = torch.ones(len(strengths), dtype=torch.float64)
    for k in range(m):
        chance = chance * strengths[:, k] / strengths[:, k:].sum(-1)
    return -chance.log()


def first_places_among_themselves(policy_logps, ref_logps, m, beta):
    return first_places_one_by_one(policy_logps[:, :m], ref_logps[:, :m], m, beta)


def normal_preference_by_erf(first, second):
    return torch.tensor(
        [0.5 + 0.5 * math.erf((a - b) / math.pi * 3**0.5 / 2**0.5) for a, b in zip(first, second)]
    )


def normal_preference_by_torchs_distribution(first, second):
    return torch.distributions.Normal(0, math.pi / 3**0.5).cdf(first - second)


def normal_preference_of_one_noise(first, second):
    return torch.distributions.Normal(0, math.pi / 6**0.5).cdf(first - second)


def too_small_by_simulation(K):
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(40_000, K, generator=generator).argsort(-1)[:, 0].double()
    coins = torch.rand(40_000, K - 1, generator=generator).round().sum(-1)
    return places.std() / coins.std()


def too_small_by_variances(K):
    return (K + 1) / 3


# ------------------------------------------------------------------------------- 6.1 sequences


def sequence_by_loops(logits, ids, prompt_lengths, lengths):
    rows = []
    for row in range(len(ids)):
        total = 0.0
        for place in range(int(prompt_lengths[row]), int(lengths[row])):
            chances = logits[row, place - 1].softmax(-1)
            total += math.log(chances[ids[row, place]])
        rows.append(total)
    return torch.tensor(rows, dtype=torch.float64)


def _sums(logits, ids, begin, end, *, shift=1):
    chances = torch.log_softmax(logits, -1)
    rows = [
        sum((chances[b, t - shift, ids[b, t]] for t in range(int(begin[b]), int(end[b]))), torch.zeros(()))
        for b in range(len(ids))
    ]
    return torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in rows])


def sequence_mean(logits, ids, prompt_lengths, lengths):
    return _sums(logits, ids, prompt_lengths, lengths) / (lengths - prompt_lengths)


def sequence_with_its_prompt(logits, ids, prompt_lengths, lengths):
    return _sums(logits, ids, torch.ones_like(lengths), lengths)


def sequence_with_its_padding(logits, ids, prompt_lengths, lengths):
    return _sums(logits, ids, prompt_lengths, torch.full_like(lengths, ids.shape[1]))


def sequence_off_by_one(logits, ids, prompt_lengths, lengths):
    return _sums(logits, ids, prompt_lengths, lengths, shift=0)


def sequence_without_its_end(logits, ids, prompt_lengths, lengths):
    return _sums(logits, ids, prompt_lengths, lengths - 1)


def sequence_without_its_beginning(logits, ids, prompt_lengths, lengths):
    return _sums(logits, ids, prompt_lengths + 1, lengths)


# ------------------------------------------------------------------- 7 and 8: noise, and comparisons


def flips_by_halving(difference, margin):
    shares = []
    for d, m in zip(difference.tolist(), margin.tolist()):
        odds, seen = math.exp(d), math.exp(m)
        shares.append((odds - seen) / ((1 + seen) * (odds - 1)))
    return torch.tensor(shares, dtype=torch.float64)


def robust_by_steps(p, flip, told):
    """Newton's steps on the mean loss; where it has no minimum the slope far out says so."""
    share = p * (1 - flip) + (1 - p) * flip
    kept, opposite = share * (1 - told) - (1 - share) * told, (1 - share) * (1 - told) - share * told
    u = torch.zeros_like(p)
    for _ in range(50):
        slope = opposite * torch.sigmoid(u) - kept * torch.sigmoid(-u)
        u = (u - slope / ((1 - 2 * told) * torch.sigmoid(u) * torch.sigmoid(-u))).clamp(-20, 20)
    u[opposite < 0] = math.inf
    u[kept < 0] = -math.inf
    return u


def draws_one_by_one(ref_logps, rewards, beta):
    def best(n):
        levels = [(rewards <= v, rewards < v) for v in rewards]
        up = torch.stack([ref_logps.exp()[a].sum() ** n - ref_logps.exp()[b].sum() ** n for a, b in levels])
        tie = torch.stack([ref_logps.exp()[rewards == v].sum() for v in rewards])
        return ref_logps.exp() * up / tie

    goal = _worth_of(ref_logps, rewards, beta).exp()
    n = next(n for n in range(1, 1000) if best(n) @ rewards >= goal @ rewards)
    nats = [(q * (q.log() - ref_logps)).sum() for q in (best(n), goal)]
    return float(n), nats[0] - nats[1]


def ratios_by_hand(advantages, clip, step_size, steps):
    rho = torch.ones_like(advantages)
    for _ in range(steps):
        going = ((advantages >= 0) & (rho <= 1 + clip)) | ((advantages < 0) & (rho >= 1 - clip))
        rho = torch.where(going, rho * torch.exp(step_size * advantages * rho), rho)
    return rho


def bias_by_halving(logps, other_logps, rewards, lengths):
    def lead(share):
        met = torch.outer(logps.exp(), other_logps.exp())
        signs = [(s[:, None] - s[None]).sign() for s in (rewards, lengths)]
        return (met * ((1 - share) * signs[0] + share * signs[1])).sum()

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if lead(middle) * lead(0.0) > 0 else (low, middle)
    return torch.tensor(low, dtype=torch.float64)


# ------------------------------------------------------------------------------- 6.2, 6.4, 6.5


def without_end_by_beginnings(texts, logps):
    chances = dict(zip(texts, logps.exp().tolist()))
    beginnings = [text.rstrip(".") for text in texts]
    return sum(p for begin in beginnings for text, p in chances.items() if text.startswith(begin))


def without_end_by_lengths(texts, logps):
    return (logps.exp() * torch.tensor([len(text) for text in texts])).sum()


def means_by_bisection(ref_logps, rewards, lengths, beta):
    low, high = -10.0, 10.0
    for _ in range(50):
        c = (low + high) / 2
        p = ref_logps.exp() * (lengths * (rewards + c) / beta).exp()
        low, high = (low, c) if p.sum() > 1 else (c, high)
    return (p * lengths).sum()


def means_normalised_afterwards(ref_logps, rewards, lengths, beta):
    p = ref_logps.exp() * (lengths * rewards / beta).exp()
    return (p * lengths).sum() / p.sum()


def adapter_by_hand(seed, chosen, rejected, beta, steps, rate, *, weight=0.5, cut=True):
    policy, base = small_gpt(seed), small_gpt(seed)
    weights = list(policy.parameters())
    for _ in range(steps):
        h = (logps_of_rows(policy, chosen) - logps_of_rows(policy, rejected)).mean()
        for w, g in zip(weights, torch.autograd.grad(weight * beta * h, weights)):
            w.data += rate * g if cut else 0
    with torch.no_grad():
        before, after = (logps_of_rows(m, chosen) - logps_of_rows(m, rejected) for m in (base, policy))
    return after - before


adapter_that_cannot_move = functools.partial(adapter_by_hand, cut=False)
adapter_with_the_whole_weight = functools.partial(adapter_by_hand, weight=1.0)


# ------------------------------------------------------------------------------- 10 your own loss


def pulls_by_loops(pc, pr, rc, rr, lengths, beta, alpha):
    up, down = torch.empty_like(pc), torch.empty_like(pr)
    for i in range(len(pc)):
        wrong = 1 / (1 + math.exp(beta * (pc[i] - rc[i]) - beta * (pr[i] - rr[i])))
        up[i], down[i] = beta * wrong + alpha / lengths[i], beta * wrong
    return up, down


def pulls_with_the_second_term_on_both(pc, pr, rc, rr, lengths, beta, alpha):
    up, _ = pulls_by_loops(pc, pr, rc, rr, lengths, beta, alpha)
    return up, up


def pulls_per_batch(pc, pr, rc, rr, lengths, beta, alpha):
    return tuple(pull / len(pc) for pull in pulls_by_loops(pc, pr, rc, rr, lengths, beta, alpha))


def batch_by_loops(margins):
    mean, B = margins.mean(), len(margins)
    wrong = [1 / (1 + math.exp(u - mean)) for u in margins]
    return torch.tensor([sum((i == j) * w - w / B for j, w in enumerate(wrong)) / B for i in range(B)])


def batch_with_a_constant_mean(margins):
    u = margins.clone().requires_grad_()
    (-torch.nn.functional.logsigmoid(u - u.mean().detach())).mean().backward()
    return -u.grad


def batch_slope(margins):
    u = margins.clone().requires_grad_()
    (-torch.nn.functional.logsigmoid(u - u.mean())).mean().backward()
    return u.grad


def fitting_by_odds(pull, opposite_pull):
    odds = opposite_pull / pull
    return 1 - 1 / (1 + odds)


def fitting_the_other(pull, opposite_pull):
    return 1 / (1 + opposite_pull / pull)


def repaired_by_probabilities(pc, pr, rc, rr, beta):
    right = (beta * (pc - rc)).exp() / ((beta * (pc - rc)).exp() + (beta * (pr - rr)).exp())
    return 2 - 4 * right + 2 * right**2


def repaired_without_its_constant(pc, pr, rc, rr, beta):
    right = torch.sigmoid(beta * (pc - rc - pr + rr))
    return 2 * right**2 - 4 * right


def repaired_in_the_wrong_variable(pc, pr, rc, rr, beta):
    s = torch.sigmoid(-beta * (pc - rc - pr + rr))
    return 4 * (s**3 / 3 - s**4 / 4)


def optimum_by_walking(wins):
    answers = []
    for arrows in (wins, wins + wins.T):
        everywhere = True
        for start in range(len(wins)):
            seen, border = {start}, [start]
            while border:
                i = border.pop()
                new = {j for j in range(len(wins)) if arrows[i, j] > 0} - seen
                seen |= new
                border += new
            everywhere = everywhere and len(seen) == len(wins)
        answers.append(everywhere)
    return answers[0], answers[1]


def optimum_if_nobody_always_wins(wins):
    some = bool(((wins > 0).any(0) & (wins > 0).any(1)).all())
    return some, optimum_by_walking(wins)[1]


def optimum_of_dpo_twice(wins):
    return (optimum_by_walking(wins)[0],) * 2


def _worth_of(ref_logps, rewards, beta):
    worth = ref_logps.exp() * (rewards / beta).exp()
    return (worth / worth.sum()).log()


def squares_of_probabilities(pc, pr, rc, rr):
    wrong = 1 / (1 + ((pc - rc) - (pr - rr)).exp())
    return wrong * wrong


def own_by_thought(ref_logps, rewards):
    """A square error of probabilities rests at the probabilities, so at pi* of beta = 1."""
    return squares_of_probabilities, _worth_of(ref_logps, rewards, 1)


def own_by_training(ref_logps, rewards):
    """Two log-ratios that do not stand in it by their difference, trained by another optimiser."""

    def loss(pc, pr, rc, rr):
        return (pr - rr).exp() - (pc - rc)

    theta, wins = ref_logps.clone().requires_grad_(), torch.sigmoid(rewards[:, None] - rewards)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(150):
        logps = torch.log_softmax(theta, 0)
        table = loss(logps[:, None], logps[None], ref_logps[:, None], ref_logps[None])
        optimizer.zero_grad()
        (wins * table).fill_diagonal_(0).sum().backward()
        optimizer.step()
    return loss, torch.log_softmax(theta, 0).detach()


def own_without_an_end(ref_logps, rewards):
    return (lambda pc, pr, rc, rr: (pr - rr).exp() - (pc - rc).exp()), None


RIGHT = [
    ("1.1", chain_by_odds),
    ("1.5", pool_by_training),
    ("2.1", filter_by_its_mass),
    ("2.2", price_from_two_values_of_J),
    ("2.4", overoptimise_by_loops),
    ("3.3", train_by_backward),
    ("3.4", rounds_by_products),
    ("2.3", optimum_by_loops),
    ("3.1", loss_by_softplus),
    ("4.1", weight_from_the_loss),
    ("4.4", left_by_training),
    ("5.1", ranking_by_loops),
    ("5.2", first_places_one_by_one),
    ("5.3", normal_preference_by_erf),
    ("5.3", normal_preference_by_torchs_distribution),
    ("5.5", too_small_by_simulation),
    ("6.1", sequence_by_loops),
    ("6.2", without_end_by_beginnings),
    ("6.4", means_by_bisection),
    ("6.5", adapter_by_hand),
    ("10.1", pulls_by_loops),
    ("10.2", batch_by_loops),
    ("10.3", fitting_by_odds),
    ("10.4", repaired_by_probabilities),
    ("10.5", optimum_by_walking),
    ("7.1", flips_by_halving),
    ("7.2", robust_by_steps),
    ("8.2", draws_one_by_one),
    ("8.3", ratios_by_hand),
    ("8.4", bias_by_halving),
    ("10.6", own_by_thought),
    ("10.6", own_by_training),
    ("10.6", own_without_an_end),
]

WRONG = [
    ("1.1", chain_as_two_coins, "the chances are multiplied"),
    ("1.1", chain_of_odds, "these are odds"),
    ("1.5", pool_averaged, "the average of the groups' rewards"),
    ("1.5", pool_as_a_share, "the reward is its log-odds"),
    ("2.1", filter_the_other_way, "the probability of what is thrown away"),
    ("2.1", filter_not_normalised, "no longer sums to one"),
    ("2.2", price_without_the_references_reward, "the reference earns something too"),
    ("2.4", overoptimise_what_is_true, "the policy optimises the true reward"),
    ("3.1", loss_of_ratios, "ratios of log-probabilities"),
    ("3.1", loss_as_a_hinge, "the hinge"),
    ("3.1", loss_centred, "the mean margin of the batch is subtracted"),
    ("3.3", train_without_clearing, "gradients pile up"),
    ("3.3", train_on_every_pair_alike, "each kind of choice counts once"),
    ("3.4", rounds_that_cost_more, "n rounds at β are one at β/n"),
    ("3.4", rounds_that_stop, "this is the first round's policy"),
    ("2.3", optimum_with_beta_upside_down, "β multiplies the reward"),
    ("2.3", optimum_without_reference, "the reference is missing"),
    ("2.3", optimum_not_normalised, "not normalised"),
    ("2.3", optimum_as_probabilities, "these are probabilities"),
    ("2.3", optimum_of_one_big_table, "normalised over the whole table"),
    ("2.3", optimum_tilted_backwards, "tilted away from the reward"),
    ("3.1", loss_with_beta_on_the_policy_only, "β is missing on the reference"),
    ("3.1", loss_scaled, "did you scale the loss instead of the margin?"),
    ("3.1", loss_without_reference, "the reference is missing"),
    ("3.1", loss_of_the_wrong_winner, "chosen and rejected are exchanged"),
    ("3.1", loss_without_log, "the logarithm is missing"),
    ("3.1", loss_averaged, "mean over the batch"),
    ("4.1", weight_of_the_confident, "σ(+margin) instead of σ(-margin)"),
    ("4.1", weight_without_beta_in_front, "the β in front is missing"),
    ("4.1", weight_without_beta_inside, "the β inside σ is missing"),
    ("4.1", weight_without_reference, "the reference is missing"),
    ("4.1", weight_with_its_sign, "minus sign"),
    ("4.1", weight_as_the_slope_of_sigma, "σ(u)σ(-u) is the slope of σ"),
    ("4.1", weight_of_the_chosen_alone, "only the chosen completion's reward"),
    ("4.4", left_after_one_step, "β times the share of the contradicted pairs"),
    ("5.1", ranking_with_all_in_every_place, "all K stand in every denominator"),
    ("5.1", ranking_from_the_wrong_end, "reads the ranking from its end"),
    ("5.1", ranking_by_pairs, "Bradley–Terry over all pairs"),
    ("5.1", ranking_probability, "this is the probability"),
    ("5.1", ranking_loss, "which is a loss"),
    ("5.1", ranking_of_the_winner_only, "only the first place"),
    ("5.2", first_places_among_themselves, "left out of the denominators"),
    ("5.3", normal_preference_of_one_noise, "the noise of one completion only"),
    ("5.5", too_small_by_variances, "the ratio of the variances"),
    ("6.1", sequence_mean, "mean over the completion's tokens"),
    ("6.1", sequence_with_its_prompt, "log-probs of the prompt are included"),
    ("6.1", sequence_with_its_padding, "padding is included"),
    ("6.1", sequence_off_by_one, "off by one"),
    ("6.1", sequence_without_its_end, "the last token is left out"),
    ("6.1", sequence_without_its_beginning, "the first completion token is left out"),
    ("6.2", without_end_by_lengths, "the average number of tokens with end-of-text"),
    ("6.4", means_normalised_afterwards, "normalised afterwards"),
    ("6.5", adapter_that_cannot_move, "the reference has a gradient here"),
    ("6.5", adapter_with_the_whole_weight, "the weight is β/2"),
    ("10.1", pulls_with_the_second_term_on_both, "contains the chosen completion only"),
    ("10.1", pulls_per_batch, "mean over the batch"),
    ("10.2", batch_with_a_constant_mean, "the mean moves with every margin"),
    ("10.2", batch_slope, "the sign is reversed"),
    ("10.3", fitting_the_other, "exchanged"),
    ("10.4", repaired_without_its_constant, "the constant is wrong"),
    ("10.4", repaired_in_the_wrong_variable, "du is not ds"),
    ("10.5", optimum_if_nobody_always_wins, "a win and a loss of each completion are not enough"),
    ("10.5", optimum_of_dpo_twice, "IPO needs no win against the order"),
]
