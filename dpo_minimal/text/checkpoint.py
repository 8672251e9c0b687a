"""Hugging Face GPT-2 folders, read and written: `config.json` beside `model.safetensors`.

Hugging Face's GPT-2 keeps its linear maps as (in, out) matrices where torch's nn.Linear has (out, in), and
puts `transformer.` before every name; otherwise names and values are the same. A checkpoint is checked
tensor by tensor before a model is made of it; no code in it is run.

But: no optimizer state (training_state.py), no tokenizer (tokenizer.py), nothing but GPT-2. Dropout rates in
a config are ignored on purpose: policy and reference must give the same log-probability twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
from pathlib import Path
from reprlib import repr as short
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..model import GPT, GPTConfig
from ..validation import InputError
from .adapters import ADAPTER_CONFIG, adapters_of, load_adapter, merge
from .runs import read_json_object, read_safetensors, write_atomically, write_json

CONFIG_FILE, WEIGHTS_FILE, PICKLED_WEIGHTS_FILE = "config.json", "model.safetensors", "pytorch_model.bin"
NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that older versions saved
_WRAPPERS = ("transformer", "_orig_mod", "module", "pretrained_model")  # parts of names that others add
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(folder_or_name: str | Path, *, vocab_size: int | None = None) -> GPT:
    """Read a GPT-2 in Hugging Face's layout, as float32 on the CPU.

    Args:
        folder_or_name: a folder with config.json and model.safetensors or pytorch_model.bin, whole or as an
            index and its parts; or the name of a released model ("gpt2" to "gpt2-xl"), fetched by
            huggingface_hub where that is installed; or a LoRA adapter, which is merged into its base.
        vocab_size: of its tokenizer; embeddings beyond it stand for no token and are left out, with a note.
    Raises:
        InputError: no such folder or name, a file that is missing or damaged, a config that this GPT cannot
            follow, a tensor that is missing, unknown, of another shape or not finite, another vocabulary.
    """
    base = base_of(folder_or_name)
    if base != str(folder_or_name):
        return merge(load_adapter(Path(folder_or_name), load_model(base, vocab_size=vocab_size)))
    folder = _resolve(folder_or_name)
    config = read_config(folder / CONFIG_FILE)
    surplus = config.vocab_size - (vocab_size or config.vocab_size)
    if not 0 <= surplus <= config.vocab_size // 8:  # more is no padding, but another model's vocabulary
        raise InputError(
            f"{folder_or_name}: its tokenizer has {vocab_size} tokens but its model {config.vocab_size}; put "
            "the tokenizer that belongs to it beside the weights."
        )
    path, tensors = _read_tensors(folder)
    with torch.device("meta"):  # names and shapes only: no random numbers are drawn
        model = GPT(config)
    model.load_state_dict(_from_hugging_face(path, tensors, model.state_dict()), assign=True)
    if surplus:
        print(f"note: {path}: {surplus} embeddings beyond the vocabulary are left out.", file=sys.stderr)
        model.config = dataclasses.replace(config, vocab_size=vocab_size)
        model.wte = torch.nn.Embedding.from_pretrained(model.wte.weight[:vocab_size].clone(), freeze=False)
    return model


def save_model(model: GPT, folder: str | Path, *, eos: int | None = None) -> None:
    """Write a GPT-2 so that `load_model` and Hugging Face's own classes read it.

    Args:
        model: its weights, written as float32; an adapter is merged.
        folder: made where it is missing; files of an earlier model in it are replaced.
        eos: the end-of-text id to name in config.json.
    Raises:
        InputError: a weight is not finite in float32, or the folder cannot be written; an earlier model in it
            is then as it was.
    """
    folder = Path(folder)
    model = merge(model) if adapters_of(model) else model
    tensors = {
        f"transformer.{name}": (weight.T if name.endswith(_TRANSPOSED) else weight).float().cpu().contiguous()
        for name, weight in model.state_dict().items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: not written, because {name!r} holds NaN or infinity; train it anew.")

    def write(path: Path) -> None:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        # Only now, when the larger file is on the disk.
        write_json(folder / CONFIG_FILE, _config_fields(model.config, eos))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS_FILE, write)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{folder}: the model cannot be written ({error}); free some space or name another folder."
        ) from None


def state_fingerprint(model: GPT) -> str:
    """SHA-256 of a model's config and every weight's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{model.config}\n".encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- config


