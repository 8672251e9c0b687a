"""LoRA: the change by hand, a reference without a copy, runs that go on, PEFT's folders both ways."""

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from planting import CAUGHT, plant
from test_checkpoint import SHAPE, assert_same_bits, bits, one_sentence, random_gpt

from dpo_minimal.__main__ import main
from dpo_minimal.experiments.text import dpo, figure
from dpo_minimal.experiments.text.setup import load_policy
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.text import adapters, training_run
from dpo_minimal.text.adapters import TARGETS, add_adapter, load_adapter, merge, save_adapter
from dpo_minimal.text.batches import Example
from dpo_minimal.text.checkpoint import load_model, save_model, state_fingerprint
from dpo_minimal.text.objectives import make_window, preference_objective, reference_logps
from dpo_minimal.text.tokenizer import byte_tokenizer, save_tokenizer
from dpo_minimal.train import make_optimizer, train
from dpo_minimal.validation import InputError

IDS = torch.randint(SHAPE.vocab_size, (3, 6), generator=torch.Generator().manual_seed(5))
CONFIG, WEIGHTS = adapters.ADAPTER_CONFIG, adapters.ADAPTER_WEIGHTS
# adapter_config.json as PEFT 0.21.2 writes it for GPT-2, but for the first four.
PEFT = {
    "base_model_name_or_path": None, "r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "mlp.c_proj"],
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": True, "inference_mode": True, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.1, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16,
    "rank_pattern": {}, "revision": None, "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "velora_config": None,
}  # fmt: skip


