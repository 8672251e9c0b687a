"""Files that people bring: what good ones become, and what is said about them and about bad ones."""

import gzip
import math

import pytest
import torch

from dpo_minimal.experiments.bandit.tables import load_comparisons, load_table
from dpo_minimal.preferences import win_counts
from dpo_minimal.validation import InputError


@pytest.fixture
def write(tmp_path):
    """Write text (or bytes) to a file, return its path."""

    def write(content: str | bytes, name: str = "world.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def refused(load, path, *named: str) -> str:
    """The message of the refusal: one sentence that names the file and everything in `named`."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith("."), message
    assert "\n" not in message and ". " not in message, message
    for part in named:
        assert part in message, message
    return message


# ------------------------------------------------------------------------------------------- good tables


def test_table_of_rewards(write):
    """Fails if prompts or completions are reordered, columns are read by place instead of by name, or the
    uniform default reference is not uniform over a prompt's own completions."""
    world = load_table(write("reward,completion,prompt\n0.5,b,Q\n-1,a,Q\n2e0,c,Q\n3,a,P\n4,z,P\n"))
    assert world.prompts == ("Q", "P")
    assert world.completions == (("b", "a", "c"), ("a", "z"))
    assert world.rewards.dtype == world.ref_logps.dtype == torch.float64
    assert world.rewards.tolist() == [[0.5, -1.0, 2.0], [3.0, 4.0, 0.0]]
    assert world.exists.tolist() == [[True, True, True], [True, True, False]]
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0]], dtype=torch.float64)
    # one log, one log_softmax and one exp: a few roundings of 1e-16
    torch.testing.assert_close(world.ref_logps.exp(), expected, rtol=0, atol=1e-15)


def test_reference_as_counts_or_probabilities(write):
    """A reference of counts that is not normalised converges to the wrong policy; so does a normalisation
    over the whole file instead of over each prompt."""
    rows = [("p", "a", 3), ("p", "b", 1), ("q", "a", 10), ("q", "b", 30), ("q", "c", 60)]
    totals = {"p": 4, "q": 100}
    counts = "".join(f"{p},{c},0,{n}\n" for p, c, n in rows)
    chances = "".join(f"{p},{c},0,{n / totals[p]!r}\n" for p, c, n in rows)
    first = load_table(write("prompt,completion,reward,reference\n" + counts, "counts.csv"))
    second = load_table(write("prompt,completion,reward,reference\n" + chances, "chances.csv"))
    expected = torch.tensor([[3 / 4, 1 / 4, 0], [1 / 10, 3 / 10, 6 / 10]], dtype=torch.float64)
    for world in (first, second):
        # a few float64 roundings
        torch.testing.assert_close(world.ref_logps.exp(), expected, rtol=0, atol=1e-15)
        assert world.ref_logps[0, 2] == -math.inf


def test_numbers_keep_their_digits(write):
    """A detour over float32 would keep 7 of them: rewards off by 1e-8 put pi* off by 1e-7, ten thousand times
    what the training certifies."""
    world = load_table(write("prompt,completion,reward,reference\np,a,0.1,0.7\np,b,16777217,0.3\n"))
    assert world.rewards.tolist() == [[0.1, 16777217.0]]  # exactly what Python reads
    # log and log_softmax: a few roundings of 1e-16 on numbers of size 1
    assert world.ref_logps[0].tolist() == pytest.approx([math.log(0.7), math.log(0.3)], abs=1e-15)


def test_a_tiny_reference_stays_positive(write):
    """A positive reference that underflows on the way (float32 ends at 1e-45) silently removes a completion
    that the user listed."""
    world = load_table(write("prompt,completion,reward,reference\np,a,0,1e-60\np,b,0,1\n"))
    assert world.exists.all()
    assert world.ref_logps[0, 0].item() == pytest.approx(math.log(1e-60), rel=1e-14)  # two roundings


