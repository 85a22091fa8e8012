"""Parley without containers: `make up`, `down`, `status` and `logs`, from the broker to the services.

Everything that it makes is under `.parley/`, and everything that it starts listens on loopback (the api, where
PARLEY_API_HOST says). Whatever runs already is left running, so that a second `up` only brings what differs.
"""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from infra.local import demo, model
from infra.local.mongod import Mongod
from infra.local.process import StartError, free_port, port_is_free, replace_file, tail
from infra.local.progress import Steps
from infra.local.rabbitmq import RabbitMQ
from infra.local.secret_files import Secrets
from infra.local.supervision import Program, Supervisor
from infra.rabbitmq.apply import ManagementError, apply, service_users

ROOT = Path(__file__).resolve().parent.parent.parent
_VHOST = "parley"
_READY_S = 90
_PRIORITY = {"model": 10, "store": 20, "worker": 30, "api": 40}
_MODULE = {
    "store": "services.conversation_store",
    "worker": "services.inference_worker",
    "api": "services.api",
}
_USER = {"store": "parley-store", "worker": "parley-worker", "api": "parley-api"}


class Stack:
    """The local stack of one checkout, whose state is under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets = Secrets(folder / "secrets")
        self.broker = RabbitMQ(folder / "rabbitmq")
        self.database = Mongod(folder / "mongod")
        self.supervisor = Supervisor(folder / "supervisor", ROOT, folder / "logs")
        self._ports_file = folder / "ports.json"
        self._replicas_file = folder / "replicas.json"

    # ------------------------------------------------------------------ up

    def up(self, asked: Mapping[str, int | None], first_step: int) -> None:
        """Brings everything up with the asked number of each service; None = as many as now, at first one."""
        steps = Steps(self.folder / "up.log", first_step, first_step + 4)
        replicas = {**{"api": 1, "store": 1, "worker": 1}, **self._replicas()}
        replicas |= {kind: number for kind, number in asked.items() if number is not None}
        self._start_broker(steps)
        self._start_database(steps)
        self._prepare_model(steps)
        self._prepare_broker_and_database(steps)
        programs = self._programs(replicas)
        replace_file(self._replicas_file, json.dumps(replicas))
        title = ", ".join(f"{number} {kind}" for kind, number in replicas.items())
        with steps.step(f"Services: {title}") as step:
            self.supervisor.keep(programs)
            self._wait_until_ready(programs, step)
            step.result = "all ready"
        steps.say(self._closing_words(replicas["api"]))
'''
