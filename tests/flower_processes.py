"""A federation of real processes on loopback, for the tests of deployments."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from fedtail import cli, runs

BIN = Path(sys.executable).parent
PATIENCE = 1200.0  # seconds; a busy machine needs many times what an idle one does


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what, condition, seconds=PATIENCE, watched=lambda: None):
    """Looks again and again; a machine that stands still for a while does not count."""
    for _ in range(int(seconds / 0.3)):
        if condition():
            return
        watched()
        time.sleep(0.3)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def descendants(pid):
    """The process ids below a process, deepest last."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += [int(child), *descendants(child)]
    return found


def clean_environment():
    """What every process needs: this fedtail and this Flower, and nothing of Flower's own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    source = str(Path(runs.__file__).parents[1])
    return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}  # fmt: skip


def figures(fault, **numbers):
    """Keeps what a fault test has measured, for benchmarks/deployment/faults.py."""
    if where := os.environ.get("FEDTAIL_FIGURES"):
        path = Path(where)
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, fault: numbers}, indent=1) + "\n")


class Processes:
    """A SuperLink and SuperNodes around one app; everything that it starts ends with it."""

    def __init__(self, folder, experiment, *flags, tls=False):
        self.folder, self.app, self.tls = Path(folder), Path(folder) / "app", tls
        self.port, self.address = free_port(), ""
        self.address = f"127.0.0.1:{self.port}"
        extra = ["--tls"] if tls else []
        cli.dispatch(["deploy", str(experiment), str(self.app), "--address", self.address, *extra, *flags])
        self.run_folder = self.app / "runs" / "app"
        home = self.app / "flwr-home"
        home.mkdir()
        trust = f'root-certificates = "{self.app}/keys/ca.crt"' if tls else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "fedtail"\n[superlink.fedtail]\naddress = "{self.address}"\n{trust}\n'
        )
        self.env = {**clean_environment(), "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0",
                    "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
                    "OMP_NUM_THREADS": "1"}  # fmt: skip
        self.started = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in list(self.started):
            self.kill(name)

    def start(self, name, *command, **env):
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115 (the child's)
        self.started[name] = subprocess.Popen(
            list(map(str, command)),
            cwd=self.app,
            env={**self.env, **env},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, name, how=signal.SIGKILL):
        """Kills a process with everything below it: a machine that goes."""
        process = self.started.pop(name)
        if process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
        process.wait()

    @staticmethod
    def end(pid):
        """Kills one process of those below a started one."""
        os.kill(pid, signal.SIGKILL)

    def superlink(self):
        keys = self.app / "keys"
        link = ["--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "server.crt", "--ssl-keyfile",
                keys / "server.key", "--enable-supernode-auth"] if self.tls else ["--insecure"]  # fmt: skip
        self.start("superlink", "flower-superlink", *link, "--host", "127.0.0.1", "--port", self.port,
                   "--disable-runtime-dependency-installation", "--database", "superlink.db")  # fmt: skip
        wait_for("the SuperLink's port", self._listening, 120)

    def _listening(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def supernode(self, client, config="", key=None, **env):
        keys = self.app / "keys"
        join = ["--insecure"]
        if self.tls:
            join = ["--root-certificates", keys / "ca.crt"]
            if key != "":
                join += ["--auth-supernode-private-key", key or keys / f"client-{client}"]
        self.start(f"node{client}", "flower-supernode", *join, "--superlink", self.address, "--port", free_port(),
                   "--node-config", f"client={client} {config}".strip(), **env)  # fmt: skip

    def flwr(self, *arguments):
        done = subprocess.run([BIN / "flwr", *map(str, arguments)], cwd=self.app, env=self.env, capture_output=True, text=True,
                              timeout=PATIENCE)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *overrides):
        return self.flwr("run", ".", "fedtail", *(part for o in overrides for part in ("-c", o)))

    def rounds(self):
        return runs.rounds_done(self.run_folder) if (self.run_folder / "config.toml").is_file() else 0

    def seconds(self):
        """What each round took, by its own clock."""
        return [json.loads(line)["seconds"] for line in (self.run_folder / "timings.jsonl").read_text().splitlines()]

    def wait_rounds(self, number, seconds=PATIENCE):
        def watched():
            text = self.log("superlink")
            assert "raised an exception" not in text[getattr(self, "seen", 0) :], text[-3000:]

        wait_for(f"round {number}", lambda: self.rounds() >= number, seconds, watched)

    def children(self, name, program):
        """Process ids below a started process whose command line has a word."""
        found = []
        for pid in descendants(self.started[name].pid):
            with contextlib.suppress(OSError):
                if program in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                    found.append(pid)
        return found
