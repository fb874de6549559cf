"""The caption worker's client against a real server that misbehaves: what is the request's fault, and what is not."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from services.captioner.captioning import remote
from services.captioner.captioning.remote import ENGINE_TRIES, TRIES, Captioner, Reply, encode_picture
from services.captioner.settings import CaptionerSettings, CaptionWorkerSettings
from shared.errors import InvalidInput, Unavailable
from tests.integration.captioner_server import Answer, Asked, CaptionerServer, captioner_server

AT_ONCE = {"Retry-After": "0"}
PICTURE = encode_picture(b"image", "image/png")


@pytest.fixture
def server() -> Iterator[CaptionerServer]:
    with captioner_server() as running:
        yield running


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    """These, the last one for ever."""
    return lambda asked: answers[min(asked.number, len(answers)) - 1]


def client(url: str, patience: float = 2.0, concurrency: int = 8, timeout: float = 300.0) -> Captioner:
    settings = CaptionWorkerSettings(
        captioner_url=url, service_token="token", caption_concurrency=concurrency, request_timeout_s=timeout
    )
    return Captioner(settings, patience)


def ask(server: CaptionerServer, patience: float = 2.0, **options: Any) -> Reply:
    return asyncio.run(_ask(client(server.url, patience), ["describe"], **options))[0]


async def _ask(captioner: Captioner, prompts: Sequence[str], **options: Any) -> list[Reply]:
    async with captioner:
        asked = (captioner.caption("m", "r1", PICTURE, prompt, **options) for prompt in prompts)
        return await asyncio.gather(*asked)


def test_a_request_carries_the_picture_the_prompt_and_the_options(server: CaptionerServer) -> None:
    reply = ask(server, seed=3, metadata={"class_name": "cat", "characteristic": "shape"})
    (asked,) = server.asked
    assert (asked.prompt, asked.picture) == ("describe", "data:image/png;base64,aW1hZ2U=")
    assert {name: asked.body[name] for name in ("model", "seed")} == {"model": "m", "seed": 3}
    assert (reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == ("stop", 7, 3)
    assert reply.milliseconds > 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_final_and_keeps_the_servers_words(server: CaptionerServer, status: int) -> None:
    server.answer = in_turn(Answer(status=status), Answer("never reached"))
    with pytest.raises(InvalidInput, match="the server's own words") as error:
        ask(server)
    assert (error.value.code, server.calls) == ("why", 1)


GARBAGE = [b"", b"<html>", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": {"content": ["a"]}}]}']


@pytest.mark.parametrize("failure", [*(Answer(status=s) for s in (401, 403, 404, 429, 500, 502, 503)), *GARBAGE])
def test_a_failure_of_the_server_is_not_an_images_refusal(server: CaptionerServer, failure: Answer | bytes) -> None:
    failed = Answer(body=failure) if isinstance(failure, bytes) else failure
    server.answer = in_turn(failed, Answer("a red bird"))
    assert ask(server).text == "a red bird"
    server.answer = lambda _: failed
    with pytest.raises(Unavailable, match=f"answered {failed.status if failed.status != 200 else 'with something'}"):
        ask(server, patience=0.3)


def test_a_body_that_is_cut_off_is_asked_for_again(server: CaptionerServer) -> None:
    cut = Answer(body=b'{"choices', headers={"Content-Length": "9000", "Connection": "close"})
    server.answer = in_turn(cut, Answer("a red bird"))
    assert ask(server).text == "a red bird"


def test_a_server_that_is_away_is_waited_for_within_patience() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        asyncio.run(_ask(client("http://127.0.0.1:9", 0.5), ["describe"]))


def test_a_retry_waits_as_long_as_the_server_says(server: CaptionerServer) -> None:
    server.answer = in_turn(Answer(status=429, headers={"Retry-After": "1"}), Answer("a red bird"))
    began = time.monotonic()
    assert ask(server).text == "a red bird"
    assert 1.0 <= time.monotonic() - began < 2.5


def test_too_many_requests_lower_how_many_are_in_flight(server: CaptionerServer) -> None:
    """A server that takes two at a time: nobody is given up, and the limit comes near what it takes."""

    def two_at_a_time(asked: Asked) -> Answer:
        if server.in_flight > 2:
            return Answer(status=429, headers={"Retry-After": "1"})
        time.sleep(0.01)
        return Answer("a red bird")

    server.answer = two_at_a_time
    captioner = client(server.url, patience=5.0, concurrency=32)
    options = {"metadata": {"characteristic": "shape", "class_name": "cat"}}
    replies = asyncio.run(_ask(captioner, ["describe"] * 60, **options))
    assert [reply.text for reply in replies] == ["a red bird"] * 60
    assert captioner.slots.limit < 32
    assert server.most_in_flight <= 32


def test_a_request_that_always_fails_while_others_are_answered_is_refused(server: CaptionerServer) -> None:
    failed = Answer(status=500, headers=AT_ONCE)
    server.answer = lambda asked: Answer("a red bird") if asked.prompt == "good" else failed

    async def both() -> str:
        async with client(server.url, patience=1.0) as captioner:
            bad = asyncio.create_task(captioner.caption("m", "r1", PICTURE, "bad"))
            while not bad.done():
                assert (await captioner.caption("m", "r1", PICTURE, "good")).text == "a red bird"
                await asyncio.sleep(0.01)
            with pytest.raises(InvalidInput, match="answered 500 each of 10 times") as error:
                await bad
            return error.value.code

    assert asyncio.run(both()) == "captioner_failed"
    assert sum(asked.prompt == "bad" for asked in server.asked) >= TRIES


BROKE = Answer(status=500, code="engine_failed", headers=AT_ONCE)


def test_what_breaks_the_model_each_time_is_refused_though_nobody_else_asks(server: CaptionerServer) -> None:
    server.answer = in_turn(BROKE, BROKE, Answer("a red bird"))
    assert ask(server).text == "a red bird", "it may have been another's fault"
    server.answer = lambda _: BROKE
    with pytest.raises(InvalidInput, match="the server's own words") as error:
        ask(server)
    assert (error.value.code, server.calls) == ("engine_failed", 3 + ENGINE_TRIES)


TIMED_OUT = Answer(status=503, code="deadline_exceeded", headers=AT_ONCE)


@pytest.mark.parametrize("slow", ["deadline_exceeded", "no answer"])
def test_a_slow_answer_is_waited_for_as_long_as_others_are_answered(
    server: CaptionerServer, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Each try takes longer than the patience; the last is in time."""
    monkeypatch.setattr(remote, "GRACE_SECONDS", 0.1)
    tries = 0

    def answer(asked: Asked) -> Answer:
        nonlocal tries
        if asked.prompt == "slow":
            tries += 1
            if tries <= 2:
                time.sleep(1.0 if slow == "deadline_exceeded" else 1.5)
                return TIMED_OUT
        return Answer(asked.prompt)

    server.answer = answer

    async def both() -> str:
        async with client(server.url, patience=0.9, timeout=1.1) as captioner:
            waiting = asyncio.create_task(captioner.caption("m", "r1", PICTURE, "slow"))
            while not waiting.done():
                await captioner.caption("m", "r1", PICTURE, "quick")
                await asyncio.sleep(0.05)
            return (await waiting).text

    assert asyncio.run(both()) == "slow"
    assert tries == 3


