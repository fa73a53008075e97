"""What `fedtail deploy` writes and refuses, and what a site's data must be: no part of this needs Flower."""

import dataclasses
import json
import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedtail import cli, config
from fedtail.algorithms.client_distillation import ClientDistillation
from fedtail.config import Data, Evaluation, Experiment
from fedtail.data.dataset import Split, assemble
from fedtail.errors import ConfigError, DataError
from fedtail.flower import server, sites
from fedtail.flower.node import Node
from fedtail.flower.roster import Options
from fedtail.flower.wire import load_experiment
from fedtail.losses import LogitAdjustment
from fedtail.metrics import Explicit, Thirds
from fedtail.personalise import Finetune

GROUPS = Explicit(head=(0, 1, 2), medium=(3, 4, 5), tail=(6, 7, 8, 9))
SITES = Experiment(rounds=2, evaluation=Evaluation(local=False, groups=GROUPS))


def deploy(folder, *flags, experiment=SITES):
    path = folder / "experiment.toml"
    path.write_text(config.dumps(experiment))
    cli.dispatch(["deploy", str(path), str(folder / "app"), *flags])
    return folder / "app"


def npz(path, x=None, y=None):
    rng = np.random.default_rng(0)
    y = np.arange(40) % 10 if y is None else y
    x = rng.integers(0, 256, (len(y), 8, 8), dtype=np.uint8) if x is None else x
    np.savez(path, x=x, y=y)
    return path


def test_an_app_is_complete_and_loads(tmp_path, capsys):
    app = deploy(tmp_path, "--sites", "3", "--quorum", "0.7", "--rounds", "5", "--address", "server.example:9000")
    assert "3 clients" in capsys.readouterr().out
    project = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert project["config"] == {"run": "runs/app", "quorum": 0.7, "deadline": 3600.0, "attempts": 3, "wait": 600.0,
                                 "states": "server", "sites": 3, "share-counts": False,
                                 "clip": 0.0, "noise": 0.0, "delta": 1e-5}  # fmt: skip
    assert Options.of(project["config"]) == Options(run="runs/app", quorum=0.7, sites=3)
    assert project["components"] == {
        "serverapp": "fedtail_app.server_app:app",
        "clientapp": "fedtail_app.client_app:app",
    }
    assert load_experiment(app / "fedtail_app") == dataclasses.replace(SITES, rounds=5)
    form = sites.Form.read(app / "fedtail_app")
    assert form.shape == (1, 8, 8)
    assert form.classes == tuple("0123456789")
    text = (app / "README.md").read_text()
    for word in (
        "--insecure",
        "server.example:9000",
        "--host 0.0.0.0 --port 9000",
        "FLWR_TELEMETRY_ENABLED=0",
        "client=0 data=",
    ):
        assert word in text
    compile((app / "fedtail_app" / "client_app.py").read_text(), "client_app.py", "exec")
    with pytest.raises(ConfigError, match="exists already"):
        deploy(tmp_path)


def test_the_readme_packs_what_each_site_gets(tmp_path, capsys):
    pytest.importorskip("cryptography")
    app = deploy(tmp_path, "--sites", "2", "--tls")
    [pack] = re.findall(
        r"```bash\n(for K in \$\(seq 0 1\); do S=.*?)```", (app / "README.md").read_text(), flags=re.DOTALL
    )
    subprocess.run(["bash", "-ec", pack], cwd=app, check=True)
    for k in (0, 1):
        assert sorted(p.name for p in (app / "sites" / str(k) / "keys").iterdir()) == ["ca.crt", f"client-{k}"]
    check(app / "sites" / "1", npz(tmp_path / "site.npz"), client=1)
    assert "client 1: 40 examples fit" in capsys.readouterr().out


def test_a_folder_must_be_named():
    with pytest.raises(ConfigError, match="a new folder: fedtail deploy EXP DIR"):
        cli.dispatch(["deploy"])


def test_an_algorithm_of_ones_own_travels_with_the_app(tmp_path):
    source = Path(__file__).with_name("contract_problem.py")
    own = config.user_class(f"{source}:Collecting")()
    app = deploy(tmp_path, experiment=Experiment(algorithm=own))
    assert (app / "fedtail_app" / source.name).read_text() == source.read_text()
    found = load_experiment(app / "fedtail_app").algorithm
    assert type(found).__name__ == "Collecting"
    assert type(found) is not type(own), "it comes from the app's own file"
    assert dataclasses.asdict(found) == dataclasses.asdict(own)


