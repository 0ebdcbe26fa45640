"""URLs and names that lead to where nothing may be sent, in all the ways that readers differ."""

import ipaddress
from collections.abc import Iterator

INSIDE = (
    *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
    *("169.254.169.254", "100.100.100.200", "255.255.255.255", "224.0.0.1", "168.63.129.16"),
)
INSIDE_SIX = (
    *("::1", "::", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "fd12:3456::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:8.8.8.8"),
    *("::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:7f00:1::1", "100::1"),
    *("2001:db8::1", "3fff::1", "2001:10::1", "5f00::1", "fd20:ce::254"),
)


def numbers(port: int) -> Iterator[str]:
    """Addresses as some resolvers read them."""
    for text in INSIDE:
        address = ipaddress.IPv4Address(text)
        whole, (a, b, c, d) = int(address), address.packed
        for spelt in (
            *(text, f"{text}.", str(whole), f"{whole}.", hex(whole), f"0{whole:o}"),
            *(f"{a:#o}.{b:#o}.{c:#o}.{d:#o}".replace("0o", "0"), f"{a:#x}.{b:#x}.{c:#x}.{d:#x}"),
            *(f"0{a:03o}.{b}.{c}.{d}", f"{a:#x}.{b}.{c}.{d:03o}", f"{a}.{b}.{c << 8 | d}"),
            *(f"{a}.{b << 16 | c << 8 | d}", f"{a:#x}.{b << 16 | c << 8 | d}", f"{whole + 2**32}"),
            *(f"{a + 256}.{b}.{c}.{d}", f"{a:03}.{b:03}.{c:03}.{d:03}", f"[{text}]"),
            "".join(chr(0xFF10 + int(digit)) if digit.isdigit() else digit for digit in text),
            text.replace(".", "。"),
            text.replace(".", "%2e"),
        ):
            yield f"https://{spelt}:{port}/"


def sixes(port: int) -> Iterator[str]:
    for text in INSIDE_SIX:
        yield f"https://[{text}]:{port}/"
        yield f"https://[{ipaddress.IPv6Address(text).exploded}]:{port}/"
        yield f"https://[{text}%25lo]:{port}/"
        yield f"https://{text}:{port}/"


def tricks(port: int) -> Iterator[str]:
    """What looks like the allowed host to one reader and like this machine to another."""
    here, ok = f"127.0.0.1:{port}", "hooks.example.com"
    yield from (
        *(f"https://{ok}@{here}/", f"https://{ok}:443@{here}/", f"https://{here}#@{ok}/"),
        *(f"https://{here}\\@{ok}/", f"https://{ok}\\@{here}/", f"https://{here}\\.{ok}/"),
        *(f"https://{here}?@{ok}/", f"https://{here}/@{ok}", f"https://{ok} @{here}/"),
        *(f"https://{ok}\t@{here}/", f"https://{ok}\r\nHost: {here}/", f"https://{ok}%00.{here}/"),
        *(f"https://{ok}%23@{here}/", f"https://{ok}%40{here}/", f"https:/\\{here}/"),
        *(f"https:{here}/", f"https:///{here}/", f"//{here}/", f"{here}/", f"HTTPS://{here}/"),
        *(f"https://a:b@{here}/", f"https://@{here}/", f"https://:@{here}/", f"https://{here}"),
        *(f"http://{here}/", f"http://localhost:{port}/", f"http://[::1]:{port}/", "https://"),
        *(f"file:///etc/passwd?{ok}", f"gopher://{here}/_x", f"ftp://{here}/", f"dict://{here}/"),
        *(f"unix://{here}/", f"https+unix://{here}/", f"javascript:{here}", f"ws://{here}/"),
        *(
            f"https://localhost:{port}/",
            f"https://LOCALHOST:{port}/",
            f"https://localhost.:{port}/",
        ),
        *(
            f"https://ⓛocalhost:{port}/",
            f"https://loc%61lhost:{port}/",
            f"https://①②⑦.0.0.1:{port}/",
        ),
        *(f"https://{ok}.:{port}/", f"https://{ok}..:{port}/", f"https://.{ok}:{port}/"),
        *(f"https://hooks.ex\u0430mple.com:{port}/", f"https://hooks.example.com\u200b:{port}/"),
        *(f"https://hooks.example.com\u3002evil.example:{port}/", f"https://ok.{ok}:{port}/"),
        *(f"https://{ok}.evil.example:{port}/", f"https://{ok}-evil.example:{port}/"),
        *(f"https://evil.example:{port}/{ok}", f"https://evil.example:{port}/?{ok}"),
        *(f"https://{ok}:0{port}/", f"https://{ok}:{port + 65_536}/", f"https://{ok}:-1/"),
        *(f"https://{ok}:{port}:{port}/", f"https://{ok}:\uff11/", f"https://{ok}:{port}/\r\nX: y"),
        *(f"https://{'a' * 64}.example:{port}/", f"https://{'a.' * 127}example:{port}/"),
        *(f"https://[::1]{ok}:{port}/", f"https://[::1]@{ok}:{port}/", f"https://[{ok}]:{port}/"),
    )


def names() -> Iterator[tuple[str, list[str]]]:
    """The allowed host's name, and what a resolver says that it stands for."""
    public = "93.184.215.14"
    for address in (*INSIDE, *INSIDE_SIX):
        yield "one", [address]
    for address in ("127.0.0.1", "::1", "169.254.169.254", "10.0.0.1", "::ffff:127.0.0.1"):
        yield "after a public one", [public, address]
        yield "before a public one", [address, public]
        yield "with a zone", [f"{address}%lo"]
    yield from [("no address", ["localhost"]), ("a number", ["2130706433"]), ("nothing", [""])]
