"""Engine `openai`: any OpenAI-compatible chat server, hosted or on loopback (vLLM, SGLang, llama.cpp).

One idea: a request asks for all missing samples of one prompt (`n`, at most `MAX_N`), so its prompt is paid for once. The
first request finds out whether that works: a server that answers with fewer choices, or whose `usage` leaves some out, is
asked one by one, with a seed derived from prompt and sample. It also asks for log-probs, which nothing here uses; `note`
says what the server turned out to do.
Requests run on an event loop in a daemon thread; `run` hands finished samples over in lists of a few seconds' work: a kill
costs at most those.

    retried      time-outs, broken connections, 408, 409, 425, 429, 5xx, and garbage (not JSON, no choice, no
                 text, no finish_reason): exponential backoff with jitter, or as long as Retry-After says, for all requests
    Failure      what is left of those after `retries`; other 4xx; a finish that is neither stop nor length
    WorkError    401, 403, 404; a server that does not answer at the start; 16 requests failed in a row; a budget used up

What a reply means is openai_reply.py's, what it costs spending.py's. The key is read from the environment, sent to the
server, and struck out of every message.
"""

import asyncio
import importlib
import json
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.engines.base import Ask, Failure, Finished, Sample
from pipeline.engines.openai_reply import Bad, Reply, read, retry_after, said
from pipeline.engines.spending import Meter, Usage
from schemas.errors import UserError, WorkError
from schemas.ids import seed_from
from schemas.recipe import OpenAIEngine

BACKOFF_S = 0.5  # before the first repeat; doubled for each further one
MAX_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 300.0
FLUSH_ROWS, FLUSH_S = 64, 5.0
MAX_N = 8  # samples in one request, which is what a lost one costs
IN_A_ROW = 16  # requests that failed for good, one after the other: the server is gone or misconfigured
START_TRIES = 3  # connections, while the server has never answered
CONNECT_S = 10.0
RETRIED = frozenset({408, 409, 425, 429})
UNKNOWN_PARAMETER = frozenset({400, 422, 501})  # what servers say to a parameter that they do not have

Result = Sample | Failure
Results = list[Result]  # of one request
Samples = tuple[int, ...]


class OpenAITeacher:
    """The engine; `who` opens its messages."""

    name = "openai"
    seeded = True
    complete = True

    def __init__(self, config: OpenAIEngine, who: str = "openai", spent: Usage = Usage()) -> None:
        """`spent`: what the stage's stored rows used up already."""
        self._config, self._who = config, who
        self._meter = Meter(config.budget, spent)
        self.note = ""
        try:
            importlib.import_module("openai")
        except ImportError:
            raise UserError(f"{who}: engine 'openai' needs the package of that name: pip install dypo[openai]") from None

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Result]]:
        """Yields finished samples in the order in which the server answers."""
        wanted = ((ask, tuple(s for s in ask.samples if (ask.prompt_id, s) not in finished)) for ask in asks)
        work = deque((ask, samples) for ask, samples in wanted if samples)
        if not work:
            return
        left = sum(len(samples) for _, samples in work)
        results: queue.SimpleQueue[Results | BaseException] = queue.SimpleQueue()
        crew = _Crew(self._config, self._who, work, results, self._meter)
        batch: list[Result] = []
        began = time.monotonic()
        try:
            while left:
                try:
                    # Never without an end: a Ctrl-C at the moment when a wait begins is noticed when it ends.
                    item = results.get(timeout=max(0.0, began + FLUSH_S - time.monotonic()))
                except queue.Empty:
                    item = []
                if isinstance(item, BaseException):
                    raise item
                batch += item
                left -= len(item)
                if len(batch) >= FLUSH_ROWS or (batch and time.monotonic() - began >= FLUSH_S):
                    full, batch = batch, []
                    yield full
                if not batch:
                    began = time.monotonic()
        except (Exception, KeyboardInterrupt):
            crew.stop()
            batch += _left_over(results)
            if batch:
                yield batch
            raise
        finally:
            crew.stop()
            self.note = crew.note()
        if batch:
            yield batch


def _left_over(results: "queue.SimpleQueue[Results | BaseException]") -> list[Result]:
    out: list[Result] = []
    while not results.empty():
        item = results.get()
        if not isinstance(item, BaseException):
            out += item
    return out


@dataclass(frozen=True)
class _Request:
    """What one request asks for: some samples of one prompt, and whether their log-probs too."""

    ask: Ask
    samples: Samples
    logprobs: bool


