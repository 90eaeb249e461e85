"""Images from addresses that strangers name: within one deadline, and never from the network behind this machine."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import Timer
from urllib.parse import urljoin, urlsplit

from ..errors import UserError
from .uploads import MAX_BYTES

SECONDS = 10.0  # for all of it: names, connections, redirects, content
REDIRECTS = 3


def fetch(url: str, private: Collection[str] = ()) -> bytes:
    """What lies at an http(s) address, at most one byte more than `MAX_BYTES`, or a `UserError` within `SECONDS`.

    Hosts in ``private`` may have addresses that are not public.
    """
    end = time.monotonic() + SECONDS
    try:
        for _ in range(REDIRECTS + 1):
            content, moved = _ask(url, end, private)
            if moved is None:
                return content
            url = urljoin(url, moved)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, UserError):
            raise
        late = time.monotonic() >= end
        reason = f"it took more than {SECONDS:g} seconds" if late else str(error) or type(error).__name__
        raise UserError(f"{url!r} could not be fetched: {reason}") from error
    raise UserError(f"{url!r} could not be fetched: more than {REDIRECTS} redirects")


def _ask(url: str, end: float, private: Collection[str]) -> tuple[bytes, str | None]:
    """The content, or where it moved to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url!r} is no web address")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    link = _connected(parts.hostname, port, end, private)
    # A slow sender would renew the time-out of every read, so that the connection itself is ended in time.
    with link, _ending(link, end):
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname, port)
        connection.sock = link
        if secure:
            connection.sock = ssl.create_default_context().wrap_socket(link, server_hostname=parts.hostname)
        with connection.sock:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "pitome-mllm", "Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return b"", answer.headers.get("Location", "")
            if answer.status != 200:
                raise OSError(f"HTTP {answer.status} {answer.reason}")
            content = answer.read(MAX_BYTES + 1)
    if time.monotonic() >= end:  # cut off
        raise TimeoutError
    return content, None


@contextmanager
def _ending(link: socket.socket, end: float) -> Iterator[None]:
    """A block at whose deadline a connection ends."""
    with link.dup() as same:
        timer = Timer(max(0.0, end - time.monotonic()), _cut, [same])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _cut(link: socket.socket) -> None:
    try:
        link.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it ended by itself


def _connected(host: str, port: int, end: float, private: Collection[str]) -> socket.socket:
    """A connection to a public address of a host, the one that was checked."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if host not in private and not _public(str(address[0])):
            raise UserError(f"{host!r} has the address {address[0]}, which is not public; send the picture itself")
    failed: OSError = TimeoutError()
    for family, kind, *_, address in found:
        link = socket.socket(family, kind)
        try:
            link.settimeout(max(0.001, end - time.monotonic()))
            link.connect(address)
            return link
        except OSError as error:
            link.close()
            failed = error
    raise failed


def _public(address: str) -> bool:
    """Whether an address is one of the internet's, and no other wrapped in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
        return not nat64 and ip.teredo is None and (inner is None or inner.is_global) and ip.is_global
    return ip.is_global and not ip.is_multicast
