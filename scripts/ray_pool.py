"""A run whose workers Ray places: on a cluster that runs already (``ray start``), or on this machine alone.

    python scripts/ray_pool.py --workers 2 --gpus 1 -- RECIPE --run RUN [ARGUMENTS OF rltrain train ...]

The learner runs here, with what follows ``--`` as arguments; start it on the machine of its GPUs. Each worker
is an actor with ``--gpus`` GPUs that runs ``rltrain worker --join`` until the learner has ended. Where a
machine is lost, Ray starts its worker again on another, and the run goes on meanwhile. The exit code is the
learner's. Needs ``pip install ray``, which rltrain itself does not.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys

import ray

TOKEN = "RLTRAIN_WORKER_TOKEN"


@ray.remote(max_restarts=-1, max_task_retries=-1, max_concurrency=2)
class Worker:
    """One ``rltrain worker``."""

    def serve(self, arguments: list[str], environment: dict[str, str]) -> int:
        """Until ``stop``; a worker that ends by itself is started again."""
        self.is_ending = False
        code = 0
        while not self.is_ending:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rltrain", "worker", *arguments], env={**os.environ, **environment}
            )
            code = self.process.wait()
        return code

    def stop(self) -> None:
        self.is_ending = True
        self.process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--host", default=ray.util.get_node_ip_address(), help="as workers see it")
    parser.add_argument("--port", type=int, default=8900)
    parser.add_argument("--launcher", default="", help='in place of one process: "accelerate launch ... -m"')
    parser.add_argument("train", nargs="+", help="RECIPE --run RUN and other arguments of rltrain train")
    options = parser.parse_args()
    recipe, *rest = options.train
    run = rest.index("--run")
    shared = [*rest[:run], *rest[run + 2 :]]
    shared += ["--set", "rollout.engine=vllm_server"]
    shared += ["--set", f"rollout.workers={{join: true, host: 0.0.0.0, port: {options.port}}}"]
    environment = {TOKEN: os.environ.setdefault(TOKEN, secrets.token_urlsafe(32))}
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE"):
        if name in os.environ:
            environment[name] = os.environ[name]

    ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True)
    door = f"http://{options.host}:{options.port}"
    asked = [recipe, "--host", "0.0.0.0", "--join", door, *shared]
    workers = [Worker.options(num_gpus=options.gpus).remote() for _ in range(options.workers)]
    for worker in workers:
        worker.serve.remote(asked, environment)
    launcher = options.launcher.split() or [sys.executable, "-m"]
    learner = [*launcher, "rltrain", "train", recipe, *rest[run : run + 2], *shared]
    try:
        return subprocess.run(learner, check=False).returncode
    finally:
        ray.get([worker.stop.remote() for worker in workers])
        ray.shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
