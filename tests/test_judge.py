"""The judge: what is asked of a server, and how often; what its answers amount to; agreement with people."""

import itertools
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from planting import CAUGHT, plant
from test_cli import PARENT, assert_refused

from dpo_minimal.__main__ import main
from dpo_minimal.experiments.judge import LEVEL, agreement
from dpo_minimal.rivals import judge
from dpo_minimal.validation import InputError

KEY = "sk-secret-0123456789"
QUESTION = judge.question("dialogue", {"prompt": "p", "a": "long", "b": "s"}, "a")


class Judge(ThreadingHTTPServer):
    """A server on this machine. `opinion(post, A, B)` is the text of its reply, or what to do instead."""

    daemon_threads = True

    def __init__(self, opinion):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.opinion, self.asked, self.keys, self.paths = opinion, [], [], []
        self.bodies, self.lock = [], threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""


class Waits(list):
    """An event that is never set, and the seconds that were waited for it."""

    wait, stopped = list.append, False

    def set(self):
        self.stopped = True


class _Handler(BaseHTTPRequestHandler):
    wbufsize = -1  # headers and body in one packet; else each request waits 40 ms for an acknowledgement

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        post, rest = text.split(" A:\n")[0].split(":\n", 1)[1], text.split(" A:\n")[1]
        first, second = rest.split(" B:\n")
        shown = post.rsplit("\n\n", 1)[0], first.rsplit("\n\n", 1)[0], second.rsplit("\n\n", 1)[0]
        with self.server.lock:
            self.server.asked.append(shown)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.paths.append(self.path)
            reply = self.server.opinion(*shown)
        status, reply = reply if isinstance(reply, tuple) else (200, reply)
        content = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        data = json.dumps(content if status == 200 else {"error": {"message": reply}}).encode()
        if status == "cut off":  # half of the body, then the end of the connection
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        if status == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        if status == "slow":
            time.sleep(0.3)
        if status == "raw":
            data = reply.encode()
        self.send_response(status if isinstance(status, int) else 200)
        if status in (307, 302):
            self.send_header("Location", reply)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own, no key, waits of milliseconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.001)


@pytest.fixture
def serve():
    """Starts servers, and stops them afterwards."""
    servers = []

    def start(opinion):
        servers.append(Judge(opinion))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def longer(post, first, second):
    """Prefers the longer answer, wherever it stands."""
    return f"One is longer.\n{'A' if len(first) > len(second) else 'B'}"


def pairs(count=40, **more):
    """a is always the longer answer."""
    return [{"prompt": f"post {k}", "a": f"long answer {k}", "b": f"short {k}"} | more for k in range(count)]


