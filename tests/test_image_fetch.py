"""Fetching: no address of a private network is ever connected to, and no server can hold us."""

import contextlib
import gzip
import io
import socket
import ssl
import threading
import time

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.image import ImageError, fetch, load_image

PUBLIC = "93.184.215.14"


def picture_bytes() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 3), "red").save(stream, "PNG")
    return stream.getvalue()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if not any(line.startswith("Content-Length") for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return answer(b"", "302 Found", f"Location: {location}")


class Internet:
    """A local server that plays every public host, and a record of who was asked for what."""

    def __init__(self, monkeypatch):
        self.names = {"pictures.example": [PUBLIC], "inside.example": ["10.1.2.3"]}
        self.answers, self.greeting = {}, b""
        self.connected, self.requests = [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.real_lookup = socket.getaddrinfo
        monkeypatch.setattr("socket.getaddrinfo", self.look_up)
        monkeypatch.setattr("socket.create_connection", self.connect)
        threading.Thread(target=self.serve, daemon=True).start()

    def look_up(self, host, port, **options):
        found = self.names.get(host)
        if found is None:  # numbers are read as the system reads them, names do not exist
            return self.real_lookup(host, port, flags=socket.AI_NUMERICHOST, **options)
        addresses = found.pop(0) if isinstance(found[0], list) else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    def connect(self, address, timeout):
        self.connected.append(address)
        sock = socket.socket()
        sock.settimeout(timeout)
        sock.connect(self.listener.getsockname())
        return sock

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.reply, args=[client], daemon=True).start()

    def reply(self, client):
        with client, contextlib.suppress(OSError):
            client.sendall(self.greeting)
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            self.requests.append(head.decode())
            reply = self.answers[head.split()[1].decode()]
            for part in [reply] if isinstance(reply, bytes) else reply:
                client.sendall(part)


@pytest.fixture
def internet(monkeypatch):
    net = Internet(monkeypatch)
    yield net
    net.listener.close()


def test_a_public_picture_is_fetched_from_the_checked_address(internet):
    internet.answers["/a%20b.png?x=1"] = answer(picture_bytes())
    result = load_image("http://pictures.example:8080/a%20b.png?x=1#part", allow_fetch=True)
    np.testing.assert_array_equal(result, np.full((3, 5, 3), [255, 0, 0]))
    assert internet.connected == [(PUBLIC, 8080)]
    assert "\r\nHost: pictures.example:8080\r\n" in internet.requests[0]
    assert "\r\nAccept-Encoding: identity\r\n" in internet.requests[0]


PRIVATE_URLS = [
    "http://127.0.0.1/",
    "http://[::1]/",
    "http://0x7f000001/",
    "http://2130706433/",
    "http://0/",
    "http://127.1/",
    "http://[::ffff:169.254.169.254]/",
    "http://169.254.169.254/latest/meta-data",
    "http://100.64.0.1/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[fe80::1]/",
    "http://[fd00::1]/",
    "http://[ff02::1]/",
    "http://[2002:7f00:1::]/",  # 6to4 of 127.0.0.1
    "http://[64:ff9b::7f00:1]/",  # NAT64 of 127.0.0.1
    "http://inside.example/",
]


@pytest.mark.parametrize("url", PRIVATE_URLS)
def test_private_addresses_are_refused_before_connecting(internet, url):
    with pytest.raises(ImageError, match="private or local network"):
        load_image(url, allow_fetch=True)
    assert internet.connected == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user@pictures.example/", "without user"),
        ("http://user:secret@pictures.example/", "without user"),
        ("http://pictures.example\\@inside.example/", "backslash"),
        ("http://pictures.example/a b", "space"),
        ("http://pictures.example/\r\nX: y", "control"),
        ("http://pictures.example:99999/", "malformed"),
        ("http://pictures.example:x/", "malformed"),
        ("http://[::1/", "malformed"),
        ("http:///path", "name a host"),
        ("http://" + "a" * 80 + ".example/", "malformed"),
        ("http://unknown.example/", "not known"),
    ],
)
def test_malformed_addresses_are_refused_before_connecting(internet, url, words):
    with pytest.raises(ImageError, match=words):
        load_image(url, allow_fetch=True)
    assert internet.connected == []


def test_one_private_address_among_public_ones_is_enough_to_refuse(internet):
    internet.names["pictures.example"] = [PUBLIC, "127.0.0.1"]
    with pytest.raises(ImageError, match="private"):
        load_image("http://pictures.example/", allow_fetch=True)


