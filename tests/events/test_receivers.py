"""A URL means to us what it means to others, or it is refused."""

from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.errors import ConfigurationError
from app.events.receivers import Receiver, receivers_of

HOSTS = "a.example,b-1.a.example,xn--bcher-kva.example,localhost,127.0.0.1,[::1],[2001:db8::2]"
PARTS = [
    *("https://", "http://", "HTTPS://", "//", "/", "\\", "?", "#", "@", ":", ":443", ":8443", "%"),
    *("a.example", "A.Example", "b-1.a.example", "xn--bcher-kva.example", "localhost", "[::1]"),
    *(
        "127.0.0.1",
        "[2001:db8:0::2]",
        "[::ffff:127.0.0.1]",
        "0x7f.1",
        "2130706433",
        ".",
        "..",
        "/./",
    ),
    *(
        "/../",
        "%2e%2e",
        "%2F",
        "%41",
        "%zz",
        "x",
        "=&;",
        "!$'()*+",
        "~_-",
        " ",
        "\t",
        "\n",
        "é",
        "[",
        "]",
    ),
]


def accepted(url: str) -> Receiver | None:
    try:
        [receiver] = receivers_of(url, HOSTS)
    except (ConfigurationError, ValueError):
        return None
    return receiver


@settings(max_examples=300)
@given(
    st.sampled_from(PARTS[:4]),
    st.sampled_from(PARTS[13:22]),
    st.lists(st.sampled_from(PARTS), max_size=6).map("".join),
)
@example("https://", "a.example", "/a/../b")
@example("https://", "a.example", "/%zz")
@example("https://", "a.example", "/x?y=/../z")
@example("https://", "a.example", ":8443/services/T0/B0/x?token=%41")
def test_a_url_that_is_taken_means_the_same_to_other_readers(
    scheme: str, host: str, rest: str
) -> None:
    url = f"{scheme}{host}{rest}".strip(" ")
    receiver = accepted(url)
    if receiver is None:
        return
    split = urlsplit(url)
    assert (split.username, split.fragment) == (None, "")
    sent = httpx.URL(receiver.url_at(receiver.host))
    for other in (httpx.URL(url), sent):
        port = other.port or {"https": 443, "http": 80}[other.scheme]
        assert (other.scheme, port) == (receiver.scheme, receiver.port)
        assert other.raw_path.decode() == receiver.target
    assert sent.raw_host.decode() == receiver.host
    assert httpx.URL(url).raw_host.decode() == split.hostname


@pytest.mark.parametrize(
    "url", ["https://a.example", "https://A.example:8443/x?y=z", "http://localhost:80/%41"]
)
def test_usual_urls_are_taken(url: str) -> None:
    assert accepted(url) is not None


@pytest.mark.parametrize("path", ["/a/../b", "/./", "/..", "/a/.", "/%", "/%zz", "/%4", "/a,b"])
def test_a_path_that_would_be_sent_otherwise_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError, match="HIKYAKU_WEBHOOKS: URL"):
        receivers_of(f"https://a.example{path}", "a.example")