def _config_fields(config: GPTConfig, eos: int | None) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": config.vocab_size, "n_positions": config.block_size, "n_ctx": config.block_size,
        "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None,
        "layer_norm_epsilon": 1e-05, "initializer_range": 0.02, "tie_word_embeddings": True,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": eos, "eos_token_id": eos,
    }  # fmt: skip


# What this GPT does; a config that says otherwise is another model. None: where the field is absent, fine.
_REQUIRED = {
    "model_type": ("gpt2", None),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
    "layer_norm_epsilon": (1e-5, None),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
    "quantization_config": (None,),
}
_SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")  # in the order of GPTConfig


def read_config(path: Path) -> GPTConfig:
    """The shape that a Hugging Face config.json names. Raises InputError naming file and field."""
    fields = read_json_object(path)
    for field, allowed in _REQUIRED.items():
        if fields.get(field) not in allowed:
            raise InputError(
                f"{path}, field {field!r}: {short(fields[field])} is not what this GPT-2 does, which is "
                f"{allowed[0]!r}; choose another model."
            )
    for field in _SIZES:
        value, most = fields.get(field), 1_000 if field == "n_layer" else 10**7  # beyond, torch takes long
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise InputError(
                f"{path}, field {field!r}: an integer from 1 to {most} is needed, got {short(value)}; copy "
                "the model's own config.json again."
            )
    if fields.get("n_inner") not in (None, 4 * fields["n_embd"]):
        raise InputError(
            f"{path}, field 'n_inner': {short(fields['n_inner'])} is not 4 x n_embd, which this GPT-2 has; "
            "choose another model."
        )
    try:
        return GPTConfig(*(fields[field] for field in _SIZES))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------- weights


def find_folder(folder_or_name: str | Path) -> Path | None:
    """The folder of a model; None for the name of a released one. Raises InputError for what is neither."""
    folder = Path(folder_or_name)
    if not os.path.isdir(folder):  # False also for what can be no name
        if str(folder_or_name).removeprefix("openai-community/") in NAMES:
            return None
        raise InputError(
            f"{folder_or_name}: no such folder; name the folder of a model or one of {', '.join(NAMES)}."
        )
    for path in folder.iterdir():
        if path.exists() and not (
            path.is_file() or path.is_dir()
        ):  # reading a pipe or a device may never end
            raise InputError(f"{path}: is neither file nor folder; delete it.")
    if _has_weights(folder) or (folder / ADAPTER_CONFIG).exists():
        return folder
    steps = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    if steps:
        newest = max(steps, key=lambda path: int(path.name[11:]))
        raise InputError(f"{folder}: holds a trainer's checkpoints, no weights of its own; name {newest}.")
    return folder


def _has_weights(folder: Path) -> bool:
    return any(True for name in (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE) for _ in folder.glob(f"{name}*"))


def base_of(folder_or_name: str | Path) -> str:
    """The model whose adapter lies in a folder; what holds none, itself. Raises InputError."""
    folder = find_folder(folder_or_name)
    if folder is None or _has_weights(folder) or not (folder / ADAPTER_CONFIG).exists():
        return str(folder_or_name)
    path, field = folder / ADAPTER_CONFIG, "base_model_name_or_path"
    base = read_json_object(path).get(field)
    is_name = str(base).removeprefix("openai-community/") in NAMES
    if not is_name and not (isinstance(base, str) and os.path.isdir(base) and _has_weights(Path(base))):
        raise InputError(f"{path}, field {field!r}: {short(base)} is no model; write where its model is.")
    return base