@pytest.mark.parametrize("location", [*PRIVATE_URLS, "//127.0.0.1/x"])
def test_redirects_into_a_private_network_are_refused(internet, location):
    internet.answers["/"] = redirect(location)
    with pytest.raises(ImageError, match="private or local network"):
        load_image("http://pictures.example/", allow_fetch=True)
    assert internet.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://pictures.example/", "data:,x"])
def test_redirects_to_other_schemes_are_refused(internet, location):
    internet.answers["/"] = redirect(location)
    with pytest.raises(ImageError, match="must be http or https"):
        load_image("http://pictures.example/", allow_fetch=True)


def test_a_name_that_changes_its_answer_is_resolved_once_a_hop(internet):
    internet.names["pictures.example"] = [[PUBLIC], ["127.0.0.1"]]
    internet.answers["/"] = answer(picture_bytes())
    assert load_image("http://pictures.example/", allow_fetch=True).shape == (3, 5, 3)
    assert internet.connected == [(PUBLIC, 80)]
    with pytest.raises(ImageError, match="private"):
        load_image("http://pictures.example/", allow_fetch=True)


def test_relative_redirects_are_followed_three_times(internet):
    for hop in range(3):
        internet.answers[f"/{hop}"] = redirect(f"{hop + 1}")
    internet.answers["/3"] = answer(picture_bytes())
    assert load_image("http://pictures.example/0", allow_fetch=True).shape == (3, 5, 3)
    internet.answers["/3"] = redirect("/0")
    with pytest.raises(ImageError, match="redirects too often"):
        load_image("http://pictures.example/0", allow_fetch=True)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (answer(b"", "404 Not Found"), "status 404"),
        (answer(b"", "500 Oops"), "status 500"),
        (answer(b"", "302 Found"), "status 302"),
        (answer(b"<html>", "200 OK", "Content-Type: image/png"), "HTML page"),
        (answer(b"x" * 2001), "too large"),
        (answer(b"", "200 OK", "Content-Length: 99999999999"), "too large"),
        (answer(picture_bytes(), "200 OK", "Content-Length: 1000"), "broke off"),
        (answer(gzip.compress(b"x" * 10**6), "200 OK", "Content-Encoding: gzip"), "compressed"),
        (b"not http at all\r\n\r\n", "broke off"),
        (b"", "broke off"),
    ],
)
def test_wrong_answers_are_refused(internet, monkeypatch, reply, words):
    monkeypatch.setattr(fetch, "MAX_FETCHED_BYTES", 2000)
    internet.answers["/"] = reply
    with pytest.raises(ImageError, match=words):
        load_image("http://pictures.example/", allow_fetch=True)


def test_an_endless_body_is_cut_at_the_cap(internet, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_FETCHED_BYTES", 100_000)

    def forever():
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        while True:
            yield b"x" * 1000

    internet.answers["/"] = forever()
    with pytest.raises(ImageError, match="too large"):
        load_image("http://pictures.example/", allow_fetch=True)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_one_byte_at_a_time_ends_at_the_deadline(internet, monkeypatch, start):
    monkeypatch.setattr(fetch, "TOTAL_SECONDS", 0.5)

    def drip():
        yield start
        for _ in range(200):
            time.sleep(0.05)
            yield b"x"

    internet.answers["/"] = drip()
    before = time.monotonic()
    with pytest.raises(ImageError, match=r"within 0\.5 seconds"):
        load_image("http://pictures.example/", allow_fetch=True)
    assert time.monotonic() - before < 3


def test_https_checks_the_name_on_the_pinned_connection(internet, monkeypatch):
    asked = []

    def wrap_socket(self, sock, server_hostname, **_):
        asked.append((server_hostname, self.check_hostname, self.verify_mode))
        return sock

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)
    internet.answers["/"] = answer(picture_bytes())
    assert load_image("https://pictures.example/", allow_fetch=True).shape == (3, 5, 3)
    assert asked == [("pictures.example", True, ssl.CERT_REQUIRED)]
    assert internet.connected == [(PUBLIC, 443)]
    assert "\r\nHost: pictures.example\r\n" in internet.requests[0]


def test_a_silent_tls_side_ends_at_the_deadline(internet, monkeypatch):
    monkeypatch.setattr(fetch, "TOTAL_SECONDS", 0.5)
    with pytest.raises(ImageError, match=r"within 0\.5 seconds"):
        load_image("https://pictures.example/", allow_fetch=True)


def test_another_protocol_on_the_tls_port_fails_cleanly(internet):
    internet.greeting = b"220 mail.example ESMTP\r\n"
    with pytest.raises(ImageError, match="broke off"):
        load_image("https://pictures.example/", allow_fetch=True)
