"""The command line: what it writes, what it prints, and what it refuses before it works."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import dpo_minimal
from dpo_minimal.__main__ import entry_point, main
from dpo_minimal.bandit import Bandit, random_bandit
from dpo_minimal.experiments.bandit import command as bandit
from dpo_minimal.experiments.bandit import convergence, figure
from dpo_minimal.text import runs
from dpo_minimal.validation import InputError

NAMES = ("tabular", "finite", "gpt", "plackett_luce")
SMALL = ["--prompts", "2", "--completions", "4", "--pairs", "400", "--steps", "30"]
PARENT = Path(dpo_minimal.__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with a GPT of 21 completions a prompt instead of 341."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convergence, "MAX_LENGTH", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run that several tests read: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "MAX_LENGTH", 2)
        lines = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        assert main(["bandit", *SMALL, "--beta", "0.7", "--output-dir", str(folder)]) == 0
    return folder, "\n".join(lines)


@pytest.fixture
def no_figure(monkeypatch):
    """Leave out the drawing, which takes most of a small run's time."""
    monkeypatch.setattr(figure, "bandit_figure", lambda *_: None)


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "result.npz", allow_pickle=False) as file:
        return dict(file)


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_refused(capsys, arguments: list[str], *named: str) -> None:
    """Exit code 2, one sentence on stderr that names the trouble, nothing on stdout, nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dpo-minimal: error: ") and err.count("\n") == 1, err
    assert err.endswith(".\n") and ". " not in err, err
    for part in named:
        assert part in err, err
    assert sorted(Path.cwd().rglob("*")) == before


def assert_real_image(path: Path, width: int, height: int) -> None:
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] >= height and pixels.shape[1] >= width
    red, green, blue = (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3).T
    colours = np.unique(65536 * red + 256 * green + blue)
    channels = np.stack([colours // 65536, colours // 256 % 256, colours % 256])
    # an empty canvas has one colour, axes without data only greys; data are drawn in colour
    assert (np.ptp(channels, axis=0) > 60).sum() > 10


# -------------------------------------------------------- numpy's own closed forms, nothing of the package


def numpy_log_softmax(scores: np.ndarray) -> np.ndarray:
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))


def numpy_bradley_terry(prompt, order, weight, shape) -> np.ndarray:
    """Maximum likelihood by Hunter's MM algorithm, which shares nothing with the package's Newton."""
    X, Y = shape
    wins = np.zeros((X, Y, Y))
    np.add.at(wins, (prompt, order[:, 0], order[:, 1]), weight)
    games = wins + wins.transpose(0, 2, 1)
    strength = np.ones((X, Y))
    for _ in range(5000):
        strength = wins.sum(-1) / (games / (strength[:, :, None] + strength[:, None, :])).sum(-1)
        strength /= np.exp(np.log(strength).mean(-1, keepdims=True))
    return np.log(strength)  # mean zero


def printed_rows(text: str) -> dict[str, dict[str, float]]:
    """The printed table: {"tabular -> pi*": {"max|dlogp|": ..., ...}}."""
    lines = text.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith("experiment"))
    columns = lines[start].split()[1:]
    rows = {}
    for line in lines[start + 2 :]:
        if not line.strip():
            break
        words = line.split()
        rows[" ".join(words[:3])] = dict(
            zip(columns[:5], (float(word.replace("-", "nan", word == "-")) for word in words[3:8]))
        )
    return rows


# ---------------------------------------------------------------------------------------- the bandit run


def test_bandit_writes_its_files(run):
    """A missing or half-written file, or one left over from writing, makes a run worthless to others."""
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "bandit.png",
        "config.json",
        "metrics.jsonl",
        "result.npz",
    ]


def test_config_holds_what_it_takes_to_repeat_the_run(run):
    """A run whose options, seed or versions are unknown cannot be repeated."""
    config = json.loads((run[0] / "config.json").read_text())
    asked = {"command": "bandit", "prompts": 2, "completions": 4, "pairs": 400, "steps": 30, "beta": 0.7}
    assert config.items() >= {**asked, "seed": 0, "device": "cpu", "table_steps": 30, "gpt_steps": 30}.items()
    assert config["torch"] == torch.__version__ and config["numpy"] == np.__version__
    assert config["dpo_minimal"] == dpo_minimal.__version__


def test_printed_distances_can_be_recomputed_with_numpy_alone(run):
    """The claim of the table is pi_ref exp(r / beta) / Z: recomputed from the stored arrays by formulas that
    share no code with the package. Fails if another table is stored than judged, if beta is missing
    somewhere, or if a KL is taken the wrong way round."""
    folder, text = run
    arrays, rows = arrays_of(folder), printed_rows(text)
    targets = {}
    for name in NAMES:
        ref_logps, rewards, beta = (arrays[f"{name}_{key}"] for key in ("ref_logps", "rewards", "beta"))
        assert beta == 0.7
        targets[f"{name} -> pi*"] = numpy_log_softmax(ref_logps + rewards / beta)
    shape = arrays["finite_rewards"].shape
    estimate = numpy_bradley_terry(*(arrays[f"finite_{key}"] for key in ("prompt", "order", "weight")), shape)
    targets["finite -> MLE"] = numpy_log_softmax(arrays["finite_ref_logps"] + estimate / 0.7)
    targets["MLE -> pi*"] = targets.pop("finite -> pi*")
    arrays["MLE_logps"] = targets["finite -> MLE"]
    assert set(rows) == set(targets)
    for row, target in targets.items():
        logps = arrays[row.split()[0] + "_logps"]
        # rows sum to one: float64 roundings of up to 341 terms
        np.testing.assert_allclose(np.exp(logps).sum(-1), 1, rtol=0, atol=1e-12)
        gap = logps - target
        expected = {
            "max|dlogp|": np.abs(gap).max(),
            "TV": (np.abs(np.exp(logps) - np.exp(target)).sum(-1) / 2).max(),
            "KL(p|t)": (np.exp(logps) * gap).sum(-1).max(),
            "KL(t|p)": (np.exp(target) * -gap).sum(-1).max(),
        }
        for column, value in expected.items():
            # two digits are printed, so the last is off by at most half a unit, 5 %; 1e-12 is the rounding
            assert rows[row][column] == pytest.approx(value, rel=0.051, abs=1e-12), (row, column)
        bound = rows[row]["bound"]
        if row != "MLE -> pi*":  # nothing was trained there, so nothing is certified
            assert np.abs(gap).max() <= bound * 1.051
            stored = arrays[row.split()[0] + "_logp_bound"].max()
            assert bound == stored or bound == pytest.approx(stored, rel=0.051)


def test_population_data_are_the_exact_preference_probabilities(run):
    """The population layer compares with exact probabilities: the stored weights must be sigma(r_w - r_l) of
    each pair's two outcomes, and Plackett-Luce's for rankings; samples would
    make the target a lie."""
    arrays = arrays_of(run[0])
    for name in ("tabular", "gpt"):
        prompt, order, weight = (arrays[f"{name}_{key}"] for key in ("prompt", "order", "weight"))
        rewards = arrays[f"{name}_rewards"]
        wins = np.zeros((*rewards.shape, rewards.shape[1]))
        np.add.at(wins, (prompt, order[:, 0], order[:, 1]), weight)  # rings may hold a pair more than once
        x, i, j = wins.nonzero()
        share = wins[x, i, j] / (wins[x, i, j] + wins[x, j, i])
        # a sigmoid, a product, a sum and a quotient: a few roundings of 1e-16
        np.testing.assert_allclose(share, 1 / (1 + np.exp(rewards[x, j] - rewards[x, i])), rtol=1e-13)
    prompt, order, weight = (arrays[f"plackett_luce_{key}"] for key in ("prompt", "order", "weight"))
    rewards = arrays["plackett_luce_rewards"][prompt[:, None], order]
    tails = np.exp(rewards)[:, ::-1].cumsum(-1)[:, ::-1]
    chance = np.exp(rewards - np.log(tails)).prod(-1)
    for x in np.unique(prompt):  # each prompt has all four completions in its one set
        ours = weight[prompt == x]
        np.testing.assert_allclose(
            ours / ours.sum(), chance[prompt == x] / chance[prompt == x].sum(), rtol=1e-12
        )
    assert arrays["finite_weight"].sum() == 400  # sampled data keep their counts
    for name in ("tabular", "gpt", "plackett_luce"):  # in a population, prompts count alike
        share = np.bincount(arrays[f"{name}_prompt"], weights=arrays[f"{name}_weight"])
        np.testing.assert_allclose(share, 1 / len(share), rtol=1e-12)  # sums of up to a few hundred terms


def test_metrics_tell_the_whole_training(run):
    """Fails if a metric is renamed, a loss is not that of the untrained policy at step 0 (ln 2 for pairs,
    ln 4! for rankings of four), or a gradient weight does not start at beta / 2."""
    records = records_of(run[0])
    measured = {"experiment", "step", "loss", "dpo/gradient_weight", "distance/max_logp", "distance/bound"}
    measured |= {"kl/policy_target", "kl/policy_reference", "reward"}
    assert [*dict.fromkeys(record["experiment"] for record in records)] == list(NAMES)
    for name in NAMES:
        own = [record for record in records if record["experiment"] == name]
        first, last = own[0], own[-1]
        steps = [record["step"] for record in own]
        assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 30
        assert set(first) == measured
        assert all(set(record) == measured | {"grad_norm", "learning_rate"} for record in own[1:])
        # float64 log-softmax and a sum over weights that add up to one: a few dozen roundings
        assert first["loss"] == pytest.approx(math.log(24 if name == "plackett_luce" else 2), abs=1e-12)
        if name != "plackett_luce":
            assert first["dpo/gradient_weight"] == pytest.approx(0.7 / 2, abs=1e-12)
        assert first["kl/policy_reference"] == pytest.approx(0, abs=1e-12)
        assert last["loss"] < first["loss"]
        if name != "gpt":  # thirty steps teach a network which pairs to fit, not yet the whole distribution
            assert last["kl/policy_target"] < first["kl/policy_target"]
    # JSON has no word for infinity: the certificate that is not there yet is null
    assert any(record["distance/bound"] is None for record in records)
    assert "Infinity" not in (run[0] / "metrics.jsonl").read_text()


def test_the_last_record_is_the_stored_policy(run):
    """A policy saved one step before or after the numbers reported for it could not be checked."""
    arrays = arrays_of(run[0])
    for name in NAMES:
        last = [record for record in records_of(run[0]) if record["experiment"] == name][-1]
        logps, ref_logps, rewards = (arrays[f"{name}_{key}"] for key in ("logps", "ref_logps", "rewards"))
        # sums in another order: float64 roundings
        assert last["reward"] == pytest.approx((np.exp(logps) * rewards).sum(-1).mean(), abs=1e-12)
        kl = (np.exp(logps) * (logps - ref_logps)).sum(-1).mean()
        assert last["kl/policy_reference"] == pytest.approx(kl, abs=1e-12)


def test_bandit_figure_is_a_picture(run):
    """An empty canvas is a valid PNG too."""
    assert_real_image(run[0] / "bandit.png", 800, 600)


def test_the_seed_decides_everything(capsys, no_figure):
    """#80: the same seed gives the same bits, another seed another world; a seed that reaches only part of
    the draws would leave some array equal."""
    options = ["--prompts", "2", "--completions", "3", "--pairs", "300", "--steps", "3"]
    for folder, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        assert main(["bandit", *options, "--seed", seed, "--output-dir", folder]) == 0
    first, again, other = (arrays_of(Path(folder)) for folder in ("first", "again", "other"))
    assert first.keys() == again.keys() == other.keys()
    for key, array in first.items():
        assert array.dtype == again[key].dtype and np.array_equal(array, again[key]), key
    for name in NAMES:
        for key in ("ref_logps", "rewards", "logps", "weight"):
            assert not np.array_equal(first[f"{name}_{key}"], other[f"{name}_{key}"]), (name, key)
    without_time = [(Path(folder) / "metrics.jsonl").read_text() for folder in ("first", "again")]
    assert without_time[0] == without_time[1]


def test_other_options_leave_the_same_world(capsys, no_figure):
    """Draws come from one stream for each purpose: more pairs must not change the world or the GPT."""
    options = ["--prompts", "2", "--completions", "3", "--steps", "1"]
    for folder, pairs in (("few", "300"), ("many", "500")):
        assert main([*options, "--pairs", pairs, "--output-dir", folder]) == 0
    few, many = arrays_of(Path("few")), arrays_of(Path("many"))
    for key in few:
        if not key.startswith("finite_"):
            assert np.array_equal(few[key], many[key]), key


def test_quick_means_a_smaller_gpt_world_and_fewer_steps(monkeypatch, capsys):
    """An option silently ignored."""
    seen = []
    monkeypatch.setattr(convergence, "tabular", lambda world, settings: seen.append(settings) or stop())

    def stop():
        raise InputError("stopped here")

    for options in ([], ["--quick"], ["--steps", "7"]):
        assert main([*options, "--pairs", "2000", "--prompts", "1", "--completions", "2"]) == 2
    assert [settings.gpt_steps for settings in seen] == [2000, 1000, 7]
    assert [settings.table_steps for settings in seen] == [2000, 2000, 7]
    monkeypatch.undo()  # the true MAX_LENGTH
    counts = [len(convergence.gpt_world(settings)[2].ids) for settings in seen]
    by_length = [4**t for t in range(5)]  # strings of t words; the longest ones are cut, the others ended
    assert counts == [sum(by_length), sum(by_length[:4]), sum(by_length)]


def test_the_verdict_is_earned():
    """The closing line must say what the numbers say: not converged after one step, and a distance beyond a
    certificate is no success, however small."""
    settings = convergence.Settings(beta=0.5, pairs=1, table_steps=500, gpt_steps=1, seed=0, device="cpu")
    world = random_bandit(2, 4, generator=torch.Generator().manual_seed(0))
    done = convergence.tabular(world, settings)
    begun = convergence.tabular(world, replace(settings, table_steps=1))
    assert bandit._verdict([done]).startswith("Every training reached its target")
    assert bandit._verdict([done, begun]).startswith("NOT CONVERGED: tabular")
    assert (done.logps != done.target_logps).any()
    assert bandit._verdict([replace(done, logp_bound=torch.zeros(2))]).startswith("BEYOND ITS BOUND: tabular")


# ---------------------------------------------------------------------------------- the command as a program


@pytest.mark.slow  # a start of torch, which .ci/run and other tests have too
def test_program_without_a_command_runs_bandit(tmp_path):
    """`python -m dpo_minimal` must work from any folder, in a process of its own, and number its output. On
    a table of one's own, because the GPT's whole world takes seconds (`run` has a GPT)."""
    Path("world.csv").write_text("prompt,completion,reward\np,a,1\np,b,0\n")
    options = ["--table", "world.csv", "--pairs", "100", "--steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(PARENT)}
    done = subprocess.run(
        [sys.executable, "-m", "dpo_minimal", *options], cwd=tmp_path, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar and no warnings where the output is a file
    folder = tmp_path / "runs" / "bandit-001"
    assert "runs/bandit-001/bandit.png" in done.stdout.replace(os.sep, "/")
    assert json.loads((folder / "config.json").read_text())["command"] == "bandit"
    assert set(printed_rows(done.stdout)) == {
        *(f"{name} -> pi*" for name in ("tabular", "plackett_luce", "MLE")),
        "finite -> MLE",
    }


def test_program_reports_bad_input_with_exit_code_two(tmp_path, monkeypatch, capsys):
    """Scripts look at the exit code, people at the last line: a traceback serves neither."""
    monkeypatch.setattr(sys, "argv", ["dpo_minimal", "bandit", "--beta", "0"])
    file = PARENT / "dpo_minimal" / "__main__.py"
    program = compile(file.read_text(encoding="utf-8"), file, "exec")
    with pytest.raises(SystemExit) as ended:  # as runpy does, which does not take what pytest has rewritten
        exec(program, {"__name__": "__main__", "__package__": "dpo_minimal"})
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err == "dpo-minimal: error: --beta must be a positive finite number, got 0.0.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_printed_where_the_terminal_lacks_its_letters(monkeypatch):
    """A run that has trained for hours must not end at its samples: unknown letters are escaped."""
    Path("caf\xe9.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": " A", "rejected": " B"}))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", ["dpo-minimal", "audit", "--data", "caf\xe9.jsonl"])
    with pytest.raises(SystemExit) as ended:
        entry_point()
    assert ended.value.code == 0 and rb"caf\xe9" in screen.buffer.getvalue()


def test_interruption_ends_with_130(monkeypatch, capsys):
    """Ctrl-C in a long run is no error to be explained by a traceback."""

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bandit, "run", interrupted)
    assert main([]) == 130
    assert "interrupted" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--beta", "0"], ["--beta", "0.0"]),
        (["--beta", "-1"], ["--beta", "-1.0"]),
        (["--beta", "nan"], ["--beta", "nan"]),
        (["--beta", "inf"], ["--beta", "inf"]),
        (["--prompts", "0"], ["--prompts", "0"]),
        (["--prompts", "100000000"], ["--prompts", "between 1 and 10000000", "12000000000"]),
        (["--completions", "1"], ["--completions", "1"]),
        (["--pairs", "0"], ["--pairs", "0"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--quick", "--steps", "5"], ["--quick", "--steps"]),
        (["--table", "world.csv", "--prompts", "3"], ["--prompts", "--table"]),
        (["--table", "world.csv", "--completions", "3"], ["--completions", "--table"]),
        (["--table", "missing.csv"], ["missing.csv", "no such file"]),
        (["--loss", "ipo"], ["--loss", "--comparisons"]),
        (["--prior", "1"], ["--prior", "--comparisons"]),
        (["--comparisons", "games.csv", "--table", "world.csv"], ["--table", "--comparisons"]),
        (["--comparisons", "games.csv", "--pairs", "10"], ["--pairs", "--comparisons"]),
        (["--comparisons", "games.csv", "--quick"], ["--quick", "--comparisons"]),
        (["--comparisons", "games.csv", "--prior", "0"], ["--prior"]),
        (["--comparisons", "games.csv", "--beta", "0"], ["--beta"]),
        (["--comparisons", "missing.csv"], ["missing.csv", "no such file"]),
        (["--device", "tpu"], ["--device tpu", "cpu or cuda"]),
        (["--device", "cpu:x"], ["--device cpu:x"]),
        (["--seed", str(10**30)], ["--seed"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--comparisons", "games.csv", "--seed", "1"], ["--seed", "--comparisons"]),
        (["--table", "world.csv", "--quick"], ["--quick", "--table"]),
    ],
)
def test_bad_options_are_refused_before_any_work(capsys, options, named):
    """Each would otherwise be ignored in silence, end in a traceback, or be noticed only after
    minutes of training."""
    Path("world.csv").write_text("prompt,completion,reward\np,a,1\np,b,2\n")
    Path("games.csv").write_text("prompt,winner,loser\np,a,b\np,b,a\n")
    assert_refused(capsys, ["bandit", *options], *named)


def test_cuda_is_refused_where_there_is_none(capsys, monkeypatch):
    """torch's own message comes as a traceback, after the folder was made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(capsys, ["--device", "cuda"], "--device cuda", "use cpu")
    assert_refused(capsys, ["--device", "cuda:1"], "--device cuda:1", "use cpu")


