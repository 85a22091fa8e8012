"""Requests a minute: counted here, told in batches, judged by what all replicas have together."""

import asyncio
import hashlib

import pytest

from services.api.limits import REPORT_S
from shared.contracts.accounts import ReportRequests, RequestCount, RequestRate, RequestRates
from shared.contracts.problems import refused
from shared.contracts.resources import KeyGrant
from shared.contracts.store import CheckKey
from shared.ids import new_id
from tests.api.conftest import PATIENCE_S, Peers
from tests.stack.client import NativeClient, native_client

TENANT = "limited"


class Store:
    """Adds up what it is told, as the store does, and knows keys by what they may do."""

    def __init__(self, peers: Peers) -> None:
        self.counted: dict[str, int] = {}
        self.told: asyncio.Queue[ReportRequests] = asyncio.Queue()
        self.grants: dict[str, KeyGrant] = {}
        peers.answers[CheckKey] = self.check
        peers.answers[ReportRequests] = self.count

    def key(self, *, of_key: int | None = None, of_tenant: int | None = None) -> str:
        """A key that may make so many requests a minute."""
        key = new_id()
        self.grants[hashlib.sha256(key.encode()).hexdigest()] = KeyGrant(
            key_id=new_id(),
            tenant=TENANT + key,
            scope="chat",
            requests_per_minute=of_key,
            tenant_requests_per_minute=of_tenant,
        )
        return key

    def check(self, request: CheckKey) -> KeyGrant:
        try:
            return self.grants[request.digest]
        except KeyError:
            raise refused("unauthorized", "This key is not known.") from None

    def count(self, report: ReportRequests) -> RequestRates:
        self.told.put_nowait(report)
        subjects = []
        for count in report.counts:
            for subject in (count.tenant, count.key_id):
                if subject is not None:
                    self.counted[subject] = self.counted.get(subject, 0) + count.requests
                    subjects.append(subject)
        rates = tuple(RequestRate(subject=name, before=0, now=self.counted[name]) for name in subjects)
        return RequestRates(minute=1, elapsed_s=20.0, rates=rates)

    async def next_told(self, key: str) -> list[RequestCount]:
        """What the next report that has to do with that key says of it; others may be left from earlier tests."""
        tenant = TENANT + key
        async with asyncio.timeout(PATIENCE_S):
            while not (counts := [count for count in (await self.told.get()).counts if count.tenant == tenant]):
                pass
        return counts


@pytest.fixture
async def store(peers: Peers) -> Store:
    """A store that counts requests."""
    return Store(peers)


async def statuses(client: NativeClient, count: int) -> list[int]:
    return [(await client.request("GET", f"/runs/{new_id()}")).status for _ in range(count)]


async def test_request_beyond_the_limit_of_a_key_is_refused_with_when_to_come_again(peers: Peers, store: Store) -> None:
    async with native_client(peers.url, store.key(of_key=3)) as client:
        assert await statuses(client, 3) == [404] * 3
        reply = await client.request("GET", f"/runs/{new_id()}")
        assert (reply.status, reply.body["code"]) == (429, "rate_limited")
        assert reply.body["detail"] == "The key's limit of 3 requests a minute is reached."
        assert 1 <= int(reply.headers["Retry-After"]) <= 120


async def test_what_other_replicas_have_answered_counts(peers: Peers, store: Store) -> None:
    key = store.key(of_tenant=100)
    grant = store.grants[hashlib.sha256(key.encode()).hexdigest()]
    store.counted[grant.tenant] = 98
    async with native_client(peers.url, key) as client:
        assert await statuses(client, 1) == [404]
        told = await store.next_told(key)
        assert [(count.key_id, count.requests) for count in told] == [(None, 1)]
        async with asyncio.timeout(PATIENCE_S):
            while await statuses(client, 1) != [429]:
                pass
        reply = await client.request("GET", f"/runs/{new_id()}")
        assert reply.body["detail"] == "The tenant's limit of 100 requests a minute is reached."


async def test_many_requests_are_told_in_few_reports_and_none_is_forgotten(peers: Peers, store: Store) -> None:
    key = store.key(of_key=1000, of_tenant=2000)
    begun = asyncio.get_running_loop().time()
    async with native_client(peers.url, key) as client:
        assert await statuses(client, 40) == [404] * 40
        reports, told = 0, 0
        while told < 40:
            told += sum(count.requests for count in await store.next_told(key))
            reports += 1
        assert told == 40
        passed = asyncio.get_running_loop().time() - begun
        assert reports <= passed / REPORT_S + 2, "more than one a second"


async def test_report_that_failed_is_made_again_and_holds_up_nobody(peers: Peers, store: Store) -> None:
    def fail(_: ReportRequests) -> RequestRates:
        raise refused("unavailable", "the database does not answer")

    peers.answers[ReportRequests] = fail
    key = store.key(of_key=20)
    async with native_client(peers.url, key) as client:
        assert await statuses(client, 2) == [404] * 2
        peers.answers[ReportRequests] = store.count
        told = 0
        while told < 2:
            told += sum(count.requests for count in await store.next_told(key))
        assert told == 2


async def test_keys_without_limits_are_told_of_nobody(peers: Peers, store: Store, client: NativeClient) -> None:
    key = store.key()
    async with native_client(peers.url, key) as free:
        assert await statuses(free, 30) == [404] * 30
    told = [store.told.get_nowait() for _ in range(store.told.qsize())]
    assert TENANT + key not in {count.tenant for report in told for count in report.counts}
