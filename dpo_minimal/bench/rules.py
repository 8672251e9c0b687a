"""The rules of the log doctor: one small function each, Case -> findings, in the table `RULES` [D13.7].

First what cannot be in a log whatever the data are, then what may be and is worth knowing. What findings mean
and what to do is in findings.toml.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from .case import (
    ACCURACY,
    HALF,
    LN2,
    LOGPS,
    MARGINS,
    RATIO,
    REWARDS,
    Case,
    Finding,
    counted,
    finding,
    having,
    least_loss,
    shown,
    softplus,
    the_last,
)  # fmt: skip
from .logs import Record

ON_ROWS = "loss", MARGINS, ACCURACY
OTHER_REWARDS = (  # than beta times the log-ratio: means over tokens, and other functions of it
    "averaged_dpo", "averaged_ipo", "forward_kl", "jensen_shannon", "alpha_divergence", "chi2_kl",
)  # fmt: skip
TIE = 3.2e-3  # nats: what ours takes for a tie, 1e-4 per square root of tokens, at GPT-2's 1024
SURE = -math.log(0.99)  # the loss of a pair that is ordered with odds of 99 : 1
MEDIAN_WEIGHT = 0.6745 * 0.02  # the median of |w| for w ~ N(0, 0.02^2), as GPT-2's weights begin
BITS = {"bfloat16": 8, "bf16": 8, "float16": 11, "fp16": 11}  # significant ones
ERRORS = 5.0  # standard errors: 6e-7 by chance
Findings = Iterator[Finding]
Slope = tuple[float, float, str]  # least, most, where: of rewards over log-ratios, which is beta


# ------------------------------------------------------------------------------------------- what cannot be


def not_finite(case: Case) -> Findings:
    """The first nan or inf, and what came before it."""
    for records in (case.training, case.evaluations):
        for before, record in zip([None, *records], records):
            bad = [name for name, value in record.values.items() if not math.isfinite(value)]
            if not bad:
                continue
            seen = f"{record.place}: {', '.join(bad)}"
            if before is not None:
                seen += f"; the last one before, {shown(before, 'loss', 'grad_norm', 'learning_rate')}"
            read = [name for name in bad if not name.startswith(("logits/", "grad_norm"))]
            filtered = ".filtered" if read and math.isfinite(record.of("loss")) else ""
            logits = ".logits" if all(name.startswith("logits/") for name in bad) else ""
            yield finding(f"not finite{filtered or logits}", seen)
            return


def no_reference(case: Case) -> Findings:
    """Rewards are b log pi, with one b in all records [D4.1]."""
    used = [record for record in having(case.training, *LOGPS, *REWARDS) if any(map(record.of, REWARDS))]
    low, high = -math.inf, math.inf
    for record, (logps, reward) in itertools.product(used, zip(LOGPS, REWARDS)):
        least, most, _ = _slope(case, [(record, logps, 1)], [(record, reward, 1)]) or (math.inf, 0, "")
        low, high = max(low, least), min(high, most)
        if low > high:
            return
    if case.reads_reference and len(used) > 1:
        seen = f"in all {counted(used)} both rewards are {(low + high) / 2:.4g} times the log-probabilities"
        yield finding("no reference", seen)


def not_at_the_reference(case: Case) -> Findings:
    """Before any update rewards are 0, and the loss has its value there [D13.7]."""
    away = [record for record in case.start if _is_away(case, record)]
    if not case.reads_reference:
        return
    if away:
        seen = shown(away[0], "loss", *REWARDS, RATIO) + ", before any update"
        square = 8 * (away[0].of("loss") - LN2 + away[0].of(MARGINS) / 2)  # log cosh(m/2) <= m^2/8
        if case.is_sigmoid and square > 0:
            seen += f"; the margins' root mean square is at least {math.sqrt(square):.3g}"
        alone = away == case.training[:1] and len(case.start) > 1
        yield finding("not at the reference" + ".dropout" * alone, seen)
        return
    if case.training and not case.log.ours and case.is_sigmoid and (steps := _steps_of_the_first(case)):
        first = case.training[0]
        if first.of("loss") < LN2 / steps - case.error(first, "loss") - HALF:
            bound = f"a mean over {steps:g} steps is at least ln 2 / {steps:g} = {LN2 / steps:.4g}"
        elif first.of(ACCURACY) == 1 and max(abs(first.of(name)) for name in REWARDS) > HALF:
            bound = "the accuracy is below 1"
        else:
            return
        seen = f"{shown(first, *ON_ROWS, *REWARDS)}, the first record"
        yield finding("not at the reference.averaged", seen, bound=bound)


def _is_away(case: Case, record: Record) -> bool:
    """Whether a record of the start is away from it, by more than half precision explains."""
    known = [RATIO] if having([record], RATIO) else [name for name in REWARDS if having([record], name)]
    if known:
        return any(abs(record.of(name)) > HALF + case.error(record, name) for name in known)
    return case.is_sigmoid and abs(record.of("loss") - LN2) > HALF + case.error(record, "loss")


def _steps_of_the_first(case: Case) -> float:
    """How many steps the first record averages, inf where nobody says; 0 if it is not of the beginning."""
    for name in "step", "epoch":
        if len(pair := having(case.training[:2], name)) == 2:
            first, second = (record.of(name) for record in pair)
            error = 0.0 if name == "step" else 3 * max(case.error(record, name) for record in pair)
            return 0 if abs(second - 2 * first) > error else first if name == "step" else math.inf
    return 0


def another_loss(case: Case) -> Findings:
    """Rewards are 0 as they must, and the loss is not what it must be there [D13.7]."""
    start = case.loss_at_start
    for record in having(case.start, "loss", *REWARDS):
        ratio, error = record.of("loss") / (start or LN2), case.error(record, "loss")
        factor = max(ratio, 1 / ratio) if ratio > 0 else 0.0
        exact = error / record.of("loss") + 2.0**-16 if ratio > 0 else 0.0  # float32
        is_scaled = 1.5 < factor < 64 and abs(factor / round(factor) - 1) < exact
        if start is None:  # 2 ln 2 is where NCA and BCO start, so that 3 is the first multiple that tells
            is_wrong = is_scaled and not case.loss_is_claimed and not 1 < ratio < 2.5
        else:
            is_wrong = abs(record.of("loss") - start) > error + HALF * start
        if is_wrong and not _is_away(case, record):
            seen = f"{shown(record, 'loss', *REWARDS)}, before any update"
            kind = "scaled loss" if is_scaled else "another loss"
            yield finding(kind, seen, start=start or LN2, ratio=ratio)
            return


def margins_do_not_add_up(case: Case) -> Findings:
    """The mean margin is the mean chosen reward minus the mean rejected one, in every record."""
    wrong = []
    for record in having(case.records, *REWARDS, MARGINS):
        chosen, rejected, margin = (record.of(name) for name in (*REWARDS, MARGINS))
        # In half precision the margin of each row is rounded, and their mean size is at most m + 2 loss.
        sizes = abs(chosen) + abs(rejected) + abs(margin) + 2 * abs(record.values.get("loss", 0.0))
        error = case.error(record, *REWARDS, MARGINS) + case.precision * sizes
        if abs(chosen - rejected - margin) > error:
            wrong.append((record, chosen - rejected))
    if wrong:
        record, difference = wrong[0]
        seen = f"{shown(record, *REWARDS, MARGINS)}; the difference is {difference:.4g} ({counted(wrong)})"
        yield finding("margins do not add up", seen)


def loss_against_margins(case: Case) -> Findings:
    """Jensen's bound, a higher one with the accuracy, and a ceiling where every pair is right [D13.7]."""
    records = having(case.same_rows, "loss", MARGINS) if case.is_sigmoid else []
    worst: dict[str, list[tuple[float, Record, float]]] = {}
    for record in records:
        for name, missing, least in _violations(case, record):
            worst.setdefault(name, []).append((missing, record, least))
    for name, found in worst.items():
        right = [record for record in records if record.of(ACCURACY) == 1]
        if case.is_systematic(len(found), len(right if name.startswith("above") else records)):
            _, record, least = max(found, key=lambda violation: violation[0])
            seen = f"{shown(record, *ON_ROWS)} ({counted(found)})"
            yield finding(name, seen, least=least, wrong=1 - record.of(ACCURACY))
            return


