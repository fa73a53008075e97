"""The optimizers step by step against torch.optim, and the three sets of operations against one another."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtail import trees
from fedtail.errors import ConfigError
from fedtail.optim import SGD, Adam, Foreach, ForeachInPlace, Nadam, Partition, PerKey, clip_by_norm

OPERATIONS = [PerKey(), Foreach(), ForeachInPlace()]
STEPS = 12


def problem(dtype=torch.float64):
    """Start and gradients of two tensors over twelve steps."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"layer.weight": (4, 3), "layer.bias": (4,), "head.weight": (2, 4)}
    start = {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in shapes.items()}
    grads = [
        {k: torch.randn(s, generator=generator, dtype=dtype) * (step + 1) for k, s in shapes.items()}
        for step in range(STEPS)
    ]
    return start, grads


def ours(optimizer, ops, dtype=torch.float64, scale=lambda step: 1.0):
    """Parameters after each step; every step gets tensors that it may overwrite."""
    start, grads = problem(dtype)
    params, found = trees.clone(start), []
    state = optimizer.init(params)
    for step, g in enumerate(grads):
        params, state = optimizer.update(ops, trees.clone(g), state, params, scale(step))
        found.append(trees.clone(params))
    return found


def torchs(make, clip=0.0, scale=lambda step: 1.0):
    """The same with an optimizer of torch's; `scale` sets the learning rate of each step."""
    start, grads = problem()
    params = {k: v.clone().requires_grad_() for k, v in start.items()}
    optimizer, found = make(list(params.values())), []
    rate = optimizer.param_groups[0]["lr"]
    for step, g in enumerate(grads):
        for k, p in params.items():
            p.grad = g[k].clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(params.values()), clip)
        optimizer.param_groups[0]["lr"] = rate * scale(step)
        optimizer.step()
        found.append(trees.clone(params))
    return found


def close(found, expected, atol):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for k in b:
            torch.testing.assert_close(
                a[k], b[k], rtol=atol, atol=atol, msg=lambda m, k=k, step=step: f"{k}, step {step}: {m}"
            )


SGDS = [
    dict(momentum=m, nesterov=n, weight_decay=w, clip=c)
    for m, n, w, c in itertools.product((0.0, 0.9), (False, True), (0.0, 0.1), (0.0, 5.0))
    if m or not n
]  # fmt: skip
ADAMS = [
    dict(decoupled=d, weight_decay=w, clip=c, beta1=b1, beta2=b2, eps=e)
    for d, w, c, (b1, b2, e) in itertools.product((False, True), (0.0, 0.1), (0.0, 5.0), ((0.9, 0.999, 1e-8), (0.5, 0.9, 1e-3)))
]  # fmt: skip


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("options", SGDS, ids=str)
def test_sgd_equals_torchs(options, ops):
    def make(params):
        return torch.optim.SGD(
            params,
            lr=0.05,
            momentum=options["momentum"],
            nesterov=options["nesterov"],
            weight_decay=options["weight_decay"],
        )

    close(ours(SGD(lr=0.05, **options), ops), torchs(make, options["clip"]), 1e-12)


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("options", ADAMS, ids=str)
def test_adam_and_adamw_equal_torchs(options, ops):
    def make(params):
        cls = torch.optim.AdamW if options["decoupled"] else torch.optim.Adam
        return cls(
            params,
            lr=0.05,
            betas=(options["beta1"], options["beta2"]),
            eps=options["eps"],
            weight_decay=options["weight_decay"],
        )

    close(ours(Adam(lr=0.05, **options), ops), torchs(make, options["clip"]), 1e-12)


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
def test_a_schedule_scales_the_learning_rate(ops):
    def scale(step):
        return 0.5 ** (step // 3)

    close(
        ours(SGD(lr=0.05, momentum=0.9), ops, scale=scale),
        torchs(lambda p: torch.optim.SGD(p, 0.05, 0.9), scale=scale),
        1e-12,
    )
    # decoupled decay is scaled too, as in torch.optim.AdamW
    expected = torchs(lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1), scale=scale)
    close(ours(Adam(lr=0.05, weight_decay=0.1, decoupled=True), ops, scale=scale), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "optimizer", [*(SGD(lr=0.05, **o) for o in SGDS), *(Adam(lr=0.05, **o) for o in ADAMS)], ids=str
)
def test_all_operations_give_the_same_bits(optimizer, dtype):
    per_key, lists, in_place = (ours(optimizer, ops, dtype) for ops in OPERATIONS)
    assert all(trees.equal(a, b) for a, b in zip(lists, in_place, strict=True))
    if isinstance(optimizer, SGD):  # torch's fused step rounds less often
        close(per_key, lists, 1e-6 if dtype == torch.float32 else 1e-14)
    else:
        assert all(trees.equal(a, b) for a, b in zip(per_key, lists, strict=True))


