"""Verbs of the command line: the demo, teachers, generative runs, deployments. As in `fedtail.cli`, nothing heavy."""

import json as writer
from pathlib import Path
from typing import Annotated, Literal

import tyro

Positional = tyro.conf.Positional


def demo(output: Path = Path("runs/demo"), rounds: int = 0) -> None:
    """Train FedAvg and Fed-GraB on the same long-tailed split and write a report.

    Args:
        output: where the run folders and report.html go; a demo that was stopped is continued.
        rounds: number of rounds; 0 = the demo's own.
    """
    from fedtail import demo as module

    module.main(output, rounds)


def sample(
    run: Positional[Path],
    count: int = 64,
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None,
    output: Path | None = None,
    columns: int = 8,
    checkpoint: Literal["checkpoint", "best"] = "checkpoint",
) -> None:
    """Draw images from a run of a generative method; needs the run folder, not the training data.

    Args:
        run: the run folder.
        count: number of images.
        label: only images of this class, where generators are told one.
        output: a folder for the images and grid.png; default: RUN/images.
        columns: of the grid.
        checkpoint: which one.
    """
    from fedtail import generation

    found = generation.load(run, checkpoint).draw(count, label)
    folder = run / "images" if output is None else output
    pixels = generation.to_bytes(found.images)
    for i, image in enumerate(pixels):
        asked = f"-class{found.labels[i]}" if found.labels[i] >= 0 else ""
        name = f"{i:05d}-generator{found.generators[i]}{asked}.png"
        generation.save_picture(folder / name, image.transpose(1, 2, 0))
    generation.save_picture(folder / "grid.png", generation.grid(pixels, columns), 2)
    print(folder / "grid.png")


def quality(
    run: Positional[Path],
    feature: Literal["classifier", "efflite0", "inception", "pixels"] = "classifier",
    count: int = 10_000,
    weights: str = "",
    full: bool = True,
    json: bool = False,
) -> None:
    """Judge the images of a run of a generative method against the test set.

    Args:
        run: the run folder.
        feature: network that distances are measured in: a small classifier trained in place, an ImageNet encoder (extra
            teachers), a user's Inception, principal components of pixels.
        count: images of each kind; compare only equal counts.
        weights: file of the feature inception.
        full: also experts one by one, nearest training images, and training a classifier on the images.
        json: print JSON.
    """
    from fedtail import assessment

    found = assessment.assess(run, feature, count, weights, full)
    if json:
        print(writer.dumps(found, indent=1))
        return
    print(f"{found['feature']}; {count} images of each kind; floor (real training images) {found['floor']:.3f}")
    for name, scores in found["readings"].items():
        print(f"{name:10}" + "  ".join(f"{key} {value:.4g}" for key, value in scores.items()))
    for name in ("memory", "use"):
        if name in found:
            print(f"{name:10}" + "  ".join(f"{key} {value:.4g}" for key, value in found[name].items()))


def teacher(run: Positional[Path], calls: int = 50, json: bool = False) -> None:
    """A run's teacher beside its student: parameters, operations, latency, memory, accuracy on the test set.

    Args:
        run: a run folder, or an experiment's file, whose student is untrained.
        calls: timed calls of each.
        json: print JSON.
    """
    from fedtail import student

    found = student.compare(run, calls)
    print(writer.dumps(found, indent=1) if json else student.to_text(found))


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
