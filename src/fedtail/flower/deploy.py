"""`fedtail deploy EXP DIR`: a Flower app of an experiment, and a README with the commands that run it."""

import dataclasses
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import tomli_w

from fedtail import config
from fedtail.config import Experiment
from fedtail.errors import ConfigError
from fedtail.federation import federate
from fedtail.files import write_atomic
from fedtail.flower import server, sites, tls, wire
from fedtail.flower.roster import Options
from fedtail.userfile import split_target

APP = "fedtail_app"
IGNORED = "keys/\nsites/\nruns/\nflwr-home/\n*.db*\n"
"""Flower leaves out of an app what its .gitignore names."""


@dataclass(frozen=True, kw_only=True)
class Deploy(Options):
    """Write a Flower app that runs an experiment on real nodes; without a file, of the digits experiment."""

    address: str = "127.0.0.1:8000"
    """Where nodes reach the SuperLink: HOST:PORT."""
    tls: bool = False
    """Also make a test certificate authority, the server's certificate and a key for each client, in DIR/keys."""
    names: tuple[str, ...] = ()
    """Further names and IP addresses that the server's certificate is valid for."""
    experiment: Any = None


def write(options: Deploy, where: str) -> str:
    """Writes the app and says so.

    Args:
        options: the experiment and how it is deployed.
        where: the app's folder, which must not exist.

    Raises:
        ConfigError: the experiment cannot be deployed so, or the folder is not named or exists.
    """
    experiment, folder = cast("Experiment", options.experiment), Path(where)
    if not where:
        raise ConfigError("deploy wants an experiment and a new folder: fedtail deploy EXP DIR --sites 3")
    server.refuse(experiment, options)
    if folder.exists():
        raise ConfigError(f"{folder} exists already and is not overwritten. Remove it, or choose another folder.")
    clients = options.sites or federate(experiment.data, experiment.seed).clients
    form = sites.Form.of(sites.load_server(experiment.data))
    package = folder / APP
    package.mkdir(parents=True)
    for part, module in (("client", "node"), ("server", "server")):
        write_atomic(package / f"{part}_app.py", SHIM.format(part=part.capitalize(), module=module))
    write_atomic(package / "__init__.py", f'"""A Flower app, written by fedtail {wire.VERSION}."""\n')
    write_atomic(package / "experiment.toml", tomli_w.dumps(_portable(experiment, package)))
    write_atomic(package / "data.toml", tomli_w.dumps({k: list(v) for k, v in form._asdict().items()}))
    write_atomic(folder / "pyproject.toml", tomli_w.dumps(_project(options, folder.name)))
    if options.tls:
        host = options.address.rpartition(":")[0]
        tls.make(folder / "keys", [host, *options.names], clients)
    write_atomic(folder / ".gitignore", IGNORED)
    write_atomic(folder / "README.md", readme(options, experiment, clients))
    return f"{folder}: a Flower app of {clients} clients; {folder / 'README.md'} has the commands that run it."


def _portable(experiment: Experiment, package: Path) -> dict[str, Any]:
    """Returns the experiment's table; files of one's own are copied into the package, what is local becomes absolute."""
    table = config.to_dict(experiment)
    for node in (table["algorithm"], table["model"]):
        if ".py:" in node["name"]:
            path, name = split_target(node["name"])
            shutil.copyfile(path, package / Path(path).name)
            node["name"] = f"{Path(path).name}:{name}"
    data = table["data"]
    if Path(data["name"]).exists():
        data["name"] = str(Path(data["name"]).resolve())
    if table["start"]:
        table["start"] = str(Path(table["start"].replace("{seed}", str(experiment.seed))).resolve())
    return table


def _project(options: Deploy, name: str) -> dict[str, Any]:
    """Returns pyproject.toml: the components, and the options as flat keys that `flwr run -c` overrides."""
    try:
        flower = f"flwr>={version('flwr')}"
    except PackageNotFoundError:  # an app may be written where Flower is not installed
        flower = "flwr>=1.41"
    known = {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}
    known["run"] = f"runs/{name}" if known["run"] == Options.run else known["run"]
    components = {part: f"{APP}.{part[:-3]}_app:app" for part in ("serverapp", "clientapp")}
    return {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {"name": _identifier(name), "version": "1.0.0", "description": "A federation, written by fedtail.",
                    "license": "Apache-2.0", "dependencies": [flower, f"fedtail=={wire.VERSION}"]},
        "tool": {"hatch": {"build": {"targets": {"wheel": {"packages": [APP]}}}},
                 "flwr": {"app": {"publisher": "fedtail", "components": components,
                                  "config": {k.replace("_", "-"): v for k, v in known.items()}}}},
    }  # fmt: skip


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in name.lower()).strip("-") or "federation"


