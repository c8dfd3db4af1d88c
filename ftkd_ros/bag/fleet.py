# SPDX-License-Identifier: Apache-2.0
"""One task per scene or bag: in this process, in a local pool, or on a Ray cluster.

A task that fails is an outcome, not an exception, so one bad bag does not stop the rest. On Ray, the work of
a lost node runs again. Ray is optional: `pip install 'ray>=2.9'` on every machine of the cluster.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ftkd_core.errors import UserError

Task = Callable[[str], Any]
"""Picklable function of a name; raises UserError if the work cannot be done."""
_RETRIES: Final = 3


class Outcome(NamedTuple):
    """Value of one task, or the sentence of its error if it failed."""

    name: str
    value: Any
    failed: bool


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where tasks run. jobs: processes on this machine; ray: address of a cluster (`auto`, HOST:PORT), "" for
    this machine; gpus: GPUs per task on Ray, a part for several tasks per GPU."""

    jobs: int = 1
    ray: str = ""
    gpus: float = 0.0


def run_tasks(task: Task, names: Sequence[str], workers: Workers) -> Iterator[Outcome]:
    """Run a task for each name and yield the outcomes as they come. Raises UserError if Ray is missing or
    cannot be reached."""
    if workers.ray:
        yield from _on_ray(task, names, workers)
    elif workers.jobs <= 1 or len(names) <= 1:
        for name in names:
            yield run_one(task, name)
    else:
        yield from _in_pool(task, names, workers.jobs)


def run_one(task: Task, name: str) -> Outcome:
    """Run one task; its error becomes a failed outcome."""
    try:
        return Outcome(name, task(name), False)
    except UserError as error:
        return Outcome(name, str(error), True)


def check_outcomes(outcomes: Sequence[Outcome], what: str) -> None:
    """Raise UserError with the sentences of all failed tasks."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        texts = "; ".join(f"{outcome.name}: {outcome.value}" for outcome in failed)
        raise UserError(f"{len(failed)} of {len(outcomes)} {what} failed: {texts}")


def _in_pool(task: Task, names: Sequence[str], jobs: int) -> Iterator[Outcome]:
    # Forked: this process has run nothing of torch yet, whose threads would not survive a fork, and ROS 2
    # from wheels starts Python again, which a spawned process does not survive.
    with ProcessPoolExecutor(min(jobs, len(names)), multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(run_one, task, name): name for name in names}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Outcome(futures[future], "its process was killed; run again", True)


def _on_ray(task: Task, names: Sequence[str], workers: Workers) -> Iterator[Outcome]:
    ray = _connected(workers.ray)
    remote = ray.remote(run_one).options(num_gpus=workers.gpus, max_retries=_RETRIES)
    waiting = {remote.remote(task, name): name for name in names}
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            name = waiting.pop(ready)
            try:
                yield Outcome(*ray.get(ready))
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                yield Outcome(
                    name, f"lost on the cluster after {_RETRIES} retries ({reason}); run again", True
                )
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _connected(address: str) -> Any:
    """Connect to a cluster and return the module `ray`."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError(
            "--ray needs the package ray, which is not installed; install it with `pip install 'ray>=2.9'`"
        ) from None
    path = os.environ.get("PYTHONPATH")
    environment = {"env_vars": {"PYTHONPATH": path}} if path else None
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"no Ray cluster at {address!r} ({reason}); start one with `ray start --head`"
        ) from error
    return ray
