"""Checkpoints: Hugging Face's own files and logits, exact both ways; what is refused; going on bit for bit.

tests/golden/ holds a tiny GPT-2 that Hugging Face saved, and its logits (make_golden.py stands beside them).
"""

import contextlib
import copy
import errno
import io
import json
import os
import random
import re
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from planting import CAUGHT, plant

from dpo_minimal.generation import generate
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.text import checkpoint, training_state
from dpo_minimal.text.checkpoint import load_model, read_config, save_model, state_fingerprint
from dpo_minimal.text.training_state import load_training_state, save_training_state
from dpo_minimal.train import OPTIMIZERS, make_optimizer
from dpo_minimal.validation import InputError

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "gpt2-tiny"
SHAPE = GPTConfig(vocab_size=11, block_size=7, n_layer=2, n_head=2, n_embd=8)
CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"


def golden_tensors() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(TINY / WEIGHTS)


def random_gpt(config: GPTConfig = SHAPE, seed: int = 0) -> GPT:
    """A GPT all of whose parameters, biases and gains included, are random."""
    gpt, generator = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return gpt


def one_sentence(error: BaseException, *named: object) -> None:
    message = str(error)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    for part in named:
        assert str(part) in message, (part, message)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(bits(ours[name]), bits(theirs[name])), name


# ------------------------------------------------------------------------------- the same logits as theirs

FORMS = {  # what such folders hold, in the wild
    "as saved": lambda t: t,
    "without prefix": lambda t: {name.removeprefix("transformer."): v for name, v in t.items()},
    "masks of older versions": lambda t: {
        **t,
        **{f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 32, 32).tril().byte() for n in range(2)},
        **{f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)},
    },
    "a copy of the tied head": lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()},
    "float64": lambda t: {name: v.double() for name, v in t.items()},
    "compiled": lambda t: {f"_orig_mod.{name}": v for name, v in t.items()},
    "of a parallel wrapper": lambda t: {f"module.{name}": v for name, v in t.items()},
    "compiled, then wrapped, without prefix": lambda t: {
        name.replace("transformer.", "module._orig_mod."): v for name, v in t.items()
    },
    "compiled block by block": lambda t: {re.sub(r"(h\.\d)", r"\1._orig_mod", n): v for n, v in t.items()},
    "with a value head": lambda t: {
        **{f"pretrained_model.{name}": v for name, v in t.items()},
        "v_head.summary.weight": torch.ones(1, 16),
        "v_head.summary.bias": torch.ones(1),
    },
}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], container: str = "safetensors") -> Path:
    """The golden config.json beside other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TINY / CONFIG, folder)
    if container == "safetensors":
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
    else:
        torch.save(tensors, folder / PICKLED, _use_new_zipfile_serialization=container == "zip")
    return folder


def distance_to_golden(gpt: GPT) -> float:
    """The largest relative error of a position's logits: ||ours - theirs|| / ||theirs||, 2-norms over V."""
    golden = safetensors.torch.load_file(GOLDEN / "logits.safetensors")
    with torch.no_grad():
        error = gpt(golden["ids"]).double() - golden["logits"]
    return (error.norm(dim=-1) / golden["logits"].norm(dim=-1)).max().item()


@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle of before torch 1.6"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_hugging_faces(tmp_path, form, container):
    """1e-5 is asked for in float32 (found: 2e-7); in float64 only rounding is left (found: 4e-16)."""
    gpt = load_model(write_folder(tmp_path, FORMS[form](golden_tensors()), container))
    assert {weight.dtype for weight in gpt.parameters()} == {torch.float32}
    assert distance_to_golden(gpt) <= 1e-5
    assert distance_to_golden(gpt.double()) <= 1e-13


def test_golden_logits_depend_on_every_tensor():
    """Else a tensor read wrongly could pass: 1 % more of any one of them is far beyond the tolerance."""
    for name, _ in load_model(TINY).named_parameters():
        gpt = load_model(TINY)
        with torch.no_grad():
            gpt.get_parameter(name).mul_(1.01)
        assert distance_to_golden(gpt) > 1e-4, name


