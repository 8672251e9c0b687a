"""micro.py: the whole algorithm in one file, held against the library part by part, and run alone."""

import ast
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo_minimal as library
from dpo_minimal import micro
from dpo_minimal.model import GPT, GPTConfig

FILE = Path(micro.__file__)
PROMISE = 1e-5  # nats, in the docstring. Worst of ten seeds, by instruction set and threads: below a tenth
SECONDS = 15  # of one core
NEAR = dict(rtol=1e-12, atol=1e-12)  # float64: a few roundings of numbers below 100
Y = 40
seeds = given(seed=st.integers(0, 2**32))


def world(seed):
    """(beta, ref_logps, rewards, noise), the tables (Y,) in float64."""
    generator = torch.Generator().manual_seed(seed)
    ref_logps, rewards, noise = torch.randn(3, Y, generator=generator, dtype=torch.float64)
    beta = 0.1 + 1.9 * torch.rand((), generator=generator).item()
    return beta, ref_logps.log_softmax(-1), rewards, noise


def test_it_imports_torch_and_the_standard_library_alone():
    nodes = list(ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported}
    assert "torch" in packages and packages - {"torch"} <= sys.stdlib_module_names


def test_each_file_that_the_docstring_names_is_there():
    named = re.findall(r"(\w+\.py|\w+/) \(", micro.__doc__)
    assert len(named) == 7
    assert [name for name in named if not (FILE.parent / name).exists()] == []


@seeds
def test_loss_and_weight_are_the_librarys(seed):
    beta, *tables = world(seed)
    tables = [tables[0].requires_grad_(), *tables[1:], tables[1] - tables[2]]
    losses, weights = micro.dpo_loss(*tables, beta=beta)
    theirs = library.dpo_loss(*tables, beta=beta)
    torch.testing.assert_close(losses, theirs.losses, **NEAR)
    torch.testing.assert_close(weights, theirs.gradient_weights, **NEAR)
    assert not weights.requires_grad


@seeds
def test_optimum_and_outcomes_are_the_librarys(seed):
    beta, ref_logps, rewards, _ = world(seed)
    theirs = library.optimal_logps(ref_logps, rewards, beta=beta)
    torch.testing.assert_close(micro.optimal_logps(ref_logps, rewards, beta=beta), theirs, **NEAR)

    w, l, share = micro.expected_pairs(rewards)
    pairs = library.expected_pairs(rewards[None], library.all_sets(torch.ones(1, Y, dtype=torch.bool)))
    ours, theirs = torch.zeros(2, Y, Y, dtype=torch.float64)
    ours[w, l], theirs[tuple(pairs.order.T)] = share, pairs.weight
    torch.testing.assert_close(ours, theirs, **NEAR)


@seeds
def test_the_certificate_is_the_librarys_and_holds(seed):
    """The library's is larger by what rounding may do."""
    beta, ref_logps, rewards, noise = world(seed)
    pair = torch.eye(Y).double()[0] - torch.eye(Y).double()[1]
    # Newton's step gives the smaller bound, but -log(1 - x) where two completions alone are wrong; no bound
    # where x is beyond 1/2 (the third) and beyond 1.
    cases = (rewards, 1e-2 * noise), (0 * noise, 0.2 * pair), (0 * noise, 0.4 * pair), (rewards, 10 * noise)
    for truth, off in cases:
        best = micro.optimal_logps(ref_logps, truth, beta=beta)
        logps = micro.optimal_logps(ref_logps, truth + off, beta=beta)
        w, l, share = micro.expected_pairs(truth)
        data = library.Rankings(torch.zeros_like(w), torch.stack([w, l], -1), share)
        ours = micro.certificate(logps, ref_logps, w, l, share, beta=beta)
        theirs = library.certify(logps[None], ref_logps[None], data, beta=beta).logp_bound.item()
        assert (logps - best).abs().max() <= ours <= theirs
        assert ours == theirs == math.inf or beta * (theirs - ours) <= 1e-12


def test_the_gpt_is_the_librarys():
    """The same weights give the same log-probabilities of the same completions, and these sum to one."""
    ours = micro.GPT().double()
    theirs = GPT(GPTConfig(vocab_size=4, block_size=4, n_layer=2, n_head=4, n_embd=32)).double()
    its = dict(c_attn="attn.c_attn", attn_proj="attn.c_proj", c_fc="mlp.c_fc", mlp_proj="mlp.c_proj")
    renamed = {
        re.sub("|".join(its), lambda name: its[name[0]], key): w for key, w in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed)

    prompt, completions = torch.tensor(micro.PROMPT), micro.enumerate_completions()
    every = library.enumerate_completions(len(micro.VOCAB), micro.MAX_LENGTH, micro.END)
    assert torch.equal(completions, every.ids) and len(completions) == Y
    with torch.no_grad():
        logps = micro.completion_logps(ours, prompt, completions)
        torch.testing.assert_close(logps, library.completion_logps(theirs, prompt[None], every)[0], **NEAR)
    torch.testing.assert_close(logps.exp().sum(), torch.ones(()).double(), **NEAR)


def run(*command, folder, **environment):
    """(printed text, error, bound, CPU seconds) of a Python command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | environment, text=True, encoding="utf-8",
        capture_output=True, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = r"max \|log π − log π\*\| = (\S+) ≤ (\S+) \(proved from the gradient\)$"
    error, bound = map(float, re.fullmatch(line, done.stdout.splitlines()[-1]).groups())
    return done.stdout, error, bound, after.ru_utime - before.ru_utime


@pytest.mark.slow
def test_a_copy_in_an_empty_folder_runs(tmp_path):
    """Shortened: loss log 2 and weight beta / 2 at the start, some bound at the end, and a table of the three
    best completions and the three worst."""
    shutil.copy(FILE, tmp_path)
    text, error, bound, _ = run("-c", "import micro; micro.STEPS = 200; micro.main()", folder=tmp_path)
    assert text.startswith(f"step   0  loss {math.log(2):.6f}  mean weight {micro.BETA / 2:.6f}")
    assert error <= bound < 1
    first, second, _, _, *table, _, _ = text.splitlines()
    assert first.startswith("step   0") and second.startswith("step 100")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(micro.SEED)
        micro.GPT()
        rewards = sorted(torch.randn(Y).tolist(), reverse=True)
    rows = [(set(words), reward) for *words, reward, _, _, _ in map(str.split, table)]
    assert [reward for _, reward in rows] == [f"{r:.3f}" for r in rewards[:3] + rewards[-3:]]
    assert all(words <= set(micro.VOCAB[1:]) for words, _ in rows) and any(words for words, _ in rows)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["default", "avx2", ""])
def test_it_keeps_its_promise(tmp_path, instructions):
    """With and without vector instructions the bound is below a third of the promise, and within the time.
    With the processor's own the module runs, else the file alone."""
    environment = {"ATEN_CPU_CAPABILITY": instructions} if instructions else {}
    assert f"{PROMISE:.0e}".replace("e-0", "e-") in micro.__doc__
    shutil.copy(FILE, tmp_path)
    alone, module = (["micro.py"], tmp_path), (["-m", "dpo_minimal.micro"], FILE.parent.parent)
    command, folder = alone if instructions else module
    _, error, bound, seconds = run(*command, folder=folder, **environment)
    assert error <= bound <= PROMISE / 3
    assert seconds <= SECONDS