class _Crew:
    """`concurrency` workers on an event loop of their own; what they get goes to `results`, errors too."""

    def __init__(
        self,
        config: OpenAIEngine,
        who: str,
        work: deque[tuple[Ask, Samples]],
        results: "queue.SimpleQueue[Results | BaseException]",
        meter: Meter,
    ) -> None:
        self._config, self._who, self._results, self._meter = config, who, results, meter
        self._work = work
        self._workers = min(config.concurrency, sum(len(samples) for _, samples in work))
        self._key = os.environ.get(config.api_key_env, "").strip()
        self._length_key = "max_tokens"
        self._failed_in_a_row = 0
        self._answered = False
        self._honours_n: bool | None = None  # None: not known yet
        self._why_not_n = "ignores n"
        self._gives_logprobs: bool | None = None
        self._probing = False  # a request is under way whose reply will tell
        self._quiet_until = 0.0  # the loop's time before which the server wants no request
        self._loop = asyncio.new_event_loop()
        self._main = self._loop.create_task(self._all())
        self._thread = threading.Thread(target=self._serve, name="openai-teacher", daemon=True)
        self._thread.start()

    def note(self) -> str:
        """What the server turned out to do, and what the stage has used up."""
        found = []
        if self._honours_n is not None:
            found.append("honours n" if self._honours_n else f"{self._why_not_n}, so it was asked one by one")
        if self._gives_logprobs is not None:
            found.append("gives log-probs" if self._gives_logprobs else "gives no log-probs")
        return "; ".join(filter(None, [", ".join(found), self._meter.told]))

    def stop(self) -> None:
        """Ends the requests under way; closing their connections may take a second."""
        if self._thread.is_alive():
            try:
                self._loop.call_soon_threadsafe(self._main.cancel)
            except RuntimeError:  # closed in between
                return
            self._thread.join(timeout=1.0)

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            self._results.put(WorkError(f"{self._who}: stopped"))
        except BaseException as e:  # to the caller's thread
            self._results.put(e)
        finally:
            self._loop.close()

    async def _all(self) -> None:
        async with _client(self._config, self._key) as client:
            workers = [asyncio.create_task(self._worker(client)) for _ in range(self._workers)]
            try:
                done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            for worker in done:
                if (error := worker.exception()) is not None:
                    raise error
        if self._work and (why := self._meter.refusal):
            raise WorkError(self._text(f"{why}. {KEPT} Raise it, then run the same command again"))

    async def _worker(self, client: Any) -> None:
        """Requests until there is no work, or no money: those under way are waited for, none is begun."""
        while self._work and not self._meter.refusal:
            ask, samples = self._work.popleft()
            probes = not self._probing and (self._honours_n is None or self._gives_logprobs is None)
            n = MAX_N if self._honours_n or (probes and self._honours_n is None) else 1
            if rest := samples[n:]:
                self._work.appendleft((ask, rest))
            self._probing |= probes
            results = await self._request(client, _Request(ask, samples[:n], probes and self._gives_logprobs is None))
            self._probing &= not probes
            self._results.put(results)
            if rest := samples[len(results) : n]:
                self._work.appendleft((ask, rest))
            if self._meter.blind:
                raise WorkError(
                    self._text(
                        f"{self._config.base_url} does not report `usage`, so the budget cannot be kept. {KEPT} "
                        "Remove `budget` or use a server that reports it, then run the same command again"
                    )
                )

    async def _request(self, client: Any, request: _Request) -> Results:
        """The request's first samples, at least one, however many attempts it takes; none if the budget is used up."""
        attempt, asked, plainer = 0, request, False
        while True:
            while (quiet := self._quiet_until - self._loop.time()) > 0:
                await asyncio.sleep(quiet + random.uniform(0, min(1.0, 0.1 * quiet)))
            got = await self._attempt(client, request)
            if isinstance(got, Reply):
                self._failed_in_a_row = 0
                self._answered = True
                self._learn(asked, request, got, plainer)
                return self._samples(request, got)
            attempt += not got.free
            if got.fatal is not None:
                raise WorkError(self._text(got.fatal))
            self._answered |= got.connected
            if not self._answered and attempt >= START_TRIES:
                raise WorkError(
                    self._text(
                        f"no server answers at {self._config.base_url} (tried {attempt} times: {got.why}). "
                        f"{KEPT} Start the server or correct base_url, then run the same command again"
                    )
                )
            plainer |= got.plainer
            request = _Request(request.ask, request.samples[:1] if plainer else request.samples, logprobs=False)
            if self._answered and not got.free and (not got.again or attempt > self._config.retries):
                return self._failures(request, got, attempt)
            if self._meter.refusal:
                return []
            if got.wait_s is not None:
                self._quiet_until = max(self._quiet_until, self._loop.time() + min(got.wait_s, MAX_RETRY_AFTER_S))
            elif not got.free:
                wait = min(BACKOFF_S * 2 ** (attempt - 1), MAX_BACKOFF_S)
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))

    def _learn(self, asked: _Request, request: _Request, got: Reply, plainer: bool) -> None:
        """What a reply to `request` says about the server; `plainer`: it did not take the one `asked` at first."""
        if request.logprobs or (asked.logprobs and plainer):
            self._gives_logprobs = request.logprobs and got.logprobs > 0
        if len(asked.samples) > 1 and self._honours_n is not False:
            self._honours_n = not plainer and got.choices >= len(request.samples) and not got.undercounted
            if got.undercounted:
                self._why_not_n = "counts the tokens of one answer where n were given"

    def _samples(self, request: _Request, got: Reply) -> Results:
        config = self._config
        row: dict[str, Any] = {k: getattr(config, k) for k in ("temperature", "top_p", "max_tokens")}
        row |= {"seed": _seed(request)} | ({"n": len(request.samples)} if got.choices > 1 else {})
        # usage is the whole request's, so it stands in its first row alone: sums over rows are right
        first = row if got.usage is None else row | {"usage": vars(got.usage)}
        return [
            Sample(request.ask.prompt_id, sample, text, finish, got.model or config.model, json.dumps(row if i else first))
            for i, (sample, (text, finish)) in enumerate(zip(request.samples, got.answers, strict=False))
        ]

    def _failures(self, request: _Request, got: Bad, attempts: int) -> Results:
        self._failed_in_a_row = self._failed_in_a_row + 1 if got.counts else 0
        if self._failed_in_a_row >= IN_A_ROW:
            raise WorkError(
                self._text(
                    f"{self._config.base_url}: {IN_A_ROW} requests failed in a row, the last with: {got.why}. {KEPT} "
                    "See to the server, or raise retries and timeout_s, then run the same command again"
                )
            )
        times = f" ({attempts} attempts)" if attempts > 1 else ""
        return [Failure(request.ask.prompt_id, s, self._struck(got.why + times)) for s in request.samples]

    async def _attempt(self, client: Any, request: _Request) -> Reply | Bad:
        import openai

        config, limit = self._config, self._length_key
        more: dict[str, Any] = {"n": len(request.samples)} if len(request.samples) > 1 else {}
        if request.logprobs:
            more["logprobs"] = True
        try:
            async with asyncio.timeout(config.timeout_s):
                reply = await client.chat.completions.with_raw_response.create(
                    model=config.model, messages=_messages(request.ask, config.system), temperature=config.temperature,
                    top_p=config.top_p, seed=_seed(request), **{limit: config.max_tokens}, **more,
                )  # fmt: skip
        except openai.APIStatusError as e:
            return await self._refused(client, e, limit, request)
        except (TimeoutError, openai.APITimeoutError) as e:
            if type(e.__cause__).__name__ == "ConnectTimeout":
                return Bad("no connection in time", connected=False)
            return Bad(f"no answer within {config.timeout_s:g} s")
        except openai.APIConnectionError as e:
            return Bad(f"connection failed: {str(e.__cause__ or e) or type(e.__cause__).__name__}", connected=False)
        made = read(reply.content)
        if made.usage is not None or isinstance(made, Reply):
            self._meter.add(made.usage)
        return made

    async def _refused(self, client: Any, e: Any, limit: str, request: _Request) -> Bad:
        """What a status other than 200 means."""
        config, code, words = self._config, e.status_code, said(e)
        why = f"status {code}: {words}"
        if code in (401, 403):
            state = "is set, so it may be the wrong key" if self._key else "is not set"
            return Bad(why, fatal=(
                f"{config.base_url} refuses the key ({why}). The environment variable {config.api_key_env} {state}; "
                f"set it, or name another in api_key_env. {KEPT}"
            ))  # fmt: skip
        if code == 404:
            return Bad(why, fatal=(
                f"{config.base_url} does not know model '{config.model}' or has no /chat/completions ({why}). "
                f"{await _models(client)}Correct model or base_url (which mostly ends in /v1). {KEPT}"
            ))  # fmt: skip
        if code == 400 and limit == "max_tokens" and "max_completion_tokens" in words:
            self._length_key = "max_completion_tokens"
            return Bad(why, free=True)
        if code in UNKNOWN_PARAMETER and (request.logprobs or len(request.samples) > 1):
            return Bad(why, free=True, plainer=True)
        if code in RETRIED or code >= 500:
            return Bad(why, wait_s=retry_after(e.response.headers), free=code >= 500 and request.logprobs)
        return Bad(why, again=False)

    def _text(self, message: str) -> str:
        return self._struck(f"{self._who}: {message}")

    def _struck(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message


KEPT = "Finished rows are kept."


def _seed(request: _Request) -> int:
    return seed_from(request.ask.seed, request.samples[0]) % 2**31  # some servers hold 32 bits


@asynccontextmanager
async def _client(config: OpenAIEngine, key: str) -> AsyncIterator[Any]:
    import openai

    timeout = openai.Timeout(config.timeout_s, connect=min(CONNECT_S, 0.9 * config.timeout_s))
    client = openai.AsyncOpenAI(
        base_url=config.base_url, api_key=key or "none", max_retries=0, timeout=timeout
    )  # a local server takes any key
    async with client:
        yield client


def _messages(ask: Ask, system: str | None) -> list[dict[str, str]]:
    """The prompt's messages; the teacher's own system message, if it has one, in place of the prompt's."""
    if system is None:
        return ask.messages
    return [{"role": "system", "content": system}, *(m for m in ask.messages if m["role"] != "system")]


async def _models(client: Any) -> str:
    """What the server says it has, if it says so within a few seconds."""
    try:
        async with asyncio.timeout(5):
            page = await client.models.list()
        names = [m.id for m in page.data][:10]
    except Exception:  # help for a message only; the 404 is what is reported
        return ""
    return f"It has: {', '.join(names)}. " if names else ""
