"""Plant a bug, and see that the test which claims to guard against it fails.

Each row names a function, a piece of its source, what a mistaken author would have written instead, and
the guard. The function's code object is replaced in place, so every importer sees the mistake.
"""

from typing import NamedTuple

import pytest
import test_bandit
import test_certificates
import test_closed_form
import test_finite_data
import test_losses
import test_model
import test_policy
import test_relatives
import torch
from planting import CAUGHT, plant

from dpo_minimal import (
    bandit,
    cdpo_loss,
    certificates,
    closed_form,
    ipo_loss,
    kto_kl_estimate,
    kto_loss,
    losses,
    model,
    orpo_loss,
    policy,
    preferences,
    robust_dpo_loss,
    simpo_loss,
    unlikelihood_loss,
    unweighted_dpo_loss,
    validation,
)
from dpo_minimal.experiments.bandit import fit
from dpo_minimal.laws import finite_data, sampling_laws
from dpo_minimal.zoo import inputs, orpo
from dpo_minimal.zoo.ipo import ipo_estimate


class Mutant(NamedTuple):
    """A bug: in `function`, `wrong` instead of `right`; `guard` must fail, called with `arguments`."""

    name: str
    function: object
    right: str
    wrong: str
    guard: object
    arguments: tuple = ()


L, R = test_losses, test_relatives
MUTANTS = [
    # ---- the mutation table of the theory: bugs that people have published
    Mutant(
        "beta missing on the reference",
        losses.dpo_loss,
        "beta * logratio_margin",
        "beta * logratio_margin - (1 - beta) * (reference_chosen_logps - reference_rejected_logps)",
        L.test_dpo_value_in_exact_arithmetic,
    ),
    Mutant(
        "reference ignored",
        losses._logratios,
        " - (reference_chosen - reference_rejected)",
        "",
        L.test_dpo_value_at_reference_is_log_2,
    ),
    Mutant(
        "chosen and rejected swapped",
        losses.dpo_loss,
        "beta * logratio_margin",
        "-beta * logratio_margin",
        L.test_dpo_gradient_by_hand_autograd_and_differences,
    ),
    Mutant(
        "weight of the winner's side",
        losses.dpo_loss,
        "torch.sigmoid(-margin)",
        "torch.sigmoid(margin)",
        L.test_dpo_gradient_by_hand_autograd_and_differences,
    ),
    Mutant(
        "no logarithm",
        losses.dpo_loss,
        "-F.logsigmoid(margin)",
        "-torch.sigmoid(margin)",
        L.test_dpo_value_in_exact_arithmetic,
    ),
    Mutant(
        "beta outside the sigmoid",
        losses.dpo_loss,
        "-F.logsigmoid(margin)",
        "-beta * F.logsigmoid(margin / beta)",
        L.test_dpo_value_in_exact_arithmetic,
    ),
    Mutant(
        "softplus, linear above 20",
        losses.dpo_loss,
        "-F.logsigmoid(margin)",
        "F.softplus(-margin)",
        L.test_logistic_losses_have_no_jump_at_a_margin_of_20,
    ),
    Mutant(
        "log of sigmoid",
        losses.dpo_loss,
        "-F.logsigmoid(margin)",
        "-torch.sigmoid(margin).log()",
        L.test_dpo_and_bradley_terry_at_extreme_margins,
        (torch.float32, 1.0),
    ),
    Mutant(
        "IPO target 1 / beta",
        ipo_loss,
        "(h - 1 / (2 * beta))",
        "(h - 1 / beta)",
        L.test_ipo_value_in_exact_arithmetic,
    ),
    Mutant(
        "IPO weight without the target",
        ipo_loss,
        "1 / beta - 2 * h",
        "-2 * h",
        L.test_ipo_gradient_by_hand_autograd_and_differences,
    ),
    Mutant(
        "half precision subtracted as it is",
        validation.widen,
        "tensor.float()",
        "tensor",
        L.test_half_precision_is_widened_before_subtracting,
        (torch.bfloat16, 1.0),
    ),
    Mutant(
        "readouts carry gradient",
        losses._preference_loss,
        "readout.detach()",
        "readout",
        L.test_readouts_are_detached_implicit_rewards,
    ),
    Mutant(
        "rewards of the pair in the index form",
        losses.dpo_loss_from_indices,
        "pi_logps[yl_idxs]",
        "pi_logps[yw_idxs]",
        L.test_index_form_is_the_paired_form_with_repeated_indices,
    ),
    Mutant(
        "Plackett-Luce suffix off by one",
        preferences.plackett_luce_logprob,
        "(ranked_rewards - still_there)",
        "(ranked_rewards[..., :-1] - still_there[..., 1:])",
        L.test_plackett_luce_sums_to_one_over_all_orders,
    ),
    Mutant(
        "Plackett-Luce, worst first",
        preferences.plackett_luce_logprob,
        "ranked_rewards.flip(-1).logcumsumexp(-1).flip(-1)",
        "ranked_rewards.logcumsumexp(-1)",
        L.test_plackett_luce_value_by_a_loop_over_places,
    ),
    Mutant(
        "Plackett-Luce weight of the first place only",
        losses.plackett_luce_gradient_weights,
        "chance.exp().sum(-2)",
        "chance.exp()[..., 0, :]",
        L.test_plackett_luce_dpo_gradient_by_hand_autograd_and_differences,
    ),
    Mutant(
        "length mean instead of sum",
        policy.completion_logps,
        "masked_fill(~scored, 0).sum(-1)",
        "masked_fill(~scored, 0).sum(-1) / lengths",
        test_policy.test_probabilities_of_all_completions_sum_to_one,
        (0,),
    ),
    Mutant(
        "prompt tokens scored",
        policy.token_logps,
        "position >= batch.prompt_lengths",
        "position >= 1 + 0 * batch.prompt_lengths",
        test_policy.test_prompt_tokens_are_context_and_are_not_scored,
    ),
    Mutant(
        "labels shifted by one",
        policy.token_logps,
        "batch.ids[row, place])",
        "batch.ids[row, place - 1])",
        test_policy.test_tree_sequence_and_loop_agree,
    ),
    Mutant(
        "padding scored",
        policy.token_logps,
        "position < batch.lengths.unsqueeze(-1)",
        "position < T",
        test_policy.test_what_lies_beyond_the_length_does_not_matter,
    ),
    Mutant(
        "siblings see each other",
        policy.prefix_tree,
        "F.pad(ancestors, (0, count))",
        "F.pad(ancestors, (0, count), value=True)",
        test_policy.test_tree_sequence_and_loop_agree,
    ),
    Mutant(
        "tree positions off by one",
        policy.tree_states,
        "P - 1 + tree.depth",
        "P - 2 + tree.depth",
        test_policy.test_tree_sequence_and_loop_agree,
    ),
    Mutant(
        "completions of full length forgotten",
        policy.enumerate_completions,
        "for _ in range(max_length)",
        "for _ in range(max_length - 1)",
        test_policy.test_enumeration_lists_each_completion_once,
    ),
    Mutant(
        "dropout left on",
        model.MLP.forward,
        'self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))',
        'F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), 0.1)',
        test_model.test_two_calls_in_training_mode_agree_bitwise,
    ),
    Mutant(
        "not causal",
        model._attend,
        "is_causal=mask is None",
        "is_causal=False",
        test_model.test_later_tokens_change_nothing_before_them,
        (torch.float64,),
    ),
    Mutant(
        "exact GELU",
        model.MLP.forward,
        'approximate="tanh"',
        'approximate="none"',
        test_model.test_logits_equal_a_slow_second_implementation,
    ),
    Mutant(
        "hard value for soft value",
        closed_form._logsumexp_within_groups,
        "(total.log() + top)",
        "top",
        test_closed_form.test_conditionals_of_the_optimum_are_the_soft_q_policy,
    ),
    Mutant(
        "weight decay",
        fit.fit_table,
        "nesterov=True",
        "nesterov=True, weight_decay=1e-4",
        test_bandit.test_the_population_experiment_reaches_the_closed_form,
        (0,),
    ),
    # ---- DPO's relatives
    Mutant(
        "cDPO smooths the wrong way",
        cdpo_loss,
        "- label_smoothing * F.logsigmoid(-u)",
        "+ label_smoothing * F.logsigmoid(-u)",
        R.test_value_and_gradient_of_a_fixed_table,
        ("cdpo",),
    ),
    Mutant(
        "cDPO with the opposite sign",
        cdpo_loss,
        "-(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)",
        "-F.logsigmoid(u) - label_smoothing * u",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "cDPO weight without smoothing",
        cdpo_loss,
        "(torch.sigmoid(-u) - label_smoothing)",
        "torch.sigmoid(-u)",
        R.test_value_and_gradient_of_a_fixed_table,
        ("cdpo",),
    ),
    Mutant(
        "cDPO, log of sigmoid",
        cdpo_loss,
        "F.logsigmoid(-u)",
        "torch.sigmoid(-u).log()",
        R.test_extreme_log_probabilities,
        ("cdpo", torch.float32),
    ),
    Mutant(
        "robust DPO without its denominator",
        robust_dpo_loss,
        "flip_probability / (1 - 2 * flip_probability)",
        "flip_probability",
        R.test_value_and_gradient_of_a_fixed_table,
        ("robust",),
    ),
    Mutant(
        "robust DPO with the opposite sign",
        robust_dpo_loss,
        "- linear * u",
        "+ linear * u",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "robust DPO weight of DPO",
        robust_dpo_loss,
        "(torch.sigmoid(-u) + linear)",
        "torch.sigmoid(-u)",
        R.test_value_and_gradient_of_a_fixed_table,
        ("robust",),
    ),
    Mutant(
        "unweighted DPO without beta",
        unweighted_dpo_loss,
        "-beta * h",
        "-h",
        R.test_value_and_gradient_of_a_fixed_table,
        ("unweighted_dpo",),
    ),
    Mutant(
        "unweighted DPO weighted",
        unweighted_dpo_loss,
        "-beta * h",
        "-torch.nn.functional.logsigmoid(beta * h)",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "averaged IPO summed",
        inputs._of_pairs,
        "ratio / count for",
        "ratio for",
        R.test_averages_of_a_fixed_table,
    ),
    Mutant(
        "averaged IPO, lengths swapped",
        inputs._of_pairs,
        "zip(ratios, counts)",
        "zip(ratios, counts[::-1])",
        R.test_averages_of_a_fixed_table,
    ),
    Mutant(
        "averaged IPO weight not divided",
        inputs._of_pairs,
        "chosen_weights=weights[0] / counts[0]",
        "chosen_weights=weights[0]",
        R.test_averages_of_a_fixed_table,
    ),
    Mutant(
        "averaged IPO, rejected weight by the chosen's length",
        inputs._of_pairs,
        "weights[-1] / counts[1]",
        "weights[-1] / counts[0]",
        R.test_averages_of_a_fixed_table,
    ),
    Mutant(
        "averaged IPO, a margin of sums",
        inputs._of_pairs,
        "chosen - rejected if averaged else h",
        "h",
        R.test_averages_of_a_fixed_table,
    ),
    Mutant(
        "SimPO's margin with the opposite sign",
        simpo_loss,
        "- rejected_reward - gamma",
        "- rejected_reward + gamma",
        R.test_value_and_gradient_of_a_fixed_table,
        ("simpo",),
    ),
    Mutant(
        "SimPO's margin times beta, as TRL's option",
        simpo_loss,
        "- rejected_reward - gamma",
        "- rejected_reward - beta * gamma",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "SimPO summed",
        simpo_loss,
        "beta * chosen / chosen_lengths, beta * rejected / rejected_lengths",
        "beta * chosen, beta * rejected",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "SimPO, lengths swapped",
        simpo_loss,
        "beta * chosen / chosen_lengths, beta * rejected / rejected_lengths",
        "beta * chosen / rejected_lengths, beta * rejected / chosen_lengths",
        R.test_value_and_gradient_of_a_fixed_table,
        ("simpo",),
    ),
    Mutant(
        "relatives in half precision as it is",
        losses._logratios,
        "map(widen, named.values())",
        "named.values()",
        R.check_half_precision,
        ("cdpo", torch.bfloat16),
    ),
    Mutant(
        "Unlikelihood in half precision as it is",
        inputs.policy_logps,
        "widen(chosen), widen(rejected)",
        "chosen, rejected",
        R.check_half_precision,
        ("unlikelihood", torch.bfloat16),
    ),
    Mutant(
        "ORPO of sums",
        orpo_loss,
        "chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths",
        "chosen, rejected = chosen, rejected",
        R.test_value_and_gradient_of_a_fixed_table,
        ("orpo",),
    ),
    Mutant(
        "ORPO, probabilities for odds",
        orpo._log_odds,
        "average - rest",
        "average",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "ORPO, weights swapped",
        orpo_loss,
        "log_d - chosen_rest",
        "log_d - rejected_rest",
        R.test_value_and_gradient_of_a_fixed_table,
        ("orpo",),
    ),
    Mutant(
        "ORPO without lambda",
        orpo_loss,
        "-chosen - lam * F.logsigmoid",
        "-chosen - F.logsigmoid",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "ORPO, log(1 - e^a) as written",
        closed_form.log1mexp,
        "return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))",
        "return torch.log(1 - torch.exp(x))",
        R.test_orpo_keeps_its_digits_near_certainty,
    ),
    Mutant(
        "ORPO, infinite odds",
        orpo._log_odds,
        "average.clamp(max=almost_sure)",
        "average",
        R.test_orpo_of_certain_completions_is_finite,
        (torch.float32,),
    ),
    Mutant(
        "Unlikelihood without alpha",
        unlikelihood_loss,
        "alpha * rejected",
        "rejected",
        R.test_value_and_gradient_of_a_fixed_table,
        ("unlikelihood",),
    ),
    Mutant(
        "Unlikelihood raises the rejected",
        unlikelihood_loss,
        "-chosen + alpha",
        "-chosen - alpha",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "Unlikelihood, Welleck's",
        unlikelihood_loss,
        "alpha * rejected",
        "-alpha * torch.log1p(-rejected.exp())",
        R.test_optima_of_a_fixed_world,
    ),
    Mutant(
        "KTO, weights swapped",
        kto_loss,
        "logratio.new_tensor(desirable_weight), logratio.new_tensor(undesirable_weight)",
        "logratio.new_tensor(undesirable_weight), logratio.new_tensor(desirable_weight)",
        R.test_kto_of_a_fixed_batch,
    ),
    Mutant(
        "KTO with z0 on the wrong side",
        kto_loss,
        "(logratio - kl_estimate)",
        "(logratio + kl_estimate)",
        R.test_kto_of_a_fixed_batch,
    ),
    Mutant(
        "KTO in which all is desirable",
        kto_loss,
        "torch.where(is_desirable, 1.0, -1.0)",
        "torch.where(is_desirable, 1.0, 1.0)",
        R.test_kto_of_a_fixed_batch,
    ),
    Mutant(
        "KTO's weights rounded to float32",
        kto_loss,
        "logratio.new_tensor(desirable_weight), logratio.new_tensor(undesirable_weight)",
        "desirable_weight, undesirable_weight",
        R.test_kto_of_a_fixed_batch,
    ),
    Mutant(
        "KTO's logistic loss",
        kto_loss,
        "(weight * torch.sigmoid(-gain))",
        "(-weight * torch.nn.functional.logsigmoid(gain))",
        R.test_kto_of_a_fixed_batch,
    ),
    Mutant(
        "KTO trains its z0",
        kto_loss,
        "device=logratio.device).detach()",
        "device=logratio.device)",
        R.test_kto_reads_z0_and_does_not_train_it,
    ),
    Mutant(
        "z0 carries gradient",
        kto_kl_estimate,
        ").detach()",
        ")",
        R.test_kto_reads_z0_and_does_not_train_it,
    ),
    Mutant(
        "z0 below zero",
        kto_kl_estimate,
        ".clamp(min=0)",
        "",
        R.test_kto_reads_z0_and_does_not_train_it,
    ),
    Mutant(
        "z0 summed",
        kto_kl_estimate,
        ".mean()",
        ".sum()",
        R.test_kto_reads_z0_and_does_not_train_it,
    ),
    # ---- the closed forms, one altered at a time
    Mutant(
        "reward times beta",
        closed_form._tilt,
        "rewards / beta",
        "rewards * beta",
        test_closed_form.test_optimum_is_the_normalised_tilt,
    ),
    Mutant(
        "optimum without its reference",
        closed_form._tilt,
        "ref_logps + tilt",
        "tilt",
        test_closed_form.test_optimum_is_the_normalised_tilt,
    ),
    Mutant(
        "hard maximum for log Z",
        closed_form.log_partition,
        "logsumexp(-1)",
        "amax(-1)",
        test_closed_form.test_soft_value_is_the_maximum,
    ),
    Mutant(
        "log Z without beta",
        closed_form.soft_value,
        "beta * log_partition",
        "log_partition",
        test_closed_form.test_soft_value_is_the_maximum,
    ),
    Mutant(
        "implicit reward without beta",
        closed_form.implicit_reward,
        "beta * (logps - ref_logps)",
        "logps - ref_logps",
        test_closed_form.test_reward_from_its_optimum,
    ),
    Mutant(
        "canonical reward with the wrong sign",
        closed_form.canonical_reward,
        "rewards - soft_value",
        "rewards + soft_value",
        test_closed_form.test_canonical_reward_has_partition_one,
    ),
    Mutant(
        "KL the other way",
        closed_form.rlhf_objective,
        "kl_divergence(logps, ref_logps)",
        "kl_divergence(ref_logps, logps)",
        test_closed_form.test_objective_is_its_sum,
    ),
    Mutant(
        "reward weighted twice",
        closed_form.rlhf_objective,
        "(logps.exp() * rewards)",
        "(logps.exp() ** 2 * rewards)",
        test_closed_form.test_objective_is_its_sum,
    ),
    Mutant(
        "plain sum for KL",
        closed_form._kl,
        "p * (small + torch.expm1(-small))",
        "p * small",
        test_closed_form.test_divergence_of_close_policies_keeps_its_digits,
        (1e-8, 0),
    ),
    Mutant(
        "best of n, ties won by all",
        closed_form.best_of_n_logps,
        "ref_logps - log_tied",
        "0 * log_tied",
        test_closed_form.test_best_of_n_is_the_enumerated_law,
    ),
    Mutant(
        "frontier at 1 / beta",
        closed_form.reward_kl_frontier,
        "rewards / betas.view",
        "rewards * betas.view",
        test_closed_form.test_slope_of_the_frontier,
    ),
    # ---- labels, certificates and estimates
    Mutant(
        "labels at temperature squared",
        preferences._chance_of_first,
        "/ temperature",
        "/ temperature**2",
        test_bandit.test_label_temperature_scales_the_reward,
        (2.5,),
    ),
    Mutant(
        "unsafe step",
        bandit.safe_learning_rate,
        "beta**2 / 2",
        "beta**2 / 16",
        test_bandit.test_a_safe_step_never_raises_the_loss,
        ("dpo",),
    ),
    Mutant(
        "bound not divided by beta",
        certificates.certify,
        "logp_bound / beta",
        "logp_bound * beta",
        test_certificates.test_the_bound_covers_the_distance_and_is_not_wasteful,
        (2, 0.3),
    ),
    Mutant(
        "bound without its second order",
        certificates.certify_scores,
        "x / (1 - x) + torch.log1p(-x)",
        "0 * x",
        test_certificates.test_the_refined_distance_is_never_undercut,
    ),
    Mutant(
        "bound beyond x = 1/2",
        certificates.certify_scores,
        "(x <= 0.5)",
        "(x <= 50)",
        test_certificates.test_no_bound_anywhere_on_the_path_of_separable_data,
    ),
    Mutant(
        "Hessian without its cross terms",
        certificates.curvature,
        "torch.diag_embed(product.sum(-1)) - product",
        "torch.diag_embed(product.sum(-1))",
        test_certificates.test_curvature_is_the_derivative_of_the_loss,
        (3,),
    ),
    Mutant(
        "existence not checked",
        certificates.require_estimate,
        "if faults:",
        "if False:",
        test_finite_data.test_the_estimate_exists_exactly_where_ford_says,
    ),
    Mutant(
        "undamped Newton",
        certificates.maximum_likelihood,
        "torch.log1p(reach) / reach",
        "1.0",
        test_finite_data.test_very_uneven_data_are_estimated_from_afar,
    ),
    Mutant(
        "errors of one comparison instead of all",
        finite_data.standard_errors,
        " / state.total.unsqueeze(-1)",
        "",
        test_finite_data.test_two_completions_have_textbook_errors,
    ),
    Mutant(
        "IPO estimate at 1 / beta",
        ipo_estimate,
        "(2 * beta)",
        "beta",
        test_finite_data.test_the_ipo_estimate_is_a_least_squares_fit,
    ),
    Mutant(
        "law without beta",
        sampling_laws.finite_data_law,
        ".sqrt() / beta",
        ".sqrt()",
        test_finite_data.test_two_completions_have_textbook_errors,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_bug_is_caught(monkeypatch, mutant):
    """The guard passes as things stand (it is part of the suite) and fails with the bug."""
    plant(monkeypatch, mutant.function, mutant.right, mutant.wrong)
    with pytest.raises(CAUGHT):
        mutant.guard(*mutant.arguments)
