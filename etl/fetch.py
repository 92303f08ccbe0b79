"""Fetch images over HTTP from hosts that stall, lie, throttle and redirect.

A request reaches public addresses only, over http and https only, at every hop of a redirect: the host is looked up here,
all its addresses are checked, and the connection goes to the address that was checked. Hosts named in `Limits.allow`
may be private.
"""

import asyncio
import io
import ipaddress
import random
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx2 as httpx

from lanistr.transforms import MAX_IMAGE_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
RETRIED = {408, 425, 429, 500, 502, 503, 504}
MAX_REDIRECTS = 5
LONGEST_WAIT = 60.0  # seconds that Retry-After may ask for


@dataclass(frozen=True)
class Limits:
    """How to be patient, polite and careful.

    Attributes:
        concurrency: requests in flight; ``per_host`` of them to one host.
        timeout: seconds without a byte; ten times that for a whole image.
        retries: further attempts after a failure that may pass.
        backoff: seconds before the first of them, doubled each time.
        max_bytes: of a file.
        min_side: pixels; smaller ones are spacers.
        allow: hosts that may have private addresses.
    """

    concurrency: int = 32
    per_host: int = 8
    timeout: float = 20.0
    retries: int = 4
    backoff: float = 1.0
    max_bytes: int = 20 << 20
    min_side: int = 8
    allow: frozenset[str] = frozenset()


class Failed(Exception):
    """One attempt failed.

    Attributes:
        reason: for the status table.
        again: it may pass: worth another attempt, after ``wait`` seconds where the server said so.
    """

    def __init__(self, reason: str, *, again: bool = False, wait: float | None = None):
        super().__init__(reason)
        self.reason, self.again, self.wait = reason, again, wait


class Fetcher:
    """Fetches with shared connections and per-host limits; use as ``async with``."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._not_before: dict[str, float] = {}  # a host that said 429 is left alone by everybody
        self._client = httpx.AsyncClient(
            timeout=limits.timeout,
            limits=httpx.Limits(max_connections=limits.concurrency),
            headers={"User-Agent": f"lanistr/{version('lanistr')}", "Accept": "image/*", "Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> "Fetcher":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def image(self, url: str) -> bytes:
        """The bytes of an image that was decoded once, to be sure.

        Raises:
            Failed: with the last reason, after all attempts.
        """
        for attempt in range(self.limits.retries + 1):
            try:
                data = await self._once(url)
                await asyncio.to_thread(check_image, data, self.limits.min_side)
                return data
            except Failed as failure:
                if not failure.again or attempt == self.limits.retries:
                    raise
                backoff = self.limits.backoff * 2**attempt * random.uniform(0.5, 1.5)
                await asyncio.sleep(backoff if failure.wait is None else failure.wait)
        raise AssertionError("unreachable")

    async def _once(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parsed = checked_url(url)
            turn = self._turns.setdefault(parsed.host, asyncio.Semaphore(self.limits.per_host))
            async with turn:
                await asyncio.sleep(max(0.0, self._not_before.get(parsed.host, 0.0) - time.monotonic()))
                try:
                    async with asyncio.timeout(10 * self.limits.timeout):
                        found = await self._get(parsed)
                except TimeoutError:
                    raise Failed("timeout", again=True) from None
            if isinstance(found, bytes):
                return found
            url = found
        raise Failed("too many redirects")

    async def _get(self, url: httpx.URL) -> bytes | str:
        """The body, or where a redirect leads."""
        request = await self._request(url)
        try:
            response = await self._client.send(request, stream=True)
            try:
                return await self._answer(url, response)
            finally:
                await response.aclose()
        except httpx.TimeoutException:
            raise Failed("timeout", again=True) from None
        except httpx.RemoteProtocolError:
            raise Failed("truncated or not HTTP", again=True) from None
        except httpx.TransportError as error:
            raise Failed(f"no connection: {type(error).__name__}", again=True) from None

    async def _request(self, url: httpx.URL) -> httpx.Request:
        """To the address that was checked; the host's name goes into Host and TLS."""
        if url.scheme in getproxies() and not proxy_bypass(url.host):
            if _is_private(url.host) and url.host not in self.limits.allow:
                raise Failed("address is not public")
            return self._client.build_request("GET", url)  # the proxy looks the name up
        address = await self._public_address(url)
        return self._client.build_request(
            "GET",
            url.copy_with(host=address),
            headers={"Host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": url.host},
        )

    async def _public_address(self, url: httpx.URL) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(url.host, url.port or 80, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Failed("no such host", again=True) from None
        addresses = [str(entry[4][0]) for entry in found]
        if url.host not in self.limits.allow and any(map(_is_private, addresses)):
            raise Failed("address is not public")
        return addresses[0]

    async def _answer(self, url: httpx.URL, response: httpx.Response) -> bytes | str:
        status = response.status_code
        if status in (301, 302, 303, 307, 308):
            target = response.headers.get("location", "")
            try:
                return str(url.join(target))
            except (httpx.InvalidURL, ValueError):
                raise Failed("redirect to nowhere") from None
        if status != 200:
            wait = _retry_after(response.headers)
            if status == 429:
                pause = self.limits.backoff if wait is None else wait
                self._not_before[url.host] = time.monotonic() + pause
            raise Failed(f"HTTP {status}", again=status in RETRIED, wait=wait)
        said = response.headers.get("content-length", "")
        if said.isdigit() and int(said) > self.limits.max_bytes:
            raise Failed("too many bytes")
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > self.limits.max_bytes:
                raise Failed("too many bytes")
        return bytes(data)


def checked_url(url: str) -> httpx.URL:
    """Parse a URL. Raises Failed for anything but http and https to a host, without a password."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise Failed("not a URL") from None
    if parsed.scheme not in ("http", "https"):
        raise Failed(f"scheme {parsed.scheme[:20] or 'absent'} is not http or https")
    if not parsed.host or parsed.userinfo:
        raise Failed("not a URL")
    return parsed


def _is_private(host: str) -> bool:
    """Whether a literal address is not on the public internet; False for a name."""
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return not address.is_global or address.is_multicast


def _retry_after(headers: Mapping[str, Any]) -> float | None:
    """Seconds, from a number or a date, within reason."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)


def check_image(data: bytes, min_side: int) -> None:
    """Decode an image. Raises Failed where it is none, is cut off, or has too many or too few pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Failed("too many pixels")
            if min(image.size) < min_side:
                raise Failed("a spacer, not an image")
            image.load()
    except Image.DecompressionBombError:
        raise Failed("too many pixels") from None
    except UnidentifiedImageError:
        raise Failed("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise Failed("truncated image" if "truncated" in str(error) else "broken image", again=True) from None