@pytest.mark.parametrize(
    ("experiment", "options", "reason"),
    [
        (Experiment(evaluation=Evaluation(local_models=1)), {"sites": 2}, "local_models"),
        (Experiment(evaluation=Evaluation(local=False)), {"sites": 2}, "explicit"),
        (Experiment(evaluation=Evaluation(local=False, groups=Thirds())), {"sites": 2}, "--share-counts"),
        (dataclasses.replace(SITES, algorithm=config.FedAvg(loss=LogitAdjustment(prior="shared"))),
         {"sites": 2}, "fedavg needs the number of examples of each class"),
        (Experiment(evaluation=Evaluation(finetune=Finetune(epochs=1))), {"states": "node"}, "finetune"),
        (Experiment(evaluation=Evaluation(finetune=Finetune(epochs=1), groups=GROUPS)), {"sites": 2}, "finetune"),
        (Experiment(evaluation=Evaluation(local=False, groups=GROUPS), participation=config.Participation(newcomers=1)),
         {"sites": 2}, "newcomers"),
        (dataclasses.replace(SITES, data=Data(server=10, server_from="digits")), {"sites": 2}, "only for a rehearsal"),
        (dataclasses.replace(SITES, algorithm=ClientDistillation()), {"sites": 2}, "teachers .* only for a rehearsal"),
    ],
)  # fmt: skip
def test_what_cannot_be_deployed_is_refused(experiment, options, reason):
    with pytest.raises(ConfigError, match=reason):
        server.refuse(experiment, Options(**options))


def test_shared_counts_lift_the_refusals():
    prior = config.FedAvg(loss=LogitAdjustment(prior="shared"))
    agreed = Experiment(evaluation=Evaluation(local=False, groups=Thirds()), algorithm=prior)
    server.refuse(agreed, Options(sites=2, share_counts=True))


def check(app, data="", client=0):
    cli.dispatch(["node", "check", str(app), "--client", str(client), "--data", str(data)])


def test_node_check_counts_the_classes_of_a_site(tmp_path, capsys):
    app = deploy(tmp_path, "--sites", "2")
    check(app, npz(tmp_path / "site.npz"))
    text = capsys.readouterr().out
    assert "client 0: 40 examples fit the experiment (fedavg, 10 classes, inputs [1, 8, 8])" in text
    assert text.count("       4\n") == 10


def test_node_check_reads_a_folder_of_images(tmp_path, capsys):
    app = deploy(tmp_path, "--sites", "2")
    for label in ("3", "7"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "images" / label / "a.png")
    check(app, tmp_path / "images")
    assert "client 0: 2 examples fit" in capsys.readouterr().out
    (tmp_path / "images" / "3").rename(tmp_path / "images" / "cat")
    with pytest.raises(DataError, match="no class 'cat'"):
        check(app, tmp_path / "images")


def test_test_data_of_a_site_are_read_beside_its_training_data(tmp_path):
    form = sites.Form((1, 8, 8), tuple("0123456789"), (0.5,), (0.5,))
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "site.npz", x_train=x[:20], y_train=np.arange(20) % 10, x_test=x[20:], y_test=np.arange(10))
    for part, label in (("train", "3"), ("train", "7"), ("test", "7")):
        (tmp_path / "site" / part / label).mkdir(parents=True)
        Image.fromarray(x[0]).save(tmp_path / "site" / part / label / "a.png")
    for name, train, test in (("site.npz", 20, 10), ("site", 2, 1)):
        data = sites.node_data(SITES, form, 3, 1, str(tmp_path / name))
        assert [len(rows) for rows in data.owners] == [0, train, 0]
        assert [len(rows) for rows in data.local_tests] == [0, test, 0]
    held = dataclasses.replace(SITES, data=Data(client_validation=0.25))
    data = sites.node_data(held, form, 3, 1, str(tmp_path / "site.npz"))
    assert [len(rows) for rows in data.owners] == [0, 15, 0]
    assert [len(rows) for rows in data.held] == [0, 5, 0]