@pytest.mark.parametrize(
    "arguments",
    [["--stepz", "5"], ["bandit", "--step", "5"], ["bandits"], ["--beta", "half"], ["--loss", "kto"]],
)
def test_unknown_options_are_refused(capsys, arguments):
    """A misspelt option must not be guessed (--step for --steps) or dropped."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "error:" in err and any(word in err.splitlines()[-1] for word in arguments[-2:])
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("command", [[*SMALL], ["--comparisons", "games.csv"]])
def test_a_folder_that_holds_files_is_refused_before_any_work(capsys, command):
    """Two runs mixed in one folder: config.json of one beside result.npz of the other."""
    Path("games.csv").write_text("prompt,winner,loser\np,a,b\np,b,a\n")
    Path("old").mkdir()
    Path("old/result.npz").write_bytes(b"precious")
    assert_refused(capsys, ["bandit", *command, "--output-dir", "old"], "--output-dir old")
    assert Path("old/result.npz").read_bytes() == b"precious"
    assert_refused(
        capsys, ["bandit", *command, "--output-dir", "games.csv"], "--output-dir games.csv", "file"
    )
    assert Path("games.csv").read_text().startswith("prompt")


# ------------------------------------------------------------------------------------------- own worlds


def test_own_table_reaches_its_optimum(capsys):
    """--table: fails if the file's reference or rewards are not what is trained on, or if prompts with fewer
    completions leak probability to ones that do not exist."""
    rows = [
        ("p", "a", 1.0, 5), ("p", "b", -0.5, 3), ("p", "c", 0.25, 2),
        ("q", "a", 0.0, 1), ("q", "b", 1.5, 9), ("q", "c", 0.5, 4), ("q", "d", -1.0, 6),
    ]  # fmt: skip
    text = "prompt,completion,reward,reference\n" + "".join(f"{p},{c},{r},{n}\n" for p, c, r, n in rows)
    Path("world.csv").write_text(text)
    assert main(["--table", "world.csv", "--beta", "0.3", "--pairs", "5000", "--output-dir", "out"]) == 0
    printed = printed_rows(capsys.readouterr().out)
    arrays = arrays_of(Path("out"))
    assert {key.split("_")[0] for key in arrays} == {"tabular", "finite", "plackett"}  # no gpt
    assert set(printed) == {"tabular -> pi*", "finite -> MLE", "MLE -> pi*", "plackett_luce -> pi*"}
    for name in ("tabular", "plackett_luce", "finite"):
        for x, prompt in enumerate("pq"):
            own = [(r, n) for p, _, r, n in rows if p == prompt]
            rewards, reference = np.array(own).T
            if name == "finite":  # its own target: the estimate from its own counts
                mine = arrays["finite_prompt"] == x
                order, weight = arrays["finite_order"][mine], arrays["finite_weight"][mine]
                shape = (1, len(own))
                rewards = numpy_bradley_terry(np.zeros(len(order), int), order, weight, shape)[0]
            target = reference * np.exp(rewards / 0.3)
            logps = arrays[f"{name}_logps"][x]
            # training stops when 1e-11 nats are certified (2000 steps are enough here); numpy's estimate
            # itself converges to about 1e-13
            np.testing.assert_allclose(
                logps[: len(own)],
                np.log(target / target.sum()),
                rtol=0,
                atol=2e-11 if name != "finite" else 1e-10,
            )
            assert (logps[len(own) :] == -math.inf).all()
    assert_real_image(Path("out/bandit.png"), 800, 600)


GAMES = [
    ("p", "a", "b", 6), ("p", "b", "a", 2), ("p", "b", "c", 3), ("p", "c", "b", 1), ("p", "a", "c", 4),
    ("p", "c", "a", 2), ("q", "y", "x", 5), ("q", "x", "y", 3),
]  # fmt: skip


def write_games(games) -> str:
    text = "prompt,winner,loser,count\n" + "".join(f"{p},{w},{loser},{n}\n" for p, w, loser, n in games)
    Path("games.csv").write_text(text)
    return "games.csv"


def ranking_rows(folder: str) -> list[dict]:
    with open(Path(folder) / "ranking.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_ranking(rows: list[dict], games, beta: float, *more: str) -> None:
    """What holds for every ranking.csv: counts, order, means, and policy = reference exp(reward/beta) / Z."""
    assert list(rows[0]) == [
        "prompt", "completion", "wins", "losses", "reward", "standard_error", "reference", "policy",
        "borda", "copeland", "equilibrium", *more,
    ]  # fmt: skip
    for prompt in dict.fromkeys(game[0] for game in games):
        own = [row for row in rows if row["prompt"] == prompt]
        names = {name for p, *pair, _ in games if p == prompt for name in pair}
        assert {row["completion"] for row in own} == names and len(own) == len(names)
        for row in own:
            won = sum(n for p, winner, _, n in games if (p, winner) == (prompt, row["completion"]))
            lost = sum(n for p, _, loser, n in games if (p, loser) == (prompt, row["completion"]))
            assert (float(row["wins"]), float(row["losses"])) == (won, lost)
        reward, error, reference, policy = (
            np.array([float(row[key]) for row in own])
            for key in ("reward", "standard_error", "reference", "policy")
        )
        assert (np.diff(reward) <= 0).all()  # best first
        assert (error > 0).all()
        # ten digits are written of numbers of size 1; the policy is trained to 1e-8 nats
        assert reward.mean() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(reference, 1 / len(own), rtol=1e-9)
        closed = reference * np.exp(reward / beta)
        np.testing.assert_allclose(policy, closed / closed.sum(), rtol=2e-8)


def test_ranking_of_comparisons(capsys):
    """--comparisons: fails if winners and losers are swapped, counts lost, beta forgotten in the policy, or
    rewards not the maximum-likelihood ones (checked against the log-odds of two, and against numpy)."""
    path = write_games(GAMES)
    assert main(["--comparisons", path, "--beta", "0.4", "--output-dir", "out"]) == 0
    assert sorted(file.name for file in Path("out").iterdir()) == [
        "config.json", "metrics.jsonl", "ranking.csv", "ranking.png",
    ]  # fmt: skip
    rows = ranking_rows("out")
    check_ranking(rows, GAMES, 0.4)
    x, y = (next(row for row in rows if row["completion"] == name) for name in "xy")
    # two completions: the estimate is the log-odds of the wins, its error the textbook one
    assert float(y["reward"]) - float(x["reward"]) == pytest.approx(math.log(5 / 3), abs=1e-9)
    # the difference of two rewards has variance 1/wins + 1/losses, each of them half its size
    assert float(y["standard_error"]) == pytest.approx(math.sqrt(1 / 5 + 1 / 3) / 2, rel=1e-9)
    order = np.array([["abc".index(w), "abc".index(loser)] for p, w, loser, _ in GAMES if p == "p"])
    weight = np.array([float(n) for p, _, _, n in GAMES if p == "p"])
    estimate = numpy_bradley_terry(np.zeros(len(order), int), order, weight, (1, 3))[0]
    for name, value in zip("abc", estimate):
        (row,) = (row for row in rows if (row["prompt"], row["completion"]) == ("p", name))
        assert float(row["reward"]) == pytest.approx(value, abs=1e-9)  # ten digits are written
    assert_real_image(Path("out/ranking.png"), 600, 200)
    config = json.loads(Path("out/config.json").read_text())
    assert config["comparisons"] == path and config["beta"] == 0.4
    records = records_of(Path("out"))
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)  # untrained: a few roundings
    assert "26 comparisons of 5 completions for 2 prompts" in capsys.readouterr().out


def test_comparisons_without_an_estimate_are_explained(capsys):
    """Training would run off to infinity: the completion at fault must be named before anything is written,
    and the two remedies that the message names must work on the same file."""
    games = [*GAMES, ("q", "champion", "x", 7), ("r", "s", "t", 1), ("r", "t", "s", 1)]
    path = write_games(games)
    assert_refused(capsys, ["--comparisons", path], "prompt q: champion never lost", "prior", "IPO")

    ipo = [
        "--loss",
        "ipo",
        "--beta",
        "0.4",
        "--steps",
        "500",
    ]  # 200 reach 1e-15; without a bound all are taken
    assert main(["--comparisons", path, *ipo, "--output-dir", "ipo"]) == 0
    rows = {(row["prompt"], row["completion"]): row for row in ranking_rows("ipo")}
    check_ranking([*rows.values()], games, 0.4)
    # q is a tree (y - x - champion), so each edge's log-ratio gap is its own minimiser: its mean label,
    # 1/(2 beta) for a win and -1/(2 beta) for a loss; the reward is beta times that, i.e. half the surplus
    x, y, champion = (float(rows["q", name]["reward"]) for name in ("x", "y", "champion"))
    assert champion - x == pytest.approx(1 / 2, abs=1e-9)  # ten digits are written
    assert y - x == pytest.approx((5 - 3) / 8 / 2, abs=1e-9)

    assert main(["--comparisons", path, "--prior", "0.5", "--output-dir", "prior"]) == 0
    said = capsys.readouterr().out
    assert "no more than 2 (one" in said and "Nothing but the prior" not in said  # sqrt(2 / 0.5) nats
    rows = {(row["prompt"], row["completion"]): row for row in ranking_rows("prior")}
    # wins and losses are the real ones, beta the default
    check_ranking([*rows.values()], games, 0.5, "prior_share")
    names = ("x", "y", "champion")
    imaginary = [("q", i, j, 0.5 / 2) for i in names for j in names if i != j]  # each half a win over two
    data = [game for game in games if game[0] == "q"] + imaginary
    order = np.array([[names.index(i), names.index(j)] for _, i, j, _ in data])
    weight = np.array([float(n) for *_, n in data])
    estimate = numpy_bradley_terry(np.zeros(len(order), int), order, weight, (1, 3))[0]
    for name, value in zip(names, estimate):
        assert float(rows["q", name]["reward"]) == pytest.approx(value, abs=1e-9)
    assert float(rows["q", "champion"]["prior_share"]) == pytest.approx(1 / 8, abs=1e-9)  # of 7 + 1 games


def test_completions_of_any_text_and_number_are_drawn():
    """What stands between dollars is no TeX, long texts leave room for the intervals, and of many completions
    the best are drawn: matplotlib refuses 65,536 pixels, which 1,324 completions would take."""
    names = (r"$5 or $\frac", "so long, " * 100, *(f"c{k}" for k in range(1500)))
    rewards = torch.arange(1502.0).flip(0).double().unsqueeze(0)
    world = Bandit(torch.zeros_like(rewards).log_softmax(-1), rewards, (r"$1 or $\sum",), (names,))
    figure.ranking_figure(world, torch.ones_like(rewards), Path("ranking.png"))
    assert_real_image(Path("ranking.png"), 600, 4000)


def test_comparisons_that_do_not_connect_are_refused_by_every_loss(capsys):
    """Two groups that never met: no loss says which is better, so IPO must refuse as well, and is no way out.
    Under a prior there is an estimate, and it is said what rests on the prior alone."""
    path = write_games([("p", "a", "b", 2), ("p", "b", "a", 1), ("p", "c", "d", 1), ("p", "d", "c", 1)])
    for loss in ("dpo", "ipo"):
        way_out = "add comparisons between these groups, or a prior."
        assert_refused(
            capsys, ["--comparisons", path, "--loss", loss], "a, b never met", loss.upper(), way_out
        )
    assert main(["--comparisons", path, "--loss", "ipo", "--prior", "2", "--steps", "300"]) == 0
    said = capsys.readouterr().out
    assert "Nothing but the prior compares" in said and "prompt p: a, b never met" in said
    assert "no more than 0.25 (one" in said  # sqrt(2 / 2), a fourth of it on the scale of win rates


def test_bad_files_are_refused_with_line_and_column(capsys):
    """The loader's sentence must come through as it is."""
    Path("world.csv").write_text("prompt,completion,reward\np,a,1\np,b,x\n")
    assert_refused(capsys, ["--table", "world.csv"], "world.csv", "line 3", "'reward'")
    Path("games.csv").write_text("prompt,winner,loser\np,a,a\n")
    assert_refused(capsys, ["--comparisons", "games.csv"], "games.csv", "line 2", "'loser'")


