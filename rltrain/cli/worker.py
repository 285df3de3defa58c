"""``rltrain worker``: a vLLM server for a recipe's model."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer

from rltrain.build.local_inputs import require_sampled
from rltrain.checkpoint.run_folder import write_atomic
from rltrain.config.schema import AnyRecipe, SampledRecipe
from rltrain.errors import UserError, user_mistakes
from rltrain.rollout.pool.knock import Knocker, advertised_url
from rltrain.rollout.worker.flags import Address, Tls, require_known_version, worker_settings
from rltrain.rollout.worker.guard import SHORTEST_TOKEN, TOKEN
from rltrain.rollout.worker.process import LocalWorker, find_free_port

__all__ = ["Listening", "worker_command"]

_LONGEST_SOCKET = 107  # bytes of a Unix socket's path


@dataclass(frozen=True)
class Listening:
    """Where the server listens, and the files it writes. port: 0 is any free one."""

    host: str
    port: int
    socket: Path | None
    url_file: Path | None
    log: Path | None
    tls_key: Path | None
    tls_certificate: Path | None
    tls_clients: Path | None
    join: str | None = None  # address of a run that waits for workers

    def address(self) -> Address:
        """Raises UserError for options that do not go together."""
        if (self.tls_key is None) != (self.tls_certificate is None):
            raise UserError("--tls-key and --tls-certificate go together: https needs both")
        if self.tls_clients is not None and self.tls_key is None:
            raise UserError("--tls-clients needs https: give --tls-key and --tls-certificate too")
        tls = None
        if self.tls_key is not None and self.tls_certificate is not None:
            tls = Tls(self.tls_key, self.tls_certificate, self.tls_clients)
        if self.socket is None:
            return Address(host=self.host, port=self.port or find_free_port(self.host), tls=tls)
        if tls is not None or self.port:
            raise UserError("--socket listens at a Unix socket, which has neither a port nor TLS; drop one")
        path = self.socket.absolute()
        if len(os.fsencode(path)) > _LONGEST_SOCKET:
            raise UserError(
                f"--socket {path}: a socket's path has at most {_LONGEST_SOCKET} bytes; shorten it"
            )
        return Address(socket=path)


def worker_command(recipe: AnyRecipe, where: Listening) -> int:
    """Serves until SIGTERM or Ctrl-C. Returns the exit code; raises UserError where the server cannot start,
    or ends by itself.
    """
    sampled = require_sampled(
        recipe, "a worker samples from the policy, and this recipe learns from judged completions"
    )
    version = require_known_version()
    token = os.environ.get(TOKEN, "")
    if len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"{TOKEN} has {len(token)} characters; set it to a secret of at least {SHORTEST_TOKEN}, here and "
            "where the recipe trains"
        )
    with user_mistakes():
        address = where.address()
        if where.join is not None:
            advertised_url(address, where.join)  # a wrong one is told before the server starts
    for line in _warnings(address):
        typer.echo(line, err=True)
    return _serve(sampled, where, address, token, version)


def _serve(recipe: SampledRecipe, where: Listening, address: Address, token: str, version: str) -> int:
    import torch  # which takes seconds: a mistake is told before

    settings = worker_settings(
        recipe.model,
        recipe.data,
        recipe.rollout,
        recipe.learner.precision,
        on_gpu=torch.cuda.is_available(),
    )
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        nonlocal is_stopping
        is_stopping = True
        worker.terminate()

    worker = LocalWorker(settings, address, token, where.log)
    try:
        signal.signal(signal.SIGTERM, stop)
        worker.wait_until_serving(recipe.rollout.server.silence_seconds, lambda: is_stopping)
        typer.echo(
            f"worker: {settings.model} at {address.url} with vLLM {version}, {settings.dtype}, rows of "
            f"{settings.max_model_len} tokens, {settings.max_num_seqs} at once, tensor parallel "
            f"{settings.tensor_parallel}, data parallel {settings.data_parallel}"
        )
        if where.url_file is not None:
            write_atomic(where.url_file, address.url + "\n")
        with _knocking(where, address, token):
            worker.wait()
        if not is_stopping:
            worker.require_alive()
    except UserError:
        if not is_stopping:
            raise
    finally:
        worker.close()
        if where.url_file is not None:
            where.url_file.unlink(missing_ok=True)
    return 0


@contextmanager
def _knocking(where: Listening, address: Address, token: str) -> Iterator[None]:
    """Inside, the run that ``--join`` names is told that the worker serves."""
    if where.join is None:
        yield
        return
    knocker = Knocker(where.join, advertised_url(address, where.join), token, typer.echo)
    try:
        yield
    finally:
        knocker.close()


def _warnings(address: Address) -> list[str]:
    if address.socket is not None or address.tls is not None:
        return []
    try:
        is_local = ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        is_local = address.host == "localhost"
    if is_local:
        return []
    return [
        f"warning: {address.host} is not this machine alone, and without --tls-key the token and all weights "
        "cross the network readable"
    ]
