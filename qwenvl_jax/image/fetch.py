"""A picture's bytes from an http(s) address, for callers who allowed it; standard library only.

The danger is a server made to read its own network for a stranger. So each hop of a redirect is
resolved once, every address found must be public, and the connection goes to exactly the checked
address: a name that answers differently a moment later changes nothing. Proxies are not used, as
they would resolve the name again.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from typing import NamedTuple

from qwenvl_jax.image.decode import ImageError

MAX_FETCHED_BYTES = 20 * 2**20
MAX_REDIRECTS = 3
TOTAL_SECONDS = 20.0  # name lookup excepted: the system's resolver has its own limit
CHUNK_BYTES = 2**16
REDIRECTS = (301, 302, 303, 307, 308)
# They carry an IPv4 address inside, which a gateway would unwrap behind our check.
TRANSLATED_NETWORKS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48")))


class _Target(NamedTuple):
    """One hop: where the connection goes, and what is asked there."""

    scheme: str
    host: str
    port: int
    request: str  # path and query
    address: str  # the checked IP address


def fetch_bytes(url: str) -> bytes:
    """The body of the answer at an http(s) address, at most MAX_FETCHED_BYTES of it.

    Raises:
      ImageError: an address that is malformed or not public (at any hop), a status other than 200,
        too many redirects, too many bytes, compressed bodies, no answer within TOTAL_SECONDS.
    """
    deadline = time.monotonic() + TOTAL_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        body, location = _ask(_checked(url), deadline)
        if location is None:
            return body
        url = urllib.parse.urljoin(url, location)
    raise ImageError(
        f"the picture's address redirects too often: got over {MAX_REDIRECTS} redirects; give the "
        "final address"
    )


def _checked(url: str) -> _Target:
    """The hop to make for an address, after every refusal that needs no connection."""
    # parsers disagree on these, and each disagreement has been a hole somewhere
    if any(c <= " " or c in "\\\x7f" for c in url):
        raise ImageError("the picture's address holds a space, backslash or control character")
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, port = parts.scheme.lower(), parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
        request = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            request += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    except ValueError as error:  # UnicodeError of the idna codec is one too
        raise ImageError("the picture's address is malformed: check its host and port") from error
    if scheme not in ("http", "https"):
        raise ImageError(f"the picture's address must be http or https: got {scheme[:20]!r}")
    if not host or "@" in parts.netloc:
        raise ImageError("the picture's address must name a host, without user or password")
    port = port or (443 if scheme == "https" else 80)
    return _Target(scheme, host, port, request, _public_address(host, port))


def _public_address(host: str, port: int) -> str:
    """The first IP address of a host, if all of its addresses are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageError("the host of the picture's address is not known: check it") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(_is_public(address) for address in addresses):
        raise ImageError(
            "the picture's address is refused: its host is inside a private or local network, "
            "expected a public one; download the picture and give the file"
        )
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner or ip.is_site_local or any(ip in network for network in TRANSLATED_NETWORKS):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _ask(target: _Target, deadline: float) -> tuple[bytes, str | None]:
    """(body, None) or (b"", where it redirects to)."""
    try:
        with contextlib.closing(_connect(target, deadline)) as sock:
            # timeouts of a socket start anew with every byte; only the timer ends a slow drip
            timer = threading.Timer(_left(deadline), _shut, [sock])
            timer.start()
            try:
                if isinstance(sock, ssl.SSLSocket):
                    sock.do_handshake()
                return _answer(sock, target, deadline)
            finally:
                timer.cancel()
    except (OSError, http.client.HTTPException) as error:
        _left(deadline)
        raise ImageError(
            "the picture could not be fetched: the connection failed or broke off; try again, or "
            "download it and give the file"
        ) from error


def _connect(target: _Target, deadline: float) -> socket.socket:
    sock = socket.create_connection((target.address, target.port), timeout=_left(deadline))
    if target.scheme == "http":
        return sock
    # the certificate must be the name's, though the connection is the address's
    return ssl.create_default_context().wrap_socket(
        sock, server_hostname=target.host, do_handshake_on_connect=False
    )


def _answer(sock: socket.socket, target: _Target, deadline: float) -> tuple[bytes, str | None]:
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = sock
    headers = {"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
    # http.client leaves a default port out of Host only when it knows the scheme
    is_default = target.port == (443 if target.scheme == "https" else 80)
    name = f"[{target.host}]" if ":" in target.host else target.host
    headers["Host"] = name if is_default else f"{name}:{target.port}"
    connection.request("GET", target.request, headers=headers)
    response = connection.getresponse()
    if response.status in REDIRECTS and response.getheader("Location"):
        return b"", response.getheader("Location")
    if response.status != 200:
        raise ImageError(f"the picture could not be fetched: got status {response.status}")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise ImageError("the picture could not be fetched: its server sent it compressed")
    return _body(response, deadline), None


def _body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    expected = response.length  # None: until the connection ends
    chunks, total = [], 0
    while True:
        if (expected or total) > MAX_FETCHED_BYTES:
            raise ImageError(
                f"the picture's file is too large: expected at most {MAX_FETCHED_BYTES} bytes"
            )
        chunk = response.read1(CHUNK_BYTES)
        _left(deadline)
        if not chunk:
            break
        chunks.append(chunk)
        total += len(chunk)
    if expected is not None and total != expected:
        raise http.client.IncompleteRead(b"", expected - total)
    return b"".join(chunks)


def _left(deadline: float) -> float:
    """Seconds until the deadline; ImageError once it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise ImageError(f"the picture could not be fetched within {TOTAL_SECONDS:g} seconds")
    return seconds


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed by the other thread
        # not the method: SSLSocket's drops its state under the thread that is reading
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