def test_classes_of_the_hub_are_matched_by_name(monkeypatch):
    form = sites.Form((1, 8, 8), ("ant", "bee", "cat"), (0.5,), (0.5,))
    x = np.zeros((4, 1, 8, 8), np.uint8)
    names = ("cat", "ant")
    found = assemble("pets", Split(x, np.array([0, 1, 1, 0])), Split(x[:2], np.array([1, 0])), names)
    monkeypatch.setattr(sites.hub, "load", lambda name: found)
    train, test = sites.read_site("hf:some/pets", form)
    assert train.y.tolist() == [2, 0, 0, 2]
    assert test.y.tolist() == [0, 2]
    with pytest.raises(DataError, match="the experiment has no class 'cat'; its classes are ant, bee, dog"):
        sites.read_site("hf:some/pets", form._replace(classes=("ant", "bee", "dog")))


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (np.zeros((4, 9, 9), np.uint8), np.arange(4), r"uint8 \[1, 9, 9\], the experiment's are uint8 \[1, 8, 8\]"),
        (np.zeros((4, 64), np.float32), np.arange(4), r"float32 \[64\]"),
        (np.zeros((4, 8, 8), np.float32), np.arange(4), "uint8"),
        (np.zeros((2, 8, 8), np.uint8), np.array([0, 10]), "labels run from 0 to 10, the experiment has 10 classes"),
        (np.zeros((2, 8, 8), np.uint8), np.array([0.5, 1.0]), "expected class numbers"),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, x, y, reason):
    app = deploy(tmp_path, "--sites", "2")
    with pytest.raises(DataError, match=reason):
        check(app, npz(tmp_path / "site.npz", x, y))


def test_a_site_needs_a_batch(tmp_path):
    app = deploy(tmp_path, "--sites", "2", "--local.min-batch", "5")
    with pytest.raises(DataError, match=r"has 4 examples and thus no batch: the experiment's local.min_batch is 5"):
        check(app, npz(tmp_path / "site.npz", y=np.arange(4)))


def test_a_site_names_data_and_number(tmp_path):
    app = deploy(tmp_path, "--sites", "2")
    for client, data in ((2, npz(tmp_path / "site.npz")), (0, "")):
        with pytest.raises(ConfigError, match="a site names its data and its number"):
            check(app, data, client)
    with pytest.raises(DataError, match=r"there is no such .npz file"):
        check(app, tmp_path / "none.npz")


def test_in_a_rehearsal_a_node_has_its_part_of_the_partition(tmp_path, capsys):
    app = deploy(tmp_path, experiment=Experiment())
    check(app, client=7)
    assert "client 7" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"client must be in \[0, 7\]"):
        check(app, client=8)
    with pytest.raises(ConfigError, match="rehearses"):
        check(app, npz(tmp_path / "site.npz"))


def test_a_node_shares_counts_only_with_the_sites_consent(tmp_path):
    app = deploy(tmp_path, "--sites", "2", "--share-counts")
    run_config = {"sites": 2, "share-counts": True}
    node = {"client": 1, "data": str(npz(tmp_path / "site.npz"))}
    with pytest.raises(ConfigError, match="share-counts=true"):
        Node(app / "fedtail_app", run_config, node).hello()
    assert Node(app / "fedtail_app", run_config, {**node, "share-counts": True}).hello()["counts"] == [4] * 10
    assert "counts" not in Node(app / "fedtail_app", {"sites": 2}, {**node, "share-counts": True}).hello()
    with pytest.raises(ConfigError, match="which client it is"):
        Node(app / "fedtail_app", run_config, {})


def test_the_server_knows_sizes_and_only_shared_counts():
    experiment = dataclasses.replace(SITES, data=Data(validation=2, server=3))
    counts = {0: [1] * 10, 1: [0, 5] + [0] * 8}
    data = sites.server_data(experiment, sites.Holdings([10, 5], [0, 0], counts))
    assert [len(rows) for rows in data.owners] == [10, 5]
    assert data.class_totals().tolist() == [1, 6, *[1] * 8]
    assert data.class_totals(without=[0]).tolist() == [0, 5, *[0] * 8]
    assert (len(data.validation), len(data.server), len(data.columns["x"]), len(data.test["y"])) == (20, 30, 50, 500)
    for rows, each in ((data.validation, 2), (data.server, 3)):
        assert np.bincount(data.columns["y"].numpy()[rows]).tolist() == [each] * 10
    assert not sites.server_data(experiment, sites.Holdings([10, 5], [2, 1])).counts().any()


def test_the_test_authority_signs_what_it_should(tmp_path):
    x509 = pytest.importorskip("cryptography.x509")
    keys = deploy(tmp_path, "--sites", "2", "--tls", "--address", "10.0.0.5:18000", "--names", "fl.example") / "keys"
    ca, leaf = (x509.load_pem_x509_certificate((keys / f"{n}.crt").read_bytes()) for n in ("ca", "server"))
    leaf.verify_directly_issued_by(ca)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(n) for n in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5", "127.0.0.1"]
    assert names.get_values_for_type(x509.DNSName) == ["fl.example", "localhost"]
    secret = ["ca.key", "server.key", "client-0", "client-1"]
    assert all((keys / name).stat().st_mode & 0o77 == 0 for name in secret)
    assert (keys / "client-1.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert json.dumps(sorted(p.name for p in keys.iterdir())).count("client") == 4