@pytest.mark.filterwarnings("ignore")  # of another project
def test_live_comparison_with_hugging_face(tmp_path):
    """Their class reads our folders, ours theirs, and both give the golden logits."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; the golden files stand in for it"
    )
    ids = safetensors.torch.load_file(GOLDEN / "logits.safetensors")["ids"]

    def theirs(folder: Path) -> torch.Tensor:
        model, notes = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not notes["missing_keys"] and not notes["unexpected_keys"] and not notes["mismatched_keys"]
        assert next(model.parameters()).dtype == torch.float32
        with torch.no_grad():
            return model.double().eval()(ids).logits

    golden = safetensors.torch.load_file(GOLDEN / "logits.safetensors")["logits"]
    save_model(load_model(TINY), tmp_path / "ours", eos=63)
    torch.testing.assert_close(theirs(TINY), golden, rtol=0, atol=1e-13)  # float64; logits are about 1
    torch.testing.assert_close(theirs(tmp_path / "ours"), golden, rtol=0, atol=1e-13)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_head=3, n_layer=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "new")
    with torch.no_grad():
        ours = load_model(tmp_path / "new").double()(ids)
    torch.testing.assert_close(ours, theirs(tmp_path / "new"), rtol=0, atol=1e-13)
    save_model(random_gpt(), tmp_path / "none")  # no end of text is named, so none is made up
    assert transformers.GPT2Config.from_pretrained(tmp_path / "none").eos_token_id is None


# ------------------------------------------------------------------------------------- parts, rows too many


def write_parts(folder: Path, ending: str, tensors: dict[str, torch.Tensor]) -> Path:
    """The golden config.json, weights in three parts, and the index that names them."""
    write_folder(folder, {})
    (folder / WEIGHTS).unlink()
    where = {}
    for number, name in enumerate(tensors):
        where[name] = f"{Path(ending).stem}-0000{number % 3 + 1}-of-00003{Path(ending).suffix}"
    for part in set(where.values()):
        some = {name: tensors[name] for name in tensors if where[name] == part}
        (safetensors.torch.save_file if ending == WEIGHTS else torch.save)(some, folder / part)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{ending}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("ending", [WEIGHTS, PICKLED])
def test_parts_are_read_as_one(tmp_path, ending):
    folder = write_parts(tmp_path, ending, golden_tensors())
    assert_same_bits(load_model(folder).state_dict(), load_model(TINY).state_dict())
    part = sorted(folder.glob("*-of-*"))[1]
    part.rename(folder / "elsewhere")
    with pytest.raises(InputError) as caught:
        load_model(folder)
    one_sentence(caught.value, part)


@pytest.mark.parametrize("ending", [WEIGHTS, PICKLED])
@pytest.mark.parametrize("part", ["../../model.safetensors", "/etc/passwd", "..", "", "a/b", 7, None, ["x"]])
def test_an_index_names_files_of_its_folder_only(tmp_path, ending, part):
    """Even where the file outside is whole."""
    folder = write_parts(tmp_path / "in" / "model", ending, golden_tensors())
    outside = safetensors.torch.save_file if ending == WEIGHTS else torch.save
    outside(golden_tensors(), tmp_path / "model.safetensors")
    path = folder / f"{ending}.index.json"
    content = json.loads(path.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = part
    for wrong in (content, {"weight_map": part}, {}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError) as caught:
            load_model(folder)
        one_sentence(caught.value, path, "weight_map")


def load_noting(folder: Path, vocab_size: int) -> tuple[GPT, str]:
    """The model, and what was said on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return load_model(folder, vocab_size=vocab_size), said.getvalue()


def test_embeddings_beyond_the_vocabulary_are_left_out(tmp_path):
    """The logits are those of a model that never had them, bit for bit, and nothing of them is drawn."""
    cut, padded = golden_tensors(), golden_tensors()
    cut[WTE] = cut[WTE][:60].clone()
    padded[WTE][60:] *= 30  # would take most of the probability
    write_folder(tmp_path / "cut", cut)
    content = json.loads((TINY / CONFIG).read_text())
    (tmp_path / "cut" / CONFIG).write_text(json.dumps({**content, "vocab_size": 60}))
    expected = load_model(tmp_path / "cut")
    for form in (padded, {**padded, "lm_head.weight": padded[WTE].clone()}):
        model, said = load_noting(write_folder(tmp_path / "padded", form), 60)
        assert said.startswith("note: ") and "4 embeddings" in said and said.endswith(".\n")
        assert model.config == expected.config and model.wte.weight.requires_grad
        assert_same_bits(model.state_dict(), expected.state_dict())
    ids = safetensors.torch.load_file(GOLDEN / "logits.safetensors")["ids"].clamp(max=59)
    assert torch.equal(bits(model(ids)), bits(expected(ids)))
    many = {"prompts": [[1]] * 50, "max_new_tokens": 9}
    assert max(map(max, generate(model, **many))) < 60
    assert max(map(max, generate(load_model(tmp_path / "padded"), **many))) >= 60  # so it would be seen
    save_model(model, tmp_path / "saved")
    again, said = load_noting(tmp_path / "saved", 60)
    assert_same_bits(again.state_dict(), expected.state_dict())
    assert said == ""
    for vocab_size in (65, 50, 1):  # too large, or too far below to be padding
        with pytest.raises(InputError) as caught:
            load_model(tmp_path / "padded", vocab_size=vocab_size)
        one_sentence(caught.value, tmp_path / "padded", vocab_size, 64, "tokenizer")


# ------------------------------------------------------------------------------------------ exact both ways


def test_export_is_the_file_that_hugging_face_saved(tmp_path):
    """Names, shapes and bits of the weights, and every field of the config that bears on the logits."""
    save_model(load_model(TINY), tmp_path, eos=63)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert_same_bits(safetensors.torch.load_file(tmp_path / WEIGHTS), golden_tensors())
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as ours:
        assert ours.metadata() == {"format": "pt"}  # without it older versions of theirs refuse the file
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, TINY))
    shared = ours.keys() & theirs.keys() - {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    assert {"architectures", "model_type", "activation_function", "eos_token_id"} <= shared
    assert read_config(tmp_path / CONFIG) == read_config(TINY / CONFIG) == load_model(TINY).config


@pytest.mark.parametrize("config", [SHAPE, GPTConfig(5, 3, 1, 1, 2), GPTConfig(17, 4, 3, 3, 12)])
def test_import_of_an_export_is_exact(tmp_path, config):
    gpt = random_gpt(config)
    gpt.save_pretrained(tmp_path / "a" / "b")
    state = torch.get_rng_state()
    back = GPT.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), state)  # reading a file draws nothing
    assert type(back) is GPT and back.config == config
    assert_same_bits(back.state_dict(), gpt.state_dict())
    for parameter in back.parameters():
        assert parameter.is_contiguous() and parameter.requires_grad and not parameter.is_meta
    gpt.bfloat16().save_pretrained(tmp_path / "half")
    assert_same_bits(load_model(tmp_path / "half").state_dict(), gpt.float().state_dict())