def write(rows, name="pairs.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def flags(server, *more):
    address = server if isinstance(server, str) else server.address
    return ["judge", "--pairs", "pairs.jsonl", "--endpoint", address, "--model", "m",
            "--prompt", "summary-simple", *more]  # fmt: skip


def result_of(folder):
    return json.loads((Path(folder) / "result.json").read_text())


def run(server, rows=None, *more):
    """Ask, and the result; each run in a folder of its own."""
    write(pairs() if rows is None else rows)
    folder = f"run{len(list(Path().glob('run*')))}"
    assert main(flags(server, *more, "--output-dir", folder)) == 0
    return result_of(folder)


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "verdicts.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ protocol


def test_the_order_is_undone(serve):
    """A judge that truly prefers the longer answer gives a win rate of 1 or 0 exactly, in either order."""
    server = serve(longer)
    assert run(server)["win_rate"][0] == 1.0
    swapped = [{"prompt": row["prompt"], "a": row["b"], "b": row["a"]} for row in pairs()]
    found = run(server, swapped)
    assert found["win_rate"][0] == found["win_rate_a_first"][0] == found["win_rate_b_first"][0] == 0
    first = [said["first"] for row in rows_of("run0") for said in row["asked"]]
    assert 8 <= first.count("a") <= 32  # of 40 fair coins: beyond with probability 1e-4
    assert {said["reply"] for row in rows_of("run0") for said in row["asked"]} > {"One is longer.\nA"}


def test_what_is_asked_is_the_pair_as_it_is(serve):
    """Each post with its own two answers, letter for letter, once, at temperature 0, at the right address."""
    server, odd = serve(longer), "{a} \\n 50 % <|x|> émile\n\tend"
    rows = [{"prompt": odd, "a": odd + " longer", "b": "{prompt}"}, *pairs(5)]
    run(server, rows, "--max-tokens", "9")
    sent = sorted((post, *sorted((first, second))) for post, first, second in server.asked)
    assert sent == sorted((row["prompt"], *sorted((row["a"], row["b"]))) for row in rows)
    assert {body["temperature"] for body in server.bodies} == {0} and server.keys == [None] * 6
    assert {(body["model"], body["max_tokens"]) for body in server.bodies} == {("m", 9)}
    assert set(server.paths) == {"/v1/chat/completions"}


def test_the_three_prompts_ask_three_things():
    """Each names its own kind of answer, and asks for a comparison before the letter."""
    asked = {
        kind: judge.question(kind, {"prompt": "P", "a": "S", "b": "F"}, "b")[0]["content"]
        for kind in judge.PROMPTS
    }
    assert len({text.split("\n")[0] for text in asked.values()}) == 3
    for kind, text in asked.items():
        word = "reply" if kind == "dialogue" else "summary"
        assert text.index("P\n") < text.index(f"{word} A:\nF") < text.index(f"{word} B:\nS")
        assert text.index("one sentence") < text.index("A or B")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("It is better.\nA", "b"),
        ("B", "a"),
        ('Comparison: A is short; B is not.\nPreferred: "B"', "a"),
        ("**Summary A**\n\nbecause it says more", "b"),
        ("No difference.\n(tie)\n", "tie"),
        ("A is better.", "unparsed"),
        ("A\nB", "unparsed"),
        ("A or B", "unparsed"),
        ("C", "unparsed"),
        ("", "unparsed"),
        ("Banana\nAB", "unparsed"),
    ],
)
def test_replies_are_read_as_what_they_say(reply, verdict):
    """b was shown first, as A. What is not a verdict on a line of its own is never guessed."""
    assert judge.verdict_of(reply, "b") == verdict


def test_what_cannot_be_read_is_counted(serve):
    """Nonsense, ties, refusals: each in its column, and the win rate is of the others, a tie being half."""
    said = {"post 0": "Bananas", "post 1": None, "post 2": "Same.\ntie", "post 3": "tie"}
    found = run(serve(lambda post, *shown: said[post] if post in said else longer(post, *shown)))
    assert [found[label] for label in ("a", "b", "tie", "unparsed")] == [36, 0, 2, 2]
    assert (
        found["win_rate"][0] == pytest.approx(37 / 38, rel=1e-15) and found["pairs"] == found["asked"] == 40
    )


def test_nothing_that_can_be_read_is_no_win_rate(serve, capsys):
    """And it is said."""
    found = run(serve(lambda *_: "Bananas"))
    assert found["win_rate"] is None and found["unparsed"] == 40 and found["position_p"] == 1
    assert "No reply is A, B or tie" in capsys.readouterr().out


def test_the_same_seed_shows_the_same_order(serve):
    """Whatever the number of workers; another seed another order; more rows leave that of the first ones."""

    def orders(*more, count=12):
        server = serve(longer)
        run(server, pairs(count), "--cache", f"cache{server.server_port}", *more)
        return sorted(server.asked)

    alone = orders("--workers", "1")
    assert alone == orders("--workers", "16") != orders("--seed", "1")
    assert set(alone) <= set(orders(count=15))
    verdicts = [(folder / "verdicts.jsonl").read_text() for folder in map(Path, ("run0", "run1"))]
    assert verdicts[0] == verdicts[1]


