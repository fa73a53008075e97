"""Distillation at the server, at the clients and from the clients' ensemble: exact values, limits, oracles, what travels."""

import contextlib
import dataclasses

import contract_problem
import numpy as np
import pytest
import torch
from contract_problem import CLASSES, PROBLEMS, distance, federated
from oracles import distillation_oracle as oracle

from fedtail import SGD, Adam, EngineOptions, Experiment, FedAvg, Participation, trees
from fedtail.algorithm import Batch
from fedtail.algorithms.client_distillation import ClientDistillation
from fedtail.algorithms.feddf import FedDF
from fedtail.algorithms.fedmd import FedMD
from fedtail.algorithms.server_distillation import ServerDistillation
from fedtail.config import Data
from fedtail.data.plan import make_plan
from fedtail.distillation import PROJECTOR, distil, match, weighted_mean
from fedtail.engines.base import Sink
from fedtail.errors import ConfigError
from fedtail.experiment import Federation
from fedtail.federation import whole_batches
from fedtail.heads import features
from fedtail.models.specs import MLP
from fedtail.task import Variables

PLAIN = SGD(lr=0.1, momentum=0.5)
COLUMNS = ("x", "y", "teacher", "teacher_features")
ENGINES = [EngineOptions(name="loop"), EngineOptions(name="parallel", workers=2), EngineOptions(name="vmap")]
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)


def federation(algorithm, problem="ragged", engine=ENGINES[0], **changes):
    chosen = PROBLEMS[problem]
    data = federated(chosen.sizes, chosen.images, COLUMNS)
    whole = contract_problem.problems.experiment(algorithm, problem, engine)
    return Federation(dataclasses.replace(whole, **changes), data)


def batch_of(n=6, classes=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(n, classes, generator=g, dtype=dtype) for _ in range(2))
    return z, t, Batch({"x": z, "y": torch.arange(n) % classes}, None, {})


def after(algorithm, rounds=2, **more):
    with contextlib.closing(federation(algorithm, **more)) as running:
        for _ in range(rounds):
            running.advance(running.step())
        return running.server, dict(running.states)


# ---- the loss


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_gradient_of_the_divergence_is_the_scaled_difference_of_the_softmaxes(temperature):
    z, t, batch = batch_of()
    z.requires_grad_()
    (found,) = torch.autograd.grad(distil(z, t, temperature, batch), z)
    expected = temperature * (torch.softmax(z / temperature, 1) - torch.softmax(t / temperature, 1)) / len(z)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
    shifted = (t + torch.arange(len(t), dtype=t.dtype)[:, None]).requires_grad_()
    (none,) = torch.autograd.grad(distil(shifted, t, temperature, batch), shifted)
    assert float(none.abs().max()) < 1e-12


def test_the_divergence_is_zero_for_equal_logits_and_finite_for_large_ones():
    z, t, batch = batch_of(dtype=torch.float32)
    assert float(distil(z, z, 1.0, batch)) == 0
    large = 100 * torch.sign(t)
    assert torch.isfinite(distil(large, -large, 1.0, batch))
    assert float(distil(z, large, 1.0, batch)) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_terms_equal_the_formulas_written_out(temperature):
    z, t, batch = batch_of()
    assert abs(float(distil(z, t, temperature, batch) - oracle.divergence(z, t, temperature))) < 1e-12
    h, f, p = (torch.randn(*s, dtype=torch.float64) for s in ((6, 3), (6, 7), (7, 3)))
    assert abs(float(match(h, p, f, batch) - oracle.angle_loss(h, p, f))) < 1e-12
    # P h in the direction of f: nothing is left
    assert float(match(h, p, 3 * h @ p.T, batch)) < 1e-12


def test_padded_rows_of_a_batch_do_not_count():
    z, t, batch = batch_of()
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=z.dtype)
    short = Batch({"x": z[:4], "y": batch.y[:4]}, None, {})
    torch.testing.assert_close(distil(z, t, 2.0, batch._replace(mask=mask)), distil(z[:4], t[:4], 2.0, short))


# ---- limits


