"""TRL's losses against ours: the same log-probabilities into its `DPOTrainer`, the same loss and gradient.

Needs requirements-bench.txt, and is skipped without it. The trainer is a real one, around a tiny GPT-2; for
the losses its model is replaced by one that returns given log-probabilities, in float64.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dpo_minimal import zoo

pytest.importorskip("trl")

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOConfig, DPOTrainer

from tests.benchmarks import tasks
from tests.benchmarks.trl_dpo import word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of another project


class Row(NamedTuple):
    """A loss of TRL's and what it is here."""

    theirs: dict  # attributes of the trainer: loss_types, and options under TRL's names
    ours: str  # a key of `zoo.LOSSES`
    options: dict
    factor: float = 1.0  # theirs = factor * ours
    # "one": of one token each, "mean": each chosen of the batch's mean number of tokens; "centred": of any
    # lengths, with a reference that differs from the policy by nothing on average.
    lengths: str = ""


EPS = 0.2
# A row a loss that both have. Where conventions differ, the last fields and a comment say how.
ROWS = [
    Row(dict(loss_types=["sigmoid"]), "dpo", {}),
    # Its `sigmoid` takes no label_smoothing any more; the mixture of both outcomes can still be had as a sum.
    Row(
        dict(loss_types=["sigmoid", "robust"], loss_weights=[2 - 2 * EPS, 2 * EPS - 1], label_smoothing=EPS),
        "cdpo", dict(label_smoothing=EPS),
    ),
    Row(dict(loss_types=["robust"], label_smoothing=EPS), "robust", dict(flip_probability=EPS)),
    Row(dict(loss_types=["ipo"]), "averaged_ipo", {}),
    Row(dict(loss_types=["ipo"]), "ipo", {}, lengths="one"),  # ours sums over tokens, as the paper does
    Row(dict(loss_types=["sigmoid_norm"]), "averaged_dpo", {}),
    Row(dict(loss_types=["hinge"]), "hinge", {}),
    Row(dict(loss_types=["exo_pair"], label_smoothing=EPS), "exo", dict(label_smoothing=EPS)),
    Row(dict(loss_types=["discopop"], tau=0.05), "discopop", dict(tau=0.05)),
    Row(dict(loss_types=["discopop"], tau=0.4), "discopop", dict(tau=0.4)),
    # Its `sft` averages over all chosen tokens of the batch, ours over those of each completion first.
    Row(
        dict(loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.7]), "rpo", dict(nll_weight=0.7),
        lengths="mean",
    ),
    Row(dict(loss_types=["nca_pair"]), "nca", {}),
    Row(dict(loss_types=["sppo_hard"]), "sppo", {}),
    Row(dict(loss_types=["apo_zero"]), "apo_zero", {}),
    Row(dict(loss_types=["apo_down"]), "apo_down", {}),
    # Its delta is 0, ours the mean reward of the batch: the same where that is 0.
    Row(dict(loss_types=["bco_pair"]), "bco", {}, lengths="centred"),
    # Its rows come out in sorted order, ours in the batch's; mean and gradient cannot tell.
    Row(dict(loss_types=["aot"]), "aot", {}),
]  # fmt: skip


