"""A language model is asked which of two answers is better (the paper's App. C.2), and what it says is held
against what people say (App. D.3, Table 2).

But: the model decides, not this file. An answer may try to talk it into a choice; nothing here prevents that.

Shapes: N pairs, C classes of labels. "a" and "b" are a pair's answers; A is the one shown first, B the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import re
import threading
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..text.files import read_bytes
from ..validation import InputError
from .evaluate import Interval, student_95

PROMPTS = {  # the paper's questions in our words; what prompt and answers are called
    "summary-simple": ("Which summary tells more of what matters in the post?", "post", "summary"),
    "summary-concise": ("Which summary tells what matters in the post, and little else?", "post", "summary"),
    "dialogue": ("Which reply is of more help to the person who asked?", "conversation", "reply"),
}
FIRST_WAIT, LONGEST_WAIT, TIMEOUT, RETRIES = 1.0, 60.0, 300.0, 5  # seconds; a wait is twice the last
_JSON = {"Content-Type": "application/json"}
_VERDICT = re.compile(r"\W*(?:(?:preferred|better|answer)\W+)?(?:(?:summary|reply)\W+)?(A|B|tie)\W*", re.I)
_ENDPOINT = re.compile(r"(https?)://(\[[\da-f:.]+\]|[^/:@?#\s]+)(:\d+)?(/[^?#\s]*)?", re.I | re.A)


def question(kind: str, pair: dict[str, str], first: str) -> list[dict[str, str]]:
    """The messages that ask which of a and b is better, one of which is shown first; of `PROMPTS` [D10.6]."""
    task, what, answer = PROMPTS[kind]
    text = f"""{task}\n\n{what}:\n{pair["prompt"]}\n\n{answer} A:\n{pair[first]}\n
{answer} B:\n{pair["b" if first == "a" else "a"]}\n
First compare the two in one sentence that says which {answer} is better, and why. Then write, on a line
of its own and with nothing else in it, the letter of the better {answer}: A or B."""
    return [{"role": "user", "content": text}]


def verdict_of(reply: str, first: str) -> str:
    r"""a, b or tie, given which was shown first, as A; unparsed without one line that is a verdict [D10.6].

    >>> [verdict_of(reply, "b") for reply in ("A is long.\n**Preferred:** B", "A or B", "A\n\nB", "Tie.")]
    ['a', 'unparsed', 'unparsed', 'tie']
    """
    found = {match[1].lower() for line in reply.splitlines() if (match := _VERDICT.fullmatch(line))}
    shown = {"a": first, "b": "b" if first == "a" else "a", "tie": "tie"}
    return shown[found.pop()] if len(found) == 1 else "unparsed"


class _AsItIs(urllib.request.HTTPErrorProcessor):  # no redirect is followed, which would take the key along
    http_response = https_response = lambda self, request, response: response


class Server(NamedTuple):
    """Who is asked [D10.6]."""

    url: str  # ends in /chat/completions
    key: str  # goes into a header and nowhere else
    opener: urllib.request.OpenerDirector  # without a proxy on this machine

    @classmethod
    def at(cls, endpoint: str, key: str) -> Server:
        """With or without /v1 and what follows. Raises InputError, also where the key would be readable."""
        parts = _ENDPOINT.fullmatch(endpoint)
        if parts is None:  # not repeated: it may hold a password
            raise InputError("--endpoint must be http://HOST:PORT/v1 or https://HOST/v1, without a password.")
        if not re.fullmatch("[!-~]*", key):
            raise InputError("the key holds a blank or a letter that no key has; copy it again.")
        local = re.fullmatch(r"localhost|127(\.\d+){3}|\[::1\]", parts[2], re.I) is not None
        if key and not local and parts[1].lower() == "http":
            raise InputError(f"--endpoint {endpoint}: would get the key unencrypted; write https.")
        opener = urllib.request.build_opener(_AsItIs, *[urllib.request.ProxyHandler({})] * local)
        opener.addheaders += [("Authorization", f"Bearer {key}")] if key else []
        url = endpoint.rstrip("/")
        url += "" if url.endswith(("/v1", "/chat/completions")) else "/v1"
        return cls(url.removesuffix("/chat/completions") + "/chat/completions", key, opener)


def ask(server: Server, body: dict[str, Any], stop: threading.Event) -> str:
    """A reply's text; asked again after 408, 429, 5xx, timeouts, and replies that are cut off [D10.6].

    `stop` is set by a failure that lasts, and ends all waits. Raises InputError with the server's message.
    """
    request = urllib.request.Request(server.url, json.dumps(body).encode(), _JSON)
    hidden = server.key if len(server.key) > 7 else "\0"  # a server may repeat the key; "EMPTY" is none
    for attempt in range(RETRIES + 1):
        pause, remedy = FIRST_WAIT * 2**attempt, "see that it runs and give the command again"
        try:
            with server.opener.open(request, timeout=TIMEOUT) as answer:
                status, data, told = answer.status, answer.read(), answer.headers["Retry-After"] or ""
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
            problem = f"did not answer ({getattr(error, 'reason', '') or error or type(error).__name__})"
        else:
            with contextlib.suppress(ValueError, LookupError, TypeError):
                if status == 200:
                    said = json.loads(data)["choices"][0]["message"]["content"]
                    return str.replace(said or "", hidden, "[key]")
            text = data.decode("utf-8", "replace").replace(hidden, "[key]")
            found = re.search(r'"(?:message|error|detail)"\s*:\s*"((?:[^"\\]|\\.)+)"', text)
            text = re.sub(r"\.\s", "; ", " ".join((found[1] if found else text).split())).rstrip(".")
            problem = f"answered {status} ({text[:200]})"
            if status not in (200, 408, 429) and status < 500:
                remedy = "check --endpoint, --model and the key"
                break
            pause = max(pause, min(float(told), LONGEST_WAIT)) if told.isdecimal() else pause
        if attempt == RETRIES or stop.wait(pause):
            break
    stop.set()
    raise InputError(f"{server.url}: {problem}; {remedy}.")


def replies(server: Server, bodies: Sequence[dict], cache: Path, *, workers: int) -> tuple[list[str], int]:
    """A reply to each question, and how many were asked for: those not in the cache, each once [D10.6]."""
    keys = [hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() for body in bodies]
    kept, lock, stop = {}, threading.Lock(), threading.Event()
    for line in read_bytes(cache).split(b"\n") if cache.exists() else ():
        try:
            record = json.loads(line)
            kept[record["key"]] = record["reply"]
        except (ValueError, TypeError, LookupError):  # the start of a record: a crash cut it off
            if not line.startswith(b'{"key": "'[: len(line)]):
                raise InputError(f"--cache {cache}: is no file of replies; name another.") from None
    cache.parent.mkdir(parents=True, exist_ok=True)
    missing = {key: body for key, body in zip(keys, bodies) if key not in kept}

    def fetch(key: str, body: dict) -> None:
        if stop.is_set():
            return
        kept[key] = ask(server, body, stop)
        with lock, cache.open("a", encoding="utf-8") as file:
            file.write("\n" * (file.tell() > 0) + json.dumps({"key": key, "reply": kept[key]}))

    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(fetch, *item) for item in missing.items()]
        for future in tqdm(as_completed(futures), desc="asking", total=len(futures), disable=None):
            future.result()
    finally:  # what was asked for already is kept, whatever happened
        stop.set()
        pool.shutdown(cancel_futures=True)
    return [kept[key] for key in keys], len(missing)


def sign_test(plus: int, minus: int) -> float:
    """How probable it is that a fair coin is at least as uneven: exact, two-sided [D10.6]."""
    n, k = torch.tensor(plus + minus).double(), torch.arange(min(plus, minus) + 1).double()
    terms = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return min(1.0, math.exp(terms.logsumexp(0).item() - (plus + minus - 1) * math.log(2)))


def clustered_share(hits: Tensor, counts: Tensor) -> Interval:
    """sum hits / sum counts over (N,) independent pairs, and Wilson's 95 % interval [D10.7].

    Its n: as many independent labels would be as uncertain, at most all; the pairs where all are alike.
    """
    hits, counts = hits[counts > 0].double(), counts[counts > 0].double()
    N, total = len(counts), counts.sum().item()
    p = hits.sum().item() / total
    variance = N / max(1, N - 1) * ((hits - p * counts) ** 2).sum().item() / total**2
    n, t = min(total, p * (1 - p) / variance) if variance > 0 else N, student_95(max(1, N - 1))
    centre, half = p + t * t / (2 * n), t * math.sqrt(p * (1 - p) / n + (t / n) ** 2 / 4)
    return Interval(p, *(min(1.0, max(0.0, (centre + s * half) / (1 + t * t / n))) for s in (-1, 1)))


def kappa(tables: Tensor) -> Tensor:
    """(..., C, C) counts of two labels -> agreement beyond chance, NaN where all are of one class [D10.7]."""
    shares = tables / tables.sum((-2, -1), keepdim=True)
    chance = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    return (shares.diagonal(dim1=-2, dim2=-1).sum(-1) - chance) / (1 - chance)


def jackknife_interval(statistic: Callable[[Tensor], Tensor], parts: Tensor) -> Interval | None:
    """A statistic of the sum of N independent parts (N, ...), and its 95 % interval within [-1, 1] [D10.7].

    None where it is undefined; all of [-1, 1] where nothing tells: one part, or parts that do not differ.
    """
    N, value, left_out = len(parts), statistic(parts.sum(0)).item(), statistic(parts.sum(0) - parts)
    error = math.sqrt((N - 1) / N * ((left_out - left_out.mean()) ** 2).sum().item())
    half = student_95(N - 1) * error if 0 < error < math.inf else 2.0
    return None if math.isnan(value) else Interval(value, max(-1.0, value - half), min(1.0, value + half))


def label_tables(judge: Tensor, people: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) labels counted -> (N, C, C) judge beside person; two people, half in each order [D10.7]."""
    two = people[:, :, None] * people[:, None] - torch.diag_embed(people)  # nobody beside themselves
    return judge[:, :, None] * people[:, None], two / 2