def test_a_large_reward_stays_finite(write):
    """1e39 is beyond float32 and well within float64, in which the world is kept."""
    assert load_table(write("prompt,completion,reward\np,a,1e39\np,b,0\n")).rewards[0, 0].item() == 1e39


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_spreadsheets_write_is_read(write, newline, mark):
    """A byte order mark would become part of the first column's name, quoted commas would shift cells, and
    blank lines or blanks around cells would become names."""
    lines = [
        " prompt , completion,reward",
        '"Say ""hi"", please","Hi, you", 1.5',
        "",
        '"Say ""hi"", please",  Hé ! ,2',
        " , , ",
    ]
    world = load_table(write(mark + newline.join(lines) + newline))
    assert world.prompts == ('Say "hi", please',)
    assert world.completions == (("Hi, you", "Hé !"),)
    assert world.rewards.tolist() == [[1.5, 2.0]]


def test_cells_may_hold_several_lines_and_lines_are_still_counted(write):
    """An error below a multi-line cell would name a line that is fine."""
    text = 'prompt,completion,reward\np,"first\nsecond",1\np,b,2\n'
    assert load_table(write(text)).completions == (("first\nsecond", "b"),)
    refused(load_table, write(text + "p,c,x\n"), "line 5", "'reward'", "'x'")


def test_further_columns_are_allowed(write):
    """Notes beside the data must neither be refused nor read as data."""
    world = load_table(write("note,prompt,completion,reward\nnan,p,a,1\n,p,b,2\n"))
    assert world.rewards.tolist() == [[1.0, 2.0]]


# -------------------------------------------------------------------------------------- good comparisons