def overwrite(file: Path) -> None:
    """Zeros in place of all bytes of a file, which stays the same file for those who have it mapped."""
    with file.open("r+b") as handle:
        handle.write(bytes(file.stat().st_size))


def test_a_model_outlives_its_file(tmp_path):
    gpt = random_gpt()
    save_model(gpt, tmp_path)
    back = load_model(tmp_path)
    overwrite(tmp_path / WEIGHTS)
    assert_same_bits(back.state_dict(), gpt.state_dict())


def test_an_earlier_model_is_replaced(tmp_path):
    save_model(random_gpt(seed=1), tmp_path, eos=3)
    save_model(random_gpt(GPTConfig(5, 3, 1, 1, 2)), tmp_path)
    assert_same_bits(load_model(tmp_path).state_dict(), random_gpt(GPTConfig(5, 3, 1, 1, 2)).state_dict())
    assert json.loads((tmp_path / CONFIG).read_text())["eos_token_id"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


# ------------------------------------------------------------------------------------------- names of models


class Hub:
    """Stands in for huggingface_hub: notes what was asked for, answers with the golden folder."""

    def __init__(self, monkeypatch, error: Exception | None = None):
        self.asked, self.error = [], error
        monkeypatch.setitem(
            sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=self.snapshot_download)
        )

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, sorted(allow_patterns)))
        if self.error is not None:
            raise self.error
        return str(TINY)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_released_models_are_fetched_by_name(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch)
    for written in (name, f"openai-community/{name}"):
        assert_same_bits(GPT.from_pretrained(written).state_dict(), load_model(TINY).state_dict())
    assert hub.asked == 2 * [(f"openai-community/{name}", [CONFIG, WEIGHTS])]
    GPTConfig.preset(name)  # names and presets are the same four
    save_model(random_gpt(), name)  # a folder of that name comes first
    assert_same_bits(load_model(name).state_dict(), random_gpt().state_dict())
    assert len(hub.asked) == 2


def test_a_name_without_huggingface_hub_or_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Hub(monkeypatch, ConnectionError("a page of. text\n"))
    with pytest.raises(InputError) as caught:
        load_model("gpt2-xl")
    one_sentence(caught.value, "gpt2-xl", "ConnectionError")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # import fails
    with pytest.raises(InputError) as caught:
        load_model("gpt2")
    one_sentence(caught.value, "gpt2", "pip install huggingface_hub")