def test_sgd_by_hand():
    """Momentum .5, lr .1, gradients 1, 1: buffers 1, 1.5; parameter 0 -> -.1 -> -.25. Nesterov adds .5 buffer: -.15, -.325."""
    for nesterov, expected in ((False, [-0.1, -0.25]), (True, [-0.15, -0.325])):
        optimizer, params = SGD(lr=0.1, momentum=0.5, nesterov=nesterov), {"w": torch.zeros(1, dtype=torch.float64)}
        state = optimizer.init(params)
        for value in expected:
            params, state = optimizer.update(PerKey(), {"w": torch.ones(1, dtype=torch.float64)}, state, params)
            assert float(params["w"]) == pytest.approx(value, abs=1e-15)


BINARY = [("add", ()), ("add", (0.3,)), ("mul", ()), ("div", ())]
UNARY = [
    ("scale", (0.7,)),
    ("scale", (torch.tensor(0.7, dtype=torch.float64),)),
    ("shift", (0.3,)),
    ("sqrt", ()),
    ("copy", ()),
    ("norm", ()),
]


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(("name", "extra"), BINARY, ids=str)
def test_only_the_first_argument_may_be_overwritten(ops, name, extra):
    a, b = ({k: v.abs() + 0.1 for k, v in tree.items()} for tree in (problem()[0], problem()[1][0]))
    first, second = trees.clone(a), trees.clone(b)
    result = getattr(ops, name)(first, second, *extra)
    assert trees.equal(second, b)
    assert trees.equal(result, getattr(PerKey(), name)(a, b, *extra))
    in_place = isinstance(ops, ForeachInPlace)
    assert all((result[k].data_ptr() == first[k].data_ptr()) == in_place for k in a)
    assert in_place or trees.equal(first, a)


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(("name", "extra"), UNARY, ids=str)
def test_operations_of_one_argument(ops, name, extra):
    a = {k: v.abs() + 0.1 for k, v in problem()[0].items()}
    first = trees.clone(a)
    result = getattr(ops, name)(first, *extra)
    assert trees.equal(result, getattr(PerKey(), name)(a, *extra))
    if name in ("copy", "norm") or not isinstance(ops, ForeachInPlace):
        assert trees.equal(first, a)
    if name == "copy":
        assert all(result[k].data_ptr() != first[k].data_ptr() for k in a)
    assert trees.equal(getattr(ops, name)({}, *extra), {}) if name != "norm" else True


@pytest.mark.parametrize("ops", [PerKey(), Foreach()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(
    "optimizer", [SGD(nesterov=True, weight_decay=0.1, clip=1.0), Adam(weight_decay=0.1, decoupled=True, clip=1.0)]
)
def test_update_is_pure_without_donation(ops, optimizer):
    params, grads = problem()
    state = optimizer.init(params)
    _, state = optimizer.update(ops, grads[0], state, params)
    inputs = (params, grads[1], state)
    before = trees.clone(inputs)
    optimizer.update(ops, grads[1], state, params)
    assert trees.equal(inputs, before)


def test_partition_updates_each_group_by_its_own_optimizer():
    """The longest prefix counts, and a group that gets no gradients keeps its parameters and its state."""
    start, grads = problem()
    parts = {"": SGD(lr=0.1), "layer.": Adam(lr=0.01), "layer.bias": SGD(lr=0.5, momentum=0.0)}
    optimizer = Partition(parts=parts)
    for ops in OPERATIONS:
        params = trees.clone(start)
        state = optimizer.init(params)
        for g in grads:
            params, state = optimizer.update(ops, trees.clone(g), state, params)
        for name, part in (
            ("head.weight", parts[""]),
            ("layer.weight", parts["layer."]),
            ("layer.bias", parts["layer.bias"]),
        ):
            alone = {name: start[name].clone()}
            own = part.init(alone)
            for g in grads:
                alone, own = part.update(PerKey(), {name: g[name].clone()}, own, alone)
            assert torch.equal(params[name], alone[name]), name
        before = trees.clone((params, state))
        params, state = optimizer.update(ops, {"head.weight": grads[0]["head.weight"].clone()}, state, params)
        assert not torch.equal(params["head.weight"], before[0]["head.weight"])
        assert torch.equal(params["layer.weight"], before[0]["layer.weight"])
        assert trees.equal(state["layer."], before[1]["layer."])
    with pytest.raises(ConfigError, match=r"no prefix of \['layer'\] matches the parameter 'head.weight'"):
        Partition(parts={"layer": SGD()}).init(start)


@pytest.mark.parametrize("optimizer", [SGD(), Adam(), Partition(parts={"": Adam()})], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
def test_nothing_to_train(optimizer, ops):
    """A method may freeze everything in some round: no parameters, no step, no error."""
    state = optimizer.init({})
    params, state = optimizer.update(ops, {}, state, {})
    assert params == {}


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.floats(0.01, 50))
def test_clipping_bounds_the_global_norm_and_keeps_the_direction(values, limit):
    grads = {"a": torch.tensor(values[:1], dtype=torch.float64), "b": torch.tensor(values[1:], dtype=torch.float64)}
    whole = torch.tensor(values, dtype=torch.float64)
    cut = clip_by_norm(PerKey(), grads, limit)
    found = torch.cat([cut["a"], cut["b"]])
    assert float(found.norm()) <= limit
    if float(whole.norm()) + 1e-6 <= limit:
        assert torch.equal(found, whole)
    else:
        torch.testing.assert_close(found, whole * limit / (whole.norm() + 1e-6), rtol=1e-12, atol=1e-12)
    assert clip_by_norm(PerKey(), grads, 0.0) is grads


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=0.0), "SGD.lr must be > 0, got 0.0."),
        (lambda: SGD(lr=float("nan")), "SGD.lr must be > 0, got nan."),
        (lambda: SGD(momentum=1.0), "SGD.momentum must be in [0, 1), got 1.0."),
        (lambda: SGD(momentum=-0.1), "SGD.momentum must be >= 0, got -0.1."),
        (lambda: SGD(weight_decay=-1.0), "SGD.weight_decay must be >= 0, got -1.0."),
        (lambda: SGD(clip=-1.0), "SGD.clip must be >= 0, got -1.0."),
        (lambda: Adam(eps=0.0), "Adam.eps must be > 0, got 0.0."),
        (lambda: Adam(beta2=1.0), "Adam.beta1 and Adam.beta2 must be in [0, 1), got 0.9 and 1.0."),
    ],
)
def test_impossible_options(make, message):
    with pytest.raises(ConfigError) as found:
        make()
    assert str(found.value) == message


