"""Engine `openai`: any OpenAI-compatible chat server, hosted or on loopback (vLLM, SGLang, llama.cpp).

One idea: a sample is one request of its own (n = 1, a seed derived from prompt and sample), because many
servers ignore `n`, and a request is what gets lost, repeated and counted. Requests run on an event loop in a
daemon thread; `run` hands finished samples over in lists of a few seconds' work: a kill costs at most those.

    retried      time-outs, broken connections, 408, 409, 425, 429, 5xx, and garbage (not JSON, no choice, no
                 text, no finish_reason): exponential backoff with jitter, or as long as Retry-After says
    Failure      what is left of those after `retries`; other 4xx; a finish that is neither stop nor length
    WorkError    401, 403, 404; a server that does not answer at the start; 16 requests failed in a row

Text that a server hands over apart as `reasoning_content` (or `reasoning`) is put before the answer in
<think>...</think>, which is what the same model writes behind a server that does not take it apart.
The key is read from the environment, sent to the server, and struck out of every message.
"""

import asyncio
import email.utils
import importlib
import json
import os
import queue
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.engines.base import Ask, Failure, Finished, Sample
from pipeline.sources import whole_unicode
from schemas.errors import UserError, WorkError
from schemas.ids import seed_from
from schemas.recipe import OpenAIEngine

BACKOFF_S = 0.5  # before the first repeat; doubled for each further one
MAX_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 300.0
FLUSH_ROWS, FLUSH_S = 64, 5.0
IN_A_ROW = 16  # requests that failed for good, one after the other: the server is gone or misconfigured
START_TRIES = 3  # connections, while the server has never answered
CONNECT_S = 10.0
RETRIED = frozenset({408, 409, 425, 429})
STOP, LENGTH = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}, {"length", "max_tokens"}

Result = Sample | Failure
Work = list[tuple[Ask, int]]


class OpenAITeacher:
    """The engine; `who` opens its messages."""

    name = "openai"
    seeded = True
    complete = True
    note = ""

    def __init__(self, config: OpenAIEngine, who: str = "openai") -> None:
        self._config, self._who = config, who
        try:
            importlib.import_module("openai")
        except ImportError:
            raise UserError(f"{who}: engine 'openai' needs the package of that name: pip install dypo[openai]") from None

    def run(self, asks: Sequence[Ask], finished: Finished) -> Iterator[list[Result]]:
        """Yields finished samples in the order in which the server answers."""
        work = [(ask, s) for ask in asks for s in ask.samples if (ask.prompt_id, s) not in finished]
        if not work:
            return
        results: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        crew = _Crew(self._config, self._who, work, results)
        batch: list[Result] = []
        left, began = len(work), time.monotonic()
        try:
            while left:
                try:
                    item = results.get(timeout=max(0.0, began + FLUSH_S - time.monotonic()) if batch else None)
                except queue.Empty:
                    item = None
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    batch.append(item)
                    left -= 1
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
        if batch:
            yield batch


def _left_over(results: "queue.SimpleQueue[Result | BaseException]") -> list[Result]:
    out: list[Result] = []
    while not results.empty():
        item = results.get()
        if not isinstance(item, BaseException):
            out.append(item)
    return out


@dataclass(frozen=True)
class _Bad:
    """An attempt that gave no sample: why, whether another may help, and how long the server asked to wait."""

    why: str
    again: bool = True
    wait_s: float | None = None
    connected: bool = True  # the server was there
    counts: bool = True  # towards the failures in a row that mean a broken server
    free: bool = False  # not an attempt: our own correction
    fatal: str | None = None