@pytest.mark.parametrize("name", ["gpt3", "folder/that/is/not/there", "a-file"])
def test_unknown_names_are_refused_without_asking_anyone(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    hub = Hub(monkeypatch)
    with pytest.raises(InputError) as caught:
        load_model(name)
    one_sentence(caught.value, name, "gpt2-medium")
    assert hub.asked == []


# ------------------------------------------------------------------------------------------- what is refused


def with_entry(name: str, value: float):
    """The golden tensors with one number of one of them replaced."""

    def alter(tensors):
        tensors[name].view(-1)[-1] = value
        return tensors

    return alter


C_FC, WTE = "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"
BAD_TENSORS = {  # what is wrong: how, and what the message must name
    "missing": (lambda t: {k: v for k, v in t.items() if k != C_FC}, "h.1.mlp.c_fc.weight", "missing"),
    "extra": (lambda t: {**t, "transformer.h.2.ln_1.bias": torch.zeros(16)}, "h.2.ln_1.bias"),
    "shape": (lambda t: {**t, WTE: t[WTE][:-1].clone()}, "wte.weight", "(63, 16)", "(64, 16)"),
    "not transposed": (lambda t: {**t, C_FC: t[C_FC].T.contiguous()}, "c_fc.weight", "(64, 16)"),
    "NaN": (with_entry(C_FC, float("nan")), "h.1.mlp.c_fc.weight", "NaN"),
    "infinity": (with_entry("transformer.ln_f.bias", float("-inf")), "ln_f.bias", "infinity"),
    "too large": (lambda t: {**t, WTE: t[WTE].double() * 1e300}, "wte.weight", "infinity"),
    "integers": (lambda t: {**t, C_FC: t[C_FC].int()}, "h.1.mlp.c_fc.weight", "torch.int32"),
    "8 bits": (lambda t: {**t, C_FC: t[C_FC].to(torch.float8_e4m3fn)}, "c_fc.weight", "torch.float8_e4m3fn"),
    "untied head": (lambda t: {**t, "lm_head.weight": t[WTE] + 1}, "lm_head.weight", "wte.weight"),
    "twice": (lambda t: {**t, "wte.weight": t[WTE].clone()}, "'transformer.'"),
    "none": (lambda t: {}, "wte.weight", "missing"),
    "a long name": (lambda t: {**t, "x" * 9999: torch.zeros(1)}, "none of GPT-2's"),
    "quantised": (lambda t: {**t, C_FC: t[C_FC].to(torch.int8)}, "c_fc.weight", "torch.int8", "quantised"),
    "wrapped and not": (lambda t: {**t, f"module.{WTE}": t[WTE].clone()}, "'transformer.'"),
    "a reward model": (lambda t: {**t, "score.weight": torch.ones(1, 16)}, "reward model", "score.weight"),
    "a head of another shape": (lambda t: {**t, "lm_head.weight": torch.ones(9, 16)}, "lm_head", "(9, 16)"),
}


@pytest.mark.parametrize("container", ["safetensors", "zip"])
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_at_fault_is_named(tmp_path, case, container):
    alter, *named = BAD_TENSORS[case]
    write_folder(tmp_path, alter(golden_tensors()), container)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    one_sentence(caught.value, tmp_path / (WEIGHTS if container == "safetensors" else PICKLED), *named)


BAD_FIELDS = [
    ("model_type", "llama"),
    ("activation_function", "relu"),
    ("activation_function", "gelu"),  # the exact one
    ("activation_function", "gelu" * 999),
    ("layer_norm_epsilon", 1e-6),
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", True),
    ("add_cross_attention", True),
    ("tie_word_embeddings", False),
    ("n_inner", 32),
    ("n_head", 3),  # does not divide 16
    ("n_head", 0),
    ("n_layer", "two"),
    ("n_layer", True),
    ("n_embd", 16.0),
    ("vocab_size", -64),
    ("n_positions", 0),
    ("n_positions", None),
    ("quantization_config", {"bits": 4, "quant_method": "gptq"}),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_field_at_fault_is_named(tmp_path, field, value):
    write_folder(tmp_path, golden_tensors())
    content = json.loads((TINY / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, field: value}))
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    named = (field, "" if len(str(value)) > 99 else value)
    one_sentence(caught.value, tmp_path / CONFIG, *named)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 400


@pytest.mark.parametrize(
    "content",
    [b"", b'{"n_embd": 16', b"[16]", b'{"n_embd": "\xff"}', b'{"n_embd": NaN}', b"[" * 10**5, b"9" * 5000],
    ids=lambda content: repr(content[:12]),
)
def test_config_that_is_no_object(tmp_path, content):
    write_folder(tmp_path, golden_tensors())
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    one_sentence(caught.value, tmp_path / CONFIG, "JSON")


def test_files_that_are_missing_or_folders(tmp_path):
    for make, *named in (
        (lambda: None, CONFIG),
        (lambda: shutil.copy(TINY / CONFIG, tmp_path), WEIGHTS, PICKLED),
        (lambda: (tmp_path / PICKLED).mkdir(), PICKLED),
        (lambda: (tmp_path / WEIGHTS).mkdir(), WEIGHTS),
        (lambda: ((tmp_path / CONFIG).unlink(), (tmp_path / CONFIG).mkdir()), CONFIG),
    ):
        make()
        with pytest.raises(InputError) as caught:
            load_model(tmp_path)
        one_sentence(caught.value, tmp_path, *named)


@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle of before torch 1.6"])
def test_truncated_files_are_refused(tmp_path, container):
    write_folder(tmp_path, golden_tensors(), container)
    path = tmp_path / (WEIGHTS if container == "safetensors" else PICKLED)
    whole = path.read_bytes()
    for length in [*range(12), *range(100, len(whole), 1499), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError) as caught:
            load_model(tmp_path)
        one_sentence(caught.value, path, "damaged")


@pytest.mark.parametrize("container", ["safetensors", "zip", "pickle of before torch 1.6"])
def test_damaged_bytes_never_give_another_exception(tmp_path, container):
    """A file with one byte altered is read or refused in a sentence; most bytes of names are refused."""
    write_folder(tmp_path, golden_tensors(), container)
    path = tmp_path / (WEIGHTS if container == "safetensors" else PICKLED)
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(1500)] = generator.randrange(256)  # what describes the tensors
        path.write_bytes(damaged)
        try:
            assert load_model(tmp_path).config.n_embd == 16
        except InputError as error:
            assert str(path) in str(error) and str(error).endswith(".")  # it may quote a damaged name
            refused += 1
    assert refused > 50


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickled_file_is_not_run(tmp_path):
    folder = write_folder(tmp_path / "model", {**golden_tensors(), "x": Payload(tmp_path / "run")}, "zip")
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert not (tmp_path / "run").exists()
    one_sentence(caught.value, folder / PICKLED, "more than tensors")
    torch.load(folder / PICKLED, weights_only=False)  # the trap would have worked
    assert (tmp_path / "run").exists()


HEADERS = {  # of a safetensors file: its length as written, its content
    "of terabytes": (2**45, b"{}"),
    "of more bytes than there are": (2**63 + 1, b"{}"),
    "a tensor of terabytes": (None, {"shape": [2**40], "data_offsets": [0, 2**42]}),
    "a tensor of terabytes in four bytes": (None, {"shape": [2**40], "data_offsets": [0, 4]}),
    "a shape that overflows": (None, {"shape": [2**40, 2**40], "data_offsets": [0, 4]}),
    "of lines": (None, {"dtype": "F32\n. x" * 999, "shape": [1], "data_offsets": [0, 4]}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, case):
    """Before anything of that size is asked for."""
    length, header = HEADERS[case]
    if isinstance(header, dict):
        header = json.dumps({WTE: {"dtype": "F32", **header}}).encode()
    write_folder(tmp_path, {})
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", length or len(header)) + header + bytes(4))
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / WEIGHTS) in message and "damaged" in message and "\n" not in message
    assert len(message.replace(str(tmp_path), "")) < 400