# ------------------------------------------------------------------------------------------ run folders


def test_default_folders_are_numbered():
    """A second run must not write into the first; a number freed by deletion is taken again, and commands
    count apart."""
    assert runs.new_run_folder(None, "bandit") == Path("runs/bandit-001")
    assert runs.new_run_folder(None, "bandit") == Path("runs/bandit-002")
    assert runs.new_run_folder(None, "ranking") == Path("runs/ranking-001")
    Path("runs/bandit-003").write_text("a file in the way")
    assert runs.new_run_folder(None, "bandit") == Path("runs/bandit-004")
    Path("runs/bandit-001").rmdir()
    assert runs.new_run_folder(None, "bandit") == Path("runs/bandit-001")
    assert all(path.is_dir() for path in Path("runs").glob("bandit-00[124]"))


def test_named_folder_may_be_new_or_empty_only():
    """An empty folder (made by a job script) is fine; hidden files count as files."""
    assert runs.new_run_folder("deep/er", "bandit").is_dir()
    assert runs.new_run_folder("deep/er", "bandit") == Path("deep/er")
    Path("deep/er/.hidden").touch()
    with pytest.raises(InputError, match="holds"):
        runs.new_run_folder("deep/er", "bandit")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else():
    """Half a result.npz under its final name looks like a result."""
    path = Path("result.json").resolve()
    runs.write_json(path, {"old": 1})

    def fail(temporary: Path):
        temporary.write_text("half a fi")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.write_atomically(path, fail)
    assert list(Path.cwd().iterdir()) == [path]
    assert json.loads(path.read_text()) == {"old": 1}
    with pytest.raises(KeyboardInterrupt):
        runs.write_atomically(Path("new.json"), fail)
    assert list(Path.cwd().iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_the_umask_and_replaces_a_link():
    """A run of private data must not be for all to read; what a link led to stays as it was."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            runs.write_json(Path("result.json"), {})
        finally:
            os.umask(before)
        assert Path("result.json").stat().st_mode & 0o777 == mode
    Path("elsewhere.json").write_text("kept")
    Path("result.json").unlink()
    Path("result.json").symlink_to("elsewhere.json")
    runs.write_json(Path("result.json"), {})
    assert Path("elsewhere.json").read_text() == "kept" and not Path("result.json").is_symlink()


def test_a_file_appears_only_when_it_is_whole():
    """Whoever watches the folder must never read half a file."""
    path = Path("result.txt").resolve()

    def write(temporary: Path):
        assert temporary.parent == path.parent and temporary != path
        temporary.write_text("first half, ")
        assert not path.exists()
        with open(temporary, "a") as file:
            file.write("second half")

    runs.write_atomically(path, write)
    assert path.read_text() == "first half, second half"
    assert list(Path.cwd().iterdir()) == [path]


def test_records_are_strict_json():
    """Python writes Infinity and NaN, which no other JSON reader takes."""
    record = {"step": 1, "bound": math.inf, "other": -math.inf, "nothing": math.nan, "loss": 0.5, "name": "x"}
    runs.write_records(Path("metrics.jsonl"), [record, {"step": 2}])

    def never(word):
        raise AssertionError(word)

    lines = Path("metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=never) for line in lines] == [
        {"step": 1, "bound": None, "other": None, "nothing": None, "loss": 0.5, "name": "x"},
        {"step": 2},
    ]


def test_arrays_need_numpy_alone_to_be_read():
    """Pickled objects inside an .npz would need the package, and run code, to be read."""
    arrays = {"a": np.arange(6.0).reshape(2, 3), "beta": np.float64(0.5)}
    runs.write_arrays(Path("result.npz"), arrays)
    with np.load("result.npz", allow_pickle=False) as file:
        assert set(file) == {"a", "beta"}
        assert np.array_equal(file["a"], arrays["a"]) and file["beta"] == 0.5