def parabola(optimizer, ops, steps):
    """The iterates of f(a) = 1.5 a^2 from 1.5."""
    params = {"a": torch.tensor(1.5, dtype=torch.float64)}
    state, found = optimizer.init(params), []
    for _ in range(steps):
        params, state = optimizer.update(ops, {"a": 3 * params["a"]}, state, {"a": params["a"].clone()})
        found.append(float(params["a"]))
    return found


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
def test_nadam_on_a_parabola(ops):
    """The numbers of Keras' Nadam; torch's with its own momentum_decay would be at 1.4919283 after ten steps."""
    found = parabola(Nadam(), ops, 10)
    expected = {1: 1.4989372, 2: 1.4981639, 3: 1.4974529, 10: 1.4922311}
    assert {t: round(found[t - 1], 7) for t in expected} == expected


def test_nadam_by_its_formulas():
    """In plain Python: u_t, the product U_t, two means, and the look ahead."""
    a, m, v, product = 1.5, 0.0, 0.0, 1.0
    for t, found in enumerate(parabola(Nadam(), PerKey(), 25), 1):
        g = 3 * a
        now, ahead = (0.9 * (1 - 0.5 * 0.96**s) for s in (t, t + 1))
        product *= now
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        hat = ahead * m / (1 - product * ahead) + (1 - now) * g / (1 - product)
        a -= 0.001 * hat / ((v / (1 - 0.999**t)) ** 0.5 + 1e-7)
        assert found == pytest.approx(a, abs=1e-12)


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_nadam_is_torchs_with_a_faster_decay(ops, clip):
    def make(params):
        return torch.optim.NAdam(params, lr=0.01, betas=(0.8, 0.99), eps=1e-7, momentum_decay=1.0)

    found = ours(Nadam(lr=0.01, beta1=0.8, beta2=0.99, clip=clip), ops)
    close(found, torchs(make, clip), 1e-9)


def test_nadam_under_a_schedule_scales_the_step():
    params, grads = {"a": torch.ones(3, dtype=torch.float64)}, {"a": torch.arange(1.0, 4.0, dtype=torch.float64)}
    whole, half = (Nadam().update(PerKey(), trees.clone(grads), Nadam().init(params), trees.clone(params), s)[0]["a"]
                   for s in (1.0, 0.5))  # fmt: skip
    torch.testing.assert_close(1 - half, (1 - whole) / 2)


@pytest.mark.parametrize("option", [{"beta1": 0.0}, {"beta2": 1.0}, {"lr": 0.0}, {"eps": 0.0}, {"clip": -1.0}])
def test_nadams_options_have_ranges(option):
    with pytest.raises(ConfigError, match=r"Nadam\."):
        Nadam(**option)


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
def test_decoupled_decay_of_sgd_as_keras_has_it(ops):
    """p <- p (1 - lr wd), biases too; buf <- .9 buf + g; p <- p - lr (g + .9 buf)."""
    optimizer = SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.3, decoupled=True)
    start, grads = problem()
    buffer = {k: torch.zeros_like(v) for k, v in start.items()}
    for g, found in zip(grads, ours(optimizer, ops), strict=True):
        for k in start:
            buffer[k] = 0.9 * buffer[k] + g[k]
            start[k] = start[k] * (1 - 0.01 * 0.3) - 0.01 * (g[k] + 0.9 * buffer[k])
            torch.testing.assert_close(found[k], start[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ops", OPERATIONS, ids=lambda o: type(o).__name__)
def test_without_a_gradient_decay_is_one_factor(ops):
    optimizer = SGD(lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-4, decoupled=True)
    start, _ = problem()
    zero = {k: torch.zeros_like(v) for k, v in start.items()}
    found, _ = optimizer.update(ops, zero, optimizer.init(start), trees.clone(start))
    for k, v in start.items():
        torch.testing.assert_close(found[k], v * (1 - 1e-7), rtol=1e-15, atol=0)
        assert not torch.equal(found[k], v)
