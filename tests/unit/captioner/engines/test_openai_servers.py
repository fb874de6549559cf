"""Each model server gets what it can take, and none that is down gets anything."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.captioner.engines.openai_servers import Servers
from shared.errors import Unavailable
from tests.openai_engine import caption, make, many
from tests.openai_server import OpenAIServer, after, echo, status


def test_concurrency_is_bounded_and_adapts(server: OpenAIServer) -> None:
    server.otherwise = after(0.03, echo)
    engine = make(server, concurrency=16, api_key=None)
    [place] = engine._servers.all
    assert [result.text for result in many(engine, 100, lanes=32)] == [f"prompt {n}" for n in range(100)]
    assert 8 < server.peak <= 16
    assert "Authorization" not in server.seen[0].headers

    server.room = 4
    lowest: list[int] = []
    watched = threading.Event()

    def watch() -> None:
        while not watched.wait(0.005):
            lowest.append(place.limit)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert [result.text for result in many(engine, 100)] == [f"prompt {n}" for n in range(100)]
    watched.set()
    watcher.join()
    assert min(lowest) <= 4
    assert server.refused < 60  # without a falling limit, most of the 16 lanes would be refused again and again

    server.room = None
    low = place.limit
    many(engine, 150)
    assert place.limit > low


def test_the_limit_halves_once_a_window_and_stays_within_bounds() -> None:
    servers = Servers("remote", {"http://a/v1": "a"}, 16)
    [server] = servers.all
    leases = [servers.acquire(time.monotonic() + 1) for _ in range(16)]
    for lease in leases:
        servers.release(lease, "busy")
    assert server.limit == 8
    for _ in range(6):
        lease = servers.acquire(time.monotonic() + 30)
        servers.release(lease, "busy")
        server.rest_until = 0.0
    assert server.limit == 1
    for _ in range(16 * 17):
        servers.release(servers.acquire(time.monotonic() + 1), "ok")
    assert server.limit == 16


def test_a_lease_stays_what_it_was_granted_as() -> None:
    """The waiter may wake up only after its server was set aside, and given to another to look at."""
    servers = Servers("remote", {"http://a/v1": "a"}, 2)
    [server] = servers.all
    for _ in range(2):
        servers.acquire(time.monotonic() + 1)
    with ThreadPoolExecutor(2) as pool:
        waiting = []
        for count in (1, 2):
            waiting.append(pool.submit(servers.acquire, time.monotonic() + 5))
            while len(servers._waiters) < count:
                time.sleep(0.001)
        with servers._lock:  # neither can wake up
            for _ in range(2):
                server.in_flight -= 1
                servers._in_flight -= 1
                servers._grant()
                servers._set_aside(server, "broke")
                server.rest_until = 0.0
        assert [lease.result().probe for lease in waiting] == [False, True]


def test_the_limit_falls_where_answers_become_far_slower(server: OpenAIServer) -> None:
    server.otherwise = after(0.005)
    engine = make(server, concurrency=8)
    many(engine, 60)
    assert engine._servers.all[0].limit == 8
    server.otherwise = after(0.25)
    many(engine, 16)
    assert engine._servers.all[0].limit < 8


def test_two_servers_share_the_load_and_the_bound() -> None:
    with OpenAIServer(otherwise=after(0.01)) as one, OpenAIServer(otherwise=after(0.01)) as two:
        engine = make(one, two, concurrency=8)
        many(engine, 120, lanes=16)
        assert abs(len(one.seen) - len(two.seen)) < 30
        assert one.peak + two.peak <= 8 + 2  # each limit may grow a little while the other's is not used up
        assert engine._servers._in_flight == 0


def test_a_slow_server_gets_less() -> None:
    with OpenAIServer(otherwise=after(0.08)) as slow, OpenAIServer(otherwise=after(0.01)) as fast:
        many(make(slow, fast, concurrency=8), 120)
        assert len(fast.seen) > 2 * len(slow.seen) > 0


def test_when_a_server_dies_the_others_take_over_and_it_is_found_again() -> None:
    with OpenAIServer(otherwise=after(0.02, echo)) as stays, OpenAIServer(otherwise=after(0.02, echo)) as dies:
        engine = make(stays, dies, concurrency=8)
        killer = threading.Timer(0.15, dies.stop)
        killer.start()
        assert [result.text for result in many(engine, 120)] == [f"prompt {n}" for n in range(120)]
        killer.join()
        assert dies.seen
        assert any(place.down for place in engine._servers.all)
        with OpenAIServer(port=dies.port, otherwise=echo) as reborn:
            deadline = time.monotonic() + 10
            while not reborn.seen and time.monotonic() < deadline:
                many(engine, 8)
            many(engine, 40)
            assert len(reborn.seen) > 5
            assert not any(place.down for place in engine._servers.all)


def test_the_only_servers_restart_is_waited_for(server: OpenAIServer) -> None:
    engine = make(server, concurrency=4)
    server.stop()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(caption, engine) for _ in range(8)]
        time.sleep(0.3)
        with OpenAIServer(port=server.port) as again:
            assert [answer.result().text for answer in answers] == ["a red fox"] * 8
            assert len(again.seen) == 8


def test_a_server_that_comes_back_with_another_model_stays_aside(server: OpenAIServer) -> None:
    with OpenAIServer() as changes:
        engine = make(server, changes, concurrency=2)
        changes.served, changes.otherwise = ("other",), status(404, "no such model")
        assert [result.text for result in many(engine, 20)] == ["a red fox"] * 20
        assert len(changes.seen) <= 2
        time.sleep(0.12)
        looks = changes.looks
        many(engine, 5)
        assert changes.looks > looks
        assert len(changes.seen) <= 2


def test_waiting_requests_are_served_in_their_order() -> None:
    servers = Servers("remote", {"http://a/v1": "a"}, 1)
    first = servers.acquire(time.monotonic() + 1)
    served: list[int] = []

    def wait(number: int) -> None:
        lease = servers.acquire(time.monotonic() + 5)
        served.append(number)
        servers.release(lease, "ok")

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(6)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(servers._waiters) <= number:
            time.sleep(0.001)
    servers.release(first, "ok")
    for thread in threads:
        thread.join()
    assert served == list(range(6))


def test_no_place_in_time_is_told() -> None:
    servers = Servers("remote", {"http://a/v1": "a"}, 1)
    lease = servers.acquire(time.monotonic() + 1)
    with pytest.raises(Unavailable, match="all are full"):
        servers.acquire(time.monotonic() + 0.05)
    servers.release(lease, "down", "cannot be reached")
    servers.all[0].rest_until = time.monotonic() + 100
    began = time.monotonic()
    with pytest.raises(Unavailable, match="a cannot be reached") as error:
        servers.acquire(time.monotonic() + 50)
    assert time.monotonic() - began < 1
    assert error.value.retry_after == 100
    assert not servers._waiters