@every_engine
@pytest.mark.parametrize(
    "algorithm",
    [
        ServerDistillation(optimizer=PLAIN, server_steps=0),
        ServerDistillation(optimizer=PLAIN, lam_kd=0.0, lam_feat=0.0, lam_ce=0.0),
        ClientDistillation(optimizer=PLAIN, lam=0.0),
        FedDF(optimizer=PLAIN, server_steps=0),
    ],
    ids=["no steps", "no terms", "client", "feddf"],
)
@pytest.mark.parametrize("problem", ["ragged", "batchnorm"])
def test_without_distillation_it_is_fedavg_bit_for_bit(algorithm, engine, problem):
    server, _ = after(algorithm, engine=engine, problem=problem)
    expected, _ = after(FedAvg(optimizer=PLAIN), engine=engine, problem=problem)
    assert trees.equal(server if isinstance(server, Variables) else server.model, expected)


def test_the_mean_of_collected_updates_is_the_engines():
    g = torch.Generator().manual_seed(0)
    updates = [{"a": torch.randn(3, generator=g, dtype=torch.float64), "n": torch.tensor(k)} for k in (1, 2, 6)]
    found = weighted_mean(updates, torch.tensor([9.0, 1.0, 2.0], dtype=torch.float64))
    expected = (9 * updates[0]["a"] + updates[1]["a"] + 2 * updates[2]["a"]) / 12
    torch.testing.assert_close(found["a"], expected, rtol=0, atol=1e-15)
    assert (found["n"], found["n"].dtype) == (torch.tensor(2), torch.int64)  # 23 / 12 = 1.9, rounded
    assert weighted_mean(updates[:1], torch.tensor([5.0])) is not None
    assert torch.equal(weighted_mean(updates[:1], torch.tensor([5.0]))["a"], updates[0]["a"])


def test_feddf_of_one_client_in_agreement_moves_nothing_at_first():
    """One client: the ensemble is the model itself, so the gradient is 0 and Adam makes no step (no BatchNorm)."""
    server, _ = after(FedDF(optimizer=PLAIN), rounds=1, problem="alone")
    assert distance(server.model, server.before) < 1e-6
    assert distance(server.model, after(FedAvg(optimizer=PLAIN), rounds=1, problem="alone")[0]) < 1e-6


# ---- what the server does, against plain PyTorch


def network(variables):
    """The problem's network with BatchNorm, holding these variables."""
    net = PROBLEMS["batchnorm"].model.build((1, 6, 6), CLASSES).double()
    net.load_state_dict({**variables.params, **variables.buffers})
    return net


def server_batches(running, algorithm):
    """The batches of the server's steps in the present round: prepared inputs, labels, teacher's columns."""
    data, work = running.data, whole_batches(algorithm.server_work, len(running.data.server))
    seed = running.experiment.seed
    plan = make_plan(seed, running.round, 0, data.clients, data.server, work, {})
    for rows in np.split(plan.order, np.cumsum(plan.lengths)[:-1]):
        index = torch.from_numpy(rows)
        x = data.prepare(data.columns["x"][index], torch.float64)  # not augmented, although the clients' images are
        yield x, data.columns["y"][index], data.columns["teacher"][index], data.columns["teacher_features"][index]


def assert_close(found, net, tolerance=1e-9):
    for name, value in net.state_dict().items():
        mine = {**found.params, **found.buffers}[name]
        torch.testing.assert_close(mine, value.detach().to(mine.dtype), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("options", "oracles"),
    [
        ({}, {}),
        ({"temperature": 4.0, "server_steps": 5, "server_batch": 3}, {"temperature": 4.0}),
        ({"lam_kd": 0.5, "lam_ce": 0.7, "server_batch": 4, "server_steps": 6}, {"kd": 0.5, "ce": 0.7}),
        ({"lam_feat": 0.9, "server_batch": 4}, {"feat": 0.9}),
        ({"server_optimizer": SGD(lr=0.05), "server_cosine": False, "server_batch": 5},
         {"optimizer": "sgd", "lr": 0.05, "cosine": False}),
        ({"server_optimizer": Adam(lr=0.01, clip=0.1), "server_batch": 4}, {"lr": 0.01, "clip": 0.1}),
    ],
    ids=["default", "T and steps", "labels", "features", "sgd", "clip"],
)  # fmt: skip
def test_the_servers_steps_equal_a_plain_torch_loop_in_two_rounds(options, oracles):
    algorithm = ServerDistillation(optimizer=PLAIN, **options)
    with contextlib.closing(federation(algorithm, "batchnorm")) as running:
        projector = running.server.projector.get(PROJECTOR)
        for _ in range(2):  # the optimizer is fresh in the second round too
            batches = list(server_batches(running, algorithm))
            record = running.step()
            assert len(batches) == max(algorithm.server_steps, 1) or algorithm.server_steps == -1
            net, projector = oracle.server_steps(
                network(running.server.before), batches, projector=projector, **oracles
            )
            assert_close(running.server.model, net)
            if projector is not None:
                torch.testing.assert_close(running.server.projector[PROJECTOR], projector.detach(), rtol=0, atol=1e-9)
            assert np.isfinite(record["server"]["kd"])
            running.advance(record)