# ------------------------------------------------------------------------------------------------ position


def test_a_preference_for_the_first_position_is_told(serve, capsys):
    """One that always says A is noticed at 1 %, and its win rate is near one half; the other is not."""
    found = run(serve(lambda *_: "x\nA"))
    assert (found["prefers_first"], found["prefers_second"]) == (40, 0)
    assert found["position_p"] == pytest.approx(2 / 2**40, rel=1e-9)  # lgamma's rounding
    assert found["win_rate_a_first"][0] == 1 and found["win_rate_b_first"][0] == 0
    assert "prefers a position" in capsys.readouterr().out
    run(serve(lambda *_: "x\nB"), None, "--cache", "other")
    assert "prefers a position" in capsys.readouterr().out
    run(serve(longer), None, "--cache", "third")
    assert "prefers a position" not in capsys.readouterr().out


def test_both_orders_make_a_preference_for_a_position_a_tie(serve, capsys):
    """Each pair is asked twice; half of them are decided by position, which leaves ties and no wins."""

    def half(post, first, second):
        return "A" if int(post.split()[1]) % 2 else longer(post, first, second)

    server = serve(half)
    found = run(server, None, "--both-orders")
    assert len(server.asked) == len(set(server.asked)) == found["asked"] == 80
    assert [found[label] for label in ("a", "b", "tie", "unparsed")] == [20, 0, 20, 0]
    assert found["win_rate"][0] == 0.75 and (found["prefers_first"], found["prefers_second"]) == (20, 0)
    assert found["win_rate_a_first"][0] == 1 and found["win_rate_b_first"][0] == 0.5
    assert "prefers a position" in capsys.readouterr().out
    once = run(serve(lambda post, first, second: "?" if second[0] == "s" else "A"), None, "--both-orders",
               "--cache", "c")  # fmt: skip
    assert once["unparsed"] == 40  # one of a pair's two replies


def test_the_sign_test_is_exact():
    """Against all 2^n throws of a coin; and no coin is as uneven as 0 of 0."""
    for n in range(11):
        heads = Counter(sum(throws) for throws in itertools.product((0, 1), repeat=n))
        for plus in range(n + 1):
            uneven = sum(c for k, c in heads.items() if abs(2 * k - n) >= abs(2 * plus - n)) / 2**n
            # lgamma and logsumexp in float64
            assert judge.sign_test(plus, n - plus) == pytest.approx(uneven, rel=1e-12)
    assert judge.sign_test(10_000, 10_000) == 1 and 0 < judge.sign_test(9_700, 10_300) < 1e-4


@pytest.mark.parametrize("both", [False, True])
def test_a_fair_judge_is_seldom_accused(both):
    """A judge that throws a loaded coin on the answers and never looks at the position: over 1,000 studies of
    60 pairs at most 1 % are accused, plus 4 deviations of such a count (3e-5)."""
    draw, accused = torch.Generator().manual_seed(5), 0
    for _ in range(1000):
        chance = torch.rand(60, generator=draw)
        first = torch.rand(60, generator=draw) < 0.5
        wins = [torch.rand(60, generator=draw) < chance for _ in range(2)]
        # In both orders a lean is left where the two verdicts name the same position.
        leans = wins[0].int() - wins[1].int() if both else (wins[0] == first).int() * 2 - 1
        accused += judge.sign_test(int((leans > 0).sum()), int((leans < 0).sum())) < LEVEL
    assert accused <= 10 + 4 * math.sqrt(1000 * 0.01 * 0.99)


# ----------------------------------------------------------------------------------- cache, failures, key


def test_a_second_run_asks_nothing(serve):
    """The same numbers from the cache, at another address too; another model, prompt or limit asks again."""
    server, other = serve(longer), serve(longer)
    first = run(server)
    again = run(other)
    assert len(server.asked) == 40 and other.asked == []
    assert again == first | {"asked": 0}
    for more in (["--model", "n"], ["--prompt", "dialogue"], ["--max-tokens", "5"]):
        assert run(other, None, *more)["asked"] == 40
    assert run(other, pairs(42))["asked"] == 2  # the first rows' order stays