def adapted_gpt(base: GPT, r: int = 2, alpha: float = 6.0, targets=TARGETS) -> GPT:
    """With B drawn too, as after training."""
    model, generator = add_adapter(base, r, alpha, targets=targets), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapters.adapters_of(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return model


# -------------------------------------------------------------------------------------------- the change


def test_an_adapter_starts_as_nothing_whatever_a_is():
    """Bit for bit: + 0 is exact. A is drawn as torch draws a linear map, of which PEFT's is one."""
    base = random_gpt()
    model = add_adapter(base, 3, 5.0, seed=7)
    assert torch.equal(model(IDS), base(IDS))
    torch.manual_seed(7)
    first = model.h[0].attn.c_attn
    assert torch.equal(first.lora_A, torch.nn.Linear(SHAPE.n_embd, 3, bias=False).weight)
    assert torch.equal(first.lora_A, add_adapter(base, 3, 1.0, seed=7).h[0].attn.c_attn.lora_A)
    assert not torch.equal(first.lora_A, add_adapter(base, 3, 1.0, seed=8).h[0].attn.c_attn.lora_A)
    assert not torch.equal(first.lora_A, model.h[1].attn.c_attn.lora_A)


@pytest.mark.parametrize("targets", [TARGETS, ("c_proj",), ("mlp.c_fc", "h.1.attn.c_attn")])
def test_the_adapted_weight_is_w0_plus_alpha_over_r_times_ba(targets):
    """By hand, in float64, where only rounding is left (found: 4e-16 relative); the merged model too."""
    base = random_gpt().double()
    model, by_hand = adapted_gpt(base, targets=targets), random_gpt().double()
    layers = adapters.adapters_of(model)
    expected = {n for n in model.state_dict() for t in targets if f".{n}".endswith(f".{t}.weight")}
    assert {f"{name}.weight" for name in layers} == expected
    with torch.no_grad():
        for name, layer in layers.items():
            by_hand.get_parameter(f"{name}.weight").add_(6 / 2 * (layer.lora_B @ layer.lora_A))
        wanted = by_hand(IDS)
        assert (wanted - base(IDS)).abs().max() > 0.1
        for found in (model(IDS), merge(model)(IDS)):
            assert (found - wanted).abs().max() <= 1e-13 * wanted.abs().max()
    assert merge(model).state_dict().keys() == base.state_dict().keys()
    assert all(weight.requires_grad for weight in merge(model).parameters())


def test_only_the_product_of_b_and_a_matters():
    """B M^-1 and M A are the same adapter."""
    model, change = adapted_gpt(random_gpt().double()), torch.tensor([[2.0, 1.0], [0.5, -1.0]]).double()
    before = model(IDS)
    with torch.no_grad():
        for layer in adapters.adapters_of(model).values():
            layer.lora_A.copy_(change @ layer.lora_A)
            layer.lora_B.copy_(layer.lora_B @ change.inverse())
    assert (model(IDS) - before).abs().max() <= 1e-12 * before.abs().max()


# ----------------------------------------------------------------------------------------- the reference


def trained(steps: int = 6) -> tuple[GPT, GPT, list, torch.Tensor]:
    """(base, its adapted model after steps of DPO, examples, the reference's log-probabilities before)."""
    draw = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(SHAPE.vocab_size, (count,), generator=draw).tolist()

    examples = [Example(ids(2), (ids(3), ids(2)), f"row {n}") for n in range(4)]
    base, where = random_gpt(), {"dtype": "float32", "device": "cpu"}
    before = reference_logps(base, examples, micro_size=4, dtype="float32")
    model = add_adapter(base, 2, 6.0)
    learnt = [weight for weight in model.parameters() if weight.requires_grad]
    window = make_window(examples, [[0, 1, 2, 3]], before, **where)
    objective = preference_objective(model, "dpo", dtype="float32", beta=0.5)
    records = list(train(objective, make_optimizer(learnt, "adamw", 0.02), [window] * steps))
    assert abs(records[0]["loss"] - math.log(2)) <= 1e-6  # float32, four rows of log-ratios that are 0
    assert steps == 1 or records[-1]["loss"] < 0.6
    return base, model, examples, before


def test_the_reference_is_the_base_and_no_copy_of_it():
    """Every weight of the base is the adapted model's own, frozen; r (in + out) numbers a map are trained."""
    base, model = (made := trained())[0], made[1]
    own = dict(model.named_parameters())
    for name, weight in base.named_parameters():
        assert own[name].data_ptr() == weight.data_ptr() and not own[name].requires_grad, name
    learnt = {name: w for name, w in own.items() if w.requires_grad}
    assert all(".lora_" in name for name in learnt)
    sizes = [
        (layer.in_features, layer.out_features) for layer in base.modules() if hasattr(layer, "in_features")
    ]
    assert sum(w.numel() for w in learnt.values()) == sum(2 * (n + m) for n, m in sizes)


def test_training_moves_the_policy_and_leaves_the_reference_bit_for_bit():
    base, model, examples, before = trained()
    assert state_fingerprint(base) == state_fingerprint(random_gpt())
    after = reference_logps(base, examples, micro_size=4, dtype="float32")
    assert torch.equal(bits(after), bits(before))
    moved = reference_logps(model, examples, micro_size=4, dtype="float32") - before
    assert moved.abs().min() > 1e-3


def test_at_the_first_step_only_b_has_a_gradient():
    """dL/dA = (alpha / r) B' dL/dW is 0 while B is."""
    _, model, *_ = trained(steps=1)
    for layer in adapters.adapters_of(model).values():
        assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()


# ---------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """pairs.jsonl and a GPT with random weights: as files."""
    folder = tmp_path_factory.mktemp("world")
    rows = [{"prompt": f"Can you {n}?", "chosen": " yes", "rejected": " no"} for n in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    save_tokenizer(tokenizer, folder / "start")
    save_model(GPT(GPTConfig(tokenizer.vocab_size, 40, 1, 2, 16)), folder / "start", eos=tokenizer.eot)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figure, "preference_figure", lambda *_: None)  # half of a small run's time
    monkeypatch.setattr(figure, "sft_figure", lambda *_: None)


def flags(world: Path, command: str = "dpo", out: str = "run") -> list[str]:
    own = "--eval-samples 2 --max-new-tokens 4 --save-steps 2" if command == "dpo" else ""
    shared = "--per-device-train-batch-size 4 --gradient-accumulation-steps 1 --warmup-steps 0 --held-out 0.2"
    files = ["--data", str(world / "pairs.jsonl"), "--model", str(world / "start"), "--output-dir", out]
    return [command, *files, *f"{shared} {own} --optimizer adamw --lora-r 3 --lora-alpha 16".split()]


def check_run(world: Path, monkeypatch) -> None:
    """The start is ln 2, nothing is copied, and base + adapter/ = model/."""
    monkeypatch.setattr(adapters.copy, "deepcopy", copy_structure)  # of the module `copy`, so for all
    assert main([*flags(world), "--learning-rate", "0.02"]) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert records[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert records[-1]["eval_loss"] < 0.65
    base, whole = load_model(world / "start"), load_model("run/model")
    split = load_adapter(Path("run/adapter"), base)
    ids = torch.arange(30).unsqueeze(0)
    assert (split(ids) - whole(ids)).abs().max() <= 1e-5  # float32: W0 + BA rounded once, or added later
    assert (split(ids) - base(ids)).abs().max() > 1e-2
    assert_same_bits(load_policy("run/adapter").model.state_dict(), whole.state_dict())


deepcopy = adapters.copy.deepcopy


def copy_structure(model, shared=()):
    """copy.deepcopy of a model whose weights are all in `shared`, so that none is copied."""
    assert {id(weight) for weight in model.parameters()} <= {*shared}
    return deepcopy(model, shared)


def test_dpo_with_an_adapter(world, monkeypatch, capsys):
    check_run(world, monkeypatch)
    # The base that such a folder would name is no model, so nobody could read it.
    again = [*flags(world, "dpo", "again"), "--model", "run/adapter"]
    assert main(again) == 2 and not Path("again").exists()
    assert "is an adapter" in capsys.readouterr().err
    state = Path("run/checkpoints").glob("step-*/*.safetensors")
    names = [name for path in state for name in safetensors.torch.load_file(path)]
    assert names and all(".lora_" in name for name in names)  # weights and moments of nothing else
    capsys.readouterr()
    for command in (
        "sample --count 1 --max-new-tokens 3 --json",
        f"score --json --reference {world / 'start'}",
    ):
        pair = ["--prompt", "Can you 3?"] + ["--chosen", " yes", "--rejected", " no"] * ("score" in command)
        printed = {}
        for name in ("run", "run/adapter"):
            assert main([*command.split(), "--model", name, *pair]) == 0
            printed[name] = capsys.readouterr().out
        assert printed["run"] == printed["run/adapter"] != ""


@pytest.mark.parametrize("command", ["dpo", "sft"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(world, command, monkeypatch):
    """Killed after a checkpoint in the middle, from which it goes on; at ten times the usual rate."""
    extra = ["--save-steps", "2"] * (command == "sft")
    assert main([*flags(world, command, "whole"), *extra]) == 0
    save = training_run._save

    def save_and_die(*state):
        save(*state)
        if state[3] == 2:  # its number
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "_save", save_and_die)
        assert main([*flags(world, command), *extra]) == 130
    assert not Path("run/model").exists()
    assert main([command, "--resume", "run"]) == 0
    rate = json.loads(Path("run/config.json").read_text())["options"]["learning_rate"]
    assert rate == {"dpo": 1e-5, "sft": 2e-4}[command]
    for name in ("metrics.jsonl", "model/model.safetensors", f"adapter/{CONFIG}", f"adapter/{WEIGHTS}"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes(), name
    fields = json.loads(Path(f"run/adapter/{CONFIG}").read_text())
    assert fields["base_model_name_or_path"] == str(world / "start")


@pytest.mark.parametrize("given, named", [
    ("dpo --lora-alpha 8", ["--lora-alpha", "only with --lora-r"]),
    ("dpo --lora-target c_fc", ["--lora-target", "only with --lora-r"]),
    ("sft --lora-dropout 0", ["--lora-dropout", "only with --lora-r"]),
    ("dpo --lora-r 4 --lora-dropout 0.1", ["--lora-dropout", "dropout makes policy and reference differ"]),
    ("dpo --lora-r 4 --lora-target wte", ["--lora-target", "attn.c_attn"]),
    ("dpo --lora-r 4 --lora-alpha 0", ["--lora-alpha"]),
    ("dpo --lora-r 0", ["--lora-r"]),
    ("dpo --lora-r 10001", ["--lora-r", "10000"]),
    ("sft --lora-r 4", ["--lora-r", "--model"]),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(given, named, capsys):
    assert main(given.split()) == 2 and not Path("runs").exists()
    message = capsys.readouterr().err.strip()
    assert message.endswith(".") and all(part in message for part in named), message


# ----------------------------------------------------------------------------------------------- folders


def peft_folder(folder: Path, **changes: object) -> Path:
    """An adapter of `base/` beside it, with names and shapes as PEFT 0.21.2 writes them."""
    save_model(random_gpt(), folder / "base")
    (folder / "adapter").mkdir()
    generator, C = torch.Generator().manual_seed(3), SHAPE.n_embd
    tensors = {
        f"base_model.model.transformer.h.{layer}.{name}.lora_{part}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(2)
        for name, n, m in (("attn.c_attn", C, 3 * C), ("mlp.c_proj", 4 * C, C))
        for part, shape in (("A", (2, n)), ("B", (m, 2)))
    }
    safetensors.torch.save_file(tensors, folder / "adapter" / WEIGHTS)
    fields = PEFT | {"base_model_name_or_path": str(folder / "base")} | changes
    (folder / "adapter" / CONFIG).write_text(json.dumps(fields))
    return folder / "adapter"


def test_a_folder_in_pefts_layout_is_read_and_written_again(tmp_path):
    """Loaded: W0 + 6 / 2 B A of its tensors. Saved: the same names, shapes and bits."""
    folder = peft_folder(tmp_path)
    theirs, loaded, base = safetensors.torch.load_file(folder / WEIGHTS), load_model(folder), random_gpt()
    for name in loaded.state_dict():
        stem = f"base_model.model.transformer.{name.removesuffix('.weight')}.lora_"
        wanted = base.get_parameter(name).detach()
        if f"{stem}A.weight" in theirs:
            wanted = wanted + 3 * theirs[f"{stem}B.weight"] @ theirs[f"{stem}A.weight"]
        assert torch.allclose(loaded.get_parameter(name), wanted, rtol=1e-6, atol=1e-6), name
    save_adapter(load_adapter(folder, base), tmp_path / "ours", str(tmp_path / "base"))
    assert_same_bits(safetensors.torch.load_file(tmp_path / "ours" / WEIGHTS), theirs)
    fields = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["fan_in_fan_out"]) == (2, 6, True)
    assert_same_bits(load_model(tmp_path / "ours").state_dict(), loaded.state_dict())


OTHER_ADAPTERS = {
    "use_rslora": True, "use_dora": True, "modules_to_save": ["wte"], "bias": "all",
    "rank_pattern": {"c_fc": 4}, "alpha_pattern": {"c_fc": 4}, "peft_type": "IA3", "task_type": "SEQ_CLS",
    "init_lora_weights": "pissa", "layers_to_transform": [0],
    "lora_bias": True, "a_field_of_tomorrow": 1, "target_modules": ".*c_attn",
    "r": 3, "lora_alpha": -1, "base_model_name_or_path": "nowhere",
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER_ADAPTERS)
def test_another_kind_of_adapter_is_refused_by_its_field(tmp_path, field):
    folder = peft_folder(tmp_path, **{field: OTHER_ADAPTERS[field]})
    with pytest.raises(InputError) as caught:
        load_model(folder)
    short = {"r": "of shape (3,", "lora_alpha": "alpha", "target_modules": ".*c_attn"}
    one_sentence(caught.value, folder, short.get(field, repr(field)))


DAMAGE = {
    "missing": lambda t, name: t.pop(name),
    "transposed": lambda t, name: t.update({name: t[name].T.contiguous()}),
    "not finite": lambda t, name: t[name].view(-1)[0].fill_(math.nan),
    "whole numbers": lambda t, name: t.update({name: t[name].to(torch.int8)}),
    "of another map": lambda t, name: t.update({"base_model.model.transformer.wte.lora_A.weight": t[name]}),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_tensors_that_do_not_fit_are_refused(tmp_path, how):
    folder = peft_folder(tmp_path)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    DAMAGE[how](tensors, "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight")
    safetensors.torch.save_file({name: x.clone() for name, x in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    one_sentence(
        caught.value, folder / WEIGHTS, "wte.lora_A" if "another" in how else "h.1.attn.c_attn.lora_B"
    )


@pytest.mark.filterwarnings("ignore")  # of other projects
@pytest.mark.parametrize("targets", [list(TARGETS), ["c_attn"], ["c_proj"], "all-linear"])
def test_live_comparison_with_peft(tmp_path, targets):
    """peft reads our adapter and we read peft's; logits agree in float32 (found: 4e-7 of the largest)."""
    peft = pytest.importorskip("peft", reason="peft is not installed; its layout above stands in for it")
    from transformers import GPT2LMHeadModel

    save_model(random_gpt(), tmp_path / "base")

    def agree(theirs: torch.nn.Module, ours: GPT) -> None:
        with torch.no_grad():
            wanted = theirs.eval()(IDS).logits
            assert (ours(IDS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
            assert (random_gpt()(IDS) - wanted).abs().max() >= 1e-2 * wanted.abs().max()

    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.1,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config)
    theirs.save_pretrained(tmp_path / "theirs")
    agree(theirs, load_model(tmp_path / "theirs"))
    ours = load_adapter(tmp_path / "theirs", load_model(tmp_path / "base"))
    save_adapter(ours, tmp_path / "ours", str(tmp_path / "base"))
    back = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "ours"
    )
    agree(back, ours)
    agree(back.merge_and_unload(), merge(ours))


# ----------------------------------------------------------------------------------------------- mutants

MUTANTS = {
    "the adapter scaled twice": (
        adapters.LoRALinear.forward, "self.alpha / self.r *", "(self.alpha / self.r) ** 2 *",
        lambda: test_the_adapted_weight_is_w0_plus_alpha_over_r_times_ba(TARGETS),
    ),
    "alpha without the rank": (
        adapters.merge, "layer.alpha / layer.r", "layer.alpha",
        lambda: test_the_adapted_weight_is_w0_plus_alpha_over_r_times_ba(TARGETS),
    ),
    "B not 0 at the start": (
        adapters.add_adapter, "    return adapted",
        "    nn.init.ones_(adapted.h[0].mlp.c_fc.lora_B)\n    return adapted",
        test_an_adapter_starts_as_nothing_whatever_a_is,
    ),
    "base weights that move": (
        adapters.add_adapter, "requires_grad_(False)", "requires_grad_(True)",
        test_training_moves_the_policy_and_leaves_the_reference_bit_for_bit,
    ),
    "a copy of the base": (
        adapters.add_adapter, "deepcopy(model, shared)", "deepcopy(model)",
        test_the_reference_is_the_base_and_no_copy_of_it,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistakes_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()


IN_FILES = {
    "A and B turned round": ("x.float()", "x.T.contiguous().float()"),
    "A for B": ("{n}", "{n.swapcase()}"),
}


@pytest.mark.parametrize("name", IN_FILES)
def test_planted_mistakes_in_files_are_caught(monkeypatch, tmp_path, name):
    plant(monkeypatch, adapters.save_adapter, *IN_FILES[name])
    with pytest.raises(CAUGHT):
        test_a_folder_in_pefts_layout_is_read_and_written_again(tmp_path)


def test_planted_mistakes_in_runs_are_caught(monkeypatch, world):
    """The reference with the adapter on; a policy that is a copy with all weights."""
    for right, wrong in (
        ("reference.requires_grad_(False)", "reference = model"),
        ("if options.lora_r is None else", "if True else"),
    ):
        with monkeypatch.context() as patch, pytest.raises(CAUGHT):
            plant(patch, dpo._train, right, wrong)
            check_run(world, patch)
        shutil.rmtree("run", ignore_errors=True)
