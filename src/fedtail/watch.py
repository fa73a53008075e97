"""`fedtail watch RUN`: a page that shows a run while it goes on, of the simulator or of a deployment, on loopback alone.

The server reads the run folder and nothing else, and writes nothing: it may be started, stopped and opened as often as one
likes, beside the run or long after it. The page (watch.html) has no parts from elsewhere and asks every
two seconds what is new.
"""

import json
import math
import time
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedtail import runs
from fedtail.errors import ConfigError, FedtailError
from fedtail.methods import flatten
from fedtail.runs import RunRecord

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("watch.html")
SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "head", "medium", "tail")
SPREAD = ("mean", "worst_decile")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def stamp(folder: Path) -> str:
    """Returns a text that changes whenever there is something new to show."""
    files = [folder / name for name in ("metrics.jsonl", "nodes.json")]
    return " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in (file.stat() for file in files if file.is_file()))


def state(folder: Path) -> dict[str, Any]:
    """Returns all that the page shows of a run, as plain values for JSON.

    Raises:
        CheckpointError: it is not a run folder, or a file of it is damaged.
    """
    now = stamp(folder)
    run = runs.read(folder)
    nodes = folder / "nodes.json"
    evaluated = [record for record in run.records if "test" in record]
    last = evaluated[-1] if evaluated else {}
    return _plain({
        "stamp": now, "folder": str(folder.resolve()), "rounds": run.config["rounds"], "done": len(run.records),
        "method": run.config["algorithm"]["name"], "data": run.config["data"]["name"], "model": run.config["model"]["name"],
        "seed": run.config["seed"], "clients": len(run.counts), "examples": int(run.counts.sum()),
        "seconds": run.seconds / max(len(run.records), 1), "updated": (folder / "metrics.jsonl").stat().st_mtime,
        "test_set": last.get("test", {}).get("test_set", ""), "groups": last.get("test", {}).get("groups", ""),
        "judged": last.get("round"), "classes": classes(run, last) if last else [],
        "course": [thin(record) for record in run.records],
        "last": {k: v for k, v in flatten(run.records[-1]).items() if isinstance(v, int | float)} if run.records else {},
        "nodes": json.loads(nodes.read_text()) if nodes.is_file() else None,
    })  # fmt: skip


def thin(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a round's record is drawn over the rounds; a long run has thousands of them."""
    train = record.get("train", {})
    return {
        "round": record["round"], "clients": train.get("clients", 0), "dropped": train.get("dropped", {}),
        "loss": train.get("loss"),
        **{name: record["test"][name] for name in SCORES if "test" in record},
        **{kind: [record[kind][name] for name in SPREAD] for kind in ("local", "personal") if kind in record},
    }  # fmt: skip


def classes(run: RunRecord, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns each class with its training examples, shot group and recall, the most frequent one first.

    Where a deployment's sites share no counts nobody knows the frequencies: then classes come as the named groups have them.
    """
    totals = run.counts.sum(0)
    group = {number: name for name, members in run.groups._asdict().items() for number in members}
    order = {name: place for place, name in enumerate(run.groups._fields)}
    found = [
        {"class": k, "examples": int(totals[k]) if totals.any() else None, "group": group.get(k, ""), "recall": recall}
        for k, recall in enumerate(record["test"]["per_class_recall"])
    ]
    return sorted(found, key=lambda c: (-(c["examples"] or 0), order.get(c["group"], len(order)), c["class"]))


def _plain(value: Any) -> Any:
    """Returns the value with None for what JSON does not know: infinite numbers and NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Handler(BaseHTTPRequestHandler):
    """Answers "/" with the page and "/state?STAMP" with what is new since then."""

    def __init__(self, folder: Path, *request: Any):
        self.folder = folder
        super().__init__(*request)

    def do_GET(self) -> None:
        """Answers; only to who asks for this machine by its own name, so that no foreign page can read a run."""
        path, _, seen = self.path.partition("?")
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"only for this machine")
        elif path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/state":
            self._send(HTTPStatus.OK, "application/json", json.dumps(self._news(seen)).encode())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is / and /state")

    def _news(self, seen: str) -> dict[str, Any]:
        try:
            if seen and seen == stamp(self.folder).replace(" ", "+"):
                return {"now": time.time()}
            return {"now": time.time(), **state(self.folder)}
        except (
            FedtailError,
            OSError,
            ValueError,
            KeyError,
        ) as error:  # the run may be moved or damaged while it is watched
            return {"now": time.time(), "error": str(error) or type(error).__name__}

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
                            ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a request comes every two seconds."""


def serve(folder: Path, port: int) -> ThreadingHTTPServer:
    """Returns a server of a run's page, not yet serving.

    Args:
        folder: the run.
        port: on loopback; 0: any that is free.

    Raises:
        CheckpointError: it is not a run folder, or damaged.
        ConfigError: the port is taken or not allowed.
    """
    state(folder)
    try:
        return ThreadingHTTPServer((HOST, port), partial(Handler, folder))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"watch: port {port} cannot be used ({error}). Choose another: --port 0 takes a free one."
        ) from error