def _violations(case: Case, record: Record) -> Iterator[tuple[str, float, float]]:
    """(name, by how much, the bound) of what a record's loss cannot be."""
    loss, margin, accuracy = (record.of(name) for name in ON_ROWS)
    error = case.error(record, "loss") + case.precision * abs(loss)
    reach = case.error(record, MARGINS) + case.precision * (abs(margin) + 2 * abs(loss))
    reach += TIE * (case.beta or 1.0) * case.log.ours
    least = softplus(-margin - reach)
    if loss + error < least:
        yield "below Jensen's bound", least - loss, least
    elif 0 <= accuracy <= 1:
        most = min(margin + reach, 0.0) if accuracy == 0 and margin <= reach else margin + reach
        least = least_loss(most, accuracy)
        if loss + error + LN2 * case.error(record, ACCURACY) < least:  # its slope in the accuracy
            yield "below the floor of its accuracy", least - loss, least
    if accuracy == 1 and loss > LN2 + error:
        yield "above ln 2 with accuracy 1", loss - LN2, LN2


def beta_and_reference(case: Case) -> Findings:
    """On one data set rewards change by beta times what log-probabilities do, if the reference stays."""
    if not (slopes := slopes_of(case)):
        return
    low, high, places = _common(slopes)
    if low > high:
        seen = f"rewards over log-probabilities: at most {high:.4g} and at least {low:.4g} ({places})"
        yield finding("the reference moves", seen)
    elif case.beta is not None and not low * (1 - 1e-6) <= case.beta <= high * (1 + 1e-6):  # as rounded
        seen = f"rewards over log-probabilities: between {low:.4g} and {high:.4g} ({places})"
        yield finding("another beta", seen, beta=case.beta)