def test_the_same_question_is_asked_once(serve):
    server = serve(longer)
    found = run(server, [{"prompt": "p", "a": "long", "b": "s"}] * 30)
    assert len(server.asked) == found["asked"] == 2 and found["a"] == 30


def test_an_interrupted_run_goes_on(serve, capsys):
    """After 25 replies the server is gone; the second run asks for the other 15 only. A line that a crash cut
    in two is asked for again."""

    def until(post, first, second):
        return (400, "gone") if len(server.asked) > 25 else longer(post, first, second)

    server = serve(until)
    write(pairs())
    assert_no_run(capsys, flags(server, "--workers", "1"), "gone")
    assert len(Path("runs/judge-cache.jsonl").read_text().splitlines()) == 25
    assert run(serve(longer))["asked"] == 15
    whole = Path("runs/judge-cache.jsonl").read_bytes()
    Path("runs/judge-cache.jsonl").write_bytes(whole[:-20])
    assert run(serve(longer))["asked"] == 1
    assert run(serve(longer))["asked"] == 0


@pytest.mark.slow  # two processes that load torch
def test_a_killed_run_goes_on(serve):
    """SIGKILL in the middle: what was answered is there, and only the rest is asked for."""
    server = serve(lambda *shown: (time.sleep(0.02), longer(*shown))[1])
    write(pairs(200))
    environment = {**os.environ, "PYTHONPATH": str(PARENT)}
    whole = [sys.executable, "-m", "dpo_minimal", *flags(server)]
    process = subprocess.Popen(whole, env=environment, stderr=subprocess.DEVNULL)
    while len(server.asked) < 50:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(Path("runs/judge-cache.jsonl").read_text().splitlines())
    assert 40 <= kept < 150 and not list(Path("runs").glob("judge-0*"))
    assert 200 - kept <= run(serve(longer), pairs(200))["asked"] <= 201 - kept  # the last line may be cut


@pytest.mark.parametrize(
    "failure",
    [(500, "down"), (503, "busy"), (429, "slower"), (408, "late"), ("cut off", ""), ("reset", ""),
     ("slow", "A"), ("raw", "<html>"), ("raw", '{"choices": []}'), ("raw", "")],
    ids=str,
)  # fmt: skip
def test_failures_that_pass_are_asked_again(serve, monkeypatch, failure):
    """Each question fails twice, then is answered: the same result, waits of 1 and 2 units, no run lost."""
    seen, waits = Counter(), Waits()
    monkeypatch.setattr(judge, "TIMEOUT", 0.1 if failure[0] == "slow" else 5.0)

    def failing(*shown):
        seen[shown] += 1
        return failure if seen[shown] <= 2 else longer(*shown)

    server = judge.Server.at(serve(failing).address, "")
    body = {"messages": QUESTION}
    assert judge.ask(server, body, waits) == "One is longer.\nA"
    assert waits == [0.001, 0.002] and set(seen.values()) == {3}


def test_waits_double_and_end(serve):
    """Six attempts, then one sentence with the server's words; where others failed there is no second one."""
    server, waits = serve(lambda *_: (503, "Overloaded. Try later.")), Waits()
    body = {"messages": QUESTION}
    with pytest.raises(InputError, match=r"answered 503 \(Overloaded; Try later\); see that it runs"):
        judge.ask(judge.Server.at(server.address, ""), body, waits)
    assert waits == [0.001 * 2**k for k in range(5)] and len(server.asked) == 6
    assert waits.stopped
    waits.wait = lambda seconds: True
    with pytest.raises(InputError, match="503"):
        judge.ask(judge.Server.at(server.address, ""), body, waits)
    assert len(server.asked) == 7