def _resolve(folder_or_name: str | Path) -> Path:
    """A folder as it is; a released name as the folder into which huggingface_hub fetches it."""
    folder = find_folder(folder_or_name)
    if folder is not None:
        return folder
    name = str(folder_or_name).removeprefix("openai-community/")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name} has to be fetched by huggingface_hub, which is not installed; "
            "run `pip install huggingface_hub` or name a folder."
        ) from None
    try:
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # its errors are those of whatever HTTP library it uses
        raise InputError(
            f"{name} cannot be fetched ({type(error).__name__}); go online once, or name a folder."
        ) from None


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of all tensors, or else an index and the tensors of the files that it names."""
    for name, read in ((WEIGHTS_FILE, read_safetensors), (PICKLED_WEIGHTS_FILE, _read_pickled)):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.exists():
            return path, read(path)
        if index.exists():
            where = read_json_object(index).get("weight_map")
            parts = where.values() if isinstance(where, dict) else [where]
            for part in parts:
                if not isinstance(part, str) or not re.fullmatch(r"\w[\w.-]*", part):
                    raise InputError(f"{index}, field 'weight_map': {short(part)} is no file beside it.")
            found = [(t, x, part) for part in sorted(set(parts)) for t, x in read(folder / part).items()]
            return index, {t: x for t, x, part in found if where.get(t) == part}
    raise InputError(f"{folder}: holds neither {WEIGHTS_FILE} nor {PICKLED_WEIGHTS_FILE}; add one.")


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what an unpickler raises on damaged bytes has no common class
        raise InputError(
            f"{path}: is missing, truncated, damaged or holds more than tensors; copy it again or convert it "
            f"to {WEIGHTS_FILE}."
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
        for name, x in tensors.items()
    ):
        raise InputError(f"{path}: must hold a dictionary of tensors; save a state_dict.")
    return tensors


def _from_hugging_face(
    path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Names without prefix, linear maps turned round, masks and the tied head dropped; all of it checked."""
    found = {".".join(p for p in name.split(".") if p not in _WRAPPERS): x for name, x in tensors.items()}
    if len(found) < len(tensors):
        raise InputError(f"{path}: names occur with and without 'transformer.'; save each tensor once.")
    if "score.weight" in found:
        raise InputError(f"{path}: is a reward model ('score.weight'); name a language model.")
    if any(name.startswith("v_head.") for name in found):
        print(f"note: {path}: its value head ('v_head') is left out.", file=sys.stderr)
    found = {n: x for n, x in found.items() if not n.endswith(_BUFFERS) and not n.startswith("v_head.")}
    head = found.pop("lm_head.weight", None)
    for name in expected:
        if name not in found:
            raise InputError(f"{path}: tensor {name!r} is missing; use the file that config.json belongs to.")
    for name in found:
        if name not in expected:
            raise InputError(f"{path}: tensor {name[:60]!r} is none of GPT-2's; use config.json's own file.")
    weights = {name: _converted(path, name, found[name], expected[name]) for name in expected}
    tied = weights["wte.weight"]
    if head is not None and not torch.equal(_converted(path, "lm_head.weight", head, tied), tied):
        raise InputError(
            f"{path}: tensor 'lm_head.weight' differs from 'wte.weight', to which this GPT-2 ties it; "
            "choose another model."
        )
    return weights


def _converted(path: Path, name: str, tensor: Tensor, expected: Tensor) -> Tensor:
    """One tensor as float32 in memory of its own, turned round where it is a linear map."""
    if tensor.dtype not in _DTYPES:
        raise InputError(f"{path}: tensor {name!r} has dtype {tensor.dtype}; name a model not quantised.")
    shape = tuple(expected.T.shape if name.endswith(_TRANSPOSED) else expected.shape)
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{path}: tensor {name!r} has shape {tuple(tensor.shape)} where config.json asks for {shape}; "
            "use the config.json that belongs to these weights."
        )
    if name.endswith(_TRANSPOSED):
        tensor = tensor.T
    weight = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(weight).all():
        raise InputError(f"{path}: tensor {name!r} holds NaN or infinity; use an earlier checkpoint.")
    return weight


# Methods of GPT that read and write files are added here, so that model.py needs no knowledge of files.
GPT.from_pretrained = staticmethod(load_model)
GPT.save_pretrained = save_model
