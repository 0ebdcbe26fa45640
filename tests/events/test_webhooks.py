"""Receivers are told signed events, as often as it takes and no more, and nobody waits for them."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import ssl
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app.errors import ConfigurationError
from app.events.addresses import Reach
from app.events.delivery import Delivery, system_addresses, trusted_authorities
from app.events.event import Event, NoEvents
from app.events.receivers import receivers_of
from app.events.signing import Signer
from app.events.webhooks import Patience, open_webhooks
from app.telemetry.metrics import Metrics
from tests.events.receiving import SECRET, outcomes, receiving, told

STARTED = Event("release.started", "m", 2, "ab" * 32)
SECRET_PATH = "/services/T00/B00/planted"


def delivery(
    port: int, scheme: str = "http", authorities: ssl.SSLContext | None = None
) -> Delivery:
    """To this machine, by its name; the path is secret."""
    [receiver] = receivers_of(f"{scheme}://localhost:{port}{SECRET_PATH}?key=planted", "localhost")
    return Delivery(receiver, Reach(), system_addresses, authorities or trusted_authorities())


async def test_an_event_is_told_once_signed_and_as_it_is() -> None:
    metrics = Metrics()
    async with (
        receiving("204") as receiver,
        told([delivery(receiver.port)], metrics, Patience()) as webhooks,
    ):
        webhooks.tell(STARTED)
        request = await receiver.requests.get()
    assert request.line == f"POST {SECRET_PATH}?key=planted HTTP/1.1"
    assert request.headers["host"] == f"localhost:{receiver.port}"
    assert request.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert request.headers["webhook-id"] == STARTED.id
    assert request.body == STARTED.encode("urn:hikyaku:test")
    assert is_genuine(request.headers, request.body, SECRET)
    assert not is_genuine(request.headers, request.body + b" ", SECRET)
    assert not is_genuine({**request.headers, "webhook-id": "other"}, request.body, SECRET)
    late = str(int(request.headers["webhook-timestamp"]) - 400)
    assert not is_genuine({**request.headers, "webhook-timestamp": late}, request.body, SECRET)
    assert outcomes(metrics) == {"delivered": 1}
    assert receiver.requests.empty()


def is_genuine(headers: dict[str, str], body: bytes, secret: str) -> bool:
    """As docs/events.md has it."""
    sent_at = headers["webhook-timestamp"]
    signed = f"{headers['webhook-id']}.{sent_at}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    signatures = headers["webhook-signature"].split(" ")
    is_known = any(hmac.compare_digest(f"v1,{expected}", each) for each in signatures)
    return is_known and abs(time.time() - int(sent_at)) < 300


def test_while_secrets_are_exchanged_either_verifies() -> None:
    other = "whsec_" + base64.b64encode(b"another one" * 3).decode()
    headers = Signer.of(f"{SECRET}, {other}").headers("id", b"{}", time.time())
    for secret in (SECRET, other):
        assert is_genuine(dict(headers), b"{}", secret)
    assert not is_genuine(dict(headers), b"{}", "whsec_" + base64.b64encode(b"x" * 32).decode())


@pytest.mark.parametrize("answer", ["500", "502", "503", "429", "408"])
async def test_a_receiver_that_is_in_trouble_is_told_again_under_the_same_id(answer: str) -> None:
    metrics = Metrics()
    async with (
        receiving(answer, answer, "200") as receiver,
        told([delivery(receiver.port)], metrics, Patience(delays_s=(0, 0, 0))) as webhooks,
    ):
        webhooks.tell(STARTED)
        requests = [await receiver.requests.get() for _ in range(3)]
    assert {request.headers["webhook-id"] for request in requests} == {STARTED.id}
    assert {request.body for request in requests} == {STARTED.encode("urn:hikyaku:test")}
    assert outcomes(metrics) == {"retried": 2, "delivered": 1}


@pytest.mark.parametrize("answer", ["400", "401", "404", "410", "304"])
async def test_what_a_receiver_refuses_is_not_told_again(answer: str) -> None:
    metrics = Metrics()
    async with receiving(answer) as receiver:
        async with told([delivery(receiver.port)], metrics, Patience()) as webhooks:
            webhooks.tell(STARTED)
        assert receiver.requests.qsize() == 1
    assert outcomes(metrics) == {"refused": 1}


async def test_attempts_have_an_end() -> None:
    metrics = Metrics()
    async with receiving("500") as receiver:
        patience = Patience(delays_s=(0, 0, 0))
        async with told([delivery(receiver.port)], metrics, patience) as webhooks:
            webhooks.tell(STARTED)
            for _ in range(4):
                await receiver.requests.get()
        assert receiver.requests.empty()
    assert outcomes(metrics) == {"retried": 3, "given_up": 1}


@pytest.mark.parametrize("asked_s", ["30", "999999999999"])
async def test_a_receiver_that_asks_for_time_gets_it(asked_s: str) -> None:
    """Only the end of the service cuts it short."""
    metrics = Metrics()
    async with receiving(f"503\nretry-after: {asked_s}", "200") as receiver:
        patience = Patience(delays_s=(0, 0))
        async with told([delivery(receiver.port)], metrics, patience) as webhooks:
            webhooks.tell(STARTED)
            await receiver.requests.get()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receiver.requests.get(), 0.3)
        assert receiver.requests.qsize() == 1
    assert outcomes(metrics) == {"retried": 1, "delivered": 1}


async def test_a_receiver_that_hangs_keeps_nobody_waiting() -> None:
    metrics = Metrics()
    patience = Patience(most_waiting=3, drain_s=0.3)
    async with receiving(None) as hanging, receiving("200") as healthy:
        deliveries = [delivery(hanging.port), delivery(healthy.port)]
        async with told(deliveries, metrics, patience) as webhooks:
            webhooks.tell(STARTED)
            await hanging.requests.get()
            for _ in range(9):
                webhooks.tell(STARTED)
                await healthy.requests.get()
            await healthy.requests.get()
            assert metrics.registry.get_sample_value("hikyaku_webhook_waiting_events") >= 4
    # One was under way to the hanging receiver and three waited: of the others the oldest are gone.
    assert outcomes(metrics) == {"delivered": 10, "dropped": 6, "lost": 4}


async def test_a_receiver_that_never_answers_is_given_up_after_the_time_of_an_attempt() -> None:
    metrics = Metrics()
    patience = Patience(attempt_s=0.05, delays_s=(0,))
    async with (
        receiving(None) as receiver,
        told([delivery(receiver.port)], metrics, patience) as webhooks,
    ):
        webhooks.tell(STARTED)
        for _ in range(2):
            await receiver.requests.get()
    assert outcomes(metrics) == {"retried": 1, "given_up": 1}


async def test_at_the_end_what_waits_is_told_without_delay() -> None:
    metrics = Metrics()
    async with receiving("503", "200") as receiver:
        async with told([delivery(receiver.port)], metrics, Patience()) as webhooks:
            for _ in range(5):
                webhooks.tell(STARTED)
        assert receiver.requests.qsize() == 5
    assert outcomes(metrics) == {"given_up": 1, "delivered": 4}


async def test_what_no_json_says_is_counted_and_harms_nobody() -> None:
    metrics = Metrics()
    async with (
        receiving("200") as receiver,
        told([delivery(receiver.port)], metrics, Patience()) as webhooks,
    ):
        webhooks.tell(Event("release.held", "m", details={"x": object()}))
        webhooks.tell(Event("release.held", "\ud800"))
        webhooks.tell(STARTED)
        assert (await receiver.requests.get()).headers["webhook-id"] == STARTED.id
    assert outcomes(metrics) == {"unsent": 2, "delivered": 1}


def test_without_receivers_events_go_nowhere() -> None:
    NoEvents().tell(STARTED)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`localhost.pem` and `other.pem`: certificates of these names, each its own authority, with
    their keys."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("localhost", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        form = serialization.PrivateFormat.PKCS8
        content = key.private_bytes(pem, form, serialization.NoEncryption())
        (folder / f"{name}.pem").write_bytes(content + certificate.public_bytes(pem))
    return folder


@pytest.mark.parametrize(
    ("shown", "trusted", "outcome"),
    [
        ("localhost", ["localhost"], "delivered"),
        ("localhost", ["other"], "given_up"),
        ("other", ["localhost", "other"], "given_up"),
    ],
)
async def test_a_receiver_is_to_show_a_certificate_of_its_name(
    certificates: Path, shown: str, trusted: Sequence[str], outcome: str
) -> None:
    of_receiver = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    of_receiver.load_cert_chain(certificates / f"{shown}.pem")
    authorities = ssl.create_default_context()
    for name in trusted:
        authorities.load_verify_locations(certificates / f"{name}.pem")
    metrics = Metrics()
    async with receiving("200", tls=of_receiver) as receiver:
        to_it = delivery(receiver.port, "https", authorities)
        async with told([to_it], metrics, Patience(delays_s=())) as webhooks:
            webhooks.tell(STARTED)
        assert receiver.requests.qsize() == (outcome == "delivered")
    assert outcomes(metrics) == {outcome: 1}


async def test_no_secret_is_in_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with receiving("500", "404", None, "200") as receiver:
        patience = Patience(attempt_s=0.05, delays_s=(0,), drain_s=0.2)
        deliveries = [delivery(receiver.port), delivery(1)]
        async with told(deliveries, Metrics(), patience) as webhooks:
            for _ in range(3):
                webhooks.tell(STARTED)
            for _ in range(4):
                await receiver.requests.get()
    said = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert "an event was not delivered" in said
    assert "planted" not in said
    assert SECRET.removeprefix("whsec_") not in said
    assert "planted" not in repr(deliveries[0].receiver)


@pytest.mark.parametrize(
    ("urls", "hosts", "networks", "secret", "sentence"),
    [
        ("", "a.example", "", SECRET, "HIKYAKU_WEBHOOKS: 1 to 16 URLs"),
        ("https://a.example/", "", "", SECRET, "a.example is not in HIKYAKU_WEBHOOK_HOSTS"),
        ("https://b.example/", "a.example", "", SECRET, "b.example is not in HIKYAKU_WEBHOOK"),
        ("http://a.example/", "a.example", "", SECRET, "a.example is to be told by https"),
        ("https://a.example/,x", "a.example", "", SECRET, "HIKYAKU_WEBHOOKS: URL 2 is not of"),
        ("https://a.example/", "*.example", "", SECRET, r"HIKYAKU_WEBHOOK_HOSTS: '\*.example' is"),
        ("https://a.example/", "a.example", "8.0.0.0/8", SECRET, "NETWORKS: '8.0.0.0/8' is no"),
        ("https://a.example/", "a.example", "", "", "HIKYAKU_WEBHOOK_SECRET: is unset"),
        ("https://a.example/", "a.example", "", "hush", "HIKYAKU_WEBHOOK_SECRET: a secret is"),
        ("https://a.example/", "a.example", "", "whsec_aHVzaA==", "a secret is whsec_ and 24"),
        ("https://a.example/", "a.example", "", f"{SECRET} whsec_!", "a secret is whsec_ and"),
    ],
)
def test_what_cannot_be_used_stops_the_start_with_a_sentence(
    urls: str, hosts: str, networks: str, secret: str, sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        open_webhooks(urls, hosts, networks, secret, "worker", Metrics())
    assert not (secret and secret in str(refused.value))


def test_names_and_addresses_are_taken_as_they_are_usually_written() -> None:
    urls = "https://A.example, https://xn--bcher-kva.example:8443/x?y=z ,http://[::1]:80/"
    receivers = receivers_of(urls, "a.EXAMPLE,xn--bcher-kva.example, ::1")
    assert [receiver.authority for receiver in receivers] == [
        "a.example:443",
        "xn--bcher-kva.example:8443",
        "[::1]:80",
    ]
    assert [receiver.target for receiver in receivers] == ["/", "/x?y=z", "/"]
    assert json.dumps([receiver.is_loopback for receiver in receivers]) == "[false, false, true]"