@pytest.mark.parametrize(
    ("told", "waited"), [("7", 7.0), ("9999", 60.0), ("Sat, 28 Nov", 0.001), ("-3", 0.001)]
)
def test_the_servers_own_wait_is_kept(serve, monkeypatch, told, waited):
    """Up to a minute; what is no number of seconds is not understood."""
    monkeypatch.setattr(_Handler, "end_headers", with_header("Retry-After", told))
    waits = Waits()
    with pytest.raises(InputError, match="429"):
        judge.ask(
            judge.Server.at(serve(lambda *_: (429, "slower")).address, ""), {"messages": QUESTION}, waits
        )
    assert waits[0] == waited


def with_header(name, value):
    plain = BaseHTTPRequestHandler.end_headers

    def end_headers(self):
        self.send_header(name, value)
        plain(self)

    return end_headers


def assert_no_run(capsys, arguments, *named):
    """One sentence on stderr (after the bar), nothing on stdout, no run folder."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    told = err[err.index("dpo-minimal: error: ") :]
    assert out == "" and told.count("\n") == 1 and told.endswith(".\n") and ". " not in told, told
    for part in named:
        assert part in told, told
    assert KEY[:6] not in out + err and not list(Path().glob("runs/judge-0*"))


def test_a_refused_key_is_one_sentence_at_once(serve, capsys, monkeypatch):
    """401: not asked again, the server's message without the key that it repeats."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda *_: (401, f"Incorrect API key: {KEY}. Find yours{' at home' * 17}, {KEY}"))
    write(pairs())
    assert_no_run(capsys, flags(server, "--workers", "1"), "401", "Incorrect API key: [key]; Find", "the key")
    assert len(server.asked) == 1
    assert server.keys[0] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [302, 307])