def test_the_students_statistics_move_at_the_server():
    """Training mode: BatchNorm's running statistics are re-estimated on the server's images."""
    server, _ = after(ServerDistillation(optimizer=PLAIN), rounds=1, problem="batchnorm")
    before, now = server.before.buffers, server.model.buffers
    assert all(not torch.equal(before[k], now[k]) for k in now)


def test_feddf_equals_a_plain_torch_loop_with_the_clients_models_as_teachers():
    algorithm = FedDF(optimizer=PLAIN, server_batch=4, temperature=1.5)
    with contextlib.closing(federation(algorithm, "batchnorm")) as running:
        start = running.server.model
        batches = list(server_batches(running, algorithm))
        ids = running.draw(algorithm.phases(0, 3)[0])
        running.step()
        members = [trees.tree_map(lambda v, k=k: v[k], running.server.members) for k in range(len(ids))]
        sizes = torch.tensor([len(running.data.owners[i]) for i in ids], dtype=torch.float64)
        for name in start.params:  # wbar is the mean of the members by size
            mean = sum(n * m.params[name] for n, m in zip(sizes, members, strict=True)) / sizes.sum()
            torch.testing.assert_close(running.server.before.params[name], mean, rtol=0, atol=1e-12)
        nets = [network(member) for member in members]
        labelled = [(x, y, oracle.ensemble(nets, x), f) for x, y, _, f in batches]
        net, _ = oracle.server_steps(network(running.server.before), labelled, temperature=1.5, clip=5.0)
        assert_close(running.server.model, net)


def test_a_clients_distillation_equals_a_plain_torch_loop():
    algorithm = ClientDistillation(optimizer=SGD(lr=0.1, momentum=0.5), lam=0.7, temperature=3.0)
    whole = dataclasses.replace(
        contract_problem.problems.experiment(algorithm, "alone"), model=PROBLEMS["batchnorm"].model
    )
    data = dataclasses.replace(federated((11,), True, COLUMNS), augmentation="none")
    with contextlib.closing(Federation(whole, data)) as running:
        start, [plan] = network(running.server), running.engine.setting.plans(running.context().round, 0, [0]).values()
        batches = []
        for rows in np.split(plan.order, np.cumsum(plan.lengths)[:-1]):
            index = torch.from_numpy(rows)
            x = data.prepare(data.columns["x"][index], torch.float64)
            batches.append((x, data.columns["y"][index], data.columns["teacher"][index]))
        record = running.step()
        net = oracle.client(start, batches, lam=0.7, temperature=3.0, lr=0.1, momentum=0.5)
        assert_close(running.server, net)
        assert record["train"]["loss"] == pytest.approx(record["train"]["ce"] + record["train"]["kd"])