def slopes_of(case: Case) -> list[Slope]:
    """What beta may be: from log-ratios and the reference's log-probabilities where they are logged, and from
    changes between evaluations on one data set, in which the reference cancels."""
    found: list[Slope | None] = []
    if not case.reads_reference or (case.loss and case.loss.name in OTHER_REWARDS):
        return []
    for record in case.records:
        if RATIO in record.values:
            found.append(_slope(case, [(record, RATIO, 1)], [(record, REWARDS[0], 1)]))
        for logps, reward in zip(LOGPS, REWARDS):
            if f"reference_{logps}" in record.values:
                terms = [(record, logps, 1), (record, f"reference_{logps}", -1)]
                found.append(_slope(case, terms, [(record, reward, 1)]))
    for records, (logps, reward) in itertools.product(case.log.evaluations.values(), zip(LOGPS, REWARDS)):
        for record in records[1:]:
            ends = (record, 1), (records[0], -1)
            found.append(_slope(case, [(r, logps, s) for r, s in ends], [(r, reward, s) for r, s in ends]))
    return [slope for slope in found if slope is not None]


Terms = list[tuple[Record, str, int]]  # signs


def _slope(case: Case, below: Terms, above: Terms) -> Slope | None:
    """A quotient of two sums of logged numbers; None where one is missing or the divisor may be 0."""
    (x, error), (y, error_above) = (
        (
            sum(sign * record.of(name) for record, name, sign in terms),
            sum(case.error(r, name) + case.precision * abs(r.of(name)) for r, name, _ in terms),
        )
        for terms in (below, above)
    )
    if not math.isfinite(x + y) or abs(x) <= 2 * error:
        return None
    half = (error_above + abs(y / x) * error) / (abs(x) - error)
    return y / x - half, y / x + half, below[0][0].place


