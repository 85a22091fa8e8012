"""A private one-node MongoDB replica set on loopback, its mongod from PATH or else out of a PyPI wheel."""

import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

from infra.local.process import Process, StartError, free_port, port_is_free, replace_file

_REPLICA_SET = "parley"
_NOT_YET_INITIALIZED = 94


def find_mongod() -> Path | None:
    """The mongod to run: the one on PATH, else the one in this environment's packages, else None."""
    if on_path := shutil.which("mongod"):
        return Path(on_path)
    in_wheel = Path(sysconfig.get_path("purelib"), "fiftyone", "db", "bin", "mongod")
    return in_wheel if in_wheel.exists() else None


class Mongod:
    """One mongod whose state is all under `folder`. Whoever makes an object with the same folder has the same one."""

    def __init__(self, folder: Path, cache_gb: float = 0.25) -> None:
        self.folder = folder.resolve()
        self._cache_gb = cache_gb
        self._process = Process(self.folder, "mongod")
        self._port_file = self.folder / "port.json"

    @property
    def running(self) -> bool:
        """Whether the process is there; `start` is what waits until it answers."""
        return self._process.pid is not None

    @property
    def pid(self) -> int | None:
        """The id of the node's process while it runs."""
        return self._process.pid

    @property
    def log(self) -> Path:
        """What mongod has to say."""
        return self._process.log

    def url(self, database: str = "") -> str:
        """The address of `database` on this replica set."""
        return f"mongodb://127.0.0.1:{self._port()}/{database}?replicaSet={_REPLICA_SET}"

    def start(self, timeout: float = 60.0) -> None:
        """Starts mongod unless it runs, and returns once the replica set takes writes.

        Port and data stay the same from start to start. Raises StartError with the end of the log.
        """
        if not self.running:
            self._launch()
        port = self._port()
        with pymongo.MongoClient[dict[str, Any]](
            "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=500, timeoutMS=5000
        ) as client:
            self._process.wait_until(lambda: _takes_writes(client, f"127.0.0.1:{port}"), timeout)

    def stop(self) -> None:
        """Ends mongod cleanly."""
        self._process.stop()

    def kill(self) -> None:
        """Ends mongod as a crash would; what it had acknowledged by majority is there again after `start`."""
        self._process.kill()

    def _port(self) -> int:
        if not self._port_file.exists():
            raise StartError(f"no mongod was ever started in {self.folder}")
        return int(json.loads(self._port_file.read_text()))

    def _launch(self) -> None:
        mongod = find_mongod()
        if mongod is None:
            raise StartError("no mongod on PATH, and the dependency group mongod is not installed")
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        port = self._port() if self._port_file.exists() else free_port()
        if not port_is_free(port):
            port = free_port()
        replace_file(self._port_file, json.dumps(port))
        command = [str(mongod), "--dbpath", str(data), "--bind_ip", "127.0.0.1", "--port", str(port)]
        command += ["--replSet", _REPLICA_SET, "--oplogSize", "256", "--nounixsocket", "--quiet"]
        command += ["--wiredTigerCacheSizeGB", str(self._cache_gb)]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        # With one node there is no other that could take over while this one lingers.
        command += ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"]
        self._process.start(command, os.environ, self.folder)


def _takes_writes(client: pymongo.MongoClient[dict[str, Any]], address: str) -> bool:
    """Makes the replica set where there is none, or moves it to `address`. True once this node is its primary."""
    try:
        hello = client.admin.command("hello")
        if hello["isWritablePrimary"] and hello["me"] == address:
            return True
        try:
            config = client.admin.command("replSetGetConfig")["config"]
        except OperationFailure as error:
            if error.code != _NOT_YET_INITIALIZED:
                return False
            members = [{"_id": 0, "host": address}]
            client.admin.command("replSetInitiate", {"_id": _REPLICA_SET, "members": members})
            return False
        if config["members"][0]["host"] != address:
            config["members"][0]["host"] = address
            config["version"] += 1
            client.admin.command("replSetReconfig", config, force=True)
    except PyMongoError:
        pass  # not up yet: whoever waits asks again, until the process ends or time runs out
    return False