def test_fedmd_is_a_plain_torch_loop_of_two_rounds():
    algorithm = FedMD(optimizer=SGD(lr=0.1, momentum=0.5), public_batches=2, public_batch=3)
    chosen = federated((9, 7), True, COLUMNS)
    data = dataclasses.replace(chosen, augmentation="none")
    whole = dataclasses.replace(
        contract_problem.problems.experiment(algorithm, "alone"), model=PROBLEMS["batchnorm"].model
    )
    with contextlib.closing(Federation(dataclasses.replace(whole, participation=Participation()), data)) as running:
        nets = [network(running.task.initial) for _ in range(2)]
        for index in range(2):
            public = running.server.images
            with torch.no_grad():
                consensus = sum(net.eval()(public) for net in nets) / 2
            plans = running.engine.setting.plans(
                running.context().round, 0, [0, 1]
            )  # training is the only one that counts
            record = running.step()
            if index:
                torch.testing.assert_close(running.server.consensus, consensus, rtol=0, atol=1e-9)
                assert record["ask"]["clients"] == 2
                nets = [oracle.towards(net, public, consensus, 3, lr=0.1, momentum=0.5) for net in nets]
            for k, plan in plans.items():
                batches = []
                for rows in np.split(plan.order, np.cumsum(plan.lengths)[:-1]):
                    rows = torch.from_numpy(rows)
                    x = data.prepare(data.columns["x"][rows], torch.float64)
                    batches.append((x, data.columns["y"][rows], torch.zeros(len(rows), CLASSES, dtype=torch.float64)))
                nets[k] = oracle.client(nets[k], batches, lam=0.0, temperature=1.0, lr=0.1, momentum=0.5)
                assert_close(running.states[k], nets[k])
            running.advance(record)


def test_fedmd_of_one_client_trains_at_home_alone():
    """It agrees with itself: the consensus moves nothing, and FedAvg of one client is the same training."""
    work = {"participation": Participation(), "schedule": contract_problem.problems.CONSTANT}
    with contextlib.closing(federation(FedMD(optimizer=PLAIN), "alone", **work)) as running:
        for _ in range(3):
            running.advance(running.step())
        own = running.states[0]
    expected, _ = after(FedAvg(optimizer=PLAIN), rounds=3, problem="alone", **work)
    assert distance(own, expected) < 1e-12


# ---- what travels, what is judged


def test_what_travels_is_what_fedavg_sends():
    algorithm = ServerDistillation(optimizer=PLAIN, lam_feat=1.0)
    forms = []
    for method in (algorithm, FedAvg(optimizer=PLAIN)):
        with contextlib.closing(federation(method, "batchnorm")) as running:
            running.advance(running.step())
            phase = method.phases(1, 3)[0]
            ctx = running.context(phase, 4)
            message = running.message(ctx)
            setting = running.engine.setting
            plans = setting.plans(ctx.round, 0, running.draw(phase))
            sink = Sink(list(plans), collect=True)
            running.engine.cohort(ctx.round, 0, message, running.states, plans, sink)
            forms.append((type(message), contract_problem.form(message), [contract_problem.form(u) for u in sink.updates],
                          sink.weights, dict(sink.states)))  # fmt: skip
    assert forms[0] == forms[1]
    assert not any("teacher" in name for name in forms[0][1])


def traffic(algorithm, rounds=2):
    """Bytes of each round, without the sums over rounds, and the clients of its cohort."""
    found = []
    with contextlib.closing(federation(algorithm)) as running:
        for _ in range(rounds):
            record = running.step()
            found.append((record["bytes"]["down"], record["bytes"]["up"], record.get("train", {}).get("clients")))
            running.advance(record)
    return found


@pytest.mark.parametrize("method", [ServerDistillation, ClientDistillation, FedDF], ids=lambda m: m.__name__)
def test_the_bytes_of_a_distillation_are_those_of_fedavg(method):
    assert traffic(method(optimizer=PLAIN)) == traffic(FedAvg(optimizer=PLAIN))


def test_without_clients_no_byte_travels():
    assert traffic(ServerDistillation(clients=False)) == [(0, 0, None)] * 2


def test_the_bytes_of_fedmd_are_images_once_and_scores_both_ways():
    """Six images of five features in float64; an update after training is one number. Nothing is sent down in round 0."""
    first, second = traffic(FedMD(optimizer=PLAIN, public_batches=2, public_batch=3))
    clients, images, scores = first[2], 8 * 6 * 5, 8 * 6 * CLASSES
    assert first == (0, 8 * clients, clients)
    assert second == (clients * (images + scores), clients * (scores + 8), clients)


