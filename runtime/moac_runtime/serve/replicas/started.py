"""Replicas as Ray Serve runs them: started, asked by their handles, ended."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException

from moac_runtime.backends.stranger import Build
from moac_runtime.errors import CheckFailed, MoacError, UsageError
from moac_runtime.host.cores import usable_cores
from moac_runtime.serve.replicas.pool import Gone, Pool
from moac_runtime.serve.replicas.replica import About, Message, Replica, Standing

_STORE_BYTES = 128 * 2**20  # of objects between processes: requests and pieces of answers
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_MANY = 2**20  # requests at once: the engine has a queue of its own, which refuses


@contextmanager
def started(
    options: argparse.Namespace, build: Build | None = None
) -> Iterator[tuple[Pool, tuple[str, ...]]]:
    """The replicas that `options` ask for, and what the first of them tells for people.

    `build`: as of `load`.

    Raises MoacError where they do not come to serve.
    """
    with _ray():
        handles = _deployed(options, build)
        abouts = [handle.about.remote().result() for handle in handles.values()]
        yield Pool({name: RayReplica(handle) for name, handle in handles.items()}), _lines(abouts)


class RayReplica:
    """See `pool.ReplicaHandle`; `handle`: Ray Serve's, of a deployment of one replica."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._stream = handle, handle.options(stream=True)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message]]:
        """What the replica sends; who stops reading has it stop."""
        found = self._stream.answer.remote(scope, body)
        try:
            async for batch in found:
                yield batch
        except (RayActorError, RayServeException):
            raise Gone from None
        finally:
            found.cancel()

    async def tell(self) -> Standing:
        """Waits for a replica that is being made; one that cannot serve is as good as gone."""
        try:
            told: Standing = await self._handle.tell.remote()
        except (RayError, RayServeException):
            raise Gone from None
        return told


@contextmanager
def _ray() -> Iterator[None]:
    """Ray with Serve, on this machine alone, for as long as it is used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ends = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_STORE_BYTES,
    )
    for number, handler in ends.items():  # Ray's own would end the process on the spot
        signal.signal(number, handler)
    try:
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        yield
    finally:
        ray.shutdown()  # ends every process; Serve's own way takes half a minute


def _deployed(options: argparse.Namespace, build: Build | None) -> dict[str, Any]:
    """Handles by name. Each replica is a deployment of its own, so that it can be asked for."""
    made = serve.deployment(
        num_replicas=1,
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": 0},  # threads are counted here, not by Ray
        health_check_period_s=1,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
        logging_config=_QUIET,
    )(Replica)
    names = [str(number) for number in range(options.replicas)]
    asked = _asked(options)
    targets = [
        serve.RunTarget(made.bind(asked, build), name=f"moac-{name}", route_prefix=None)
        for name in names
    ]
    try:
        return dict(zip(names, serve.run_many(targets), strict=True))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise MoacError(
            f"the replicas did not start ({reason}); serve without --replicas to see why"
        ) from None


def _asked(options: argparse.Namespace) -> argparse.Namespace:
    """The options of one replica: its share of the threads, and paths that hold anywhere."""
    threads = options.threads or max(1, usable_cores().threads // options.replicas)
    package = options.package.resolve()
    name = options.served_model_name or package.name
    key = options.require_signature and options.require_signature.resolve()
    changed = {"package": package, "served_model_name": name, "require_signature": key}
    return argparse.Namespace(**{**vars(options), "threads": threads, **changed})


def _lines(abouts: list[About]) -> tuple[str, ...]:
    for about in abouts:
        if about.fault is not None:
            kinds = {kind.exit_code: kind for kind in (UsageError, CheckFailed)}
            raise kinds.get(about.exit_code, MoacError)(about.fault)
    return abouts[0].lines