def _common(slopes: list[Slope]) -> Slope:
    """The largest lower bound, the smallest upper bound, and where they are."""
    low, high = max(slopes, key=lambda slope: slope[0]), min(slopes, key=lambda slope: slope[1])
    return low[0], high[1], low[2] if low[2] == high[2] else f"{high[2]} and {low[2]}"


# ------------------------------------------------------------------------- what may be, and is worth knowing


def nothing_scored(case: Case) -> Findings:
    """A mean log-probability of exactly 0, and by a reward of 0 under the reference too: no tokens count."""
    for logps, reward in zip(LOGPS, REWARDS):
        if zero := [r for r in case.records if r.of(logps) == 0 == r.values.get(reward, 0)]:
            yield finding("nothing scored", f"{zero[0].place}: {logps} is exactly 0 ({counted(zero)})")
            return


def ties(case: Case) -> Findings:
    """Margins that are exactly 0 after updates too, and what the other columns say of the reason."""
    later = [record for record in having(case.training, MARGINS) if record not in case.start]
    if not later or any(record.of(MARGINS) or record.of(ACCURACY) > 0 for record in later):
        yield from _some_ties(case)
        return
    seen = f"{shown(later[-1], 'loss', *REWARDS, MARGINS, ACCURACY)}; every margin is 0 in {counted(later)}"
    rate = max(record.of("learning_rate") for record in later)
    if all(record.of(LOGPS[0]) == record.of(LOGPS[1]) for record in later):
        kind = ".pairs"
    elif rate == 0:
        kind = ".rate"
    elif all(record.of("grad_norm") == 0 for record in later):
        kind = ".gradient"
    else:
        kind = ".shared" if _evaluations_moved(case) else ""
    yield finding(f"ties{kind}", seen, half_unit=_half_unit(8))


def _some_ties(case: Case) -> Findings:
    """Ours counts ties: pairs that stay tied in every record while others move."""
    moved = [record for record in having(case.records, "dpo/ties") if record not in case.start]
    if (share := min((record.of("dpo/ties") for record in moved), default=0.0)) > 0:
        yield finding("ties.some", f"at least {share:.0%} of the pairs, in {counted(moved)} after the start")


def _evaluations_moved(case: Case) -> bool:
    """Whether log-probabilities of a data set changed between evaluations."""
    logged = (having(records, *LOGPS) for records in case.log.evaluations.values())
    return any(len({record.of(name) for record in some}) > 1 for some in logged for name in LOGPS)


def _half_unit(bits: int) -> float:
    """Half the distance of numbers with so many significant bits at the median weight: a smaller step is lost
    by all weights that are larger, half of them [D13.7]."""
    return 2.0 ** (math.floor(math.log2(MEDIAN_WEIGHT)) - bits)


def step_too_small(case: Case) -> Findings:
    """Weights that are said to be in half precision, and a learning rate that is rounded away there."""
    bits = BITS.get(str(case.log.settings.get("dtype")).removeprefix("torch."))
    rate = max((record.of("learning_rate") for record in having(case.training, "learning_rate")), default=1.0)
    if bits and not case.log.ours and rate < _half_unit(bits):  # ours has float32 weights under any dtype
        seen = f"weights in {case.log.settings['dtype']}, learning rate at most {rate:.3g}"
        yield finding("step too small", seen, bits=bits, weight=MEDIAN_WEIGHT, unit=2 * _half_unit(bits))


def displacement(case: Case) -> Findings:
    """Margins grow while chosen completions become less likely than under the reference [D13.1]."""
    name = RATIO if case.log.ours else REWARDS[0]
    last = the_last(having(case.training, name, MARGINS))
    last = last or [r for data in case.log.evaluations.values() for r in having(data[-1:], name, MARGINS)]
    falls = bool(last) and all(record.of(name) < -HALF for record in last)
    if case.reads_reference and falls and sum(record.of(MARGINS) for record in last) > 0:
        seen = f"{shown(last[-1], *REWARDS, RATIO, *LOGPS)}; negative in the last {counted(last)}"
        yield finding("displacement", seen)