def test_the_model_before_the_servers_steps_is_the_mean_of_what_was_uploaded():
    """In round 0 that is FedAvg's model, whose scores stand under readings."before"."""
    algorithm = ServerDistillation(optimizer=PLAIN)
    with (
        contextlib.closing(federation(algorithm)) as one,
        contextlib.closing(federation(FedAvg(optimizer=PLAIN))) as two,
    ):
        one.step()
        two.step()
        assert trees.equal(one.server.before, two.server)
        assert not trees.equal(one.server.model, two.server)
        scores, expected = one.score(), two.score()
        assert scores["readings"]["before"]["test"] == expected["test"]
        assert scores["readings"]["before"]["local"] == expected["local"]
        assert trees.equal(one.variables(), one.server.model)


def test_without_clients_the_student_learns_from_the_teacher_alone():
    """KD only: no phase, nobody's data; as many server steps; the oracle's loop from the initial model."""
    algorithm = ServerDistillation(clients=False, server_batch=4)
    with contextlib.closing(federation(algorithm, "batchnorm")) as running:
        batches = list(server_batches(running, algorithm))
        record = running.step()
        assert "train" not in record
        net, _ = oracle.server_steps(network(running.task.initial), batches)
        assert_close(running.server.model, net)
        assert "readings" not in running.score()


def test_a_server_batch_larger_than_the_data_is_all_of_them():
    work = whole_batches(ServerDistillation(server_batch=128, server_steps=3).server_work, 50)
    assert work.lengths(50).tolist() == [50, 50, 50]
    assert whole_batches(ServerDistillation().server_work, 257).lengths(257).tolist() == [
        128,
        128,
    ]  # not a batch of one
    assert whole_batches(ServerDistillation().server_work, 300).lengths(300).tolist() == [128, 128, 44]


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ServerDistillation(lam_kd=-1.0), "lam_kd"),
        (lambda: ServerDistillation(temperature=0.0), "temperature > 0"),
        (lambda: ServerDistillation(server_steps=-2), "server_steps >= -1"),
        (lambda: ClientDistillation(lam=-0.1), "lam >= 0"),
        (lambda: ClientDistillation(temperature=-1.0), "temperature"),
        (lambda: FedDF(temperature=0.0), "FedDF"),
        (lambda: FedMD(public_batch=0), "FedMD"),
        (lambda: FedDF(server_batch=0), "server_batch >= 1"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_features_are_refused_where_there_are_none():
    chosen = PROBLEMS["ragged"]
    whole = contract_problem.problems.experiment(ServerDistillation(lam_feat=1.0), "ragged")
    with pytest.raises(ConfigError, match="class scores alone"):
        Federation(whole, federated(chosen.sizes, chosen.images, ("x", "y", "teacher")))


def test_server_data_are_needed_and_labels_of_others_are_not_there():
    whole = Experiment(algorithm=ServerDistillation(), data=Data(server=0))
    data = federated((4, 4), False, COLUMNS)
    with pytest.raises(ConfigError, match="needs data at the server"):
        Federation(whole, dataclasses.replace(data, server=np.zeros(0, np.int64)))
    labelled = Experiment(algorithm=ServerDistillation(lam_ce=0.1), data=Data(server=1, server_from="mnist"))
    with pytest.raises(ConfigError, match="needs labels of the server's data"):
        Federation(labelled, data)
    Federation(dataclasses.replace(labelled, algorithm=ServerDistillation()), data).close()  # unlabelled: fine


def test_the_columns_of_a_methods_server_do_not_reach_its_clients():
    algorithm = ServerDistillation(lam_feat=0.5)
    assert tuple(algorithm.columns) == ("x", "y")
    assert tuple(algorithm.server_columns) == COLUMNS
    assert tuple(ServerDistillation().server_columns) == COLUMNS[:3]


def test_the_student_is_passed_once_a_step_with_and_without_the_feature_term():
    """One pass a step: with the feature term BatchNorm's counter moves by one a step, as without it."""
    for lam in (0.0, 1.0):
        server, _ = after(
            ServerDistillation(lam_feat=lam, server_steps=3, server_batch=4), rounds=1, problem="batchnorm"
        )
        moved = server.model.buffers["bn1.num_batches_tracked"] - server.before.buffers["bn1.num_batches_tracked"]
        assert int(moved) == 3


def test_features_of_the_student_are_those_that_reach_its_head():
    with contextlib.closing(federation(ServerDistillation(), model=MLP(hidden=(6,)))) as running:
        x = running.data.columns["x"][:3]
        h = features(running.worker, running.server.model, x)
        assert h.shape == (3, 6)