def test_the_key_does_not_follow_a_redirect(serve, capsys, monkeypatch, status):
    """Another server, even of this machine, must not see it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    thief = serve(longer)
    write(pairs())
    assert_no_run(
        capsys, flags(serve(lambda *_: (status, thief.address + "/v1/chat/completions"))), str(status)
    )
    assert thief.keys == []


def test_the_key_is_in_no_file(serve, capsys, monkeypatch):
    """Sent with each request, from the variable that is named; a reply that repeats it is kept without it."""
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there: this machine needs no proxy
    server = serve(lambda *shown: f"Your key is {KEY}.\n" + longer(*shown))
    assert run(server, None, "--key-variable", "MY_KEY")["win_rate"][0] == 1
    assert set(server.keys) == {f"Bearer {KEY}"}
    out, err = capsys.readouterr()
    assert KEY not in out + err
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert len(files) == 5 and not any(KEY.encode() in path.read_bytes() for path in files)
    assert json.loads(Path("run0/config.json").read_text())["key_variable"] == "MY_KEY"


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1/chat/completions"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1/chat/completions"),
        ("https://example.org/openai/v1", "https://example.org/openai/v1/chat/completions"),
        ("https://example.org/beta/chat/completions", "https://example.org/beta/chat/completions"),
        ("HTTPS://example.org", "HTTPS://example.org/v1/chat/completions"),
    ],
)
def test_an_address_is_completed(endpoint, url):
    assert judge.Server.at(endpoint, KEY).url == url


@pytest.mark.parametrize(
    "endpoint",
    ["http://example.org/v1", "http://192.168.0.2:8000", "http://localhost.example.org", "http://127.0.0.1.org",
     "http://user:pw@localhost/v1", "http://localhost/v1?key=1", "http://localhost@example.org",
     "localhost:80", "ftp://localhost", "", "http://", "http://local host/v1", "http://localhost:1/v1\n",
     "http://localhost\\@example.org/v1", "http://localhost#@example.org"],
)  # fmt: skip
def test_addresses_that_would_leak_or_lead_nowhere_are_refused(endpoint):
    """A key only over https or to this machine; the message never repeats a password."""
    with pytest.raises(InputError) as refused:
        judge.Server.at(endpoint, KEY)
    assert "pw" not in str(refused.value)
    if endpoint in ("http://example.org/v1", "http://192.168.0.2:8000"):
        assert judge.Server.at(endpoint, "").url.startswith(endpoint)  # without a key nothing can leak


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "clé"])
def test_a_key_that_is_no_header_is_refused_without_repeating_it(key):
    with pytest.raises(InputError, match="the key holds") as refused:
        judge.Server.at("https://example.org", key)
    assert key.strip() not in str(refused.value)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("row", "more", "named"),
    [
        ({}, ["--agreement", "pairs.jsonl"], "--pairs is not used"),
        ({}, ["--both-orders", "--seed", "1"], "--seed is not used"),
        ({}, ["--key-variable", "NO_SUCH"], "variable that is empty"),
        ({}, ["--workers", "0"], "--workers"),
        ({}, ["--cache", "pairs.jsonl"], "is no file of replies"),
        ({"a": 3}, [], "field 'a': must be text"),
        ({"people": "a"}, [], "field 'people'"),
        ({"people": ["A"]}, [], "field 'people'"),
        ({"people": [{}]}, [], "field 'people'"),
        ({"people": ["unparsed"]}, [], "field 'people'"),  # a judge's reply may be that, no person's
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_asked(serve, capsys, row, more, named):
    server = serve(longer)
    write(pairs(3, **row))
    assert_refused(capsys, flags(server, *more), named)
    assert server.asked == []


def test_rows_without_answers_and_commands_without_a_server_are_refused(capsys):
    write([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert_refused(capsys, flags("http://localhost:1"), "field 'a': is missing", "chosen")
    assert_refused(capsys, ["judge"], "--pairs", "--agreement")
    assert_refused(capsys, flags("http://localhost:1")[:-4], "--model")
    write([{"judge": "a"}, {"judge": "tie", "people": ["tie"]}])
    assert_refused(capsys, ["judge", "--agreement", "pairs.jsonl"], "no a or b in 'people'")
    write([{"judge": "A", "people": ["a"]}])
    assert_refused(capsys, ["judge", "--agreement", "pairs.jsonl"], "line 1, field 'judge'")


# ----------------------------------------------------------------------------------------------- agreement


def counted(*sides, classes="ab"):
    """Labels of each pair, as texts such as "aab" -> (N, C) counts of each side."""
    return [torch.tensor([[of.count(c) for c in classes] for of in side]).double() for side in sides]


def test_kappa_of_two_is_that_of_a_table_by_hand():
    """20 and 15 times alike, 5 and 10 times not: 0.7 observed, 0.5 * 0.6 + 0.5 * 0.4 = 0.5 by chance, 0.4."""
    judged, person = "a" * 25 + "b" * 25, "a" * 20 + "b" * 5 + "a" * 10 + "b" * 15
    beside, among = judge.label_tables(*counted(judged, person))
    assert beside.sum(0).tolist() == [[20, 5], [10, 15]] and among.sum() == 0
    assert judge.kappa(beside.sum(0)).item() == pytest.approx(0.4, abs=1e-15)


def test_kappa_of_many_is_fleiss_example():
    """Fourteen people, ten things, five classes: his published 0.210, by his own formula to rounding."""
    table = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
               7 7 0 0 0  3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
    people = torch.tensor([float(count) for count in table.split()]).view(10, 5).double()
    _, among = judge.label_tables(torch.zeros_like(people), people)
    found = judge.kappa(among.sum(0)).item()
    alike, shares = ((people**2).sum(1) - 14) / (14 * 13), people.sum(0) / 140
    assert found == pytest.approx(
        ((alike.mean() - (shares**2).sum()) / (1 - (shares**2).sum())).item(), abs=1e-14
    )
    assert round(found, 3) == 0.210 and among.sum() == 10 * 14 * 13 / 2


def test_kappa_is_agreement_beyond_all_permutations():
    """Chance is the mean over all 720 orders of one side's labels."""
    judged, person = "aabtba", "abbtaa"
    tables, _ = judge.label_tables(*counted(judged, person, classes="abt"))
    share = lambda other: sum(x == y for x, y in zip(judged, other)) / 6  # noqa: E731
    chance = sum(map(share, itertools.permutations(person))) / 720
    assert judge.kappa(tables.sum(0)).item() == pytest.approx(
        (share(person) - chance) / (1 - chance), abs=1e-14
    )