@pytest.mark.parametrize("name", [WTE, "lm_head.weight"])
def test_a_pickled_tensor_of_terabytes_is_refused(tmp_path, name):
    """One number, said to be repeated 2^44 times."""
    huge = torch.ones(1, dtype=torch.float16).expand(2**40, 16)
    write_folder(tmp_path, {**golden_tensors(), name: huge}, "zip")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    one_sentence(caught.value, tmp_path / PICKLED, name.removeprefix("transformer."), 2**40)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "vocab.json"])
def test_links(tmp_path, name):
    """One to a file is read as that file, as in the cache of huggingface_hub; one to a device is refused."""
    folder = write_folder(tmp_path / "model", golden_tensors())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")  # without end
    with pytest.raises(InputError) as caught:
        load_model(folder)
    one_sentence(caught.value, folder / name, "delete it")
    (folder / name).unlink()
    os.mkfifo(folder / name)  # reading would wait for a writer
    with pytest.raises(InputError) as caught:
        load_model(folder)
    one_sentence(caught.value, folder / name, "delete it")
    (folder / name).unlink()
    (tmp_path / "secret").write_text("not for others")
    (folder / name).symlink_to(tmp_path / "secret")
    if name != "vocab.json":  # which is no file of the weights
        with pytest.raises(InputError) as caught:
            load_model(folder)
        one_sentence(caught.value, folder / name)
        assert "not for others" not in str(caught.value)
    (folder / name).unlink()
    if name != "vocab.json":
        (folder / name).symlink_to(TINY / name)
    assert_same_bits(load_model(folder).state_dict(), load_model(TINY).state_dict())


def test_what_training_leaves_is_named(tmp_path):
    shutil.copy(TINY / CONFIG, tmp_path)
    for number in (500, 1000, 90):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    one_sentence(caught.value, tmp_path, "checkpoints", f"name {tmp_path / 'checkpoint-1000'}.")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    one_sentence(caught.value, tmp_path, "base_model_name_or_path", "is no model")
    shutil.copy(TINY / WEIGHTS, tmp_path)  # beside weights of its own they do no harm
    assert_same_bits(load_model(tmp_path).state_dict(), load_model(TINY).state_dict())


@pytest.mark.parametrize("content", [[torch.ones(1)], {"model": {}}, {1: torch.ones(1)}, "weights"])
def test_a_pickled_file_of_something_else(tmp_path, content):
    write_folder(tmp_path, content, "zip")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    one_sentence(caught.value, tmp_path / PICKLED, "state_dict")