SHIM = '''"""{part}App: see fedtail.flower.{module}."""

from pathlib import Path

from fedtail.flower import {module}

app = {module}.app(Path(__file__).parent)
'''

ENVIRONMENT = """export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_HOME="$PWD/flwr-home" OMP_NUM_THREADS=1"""


def readme(options: Deploy, experiment: Experiment, clients: int) -> str:
    """Returns the README with the literal commands."""
    host, _, port = options.address.rpartition(":")
    plain, keys = "--insecure", "keys"
    link = f"--ssl-ca-certfile {keys}/ca.crt --ssl-certfile {keys}/server.crt --ssl-keyfile {keys}/server.key \\\n" \
           "    --enable-supernode-auth" if options.tls else plain  # fmt: skip
    join = f"--root-certificates {keys}/ca.crt --auth-supernode-private-key {keys}/client-0" if options.tls else plain
    trust = f'root-certificates = "$PWD/{keys}/ca.crt"' if options.tls else "insecure = true"
    bind = host if host in ("127.0.0.1", "localhost") else "0.0.0.0"
    data = ' data=\\"/path/to/data.npz\\"' if options.sites else ""
    consent = " share-counts=true" if options.sites and options.share_counts else ""
    check = " --data /path/to/data.npz" if options.sites else ""
    register = f"""
Register the public key of each site, once:

```bash
for K in $(seq 0 {clients - 1}); do flwr supernode register {keys}/client-$K.pub fedtail; done
```
""" if options.tls else ""  # fmt: skip
    secret = f" && mkdir -p $S/{keys} && cp {keys}/ca.crt {keys}/client-$K $S/{keys}" if options.tls else ""
    give = f"""Give each site, over a safe way, its folder of these (with this app{" and its own key" if secret else ""}):

```bash
for K in $(seq 0 {clients - 1}); do S=sites/$K; mkdir -p $S && cp -r {APP} pyproject.toml README.md $S{secret}; done
```
"""
    return TEXT.format(
        method=config.name_of(experiment.algorithm), rounds=experiment.rounds, clients=clients, version=wire.VERSION,
        environment=ENVIRONMENT, bind=bind, port=port, link=link, join=join, trust=trust, address=options.address,
        register=register, data=data, consent=consent, check=check, give=give, last=clients - 1,
        here=f"127.0.0.1:{port}" if bind != host else options.address,
    )  # fmt: skip


TEXT = """# A federation of {clients} clients: {method}, {rounds} rounds

Every machine needs fedtail {version} with Flower: `pip install "fedtail[flower]=={version}"`. All commands are run in this
folder. In each terminal first:

```bash
{environment}
```

## The server

The SuperLink stays up for as long as the federation lives; the run folder appears below the folder where it was started.

```bash
flower-superlink {link} \\
    --host {bind} --port {port} --disable-runtime-dependency-installation --database superlink.db
```

In a second terminal, once: tell `flwr` where the SuperLink is.

```bash
mkdir -p "$FLWR_HOME" && cat > "$FLWR_HOME/config.toml" <<END
[superlink]
default = "fedtail"
[superlink.fedtail]
address = "{address}"
{trust}
END
```
{register}
## Each site

{give}
The numbers of the clients are 0 to {last}. In that folder first see whether the data fit, then join (here client 0; nodes on
one machine need ports of their own, `--port 9095` and so on):

```bash
fedtail node check . --client 0{check}
flower-supernode {join} \\
    --superlink {address} --port 9094 --node-config "client=0{data}{consent}"
```

## Train

```bash
flwr run . fedtail --stream
```

The same command continues the run after anything that stopped it: a killed ServerApp, SuperLink or machine. Options of a
single run: `flwr run . fedtail -c "deadline=600.0 quorum=1.0"`; pyproject.toml lists them.
"""