def drawn_studies(count, pairs, people):
    """Pairs of two kinds: a is preferred with 0.9 or with 0.2, by the judge and by each of `people` persons,
    every one of them by a draw of their own."""
    draw = torch.Generator().manual_seed(11)
    chance = torch.tensor([0.9, 0.2])[torch.randint(2, (count, pairs), generator=draw)]
    votes = torch.rand(count, pairs, people + 1, generator=draw) < chance[..., None]
    sides = votes[..., :1], votes[..., 1:]
    both = [torch.stack([side.sum(-1), (~side).sum(-1)], -1).double() for side in sides]
    return zip(*both)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Share of a 0.55; two alike with 0.75; kappa (0.75 - 0.505) / (1 - 0.505). Four people label each of 60
    pairs, so labels are not independent. Of 300 studies 5 % may miss, plus 1 % for what is not exact in
    either, plus 3.3 deviations of that count (5e-4 each): 31."""
    truths = {
        "people": 0.55,
        "judge": 0.75,
        "two": 0.75,
        "kappa": 0.245 / 0.495,
        "kappa of two": 0.245 / 0.495,
    }
    missed = Counter()
    for judged, people in drawn_studies(300, 60, 4):
        beside, among = judge.label_tables(judged, people)
        hits = {"judge": beside, "two": among}
        found = {
            name: judge.clustered_share(t[:, 0, 0] + t[:, 1, 1], t.sum((1, 2))) for name, t in hits.items()
        }
        found["people"] = judge.clustered_share(people[:, 0], people.sum(1))
        found["kappa"] = judge.jackknife_interval(judge.kappa, beside)
        found["kappa of two"] = judge.jackknife_interval(judge.kappa, among)
        for name, (_, low, high) in found.items():
            missed[name] += not low <= truths[name] <= high
    assert max(missed.values()) <= 300 * 0.06 + 3.3 * math.sqrt(300 * 0.06 * 0.94)
    assert min(missed[name] for name in truths) >= 1  # 300 exact intervals miss none with 2e-7


def test_intervals_of_few_and_of_pairs_that_are_alike():
    """Wilson's with Student's t where each pair has one label; never of no width; one pair tells nearly
    nothing, and its kappa nothing."""
    ones = torch.ones(30)
    value, low, high = judge.clustered_share(ones, ones)
    assert value == high == 1 and low == pytest.approx(1 / (1 + judge.student_95(29) ** 2 / 30), abs=1e-12)
    lone = judge.clustered_share(ones[:1], ones[:1])
    assert lone.low < 0.01 and lone.high == 1
    alike = torch.eye(2).double().repeat(5, 1, 1)
    assert judge.jackknife_interval(judge.kappa, alike) == (1.0, -1.0, 1.0)
    assert judge.jackknife_interval(judge.kappa, alike[:1]) == (1.0, -1.0, 1.0)


TABLE = [
    ("a", ["a", "a"]), ("a", ["a", "b"]), ("b", ["b", "tie"]), ("tie", ["a", "a"]), ("b", ["a"]),
    ("unparsed", ["b", "b"]), ("a", ["tie"]), ("b", []),
]  # fmt: skip


def test_table_2_leaves_ties_out():
    """By hand. Judge and person: aa, aa, aa, ab, bb, ba: 4 of 6. Two people: aa, ab, aa, bb: 3 of 4. The
    judge prefers a in 3 of 5 pairs that people labelled, and they in 6 of 10 labels."""
    found = agreement([{"judge": said, "people": people} for said, people in TABLE])
    assert [found[f"{name}_comparisons"] for name in ("judge_and_person", "two_people")] == [6, 4]
    assert found["judge_and_person_agree"].value == pytest.approx(4 / 6)
    assert found["two_people_agree"].value == 3 / 4
    assert found["win_rate_by_judge"].value == 3 / 5 and found["win_rate_by_people"].value == 6 / 10
    # judge: a 4, b 2; people: a 4, b 2 -> chance 20/36
    assert found["judge_and_person_kappa"].value == pytest.approx((4 / 6 - 20 / 36) / (16 / 36))
    # labels of those pairs: a 5, b 3 -> chance 34/64
    assert found["two_people_kappa"].value == pytest.approx((3 / 4 - 34 / 64) / (30 / 64))
    assert found["ties_of_people"] == 2


def test_agreement_is_read_back_from_a_run(serve, capsys):
    """Labels that stand in the rows of --pairs are compared at once, and from the file that the run wrote;
    nobody is asked the second time."""
    rows = [row | {"people": ["a", "b"][: 1 + k % 2], "id": f"x{k}"} for k, row in enumerate(pairs(12))]
    found = run(serve(longer), rows)
    assert found["judge_and_person_agree"][0] == 12 / 18 and found["two_people_agree"][0] == 0
    assert found["judge_and_person_kappa"][0] == 0  # a judge who always says a
    assert main(["judge", "--agreement", "run0/verdicts.jsonl", "--output-dir", "again"]) == 0
    again = result_of("again")
    assert again == {name: found[name] for name in again} and len(again) == 9
    assert [row["id"] for row in rows_of("run0")] == [f"x{k}" for k in range(12)]


def test_labels_that_are_all_alike_have_no_kappa(capsys):
    write([{"judge": "a", "people": ["a", "a"]}] * 3)
    assert main(["judge", "--agreement", "pairs.jsonl", "--output-dir", "run"]) == 0
    found = result_of("run")
    assert found["two_people_kappa"] is None and found["judge_and_person_kappa"] is None
    assert found["two_people_agree"][0] == 1


# ----------------------------------------------------------------------------------------- planted mistakes

COVERS = test_intervals_hold_the_truth_as_often_as_they_say
MUTANTS = {
    "the order is not undone": (
        judge.verdict_of, '"b" if first == "a" else "a"', '"b"',
        lambda: test_replies_are_read_as_what_they_say("B", "a"),
    ),
    "any A counts": (
        judge.verdict_of, "fullmatch", "match",
        lambda: test_replies_are_read_as_what_they_say("A or B", "unparsed"),
    ),
    "one of two verdicts counts": (
        judge.verdict_of, "len(found) == 1", "found",
        lambda: test_replies_are_read_as_what_they_say("A\nB", "unparsed"),
    ),
    "one side of the coin": (
        judge.sign_test, "plus + minus - 1", "plus + minus", test_the_sign_test_is_exact,
    ),
    "every label is independent": (judge.clustered_share, "p * (1 - p) / variance", "total", COVERS),
    "deviations are not squared": (
        judge.clustered_share, "((hits - p * counts) ** 2)", "(hits - p * counts).abs()", COVERS,
    ),
    "the jackknife forgets its factor": (judge.jackknife_interval, "(N - 1) / N *", "1 / N *", COVERS),
    "chance is one half": (
        judge.kappa, "(shares.sum(-1) * shares.sum(-2)).sum(-1)", "0.5 + 0 * shares.sum((-2, -1))",
        test_kappa_is_agreement_beyond_all_permutations,
    ),
    "people agree with themselves": (
        judge.label_tables, " - torch.diag_embed(people)", "", test_kappa_of_many_is_fleiss_example,
    ),
    "ties are labels": (
        agreement, 'for c in "ab"', 'for c in ("a", "b", "tie")', test_table_2_leaves_ties_out,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistakes_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