# ------------------------------------------------------------------------------- nothing is left half-written


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def little_room(size: int):
    """No file may grow beyond `size` bytes: a real write that fails half-way, as on a full disk."""
    resource = pytest.importorskip("resource", reason="this system has no limits on file sizes")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_earlier_model(tmp_path, monkeypatch):
    save_model(random_gpt(), tmp_path / "model")
    before = contents(tmp_path)
    other = random_gpt(GPTConfig(23, 7, 3, 2, 16))
    with little_room(4096), pytest.raises(InputError) as caught:
        save_model(other, tmp_path / "model")
    one_sentence(caught.value, tmp_path / "model", "too large")
    assert contents(tmp_path) == before
    for module, name in ((safetensors.torch, "save_file"), (checkpoint, "write_json"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(InputError) as caught:
            patch.setattr(module, name, no_space)
            save_model(other, tmp_path / "model")
        one_sentence(caught.value, tmp_path / "model", "No space left on device")
        assert contents(tmp_path) == before, name


def test_a_model_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError) as caught:
            save_model(random_gpt(), folder)
        one_sentence(caught.value, folder)
    broken = random_gpt().double()
    with torch.no_grad():
        broken.h[1].mlp.c_fc.bias[3] = 1e300  # finite, but not in the float32 of the file
    with pytest.raises(InputError) as caught:
        save_model(broken, tmp_path / "model")
    one_sentence(caught.value, tmp_path / "model", "h.1.mlp.c_fc.bias")
    assert contents(tmp_path) == {"file": b""}


# ------------------------------------------------------------------------------------------- training states


def make_optimizer_of(gpt: GPT, kind: str, learning_rate: float = 1e-2) -> torch.optim.Optimizer:
    if kind == "centred rmsprop":  # remembers three tensors a parameter
        return torch.optim.RMSprop(gpt.parameters(), lr=learning_rate, momentum=0.5, centered=True)
    return make_optimizer(gpt.parameters(), kind, learning_rate)


KINDS = [*OPTIMIZERS, "centred rmsprop"]


def step(gpt: GPT, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step whose batch and learning rate depend on its number."""
    ids = torch.randint(SHAPE.vocab_size, (4, 6), generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 1.1  # a setting that changes as training goes on


def trained(kind: str = "adamw", steps: int = 2) -> tuple[GPT, torch.optim.Optimizer]:
    gpt = random_gpt()
    optimizer = make_optimizer_of(gpt, kind)
    optimizer.param_groups[0]["initial_lr"] = 1e-2  # as a scheduler adds
    for number in range(steps):
        step(gpt, optimizer, number)
    return gpt, optimizer


def memory(optimizer: torch.optim.Optimizer) -> tuple[list, dict]:
    """All an optimizer knows: settings, and tensors by parameter and key."""
    content = optimizer.state_dict()
    tensors = {f"{i}.{k}": v for i, entries in content["state"].items() for k, v in entries.items()}
    return content["param_groups"], tensors


def assert_same_run(gpt, optimizer, other_gpt, other_optimizer) -> None:
    assert_same_bits(gpt.state_dict(), other_gpt.state_dict())
    (settings, tensors), (other_settings, other_tensors) = memory(optimizer), memory(other_optimizer)
    assert settings == other_settings  # tuples and numbers alike
    assert_same_bits(tensors, other_tensors)


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, kind, done):
    gpt, optimizer = trained(kind, done)
    state = {"step": done, "notes": [1.5, None, "ü"], "deep": {"a": True}}
    save_training_state(tmp_path / "state", gpt, optimizer, state)
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        CONFIG, WEIGHTS, "optimizer.safetensors", "state.json"
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["state"]

    restored = random_gpt(seed=9)
    its_optimizer = make_optimizer_of(restored, kind, learning_rate=3.0)
    step(restored, its_optimizer, 77)  # its own past is forgotten
    if done == 0:
        its_optimizer = make_optimizer_of(restored, kind, learning_rate=3.0)
    assert load_training_state(tmp_path / "state", restored, its_optimizer) == state
    for file in (tmp_path / "state").iterdir():
        overwrite(file)  # old checkpoints are removed while a run goes on
    assert_same_run(gpt, optimizer, restored, its_optimizer)
    for number in range(done, done + 3):
        step(gpt, optimizer, number)
        step(restored, its_optimizer, number)
        assert_same_run(gpt, optimizer, restored, its_optimizer)


def test_the_model_of_a_state_is_a_model(tmp_path):
    gpt, optimizer = trained()
    save_training_state(tmp_path / "state", gpt, optimizer, {})
    assert_same_bits(load_model(tmp_path / "state").state_dict(), gpt.state_dict())


def test_a_state_is_never_overwritten(tmp_path):
    save_training_state(tmp_path / "state", *trained(), {"step": 2})
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for name in ("state", "empty"):
        with pytest.raises(InputError) as caught:
            save_training_state(tmp_path / name, *trained(), {"step": 3})
        one_sentence(caught.value, tmp_path / name, "exists")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", ["save_model", "write_atomically", "write_json", "os.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_state_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch, writer, error):
    target, name = (os, "replace") if writer == "os.replace" else (training_state, writer)
    original = getattr(target, name)

    def write_and_fail(*arguments):
        if target is os and arguments[1] == tmp_path / "state":
            raise error  # instead of the last move
        original(*arguments)
        if target is not os:
            raise error

    monkeypatch.setattr(target, name, write_and_fail)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save_training_state(tmp_path / "state", *trained(), {})
    assert contents(tmp_path) == {}
    if isinstance(error, OSError):
        one_sentence(caught.value, tmp_path / "state", "No space left on device")


def test_a_state_on_a_full_disk_leaves_nothing(tmp_path):
    gpt, optimizer = trained()
    save_model(gpt, tmp_path / "model")
    room = (tmp_path / "model" / WEIGHTS).stat().st_size + 1000  # AdamW's memory takes twice as much
    shutil.rmtree(tmp_path / "model")
    for size in (1000, room):
        with little_room(size), pytest.raises(InputError) as caught:
            save_training_state(tmp_path / "state", gpt, optimizer, {})
        one_sentence(caught.value, tmp_path, "too large")
        assert contents(tmp_path) == {}
    save_training_state(tmp_path / "state", gpt, optimizer, {})


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path):
    (tmp_path / ".state.partial" / "junk").mkdir(parents=True)
    gpt, optimizer = trained()
    save_training_state(tmp_path / "state", gpt, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert not (tmp_path / "state" / "junk").exists()


def poison_weight(gpt, optimizer):
    with torch.no_grad():
        gpt.wpe.weight[0, 0] = float("nan")


def poison_optimizer(gpt, optimizer):
    optimizer.state[gpt.ln_f.bias]["exp_avg_sq"][2] = float("inf")


@pytest.mark.parametrize(
    ("alter", "state", "named"),
    [
        (poison_weight, {}, "wpe.weight"),
        (poison_optimizer, {}, "ln_f.bias.exp_avg_sq"),
        (lambda gpt, optimizer: gpt.h[0].ln_1.double(), {}, "h.0.ln_1.weight"),  # float32 would lose bits
        (lambda gpt, optimizer: None, {"loss": float("nan")}, "'state'"),
        (lambda gpt, optimizer: None, {"loss": torch.tensor(1.0)}, "Tensor"),
        (lambda gpt, optimizer: optimizer.param_groups[0].update(lr=float("inf")), {}, "'groups'"),
    ],
)
def test_a_state_that_could_not_be_restored_is_not_saved(tmp_path, alter, state, named):
    gpt, optimizer = trained()
    alter(gpt, optimizer)
    with pytest.raises(InputError) as caught:
        save_training_state(tmp_path / "state", gpt, optimizer, state)
    one_sentence(caught.value, "state", named)
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------ states that are refused, untouched


def edit_json(alter):
    def edit(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        alter(content)
        (folder / "state.json").write_text(json.dumps(content))

    return edit


def edit_optimizer(alter):
    def edit(folder: Path) -> None:
        path = folder / "optimizer.safetensors"
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
        alter(tensors)
        safetensors.torch.save_file(tensors, path)

    return edit


def drop_all_of(kind: str):
    def alter(tensors):
        for name in [name for name in tensors if name.endswith(kind)]:
            del tensors[name]

    return alter


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


MOMENT, COUNT = "h.1.ln_2.weight.exp_avg", "h.0.attn.c_attn.bias.step"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
BAD_STATES = {  # how, and what the message must name
    "lr missing": (edit_json(lambda c: c["groups"][0].pop("lr")), STATE, "groups", "'lr'"),
    "lr a word": (edit_json(lambda c: c["groups"][0].update(lr="fast")), STATE, "'lr'", "fast"),
    "lr NaN": (edit_json(lambda c: c["groups"][0].update(lr=float("nan"))), STATE, "JSON"),
    "lr a flag": (edit_json(lambda c: c["groups"][0].update(lr=True)), STATE, "'lr'"),
    "fused a number": (edit_json(lambda c: c["groups"][0].update(fused=1)), STATE, "'fused'"),
    "one beta": (edit_json(lambda c: c["groups"][0].update(betas=[0.9])), STATE, "'betas'"),
    "no group": (edit_json(lambda c: c["groups"].clear()), STATE, "groups"),
    "group of another kind": (edit_json(lambda c: c.update(groups=[3])), STATE, "groups"),
    "no groups": (edit_json(lambda c: c.pop("groups")), STATE, "groups"),
    "no state": (edit_json(lambda c: c.pop("state")), STATE, "'state'"),
    "state a list": (edit_json(lambda c: c.update(state=[1])), STATE, "'state'"),
    "no list of tensors": (edit_json(lambda c: c.pop("tensors")), STATE, "'tensors'"),
    "odd list of tensors": (edit_json(lambda c: c["tensors"].append([{}])), OPTIMIZER, "[{}]"),
    "another format": (edit_json(lambda c: c.update(format=2)), STATE, "'format'"),
    "another optimizer": (edit_json(lambda c: c.update(optimizer="RMSprop")), STATE, "RMSprop", "AdamW"),
    "state.json missing": (lambda f: (f / STATE).unlink(), STATE, "no such file"),
    "state.json cut": (cut(STATE), STATE, "JSON"),
    "optimizer missing": (lambda f: (f / OPTIMIZER).unlink(), OPTIMIZER, "no such file"),
    "optimizer cut": (cut(OPTIMIZER), OPTIMIZER, "truncated"),
    "weights cut": (cut(WEIGHTS), WEIGHTS, "truncated"),
    "config missing": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "tensor missing": (edit_optimizer(lambda t: t.pop(MOMENT)), OPTIMIZER, MOMENT, "missing"),
    "kind missing": (edit_optimizer(drop_all_of("exp_avg_sq")), OPTIMIZER, "exp_avg_sq", "missing"),
    "tensor too many": (edit_optimizer(lambda t: t.update({"h.9.x": torch.ones(1)})), OPTIMIZER, "h.9.x"),
    "kind unknown": (edit_optimizer(lambda t: t.update({"ln_f.bias.x": torch.ones(8)})), OPTIMIZER, "bias.x"),
    "shape": (edit_optimizer(lambda t: t.update({MOMENT: torch.ones(9)})), OPTIMIZER, MOMENT, "(9,)", "(8,)"),
    "one number": (edit_optimizer(lambda t: t.update({MOMENT: torch.ones(())})), OPTIMIZER, MOMENT, "()"),
    "count a vector": (edit_optimizer(lambda t: t.update({COUNT: torch.ones(24)})), OPTIMIZER, COUNT),
    "half": (edit_optimizer(lambda t: t.update({MOMENT: t[MOMENT].half()})), OPTIMIZER, MOMENT, "float16"),
    "NaN": (edit_optimizer(lambda t: t[MOMENT].fill_(float("nan"))), OPTIMIZER, MOMENT, "NaN"),
}


def check_refused(folder: Path, gpt: GPT, optimizer: torch.optim.Optimizer, *named: str) -> None:
    """One sentence, and neither model nor optimizer has changed."""
    before = copy.deepcopy((gpt.state_dict(), memory(optimizer)))
    with pytest.raises(InputError) as caught:
        load_training_state(folder, gpt, optimizer)
    one_sentence(caught.value, folder, *named)
    assert_same_bits(gpt.state_dict(), before[0])
    assert memory(optimizer)[0] == before[1][0]
    assert_same_bits(memory(optimizer)[1], before[1][1])


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_damaged_state_is_refused(tmp_path, case):
    damage, *named = BAD_STATES[case]
    save_training_state(tmp_path / "state", *trained(), {"step": 2})
    damage(tmp_path / "state")
    check_refused(tmp_path / "state", *trained(steps=3), *named)


def test_a_state_of_another_run_is_refused(tmp_path):
    save_training_state(tmp_path / "state", *trained(), {})
    check_refused(tmp_path / "state", *trained("rmsprop"), "AdamW", "RMSprop")
    for config in (GPTConfig(11, 7, 3, 2, 8), GPTConfig(11, 7, 2, 4, 8), GPTConfig(12, 7, 2, 2, 8)):
        gpt = random_gpt(config)
        check_refused(tmp_path / "state", gpt, make_optimizer_of(gpt, "adamw"), str(config), str(SHAPE))
    gpt = random_gpt()
    halves = [{"params": list(gpt.parameters())[:5]}, {"params": list(gpt.parameters())[5:]}]
    optimizer = torch.optim.AdamW(halves, lr=1e-2, fused=True)
    check_refused(tmp_path / "state", gpt, optimizer, "state.json", "2 group")
    check_refused(tmp_path / "nowhere", *trained(), "state.json", "no such file")


# ----------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_changes_with_any_bit(tmp_path):
    gpt, generator = random_gpt(), random.Random(0)
    print_of = state_fingerprint(gpt)
    assert len(print_of) == 64 and set(print_of) <= set("0123456789abcdef")
    for name, parameter in gpt.named_parameters():
        for bit in (0, 31, generator.randrange(1, 31)):
            flat = parameter.detach().view(-1).view(torch.int32)
            place, mask = generator.randrange(len(flat)), -(2**31) if bit == 31 else 2**bit
            flat[place] ^= mask
            assert state_fingerprint(gpt) != print_of, (name, bit)
            flat[place] ^= mask
    assert state_fingerprint(gpt) == print_of


def test_fingerprint_is_that_of_the_model_alone(tmp_path):
    gpt = random_gpt()
    save_model(gpt, tmp_path)
    copies = [random_gpt(), copy.deepcopy(gpt), load_model(tmp_path)]
    assert {state_fingerprint(each) for each in copies} == {state_fingerprint(gpt)}
    more_heads = GPT(GPTConfig(11, 7, 2, 4, 8))
    more_heads.load_state_dict(gpt.state_dict())  # same tensors, other log-probabilities
    others = [more_heads, random_gpt(seed=1), random_gpt().bfloat16(), random_gpt().double()]
    assert len({state_fingerprint(each) for each in [gpt, *others]}) == 5


# ----------------------------------------------------------------------------------------------- planted bugs

SQUARE_LEFT = "name.endswith(_TRANSPOSED) and {}.shape[0] != {}.shape[1]"
MUTANTS = {  # function, right, wrong, guard, its arguments after tmp_path
    "square map read as it is": (
        checkpoint._converted,
        "if name.endswith(_TRANSPOSED):",
        f"if {SQUARE_LEFT.format('tensor', 'tensor')}:",
        test_logits_equal_hugging_faces,
        ("as saved", "safetensors"),
    ),
    "square map written as it is": (
        checkpoint.save_model,
        "if name.endswith(_TRANSPOSED)",
        f"if {SQUARE_LEFT.format('weight', 'weight')}",
        test_export_is_the_file_that_hugging_face_saved,
        (),
    ),
    "half precision exported": (
        checkpoint.save_model,
        ".float().cpu()",
        ".bfloat16().float().cpu()",
        test_export_is_the_file_that_hugging_face_saved,
        (),
    ),
    "untied head ignored": (
        checkpoint._from_hugging_face,
        "if head is not None and not torch.equal",
        "if head is None and not torch.equal",
        test_tensor_at_fault_is_named,
        ("untied head", "safetensors"),
    ),
    "rows too many keep their probability": (
        checkpoint.load_model,
        "    if surplus:",
        "    if not surplus:",
        test_embeddings_beyond_the_vocabulary_are_left_out,
        (),
    ),
    "files outside the folder": (
        checkpoint._read_tensors,
        r"\w[\w.-]*",
        r"[\w./-]+",
        test_an_index_names_files_of_its_folder_only,
        (WEIGHTS, "../../model.safetensors"),
    ),
    "weights stay in the file": (
        checkpoint._converted,
        "copy=True, memory_format=torch.contiguous_format",
        "copy=False",
        test_a_model_outlives_its_file,
        (),
    ),
    "everything unpickled": (
        checkpoint._read_pickled,
        "weights_only=True",
        "weights_only=False",
        test_code_in_a_pickled_file_is_not_run,
        (),
    ),
    "optimizer forgotten": (
        training_state.load_training_state,
        '{"state": tensors,',
        '{"state": {},',
        test_a_restored_run_goes_on_bit_for_bit,
        ("rmsprop", 2),
    ),
    "settings forgotten": (
        training_state._fitting_groups,
        "{**group, **tuples,",
        "{**own,",
        test_a_restored_run_goes_on_bit_for_bit,
        ("adamw", 2),
    ),
    "optimizer stays in the file": (
        training_state._fitting_tensors,
        "tensor.clone()",
        "tensor",
        test_a_restored_run_goes_on_bit_for_bit,
        ("adamw", 2),
    ),
    "model altered before the checks": (
        training_state.load_training_state,
        "    tensors = _fitting_tensors(",
        "    model.load_state_dict(saved.state_dict())\n    tensors = _fitting_tensors(",
        test_a_damaged_state_is_refused,
        ("NaN",),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(monkeypatch, tmp_path, name):
    function, right, wrong, guard, arguments = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard(tmp_path, *arguments)


def test_planted_bugs_of_writing_are_caught(monkeypatch, tmp_path):
    """A config that is replaced before the weights have found room; a fingerprint of rounded weights."""
    save = 'safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})'
    early = "write_json(folder / CONFIG_FILE, _config_fields(model.config, eos))"
    with monkeypatch.context() as patch:
        plant(patch, checkpoint.save_model, save, f"{early}; {save}")
        with pytest.raises(CAUGHT):
            test_a_full_disk_leaves_the_earlier_model(tmp_path, monkeypatch)
    plant(monkeypatch, checkpoint.state_fingerprint, "weight.cpu()", "weight.cpu().bfloat16()")
    with pytest.raises(CAUGHT):
        test_fingerprint_changes_with_any_bit(tmp_path)
