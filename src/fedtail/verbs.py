"""The verbs around a deployment; like `cli`, which dispatches to them, this imports nothing heavy before one runs."""

from pathlib import Path

from tyro.conf import Positional


def deploy(arguments: list[str]) -> None:
    """Write a Flower app that runs an experiment on real nodes."""
    from fedtail.cli import parse_experiment
    from fedtail.flower import deploy as module

    folder = "" if len(arguments) < 2 or arguments[1].startswith("-") else arguments[1]
    command = parse_experiment("deploy", module.Deploy, [arguments[0], *arguments[2:]] if folder else arguments)
    print(module.write(command, folder))


def node_check(app: Positional[Path], client: int, data: str = "") -> None:
    """Say whether a site's data fit an app, before the site joins; nothing leaves the machine.

    Args:
        app: the folder that `fedtail deploy` wrote.
        client: the client's number.
        data: the site's own data: an .npz file with x and y, or a folder CLASS/NAME.png; empty in a rehearsal.
    """
    from fedtail.flower import node

    print(node.check(app, client, data))


def watch(run: Positional[Path], port: int = 8765) -> None:
    """Show a run in the browser while it goes on, or afterwards; only this machine can open the page. Ctrl-C ends it.

    Args:
        run: the run folder, of a simulation or of a deployment.
        port: of the page; 0: any that is free.
    """
    from fedtail import watch as module

    with module.serve(run, port) as server:
        print(f"http://{module.HOST}:{server.server_port}/", flush=True)
        server.serve_forever()