def test_comparisons_become_counts(write):
    """Fails if winner and loser are swapped, counts dropped, repeated rows not added up, or one prompt's
    completions numbered with another's."""
    path = write(
        "prompt,winner,loser,count\np,a,b,2\np,b,a,1\nq,z,a,1.5\np,a,b,3\nq,a,y,1\nq,y,z,4\n", "games.csv"
    )
    world, rankings = load_comparisons(path)
    assert world.prompts == ("p", "q")
    assert world.completions == (("a", "b"), ("z", "a", "y"))  # in order of first appearance
    wins = win_counts(rankings, 2, 3)
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    expected[0, 0, 1], expected[0, 1, 0] = 2 + 3, 1
    expected[1, 0, 1], expected[1, 1, 2], expected[1, 2, 0] = 1.5, 1, 4
    assert torch.equal(wins, expected)
    assert rankings.weight.dtype == torch.float64
    assert (world.rewards == 0).all()
    uniform = torch.tensor([[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    # one log_softmax and one exp
    torch.testing.assert_close(world.ref_logps.exp(), uniform, rtol=0, atol=1e-15)


def test_comparisons_without_counts_count_one_each(write):
    """Merged rows must add up, not replace one another."""
    _, rankings = load_comparisons(write("prompt,winner,loser\np,a,b\np,a,b\np,b,a\n"))
    assert win_counts(rankings, 1, 2).tolist() == [[[0.0, 2.0], [1.0, 0.0]]]


def test_counts_keep_their_digits(write):
    """In float32, 16777217 games are 16777216, and 0.1 is not 0.1."""
    _, rankings = load_comparisons(write("prompt,winner,loser,count\np,a,b,16777217\np,b,a,0.1\n"))
    assert sorted(rankings.weight.tolist()) == [0.1, 16777217.0]


# ------------------------------------------------------------------------- other ways to write comparisons


def wins_of(path) -> dict[str, dict[tuple[str, str], float]]:
    """Prompt -> (winner, loser) -> how often."""
    world, rankings = load_comparisons(path)
    table = win_counts(rankings, *world.rewards.shape)
    found = {}
    for x, (prompt, names) in enumerate(zip(world.prompts, world.completions)):
        places = table[x].nonzero().tolist()
        found[prompt] = {(names[i], names[j]): table[x, i, j].item() for i, j in places}
    return found


SAME = {"p": {("a", "b"): 1500.0, ("b", "a"): 2.5}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,winner,loser,count\np,a,b,1500\np,b,a,2.5\n", ""),
        (" Prompt ,WINNER,Loser,Count,\np,a,b,1500,\np,b,a,2.5,\n", ""),  # with what spreadsheets leave over
        ('prompt,winner,loser,count\np,a,b,"1,500"\np,b,a,2.5\n', ""),
        ("prompt;winner;loser;count\np;a;b;1500\np;b;a;2,5\n", "separated by semicolons"),
        ("prompt\twinner\tloser\tcount\np\ta\tb\t1500\np\tb\ta\t2.5\n", "separated by tabs"),
        ("prompt|winner|loser|count\np|a|b|1.5e3\np|b|a|2.5\n", "separated by bars"),
        ("id,prompt,winner,loser,count,note\n1,p,a,b,1500,x\n2,p,b,a,2.5,\n", "not read: id, note."),
        ("prompt,winner,loser,count\np,a,b,1500\np,c,d,0\np,b,a,2.5\n", "count of 0, which are left out: 1."),
        ('[["a", "b", 1500], ["b", "a", 2.5]]', "No column 'prompt'"),
        ('{"winner": "a", "loser": "b", "count": 1500}\n{"winner": "b", "loser": "a", "count": 2.5}', "No c"),
        ('{"Winner": ["a", "b"], "loser": ["b", "a"], "count": [1500, 2.5]}', "No column 'prompt'"),
        (gzip.compress(b'[{"prompt": "p", "winner": "a", "loser": "b", "count": 1500, "x": []},'
                       b' {"prompt": "p", "winner": "b", "loser": "a", "count": 2.5}]', mtime=0),
         "not read: x."),
    ],
)  # fmt: skip
def test_one_set_of_comparisons_in_many_spellings(write, capsys, content, said):
    """Each says the same, and what was recognised, assumed or left out is said."""
    found = wins_of(write(content, "games"))
    assert [*found.values()] == [*SAME.values()]
    assert (list(found) == ["p"]) == ("No c" not in said)
    printed = capsys.readouterr().out
    assert said in printed and printed.count("\n") == (1 if said else 0), printed


@pytest.mark.parametrize("separator", ["; ", "\t"])
def test_a_number_that_may_be_two_numbers_is_refused(write, separator):
    """1,500 is 1500 or 1.5 where commas do not separate columns: a factor of a thousand."""
    rows = [("winner", "loser", "count"), ("a", "b", "1,500")]
    path = write("".join(separator.join(row) + "\n" for row in rows))
    refused(load_comparisons, path, "line 2", "'1,500' is not a number; write it like 1234.5")


ARENA = """model_a,model_b,winner,judge
x,y,model_a,me
x,y,Model B,me
y,x,a,me
x,y,B,me
y,x,y,me
x,y,tie,me
x,y,tie (bothbad),me
x,y,both_bad,me
"""


def test_an_arenas_ties_are_half_a_win_each_way(write, capsys):
    """[D2.1] The winner is a side or a name. Fails if a tie is dropped or counted twice, or sides swapped."""
    assert wins_of(write(ARENA)) == {"all": {("x", "y"): 1 + 3 / 2, ("y", "x"): 1 + 1 + 1 + 1 + 3 / 2}}
    said = capsys.readouterr().out
    assert "Ties, which are half a win each way: 3." in said and "not read: judge." in said
    refused(
        load_comparisons, write(ARENA + "x,y,left,me\n"), "line 10", "'winner'", "'left' does not say who won"
    )
    refused(
        load_comparisons, write(ARENA + "x,x,tie,me\n"), "line 10", "'model_b'", "'x' is compared with itself"
    )


def test_prompts_of_single_battles_are_not_ranked_apart(write, capsys):
    """One game of a prompt ranks nobody: an arena's models are ranked over all prompts, of winners and losers
    the way is said. Prompts that each have games enough stay apart in either."""
    battles = [(f"question {k}", *pair) for k, pair in enumerate(["xy", "yx", "xy", "yz", "zy"])]
    arena = "prompt,model_a,model_b,winner\n" + "".join(f"{p},{a},{b},model_a\n" for p, a, b in battles)
    assert wins_of(write(arena)) == {"all": {("x", "y"): 2, ("y", "x"): 1, ("y", "z"): 1, ("z", "y"): 1}}
    assert "over all prompts together" in capsys.readouterr().out
    plain = "prompt,winner,loser\n" + "".join(f"{p},{a},{b}\n" for p, a, b in battles)
    assert len(wins_of(write(plain))) == 5
    assert "delete the column 'prompt'" in capsys.readouterr().out
    kept = "\n".join(",".join(line.split(",")[1:]) for line in plain.splitlines())  # what it says
    assert wins_of(write(kept)) == wins_of(write(arena))
    apart = "prompt,model_a,model_b,winner\n" + "".join(f"{p},x,y,{w}\n" for p in "pq" for w in "ab")
    capsys.readouterr()
    assert list(wins_of(write(apart))) == ["p", "q"] and not capsys.readouterr().out


def test_names_that_look_alike_are_kept_apart_and_named(write, capsys):
    """One player spelt in two ways would be two, each with half the games and nobody told."""
    rows = "p,Ada,Bob\np,Bob,ada\np,ada,Bob\np,Bob, Ada \nP,A  b,c\nP,A b,c\n"
    assert len(wins_of(write("prompt,winner,loser\n" + rows))["p"]) == 4
    said = capsys.readouterr().out
    for pair in ("'Ada' and 'ada'", "'A  b' and 'A b'", "'P' and 'p'"):
        assert pair in said


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            "winner,loser\ntie,tie\n",
            ["line 2", "'tie' is compared with itself; a tie is two rows of count 0.5"],
        ),
        ("winner,loser,count\na,b,0\n", ["every count is 0"]),
        ('[["a"]]', ["row 1", "a list [winner, loser]"]),
        ('[["a", "b"], ["b", ["a"]]]', ["row 2", "'loser'", "several values"]),
        ('[["a", "b"], ["b", null]]', ["row 2", "'loser'", "is empty"]),
        ('[{"winner": "a"}]', ["'loser' is missing", "'winner'"]),
        ('[["a", "b"', ["not JSON"]),
    ],
)
def test_what_cannot_be_a_comparison_is_named(write, content, named):
    """By place and remedy, in files of either kind."""
    refused(load_comparisons, write(content), *named)