def test_trls_names_lead_to_these_rows():
    """Those that are typed as --loss-type; its `ipo` is another loss here, as the help says."""
    for row in ROWS:
        name = "+".join(row.theirs["loss_types"])
        assert zoo.TRL.get(name, name) == row.ours or "+" in name or name == "ipo"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> DPOTrainer:
    """A real one. What is compared never trains it."""
    vocabulary = 40
    torch.manual_seed(0)
    shape = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=vocabulary, n_positions=64)
    with pytest.MonkeyPatch.context() as patch:
        small = tasks.Shape(1, 2, 16, vocabulary, 64, 4)
        patch.setitem(tasks.SHAPES, "small", small)
        tokenizer = word_tokenizer(tasks.Task("trl", "small", "float32", "cpu", 1, "", 4, 4))
    rows = [
        dict(prompt="t1 t2", chosen=" t3 t4 t5", rejected=" t6"),
        dict(prompt="t7 t8 t9", chosen=" t1", rejected=" t2 t2 t3 t4"),
        dict(prompt="t5", chosen=" t9 t8", rejected=" t9 t7"),
    ]
    return DPOTrainer(
        GPT2LMHeadModel(shape),
        GPT2LMHeadModel(shape),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none",
            per_device_train_batch_size=3, gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip


def set_up(trainer: DPOTrainer, monkeypatch, row: Row, beta: float) -> None:
    theirs = dict(loss_weights=[1.0] * len(row.theirs["loss_types"])) | row.theirs
    monkeypatch.setattr(trainer.args, "discopop_tau", theirs.pop("tau", 0.05))
    for name, value in (theirs | {"beta": beta}).items():
        assert hasattr(trainer, name), f"DPOTrainer has no {name} any more"
        monkeypatch.setattr(trainer, name, value)


def batch(lengths: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probabilities (2B, T) of policy and reference, chosen first, and which are scored.

    The first token is the prompt's, which predicts the second; padding is on the right.
    """
    generator = torch.Generator().manual_seed(1)
    counts = torch.ones(6).long() if lengths == "one" else torch.tensor([3, 1, 5, 2, 6, 4])
    scored = torch.arange(6) < counts[:, None]
    tables = -2 * torch.rand(2, 6, 6, generator=generator, dtype=torch.float64)
    policy, reference = tables * scored
    if lengths == "centred":
        reference[:, 0] += (policy - reference).sum(-1).mean()
    return policy, reference, scored


def theirs(trainer: DPOTrainer, policy: Tensor, reference: Tensor, scored: Tensor) -> Tensor:
    """The batch's loss by TRL's code."""
    nothing = torch.zeros_like(policy)
    outputs = SimpleNamespace(
        log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=scored, log_sum_sq_probs=nothing
    )
    completion = torch.cat([torch.zeros(len(scored), 1), scored], -1).long()
    chosen, rejected = reference.sum(-1).chunk(2)
    inputs = dict(
        input_ids=torch.zeros_like(completion), attention_mask=torch.ones_like(completion),
        completion_mask=completion, ref_chosen_logps=chosen, ref_rejected_logps=rejected,
    )  # fmt: skip

    class Given(torch.nn.Module):
        def forward(self, **_) -> SimpleNamespace:
            return outputs

    return trainer._compute_loss(Given(), inputs, return_outputs=False)


@pytest.mark.parametrize("beta", [0.1, 1.3])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{'+'.join(row.theirs['loss_types'])}-{row.ours}")
def test_the_loss_of_a_batch_and_its_gradient_are_trls(row, beta, trainer, monkeypatch):
    """For every token of every completion; padding and prompts get no gradient from either."""
    set_up(trainer, monkeypatch, row, beta)
    monkeypatch.setattr(trainer, "precompute_ref_logps", True)
    policy, reference, scored = batch(row.lengths)
    leaf = policy.clone().requires_grad_()
    loss = theirs(trainer, leaf * scored, reference, scored)  # a model returns 0 for what is not scored
    (gradient,) = torch.autograd.grad(loss, leaf)

    record = zoo.LOSSES[row.ours]
    options = row.options | ({"beta": beta} if any(o.name == "beta" for o in record.options) else {})
    counts = scored.sum(-1).double()
    if row.lengths == "mean":
        counts = counts[:3].mean().expand(6)
    tables = {"policy": policy.sum(-1), "reference": reference.sum(-1), "lengths": counts}
    out = record.on(
        {name: lambda table=table: table.view(2, -1).T for name, table in tables.items()}, options
    )
    # a dozen roundoffs of float64; of its exo_pair the label is float32
    close = {"rtol": 0, "atol": 1e-6 if row.ours == "exo" else 1e-12}
    torch.testing.assert_close(loss, row.factor * out.losses.mean(), **close)
    pulls = torch.cat([-out.chosen_weights, out.rejected_weights]) / len(out.losses)
    torch.testing.assert_close(gradient, row.factor * pulls[:, None] * scored, **close)


def test_the_whole_way_from_tokens(trainer, monkeypatch):
    """With TRL's own tokens, batch, models and sums over tokens: the lengths that it divides by are ours."""
    set_up(trainer, monkeypatch, Row(dict(loss_types=["sigmoid_norm"]), "", {}), 0.7)
    inputs = next(iter(trainer.get_train_dataloader()))
    inputs = {name: value for name, value in inputs.items()}
    loss = trainer.compute_loss(trainer.model, dict(inputs))

    ids, scored = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
    sums = []
    for model in (trainer.model, trainer.ref_model):
        logits = model(ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
        tokens = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums += [*(tokens * scored).sum(-1).view(2, -1)]
    out = zoo.averaged_dpo_loss(*sums, *scored.sum(-1).view(2, -1), beta=0.7)
    assert set(scored.sum(-1).tolist()) == {2, 3, 4, 5}  # end-of-text counts
    torch.testing.assert_close(loss.double(), out.losses.mean(), rtol=1e-5, atol=0)  # theirs in float32
    assert abs(loss.item() - math.log(2)) > 1e-4