def worse_than_the_reference(case: Case) -> Findings:
    """The loss of the reference is known on any data; at the end it is higher."""
    if (start := case.loss_at_start) is None:
        return
    last = the_last(having(case.training, "loss"))
    above = [record for record in last if record.of("loss") > start + HALF + case.error(record, "loss")]
    if last and above == last:
        seen = f"{shown(last[-1], 'loss', 'grad_norm', 'learning_rate')}; above in the last {counted(last)}"
        yield finding("worse than the reference", seen, start=start)
        return
    learnt = sum(record.of("loss") - start for record in last) < 0
    for records in case.log.evaluations.values():
        known = having(records, "loss")
        if known and known[-1] not in case.start and known[-1].of("loss") > start + HALF:
            best = min(known, key=lambda record: record.of("loss"))
            seen = f"evaluation, {shown(known[-1], 'loss')}; least {best.of('loss'):.4g} at {best.place}"
            yield finding("overfitting" if learnt else "worse than the reference", seen, start=start)
            return


def saturation(case: Case) -> Findings:
    """The mean loss is below that of odds of 99 : 1, and with it all pulls [D5.4]."""
    last = the_last(having(case.training, "loss")) if case.is_sigmoid else []
    if last and all(record.of("loss") < SURE for record in last):
        most = max(record.of("loss") + case.error(record, "loss") for record in last)
        seen = f"{shown(last[-1], 'loss', MARGINS, 'grad_norm')}; below {SURE:.3g} in {counted(last)}"
        yield finding("saturation", seen, share=2 * most)


def warm_up(case: Case) -> Findings:
    """A learning rate that rises up to the last record has not reached its value."""
    rates = [(record.of("learning_rate"), record.place) for record in having(case.training, "learning_rate")]
    goal = case.log.settings.get("learning_rate", math.inf)
    rises = all(before < after for (before, _), (after, _) in itertools.pairwise(rates))
    if len(rates) > 2 and rises and rates[-1][0] < goal * (1 - 1e-6):  # a rounding of the schedule
        (first, _), *_, (last, place) = rates
        seen = f"the learning rate rises from {first:.3g} to {last:.3g} at {place}, the last"
        yield finding("warm-up not over", seen)


def length_drift(case: Case) -> Findings:
    """Samples become longer or shorter by more than chance."""
    count = case.log.settings.get("eval_samples", 0)
    known = [record for record in case.evaluations if record.of("samples/length") > 0]
    if count and len(known) > 1:
        first, last = known[0].of("samples/length"), known[-1].of("samples/length")
        if abs(math.log(last / first)) > ERRORS * math.sqrt(2 / count):
            seen = f"samples have {first:.4g} tokens at {known[0].place} and {last:.4g} at {known[-1].place}"
            yield finding("length drift", seen, errors=ERRORS)


RULES = (
    not_finite, no_reference, not_at_the_reference, another_loss, margins_do_not_add_up, loss_against_margins,
    beta_and_reference, nothing_scored, ties, step_too_small, displacement, worse_than_the_reference,
    saturation, warm_up, length_drift,
)  # fmt: skip
OTHER = {"scaled loss", "another loss"}
AWAY = {"no reference", "not at the reference", "the reference moves"}
EXPLAINED_BY = {  # a finding that follows from another one
    "ties": {"nothing scored"},
    "another beta": {"ties"},  # where no reward moves, β seems to be 0
    "not at the reference": {"no reference"},
    "the reference moves": {"no reference"},
    "below Jensen's bound": OTHER | {"margins do not add up"},
    "below the floor of its accuracy": OTHER | {"margins do not add up"},
    "displacement": AWAY | {"worse than the reference"},
    "worse than the reference": OTHER | AWAY | {"not finite"},
    "overfitting": OTHER | AWAY | {"not finite"},
}