def test_waiting_for_a_slot_is_not_failing(server: CaptionerServer) -> None:
    """One slot, and another's long answer before the second try."""

    def answer(asked: Asked) -> Answer:
        if asked.prompt == "long":
            time.sleep(1.5)
        return TIMED_OUT if asked.number in (1, 3) else Answer(asked.prompt)

    server.answer = answer
    captioner = client(server.url, patience=0.8, concurrency=1)
    replies = asyncio.run(_ask(captioner, ["short", "long"]))
    assert [reply.text for reply in replies] == ["short", "long"]
    assert [asked.prompt for asked in server.asked][:3] == ["short", "long", "short"]


def test_a_server_that_answers_nobody_is_away(server: CaptionerServer) -> None:
    server.answer = lambda _: Answer(status=500, headers=AT_ONCE, code="internal_error")
    with pytest.raises(Unavailable, match="answered 500 for 0 s"):
        asyncio.run(_ask(client(server.url, 0.4), ["describe"] * 20))


def test_the_captioners_deadline_comes_before_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTUNE_REQUEST_TIMEOUT_S", "700")
    captioner = Captioner(CaptionWorkerSettings(captioner_url="http://127.0.0.1:9", service_token="token"))
    assert captioner.timeout.read == CaptionerSettings().request_timeout_s + 30 == 730
    assert captioner.timeout.connect == 5.0


def test_an_endless_answer_is_cut(server: CaptionerServer) -> None:
    server.answer = in_turn(Answer("word " * 1_000_000))
    assert len(ask(server).text) == 8000


def test_a_replaced_model_writes_no_caption_under_the_old_revision(server: CaptionerServer) -> None:
    server.revision, server.answer = "r2", in_turn(Answer("a red bird"))
    with pytest.raises(Unavailable, match="was replaced"):
        ask(server)


def test_text_that_a_database_cannot_hold_is_made_so(server: CaptionerServer) -> None:
    server.answer = in_turn(Answer("a\0b\ud800c"))
    assert ask(server).text == "a\ufffdb\ufffdc"


def test_a_cancelled_request_hangs_up_at_once(server: CaptionerServer) -> None:
    asked, release = threading.Event(), threading.Event()

    def hang(_: Asked) -> Answer:
        asked.set()
        release.wait(20)
        return Answer()

    server.answer = hang

    async def cancelled() -> None:
        async with client(server.url) as captioner:
            task = asyncio.create_task(captioner.caption("m", "r1", PICTURE, "describe"))
            await asyncio.to_thread(asked.wait)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    began = time.monotonic()
    asyncio.run(cancelled())
    release.set()
    assert time.monotonic() - began < 2


def test_a_loading_model_is_waited_for_and_an_unknown_one_named(server: CaptionerServer) -> None:
    server.loading = 1

    async def look() -> None:
        async with client(server.url) as captioner:
            assert (await captioner.model("m"))["precision"] == "nf4"
            with pytest.raises(InvalidInput, match="it serves: m"):
                await captioner.model("other")

    asyncio.run(look())


def test_a_model_that_could_not_be_loaded_is_given_up_at_once(server: CaptionerServer) -> None:
    server.loading, server.error = 100, "out of memory: 16 GiB asked for"

    async def look() -> None:
        async with client(server.url) as captioner:
            with pytest.raises(InvalidInput, match="16 GiB asked for") as error:
                await captioner.model("m")
            assert error.value.code == "engine_failed_to_load"

    asyncio.run(look())
    assert server.loading == 99
