"""A local cluster with the application of deploy/ray, which obeys the lines on standard input, and ends with it.

Runs in the environment .venv/ray. Each answer is a line of JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.util import list_named_actors

from mpt_grpc.deploy.ray import app

FILE = Path(__file__).parents[2] / "deploy/ray/demo.yaml"


SCALING = {
    "max_replicas": 3,
    "target_ongoing_requests": 4,
    "look_back_period_s": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 2,
}


def deploy(http_port: int, flags: str, min_replicas: int) -> None:
    """Deploys the application of the file, with quicker scaling, or changes it as a new file would."""
    config = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    config["http_options"]["port"] = http_port
    (application,) = config["applications"]
    application["args"]["flags"] = flags
    application["deployments"][0]["autoscaling_config"].update({**SCALING, "min_replicas": min_replicas})
    _get_global_client().deploy_apps(ServeDeploySchema(**config))


def kill_one() -> None:
    """Kills the process of one replica, without any warning to its server."""
    (actor, *_) = (one for one in list_named_actors(all_namespaces=True) if "mpt-grpc#Server#" in one["name"])
    ray.kill(ray.get_actor(**actor))


def refusal(args: dict[str, str]) -> str:
    """Returns the error for arguments of the application."""
    try:
        app(args)
    except Exception as error:
        return str(error)
    return ""


def main(http_port: int, flags: str) -> None:
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": http_port})
        deploy(http_port, flags, 2)
        for line in sys.stdin:
            answer: Any = None
            command, *arguments = json.loads(line)
            if command == "kill":
                kill_one()
            elif command == "deploy":
                deploy(http_port, *arguments)
            elif command == "refusal":
                answer = refusal(*arguments)
            print(json.dumps(answer), flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