def test_a_tie_written_as_it_is_told(write):
    """The remedy for a tie."""
    assert wins_of(write("winner,loser,count\na,b,0.5\nb,a,0.5\n"))["all"] == {
        ("a", "b"): 0.5,
        ("b", "a"): 0.5,
    }


# --------------------------------------------------------------------------------------------- bad files

TABLE = "prompt,completion,reward,reference\np,a,1,1\n"
GAMES = "prompt,winner,loser,count\np,a,b,1\n"


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        (",b,1,1", "prompt", "empty"),
        ("p, ,1,1", "completion", "empty"),
        ("p,b,,1", "reward", "''"),
        ("p,b,high,1", "reward", "'high' is not a number"),
        ("p,b,1;5,1", "reward", "'1;5' is not a number"),
        ("p,b,nan,1", "reward", "'nan' is not a finite number"),
        ("p,b,-inf,1", "reward", "'-inf' is not a finite number"),
        ("p,b,1e999,1", "reward", "'1e999' is not a finite number"),
        ("p,b,1,", "reference", "''"),
        ("p,b,1,0", "reference", "'0' is not a positive finite number"),
        ("p,b,1,-0.5", "reference", "'-0.5' is not a positive finite number"),
        ("p,b,1,inf", "reference", "'inf' is not a positive finite number"),
        ("p,b,1,nan", "reference", "'nan' is not a positive finite number"),
        ("p,a,2,1", "completion", "'a' is listed twice for prompt 'p'"),
    ],
)
def test_bad_cells_of_a_table_are_named(write, row, column, problem):
    """A bad cell must be found where it stands: a NaN spreads to the whole prompt, a reference of 0 makes
    pi_ref exp(r / beta) / Z zero there for ever, and the second of two rewards would win in silence."""
    refused(load_table, write(TABLE + row + "\np,z,1,1\n"), "line 3", f"column {column!r}", problem)


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        (",b,a,1", "prompt", "empty"),
        ("p,,a,1", "winner", "empty"),
        ("p,b,,1", "loser", "empty"),
        ("p,b,b,1", "loser", "'b' is compared with itself"),
        ("p,b,a,-1", "count", "'-1' is not a number from 0 to 1e15"),
        ("p,b,a,nan", "count", "'nan' is not a number from 0 to 1e15"),
        ("p,b,a,1e308", "count", "'1e308' is not a number from 0 to 1e15"),  # two of them make infinity
        ("p,b,a,two", "count", "'two' is not a number; write it like 1234.5"),
        ('p,b,a,"0,5"', "count", "'0,5' is not a number; write it like 1234.5"),
        ("p,b,a,", "count", "''"),
    ],
)
def test_bad_cells_of_comparisons_are_named(write, row, column, problem):
    """A negative count would be an anti-preference, a comparison with itself a constant in the loss."""
    refused(load_comparisons, write(GAMES + row + "\np,b,a,1\n"), "line 3", f"column {column!r}", problem)


