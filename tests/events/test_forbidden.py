"""Nothing is sent to where it must not be, however its address is written or its name resolved."""

import asyncio
from collections.abc import Sequence

import pytest

from app.errors import ConfigurationError
from app.events.addresses import Reach
from app.events.delivery import Delivery, trusted_authorities
from app.events.event import Event
from app.events.receivers import Receiver, receivers_of
from app.events.webhooks import Patience
from app.telemetry.metrics import Metrics
from tests.events.hostile_urls import names, numbers, sixes, tricks
from tests.events.receiving import canary, outcomes, receiving, told

ONCE = Patience(attempt_s=5.0, delays_s=(), drain_s=10.0)
HOSTS = "hooks.example.com"
AUTHORITIES = trusted_authorities()


class Names:
    """A resolver: each time it is asked the next answer, and the last one ever after."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)
        self.questions: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, host: str) -> Sequence[str]:
        self.questions.put_nowait(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


async def told_once(receivers: Sequence[Receiver], resolve: Names) -> dict[str, int]:
    """What became of one event."""
    metrics = Metrics()
    deliveries = [Delivery(each, Reach(), resolve, AUTHORITIES) for each in receivers]
    async with told(deliveries, metrics, ONCE) as webhooks:
        webhooks.tell(Event("release.started", "m"))
    return outcomes(metrics)


async def test_no_url_reaches_what_is_not_allowed() -> None:
    """Of all hosts that a reader might see in them, those that are no loopback host's are allowed:
    a URL that stands the look at its host must fail for its address."""
    with canary() as inside:
        urls = [*numbers(inside.port), *sixes(inside.port), *tricks(inside.port)]
        to_this_machine = Names(["127.0.0.1"])
        refused = 0
        receivers: list[Receiver] = []
        for url in urls:
            try:
                receivers.extend(receivers_of(url, _lenient(url)))
            except ConfigurationError:
                refused += 1
        became = await told_once(receivers, to_this_machine)
        assert len(set(urls)) > 300
        assert became == {"forbidden": len(receivers)}
        assert len(receivers) > 30
        assert refused + len(receivers) == len(urls)
        assert not inside.was_reached


def _lenient(url: str) -> str:
    """The host that is read in it is on the list, unless it means this machine."""
    host = url.partition("://")[2].partition("/")[0].rpartition(":")[0]
    try:
        [receiver] = receivers_of(f"https://{host}/", host)
    except ConfigurationError:
        return HOSTS
    return HOSTS if receiver.is_loopback else f"{HOSTS},{host}"


async def test_no_name_reaches_what_is_not_allowed() -> None:
    with canary() as inside:
        receivers = receivers_of(f"https://{HOSTS}:{inside.port}/hook", HOSTS)
        for why, addresses in names():
            assert await told_once(receivers, Names(addresses)) == {"forbidden": 1}, why
        assert not inside.was_reached


async def test_a_name_is_resolved_once_and_that_address_is_connected_to() -> None:
    """Who answers a second question otherwise (DNS rebinding) is not asked."""
    async with receiving("200") as receiver:
        with canary("127.0.0.2", receiver.port) as inside:
            resolve = Names(["127.0.0.1"], ["127.0.0.2"])
            receivers = receivers_of(f"http://localhost:{receiver.port}/", "localhost")
            assert await told_once(receivers, resolve) == {"delivered": 1}
            assert resolve.questions.qsize() == 1
            assert not inside.was_reached


async def test_an_address_is_checked_again_for_each_attempt() -> None:
    async with receiving("503", "200") as receiver:
        resolve = Names(["127.0.0.1"], ["10.0.0.1"])
        receivers = receivers_of(f"http://localhost:{receiver.port}/", "localhost")
        delivery = Delivery(receivers[0], Reach(), resolve, AUTHORITIES)
        metrics = Metrics()
        async with told([delivery], metrics, Patience(delays_s=(0.0, 0.0))) as webhooks:
            webhooks.tell(Event("release.started", "m"))
            await resolve.questions.get()
            await resolve.questions.get()
        assert outcomes(metrics) == {"retried": 1, "forbidden": 1}
        assert receiver.requests.qsize() == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    with canary() as inside:
        async with receiving(f"{status}\nlocation: http://127.0.0.1:{inside.port}/") as receiver:
            receivers = receivers_of(f"http://localhost:{receiver.port}/", "localhost")
            assert await told_once(receivers, Names(["127.0.0.1"])) == {"refused": 1}
        assert not inside.was_reached


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with canary() as inside:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{inside.port}")
        async with receiving("200") as receiver:
            receivers = receivers_of(f"http://localhost:{receiver.port}/", "localhost")
            assert await told_once(receivers, Names(["127.0.0.1"])) == {"delivered": 1}
        assert not inside.was_reached


@pytest.mark.parametrize(
    ("networks", "address", "is_allowed"),
    [
        ("", "93.184.215.14", True),
        ("", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("", "10.1.2.3", False),
        ("10.1.0.0/16", "10.1.2.3", True),
        ("10.1.0.0/16", "10.2.2.3", False),
        ("10.1.0.0/16", "::ffff:10.1.2.3", False),
        ("fd00::/8, 100.64.0.0/10", "fd12::1", True),
        ("fd00::/8, 100.64.0.0/10", "fd00:ec2::254", False),
        ("fd00::/8, 100.64.0.0/10", "100.100.100.200", False),
    ],
)
def test_private_addresses_are_reached_in_networks_that_are_named(
    networks: str, address: str, is_allowed: bool
) -> None:
    reach = Reach.of(networks)
    assert reach.allows(address) is is_allowed


@pytest.mark.parametrize(
    "networks", ["0.0.0.0/0", "127.0.0.0/8", "169.254.0.0/16", "10.0.0.0/7", "::/0", "10.1.2.3/8"]
)
def test_a_network_that_is_not_private_cannot_be_named(networks: str) -> None:
    with pytest.raises(ConfigurationError, match=r"HIKYAKU_WEBHOOK_NETWORKS: .* no part of a "):
        Reach.of(networks)
