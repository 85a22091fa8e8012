"""A private RabbitMQ node out of Debian's package: its own name, ports, data and epmd, all on loopback."""

import json
import os
import secrets
import shutil
from pathlib import Path
from urllib.parse import quote

from infra.local.process import Process, StartError, free_port, port_is_free, replace_file
from infra.rabbitmq.apply import Management, ManagementError

_PORTS = ("amqp", "management", "epmd", "distribution")
# The package's own script: /usr/sbin/rabbitmq-server is a wrapper that insists on the system user.
_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_ADMIN = "parley-admin"


class RabbitMQ:
    """One node whose state is all under `folder`. Whoever makes an object with the same folder has the same node."""

    def __init__(self, folder: Path, figures_s: int = 5) -> None:
        """figures_s: how old the management API's account of connections and queues may be, in seconds."""
        self.folder = folder.resolve()
        self._figures_s = figures_s
        self._epmd = Process(self.folder, "epmd")
        self._broker = Process(self.folder, "rabbitmq")
        self._node_file = self.folder / "node.json"

    @property
    def running(self) -> bool:
        """Whether the node's process is there; `start` is what waits until it answers."""
        return self._broker.pid is not None

    @property
    def pid(self) -> int | None:
        """The id of the node's process while it runs."""
        return self._broker.pid

    @property
    def log(self) -> Path:
        """What the broker has to say."""
        return self._broker.log

    @property
    def management_url(self) -> str:
        """The management API, with the administrator's name and password in it."""
        node = self._node()
        return f"http://{_ADMIN}:{node['password']}@127.0.0.1:{node['management']}"

    def amqp_url(self, vhost: str = "/", user: str | None = None, password: str | None = None) -> str:
        """The AMQP address of `vhost`, for the administrator unless another user is given."""
        node = self._node()
        login = quote(user or _ADMIN, safe=""), quote(password or str(node["password"]), safe="")
        return f"amqp://{login[0]}:{login[1]}@127.0.0.1:{node['amqp']}/{quote(vhost, safe='')}"

    def start(self, timeout: float = 60.0) -> None:
        """Starts the node unless it runs, and returns once it takes AMQP connections.

        Ports and data stay the same from start to start. Raises StartError with the end of the log.
        """
        if not _SERVER.exists():
            raise StartError(f"{_SERVER} is missing: install the package rabbitmq-server")
        if self.running:
            self._broker.wait_until(self._answers, timeout)
            return
        self._epmd.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        node = self._choose_ports()
        self._configure(node)
        environment = self._environment(node)
        epmd = shutil.which("epmd") or "/usr/bin/epmd"
        self._epmd.start([epmd, "-address", "127.0.0.1", "-port", str(node["epmd"])], environment, self.folder)
        # The broker starts an epmd of its own, which nobody would end, where it finds none.
        self._epmd.wait_until(lambda: not port_is_free(int(node["epmd"])), 10)
        self._broker.start([str(_SERVER)], environment, self.folder)
        self._broker.wait_until(self._answers, timeout)

    def stop(self) -> None:
        """Ends the node cleanly, then its epmd."""
        self._broker.stop()
        self._epmd.stop()

    def kill(self) -> None:
        """Ends the node as a crash would; what it had confirmed is there again after `start`."""
        self._broker.kill()
        self._epmd.kill()

    def _node(self) -> dict[str, str | int]:
        if not self._node_file.exists():
            raise StartError(f"no RabbitMQ node was ever started in {self.folder}")
        node: dict[str, str | int] = json.loads(self._node_file.read_text())
        return node

    def _choose_ports(self) -> dict[str, str | int]:
        if self._node_file.exists():
            node = self._node()
        else:
            node = {"name": f"parley-{secrets.token_hex(4)}", "password": secrets.token_urlsafe(24)}
        for port in _PORTS:
            while port not in node or not port_is_free(int(node[port])):
                node[port] = free_port()
        replace_file(self._node_file, json.dumps(node))
        return node

    def _configure(self, node: dict[str, str | int]) -> None:
        replace_file(
            self.folder / "rabbitmq.conf",
            f"listeners.tcp.local = 127.0.0.1:{node['amqp']}\n"
            f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {node['management']}\n"
            f"default_user = {_ADMIN}\ndefault_pass = {node['password']}\n"
            "default_user_tags.administrator = true\nloopback_users = none\n"
            "log.console = true\nlog.console.use_colors = off\nlog.file = false\n",
        )
        replace_file(self.folder / "advanced.config", _clocks(self._figures_s))
        replace_file(self.folder / "enabled_plugins", "[rabbitmq_management].\n")
        replace_file(self.folder / "empty.conf", "")

    def _environment(self, node: dict[str, str | int]) -> dict[str, str]:
        ours = {
            "HOME": str(self.folder),  # the Erlang cookie is made here
            # A long name, since a short one wants a host name that resolves.
            "RABBITMQ_USE_LONGNAME": "true",
            "RABBITMQ_NODENAME": f"{node['name']}@127.0.0.1",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(self.folder / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            # Else the machine's own /etc/rabbitmq/rabbitmq-env.conf would have its say.
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "empty.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_DIST_PORT": str(node["distribution"]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(node["epmd"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # The script then becomes the broker instead of waiting for it, so that the pid we know is the broker's.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_", "NOTIFY_"))}
        return kept | ours

    def _answers(self) -> bool:
        try:
            Management(self.management_url).call("GET", f"health/checks/port-listener/{self._node()['amqp']}")
        except ManagementError:
            return False  # not up yet: whoever waits asks again, until the process ends or time runs out
        return True


def _clocks(seconds: int) -> str:
    """Settings in Erlang: each kind of figure has a clock of its own, not all of which the other format knows."""
    core = f"{{collect_statistics_interval, {seconds * 1000}}}, {{quorum_tick_interval, {seconds * 1000}}}"
    kept = ", ".join(f"{{{policy}, [{{605, {seconds}}}]}}" for policy in ("global", "basic", "detailed"))
    return f"[{{rabbit, [{core}]}},\n {{rabbitmq_management, [{{sample_retention_policies, [{kept}]}}]}}].\n"