@pytest.mark.parametrize(("load", "good"), [(load_table, TABLE), (load_comparisons, GAMES)])
def test_missing_and_repeated_columns_are_named(write, load, good):
    """A header that is data, or a misspelt column: a KeyError would not say what the header should be, and
    of two columns of one name the second would be read in silence. What was read is quoted."""
    header, row = good.splitlines()
    needed = ["prompt", "completion", "reward"] if load is load_table else ["winner", "loser"]
    for column in needed:
        changed = header.replace(column, column + "s", 1)
        message = refused(load, write(f"{changed}\n{row}\n"), f"column {column!r} is missing")
        assert all(name in message for name in header.split(","))  # the remedy
        assert repr(changed.replace(",", ", ")) in message
    refused(load, write(f"{header},Prompt\n{row},p\n"), "column 'prompt' appears twice")
    refused(load, write(row + "\n"), f"column {needed[0]!r} is missing")


@pytest.mark.parametrize(("load", "good"), [(load_table, TABLE), (load_comparisons, GAMES)])
def test_rows_of_another_length_are_named(write, load, good):
    """An unquoted comma in a completion shifts every cell after it."""
    refused(load, write(good + "p,b,1\n"), "line 3", "3 cells", "4")
    refused(load, write(good + "p,b, and more,1,1\n"), "line 3", "5 cells", "4")


@pytest.mark.parametrize("load", [load_table, load_comparisons])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(write, load, content):
    """max() of nothing would be the message otherwise."""
    refused(load, write(content), "is missing", "''")


@pytest.mark.parametrize(("load", "good"), [(load_table, TABLE), (load_comparisons, GAMES)])
def test_a_header_without_rows_is_refused(write, load, good):
    """A filter that removed all rows must not become an empty world."""
    header = good.splitlines()[0]
    refused(load, write(header), "no rows")
    refused(load, write(header + "\n\n , \n"), "no rows")


def test_a_prompt_with_one_completion_is_refused(write):
    """Its policy is 1 whatever is learnt: a typo in a prompt's name would go unnoticed."""
    refused(load_table, write("prompt,completion,reward\np,a,1\np,b,2\nP,c,3\n"), "prompt 'P'", "one")


@pytest.mark.parametrize("load", [load_table, load_comparisons])
def test_files_that_cannot_be_read_are_named(tmp_path, write, load):
    """A traceback would not say that the path is misspelt or that Excel saved the file as UTF-16."""
    refused(load, tmp_path / "nothing.csv", "no such file")
    refused(load, write("prompt,winner,loser\nä,b,c\n".encode("latin-1")), "UTF-8")
    refused(load, write("prompt,winner,loser\np,b,c\n".encode("utf-16")), "UTF-8")


@pytest.mark.parametrize(("load", "good"), [(load_table, TABLE), (load_comparisons, GAMES)])
def test_broken_quotes_are_refused(write, load, good):
    """Without strict reading, an unclosed quote swallows the rest of the file as one cell."""
    refused(load, write(good + 'p,"b,1,1\np,c,1,1\n'), "not valid CSV")
    refused(load, write(good + 'p,"b"x,1,1\n'), "not valid CSV")
