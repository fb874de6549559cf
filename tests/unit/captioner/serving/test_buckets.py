"""Which requests share a batch, and whose turn it is."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from services.captioner.engines.base import CaptionRequest
from services.captioner.serving.buckets import Buckets, Item, Waiting

BUSY_UNTIL = 1000.0  # the device has just become free: what was ready before goes at once


def item(bucket: str, ready_at: float = 0.0, alone: bool = False) -> Item:
    return Item(CaptionRequest((), ""), deadline=1e9 + ready_at, bucket=bucket, ready_at=ready_at, alone=alone)


def shelf(*items: Item, max_batch: int = 3) -> Buckets:
    buckets = Buckets(max_batch, max_wait_s=5.0)
    for each in items:
        buckets.add(each)
    return buckets


def test_an_idle_device_waits_for_company_but_not_longer_than_max_wait() -> None:
    first, second = item("a", ready_at=10), item("b", ready_at=12)
    buckets = shelf(first, second)
    assert buckets.next_batch(now=11, free_since=0) == ([], 4.0)
    assert buckets.next_batch(now=15, free_since=0) == ([first], None)
    assert buckets.next_batch(now=15, free_since=0) == ([], 2.0)
    assert buckets.next_batch(now=17, free_since=0) == ([second], None)
    assert buckets.next_batch(now=17, free_since=0) == ([], None)


def test_a_full_batch_or_one_from_before_does_not_wait() -> None:
    full = [item("a", ready_at=10) for _ in range(4)]
    buckets = shelf(*full)
    assert buckets.next_batch(now=10, free_since=0) == (full[:3], None)
    assert buckets.next_batch(now=10, free_since=0) == ([], 5.0)
    assert buckets.next_batch(now=10, free_since=10) == (full[3:], None)


def test_a_full_bucket_is_not_held_up_by_an_older_one_that_is_not_due() -> None:
    lone = item("a", ready_at=10)
    full = [item("b", ready_at=11) for _ in range(3)]
    assert shelf(lone, *full).next_batch(now=11, free_since=0) == (full, None)


def test_requests_tried_again_go_one_by_one_between_the_others() -> None:
    again = [item("a", alone=True) for _ in range(2)]
    plain = [item("a", ready_at=1) for _ in range(6)]
    buckets = shelf(*again, *plain)
    batches = [buckets.next_batch(now=1, free_since=BUSY_UNTIL)[0] for _ in range(4)]
    assert batches == [again[:1], plain[:3], again[1:], plain[3:]]


def test_sweep_takes_out_only_what_nobody_waits_for() -> None:
    gone, late, here = item("a"), item("b"), item("a")
    gone.future.cancel()
    late.deadline = 0.0
    buckets = shelf(gone, late, here)
    assert sorted(map(id, buckets.sweep())) == sorted(map(id, [gone, late]))
    assert buckets.clear() == [here]
    assert len(buckets) == 0


@given(steps=st.lists(st.none() | st.sampled_from("abcd"), max_size=120))
def test_nothing_is_lost_and_no_bucket_is_passed_over_for_more_than_a_round(steps: list[str | None]) -> None:
    """None takes a batch; a letter puts a request into that bucket."""
    buckets, clock = shelf(), count(1)
    put: dict[str, list[Item]] = {key: [] for key in "abcd"}
    taken: dict[str, list[Item]] = {key: [] for key in "abcd"}
    passed_over = dict.fromkeys("abcd", 0)

    def take() -> None:
        batch, _ = buckets.next_batch(now=0.0, free_since=BUSY_UNTIL)
        (key,) = {str(each.bucket) for each in batch} or {""}
        assert len(batch) <= 3
        for other in "abcd":
            waits = other != key and len(put[other]) > len(taken[other])
            passed_over[other] = passed_over[other] + 1 if waits else 0
            assert passed_over[other] < 4
        if key:
            taken[key] += batch

    for step in steps:
        if step is None:
            take()
        else:
            put[step].append(item(step, ready_at=float(next(clock))))
            buckets.add(put[step][-1])
    while len(buckets):
        take()
    assert taken == put


def test_a_request_of_another_size_is_prepared_before_a_long_queue_of_equal_ones() -> None:
    small, large = Image.new("RGB", (112, 112)), Image.new("RGB", (1120, 1120))
    requests = [CaptionRequest((large,), "x", max_tokens=200)] * 5 + [CaptionRequest((small,), "x", max_tokens=20)] * 3
    items = [Item(request, deadline=1e9 + number) for number, request in enumerate(requests)]
    waiting = Waiting()
    for each in items:
        waiting.add(each)
    order: list[int] = []
    while each := waiting.next_item(ahead=[], most_of_a_size=2):
        order.append(items.index(each))
    assert order == [0, 5, 1, 6, 2, 7, 3, 4]


def test_no_more_of_one_size_are_prepared_than_two_batches() -> None:
    large = [Item(CaptionRequest((), "x", max_tokens=200), deadline=1e9 + number) for number in range(4)]
    small = Item(CaptionRequest((), "x", max_tokens=20), deadline=2e9)
    waiting = Waiting()
    for each in [*large[2:], small]:
        waiting.add(each)
    assert waiting.next_item(ahead=large[:2], most_of_a_size=2) is small
    assert waiting.next_item(ahead=large[:2], most_of_a_size=2) is None
    assert waiting.next_item(ahead=large[:1], most_of_a_size=2) is large[2]
