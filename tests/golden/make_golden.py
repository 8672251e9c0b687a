"""Make the golden files beside this script: a tiny random GPT-2 saved by Hugging Face, and its logits.

    python tests/golden/make_golden.py        # needs transformers; test_checkpoint.py needs only the files

The weights are far larger than at birth, biases and gains included, so that a matrix left untransposed, an
untied head or another activation changes the logits by far more than rounding. The logits are those of
Hugging Face's own forward pass on the saved float32 weights, computed in float64.
"""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

FOLDER = Path(__file__).parent
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 32}


def main() -> None:
    import transformers  # not at the top: pytest looks for doctests in this file too

    torch.manual_seed(0)
    config = transformers.GPT2Config(**SHAPE, bos_token_id=63, eos_token_id=63)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    model.save_pretrained(FOLDER / "gpt2-tiny")
    (FOLDER / "gpt2-tiny" / "generation_config.json").unlink()  # says nothing that config.json does not
    ids = torch.randint(SHAPE["vocab_size"], (2, 20))
    with torch.no_grad():
        logits = model.double()(ids).logits
    versions = {module.__name__: module.__version__ for module in (torch, transformers, safetensors)}
    metadata = {"versions": json.dumps(versions)}  # one entry: safetensors shuffles several
    safetensors.torch.save_file({"ids": ids, "logits": logits}, FOLDER / "logits.safetensors", metadata)


if __name__ == "__main__":
    main()
