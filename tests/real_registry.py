"""Debian's docker-registry on loopback, in the ways that registries are set up: open, with TLS, a password, tokens."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
from attrs import frozen

from pykata.fs.block import Block
from pykata.host import run_tool
from pykata.images import Pulling, resolve
from pykata.spec import Disk, Image
from tests.http_server import Answer, Handler, Request, json_answer
from tests.images_fixtures import look_into

USER, PASSWORD = "alice", "correct horse"
# What `htpasswd -Bbn alice 'correct horse'` (apache2-utils) prints; the registry takes bcrypt only.
HTPASSWD = "alice:$2y$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"
SERVICE, ISSUER = "registry.test", "tokens.test"


@contextmanager
def registry(folder: Path, *, tls: Certificate | None = None, **auth: Mapping[str, Any]) -> Iterator[str]:
    """Run a registry with its data in ``folder``; yields its host and port."""
    http: dict[str, Any] = {"addr": "127.0.0.1:0", "net": "tcp"}
    if tls is not None:
        http["tls"] = {"certificate": str(tls.certificate), "key": str(tls.key)}
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"         # JSON is YAML
    config.write_text(json.dumps({
        "version": "0.1", "log": {"level": "info", "accesslog": {"disabled": True}}, "http": http,
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}, **({"auth": auth} if auth else {}),
    }))
    process = subprocess.Popen(["docker-registry", "serve", config], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                               env={**os.environ, "OTEL_TRACES_EXPORTER": "none"})
    assert process.stderr is not None
    drain = threading.Thread(target=process.stderr.read)
    try:
        for line in process.stderr:
            if said := re.search(rb"listening on (127\.0\.0\.1:\d+)", line):
                host = said[1].decode()
                break
        else:
            raise RuntimeError("the registry ended")
        drain.start()
        yield host
    finally:
        process.kill()
        process.wait()
        if drain.ident:
            drain.join()
        process.stderr.close()


def push(layout: str, host: str, name: str, *, credentials: str = "") -> None:
    """Copy an image of an OCI layout (``DIR:TAG``) into a registry."""
    given = ["--dest-creds", credentials] if credentials else []
    done = subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--all", "--preserve-digests", "--dest-tls-verify=false", *given,
         f"oci:{layout}", f"docker://{host}/{name}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@frozen
class Certificate:
    """A certificate for this machine by an authority of its own, as PEM files."""

    authority: Path
    certificate: Path
    key: Path


def certificate(folder: Path) -> Certificate:
    """Make an authority, and a certificate by it for 127.0.0.1."""
    made = Certificate(folder / "ca.crt", folder / "leaf.crt", folder / "leaf.key")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    request = folder / "leaf.csr"
    commands: list[list[str | Path]] = [
        ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test authority",
         "-keyout", folder / "ca.key", "-out", made.authority],
        ["req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=registry", "-keyout", made.key, "-out", request],
        ["x509", "-req", "-in", request, "-CA", made.authority, "-CAkey", folder / "ca.key", "-CAcreateserial",
         "-days", "2", "-extfile", folder / "names", "-out", made.certificate],
    ]
    for command in commands:
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return made


def tokens(by: Certificate, *, password: str = PASSWORD, anonymous: bool = False) -> Handler:
    """A server of tokens that docker-registry accepts (distribution: "Token Authentication Specification")."""

    async def handle(request: Request) -> Answer:
        query = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
        wanted = "Basic " + base64.b64encode(f"{USER}:{password}".encode()).decode()
        if request.method == "POST":
            query = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
            allowed = query.get("refresh_token") == password
        else:
            allowed = anonymous or request.headers.get("authorization") == wanted
        if not allowed:
            return Answer(b'{"details": "who are you?"}', 401)
        return json_answer({"token": await _token(by, query["service"], query["scope"]), "expires_in": 300})

    return handle


async def _token(by: Certificate, service: str, scope: str) -> str:
    kind, name, actions = scope.split(":")
    der = await run_tool(["openssl", "x509", "-in", str(by.certificate), "-outform", "DER"])
    header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
    now = int(time.time())
    claims = {
        "iss": ISSUER, "sub": USER, "aud": service, "iat": now, "nbf": now - 60, "exp": now + 300,
        "jti": os.urandom(8).hex(),
        "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
    }  # fmt: skip
    signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
    signature = await run_tool(["openssl", "dgst", "-sha256", "-sign", str(by.key)], input=signed.encode())
    return f"{signed}.{_base64url(signature)}"


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


# --- in tests ---


async def pulled(reference: str, architecture: str = "x86_64", **how: Any) -> tuple[Image, set[str]]:
    """The image, and the names in what it was converted to."""
    image = await resolve(reference, architecture=architecture, how=Pulling(**how))
    async with Block().rootfs(image, Path("/nowhere")) as attachment:
        [disk] = attachment.devices
        assert isinstance(disk, Disk)
        return image, set(await anyio.to_thread.run_sync(look_into, disk.path)) - {""}


@asynccontextmanager
async def another(folder: Path, layout: Path | None = None, **auth: Any) -> AsyncIterator[str]:
    """A registry for one test, with the image of ``layout`` as ``app:1``."""
    running = registry(folder, **auth)
    host = await anyio.to_thread.run_sync(running.__enter__)
    try:
        if layout is not None:
            await pushed(layout, host, "app:1")
        yield host
    finally:
        await anyio.to_thread.run_sync(running.__exit__, None, None, None)


async def pushed(layout: Path, host: str, name: str) -> None:
    await anyio.to_thread.run_sync(push, f"{layout}:latest", host, name)