class _Crew:
    """`concurrency` workers on an event loop of their own; what they get goes to `results`, errors too."""

    def __init__(
        self, config: OpenAIEngine, who: str, work: Work, results: "queue.SimpleQueue[Result | BaseException]"
    ) -> None:
        self._config, self._who, self._results = config, who, results
        self._work = iter(work)
        self._workers = min(config.concurrency, len(work))
        self._key = os.environ.get(config.api_key_env, "").strip()
        self._length_key = "max_tokens"
        self._failed_in_a_row = 0
        self._answered = False
        self._loop = asyncio.new_event_loop()
        self._main = self._loop.create_task(self._all())
        self._thread = threading.Thread(target=self._serve, name="openai-teacher", daemon=True)
        self._thread.start()

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

    async def _worker(self, client: Any) -> None:
        for ask, sample in self._work:
            result = await self._sample(client, ask, sample)
            self._results.put(result)

    async def _sample(self, client: Any, ask: Ask, sample: int) -> Result:
        """One sample, however many attempts it takes."""
        attempt = 0
        while True:
            got = await self._attempt(client, ask, sample)
            if isinstance(got, Sample):
                self._failed_in_a_row = 0
                self._answered = True
                return got
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
            if self._answered and (not got.again or attempt > self._config.retries):
                return self._failure(ask, sample, got, attempt)
            wait = min(BACKOFF_S * 2 ** (attempt - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.5)
            await asyncio.sleep(wait if got.wait_s is None else min(got.wait_s, MAX_RETRY_AFTER_S))

    def _failure(self, ask: Ask, sample: int, got: _Bad, attempts: int) -> Failure:
        self._failed_in_a_row = self._failed_in_a_row + 1 if got.counts else 0
        if self._failed_in_a_row >= IN_A_ROW:
            raise WorkError(
                self._text(
                    f"{self._config.base_url}: {IN_A_ROW} requests failed in a row, the last with: {got.why}. {KEPT} "
                    "See to the server, or raise retries and timeout_s, then run the same command again"
                )
            )
        times = f" ({attempts} attempts)" if attempts > 1 else ""
        return Failure(ask.prompt_id, sample, self._struck(got.why + times))

    async def _attempt(self, client: Any, ask: Ask, sample: int) -> Sample | _Bad:
        import openai

        config = self._config
        seed = seed_from(ask.seed, sample) % 2**31  # some servers hold 32 bits
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
        limit = self._length_key
        try:
            async with asyncio.timeout(config.timeout_s):
                reply = await client.chat.completions.with_raw_response.create(
                    model=config.model, messages=_messages(ask, config.system), temperature=config.temperature,
                    top_p=config.top_p, seed=seed, **{limit: config.max_tokens},
                )  # fmt: skip
        except openai.APIStatusError as e:
            return await self._refused(client, e, limit)
        except (TimeoutError, openai.APITimeoutError) as e:
            if type(e.__cause__).__name__ == "ConnectTimeout":
                return _Bad("no connection in time", connected=False)
            return _Bad(f"no answer within {config.timeout_s:g} s")
        except openai.APIConnectionError as e:
            return _Bad(f"connection failed: {str(e.__cause__ or e) or type(e.__cause__).__name__}", connected=False)
        made = _read(reply.content)
        if isinstance(made, _Bad):
            return made
        text, finish_reason, model = made
        row = json.dumps({**sampling, "seed": seed})
        return Sample(ask.prompt_id, sample, text, finish_reason, model=model or config.model, sampling=row)

    async def _refused(self, client: Any, e: Any, limit: str) -> _Bad:
        """What a status other than 200 means."""
        config, code, said = self._config, e.status_code, _said(e)
        why = f"status {code}: {said}"
        if code in (401, 403):
            state = "is set, so it may be the wrong key" if self._key else "is not set"
            return _Bad(why, fatal=(
                f"{config.base_url} refuses the key ({why}). The environment variable {config.api_key_env} {state}; "
                f"set it, or name another in api_key_env. {KEPT}"
            ))  # fmt: skip
        if code == 404:
            return _Bad(why, fatal=(
                f"{config.base_url} does not know model '{config.model}' or has no /chat/completions ({why}). "
                f"{await _models(client)}Correct model or base_url (which mostly ends in /v1). {KEPT}"
            ))  # fmt: skip
        if code in RETRIED or code >= 500:
            return _Bad(why, wait_s=_retry_after(e.response.headers))
        if code == 400 and limit == "max_tokens" and "max_completion_tokens" in said:
            self._length_key = "max_completion_tokens"
            return _Bad(why, wait_s=0.0, free=True)
        return _Bad(why, again=False)

    def _text(self, message: str) -> str:
        return self._struck(f"{self._who}: {message}")

    def _struck(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message


KEPT = "Finished rows are kept."


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


def _read(content: bytes) -> tuple[str, str, str | None] | _Bad:
    """(text, finish_reason, model) of a chat completion."""
    try:
        reply = json.loads(content)
    except ValueError:
        return _Bad(f"garbage: expected JSON, found {content[:60]!r}")
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return _Bad(f"garbage: expected choices with a message, found {content[:60]!r}")
    text, reason = message.get("content"), choice.get("finish_reason")
    thought = message.get("reasoning_content") or message.get("reasoning")
    thought = thought.strip() if isinstance(thought, str) else ""
    finish = "stop" if reason in STOP else "length" if reason in LENGTH else None
    if isinstance(reason, str) and finish is None:
        return _Bad(f"finish_reason '{reason}', expected stop or length", again=False, counts=False)
    if not isinstance(text, str) or not text.strip():
        if finish == "length" and thought:
            return _Bad("max_tokens ended the reasoning before any answer; raise max_tokens", again=False)
        return _Bad(f"garbage: expected a text, found {'an empty one' if isinstance(text, str) else repr(text)[:60]}")
    if finish is None:
        return _Bad(f"garbage: expected a finish_reason, found {reason!r}")
    if thought and not text.lstrip().startswith("<think>"):
        text = f"<think>\n{thought}\n</think>\n\n{text.lstrip()}"
    model = reply.get("model")
    return whole_unicode(text), finish, model if isinstance(model, str) and model else None


def _said(e: Any) -> str:
    """The server's own words about an error, on one line."""
    body = e.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(said or e.message).split())[:300]


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


async def _models(client: Any) -> str:
    """What the server says it has, if it says so within a few seconds."""
    try:
        async with asyncio.timeout(5):
            page = await client.models.list()
        names = [m.id for m in page.data][:10]
    except Exception:  # help for a message only; the 404 is what is reported
        return ""
    return f"It has: {', '.join(names)}. " if names else ""
