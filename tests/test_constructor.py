"""The constructor takes every argument of AdamW, and what it takes has AdamW's effect."""

import inspect
import threading

import pytest
import torch
from conftest import assert_same, cross_entropy, largest_gap, tiny, train
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from metaadamw_lite import MetaAdamW
from metaadamw_lite.modulator import Modulator

PLAIN = {"alpha_range": 0, "beta_range": 0}
KERNELS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}]
OFF = {"amsgrad": False, "maximize": False, "capturable": False, "differentiable": False}


def gap_to_adamw(batches, groups=lambda model: model.parameters(), between=lambda optimizer: None, **settings):
    """How far training is from AdamW's; ``between`` two halves something may be done to the optimizer."""
    ours, theirs = tiny(dropout=0.0), tiny(dropout=0.0)
    pairs = (
        (ours, MetaAdamW(groups(ours), **PLAIN, **settings)),
        (theirs, torch.optim.AdamW(groups(theirs), **settings)),
    )
    for model, optimizer in pairs:
        train(model, optimizer, batches[:4])
        between(optimizer)
        train(model, optimizer, batches[4:8])
    assert largest_gap(ours.parameters(), tiny().parameters()) > 1e-3
    return largest_gap(ours.parameters(), theirs.parameters())


def test_every_argument_of_adamw_is_accepted_by_its_name():
    ours, theirs = (inspect.signature(cls).parameters for cls in (MetaAdamW, torch.optim.AdamW))
    assert theirs.keys() <= ours.keys()
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.05, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.3}, {"foreach": True}, {"amsgrad": True}],
    ids=str,
)
def test_the_defaults_of_an_adamw_are_its_arguments(batches, settings):
    defaults = torch.optim.AdamW(tiny().parameters(), **settings).defaults
    optimizer = MetaAdamW(tiny().named_parameters(), **defaults)
    assert {name: optimizer.defaults[name] for name in defaults.keys() - {"fused", "foreach"}} == {
        name: value for name, value in defaults.items() if name not in ("fused", "foreach")
    }
    ours, theirs = tiny(), tiny()
    train(ours, MetaAdamW(ours.named_parameters(), **PLAIN, **defaults), batches[:4])
    train(theirs, torch.optim.AdamW(theirs.parameters(), **settings), batches[:4])
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


def test_a_group_of_an_adamw_is_one_of_its_own(batches):
    """With every key that AdamW has put there."""
    ours, theirs = tiny(), tiny()
    groups = torch.optim.AdamW([{"params": list(ours.parameters()), "lr": 0.05}], weight_decay=0.3).param_groups
    train(ours, MetaAdamW(groups, **PLAIN), batches[:4])
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.3), batches[:4])
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


@pytest.mark.parametrize("option", [*OFF, "decoupled_weight_decay"])
def test_what_is_off_changes_nothing(batches, option):
    off = {option: option == "decoupled_weight_decay"}
    models = [tiny(), tiny(), tiny()]
    optimizers = [
        MetaAdamW(models[0].named_parameters()),
        MetaAdamW(models[1].named_parameters(), **off),
        MetaAdamW([{"params": models[2].named_parameters(), **off}]),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, batches[:4])
    for model in models[1:]:
        assert_same(dict(model.state_dict()), dict(models[0].state_dict()))


@pytest.mark.parametrize(
    "wrong", [{"capturable": True}, {"differentiable": True}, {"decoupled_weight_decay": False}], ids=str
)
def test_what_is_not_supported_is_refused_where_it_is_switched_on(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        MetaAdamW(tiny().parameters(), **wrong)
    with pytest.raises(ValueError, match=name):
        MetaAdamW([{"params": list(tiny().parameters()), **wrong}])
    optimizer = MetaAdamW(tiny().parameters())
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **wrong})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"maximize": True}, {"amsgrad": True, "maximize": True}], ids=str
)
class TestAmsgradAndMaximize:
    def test_are_adamws(self, batches, options, kernel):
        assert gap_to_adamw(batches, lr=0.02, weight_decay=0.1, **options, **kernel) <= 1e-12

    def test_are_adamws_in_one_group_of_two(self, batches, options, kernel):
        def groups(model):
            return [{"params": list(model.layers.parameters()), **options}, {"params": list(model.head.parameters())}]

        assert gap_to_adamw(batches, groups, lr=0.02, **kernel) <= 1e-12

    def test_are_adamws_when_they_are_switched_off_in_the_run(self, batches, options, kernel):
        def between(optimizer):
            optimizer.param_groups[0].update(dict.fromkeys(options, False))

        assert gap_to_adamw(batches, between=between, lr=0.02, **options, **kernel) <= 1e-12

    def test_are_adamws_after_stopping_and_going_on(self, batches, options, kernel):
        def between(optimizer):
            optimizer.load_state_dict(optimizer.state_dict())

        assert gap_to_adamw(batches, between=between, lr=0.02, **options, **kernel) <= 1e-12


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_maximize_switched_on_in_the_run_is_adamws(batches, kernel):
    def between(optimizer):
        optimizer.param_groups[0]["maximize"] = True

    assert gap_to_adamw(batches, between=between, lr=0.02, **kernel) <= 1e-12


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"fused": True}], ids=str)
def test_maximizing_the_negative_loss_is_minimizing_the_loss(batches, kernel):
    """With factors that move: features are of the direction that lowers what is optimised."""
    up, down = tiny(dropout=0.0), tiny(dropout=0.0)
    climber = MetaAdamW(up.named_parameters(), maximize=True, lr=0.02, meta_lr=0.1, **kernel)
    descender = MetaAdamW(down.named_parameters(), lr=0.02, meta_lr=0.1, **kernel)
    for batch in batches[:6]:
        for model, optimizer, sign in ((up, climber, -1), (down, descender, 1)):
            optimizer.zero_grad()
            (sign * cross_entropy(model, batch)).backward()
            optimizer.step()
    assert (descender.alpha != 1).all()
    torch.testing.assert_close(climber.alpha, descender.alpha, rtol=0, atol=1e-12)
    assert largest_gap(up.parameters(), down.parameters()) <= 1e-12


def negated(model, batch):
    return -cross_entropy(model, batch)


def test_a_meta_update_of_what_is_maximized_is_that_of_its_negative_minimized(batches):
    phis = []
    for loss_fn, maximize in ((cross_entropy, False), (negated, True)):
        model = tiny(dropout=0.0)
        optimizer = MetaAdamW(model.named_parameters(), maximize=maximize, lr=0.02, meta_lr=0.1)
        for batch in batches[:3]:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
        optimizer.update_attention(model, *batches[3:5], loss_fn, batches[5])
        phis.append([p.detach().clone() for p in optimizer.modulator.parameters()])
    assert largest_gap(phis[0], MetaAdamW(model.named_parameters()).modulator.parameters()) > 1e-6
    assert largest_gap(*phis) < 1e-10


def test_a_meta_update_looks_at_the_step_that_amsgrad_takes(batches):
    """Its gradient, by a difference of two gradients, is that of differentiating twice."""
    phis = []
    for double in (True, False):
        model = tiny(dropout=0.0)
        optimizer = MetaAdamW(model.named_parameters(), lr=0.02, meta_lr=0.1, amsgrad=True)
        train(model, optimizer, batches[:3])
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            optimizer.update_attention(model, *batches[3:5], cross_entropy, batches[5], double_backward=double)
        phis.append([p.detach().clone() for p in optimizer.modulator.parameters()])
    assert largest_gap(*phis) < 1e-6
    assert largest_gap(phis[0], MetaAdamW(model.named_parameters()).modulator.parameters()) > 1e-6


def test_the_loss_decrease_with_amsgrad_is_that_of_the_next_step(batches):
    model = tiny(dropout=0.0)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.02, meta_lr=0.0, amsgrad=True, betas=(0.5, 0.5))
    train(model, optimizer, batches[:3])
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = cross_entropy(model, batches[5]).item()
    optimizer.zero_grad()
    model.load_state_dict(buffers, strict=False)
    cross_entropy(model, batches[3]).backward()
    optimizer.step()
    model.load_state_dict(buffers, strict=False)
    after = cross_entropy(model, batches[5]).item()
    assert losses.loss_decrease == pytest.approx(after - before, abs=1e-9)


# ---------------------------------------------------------------- the kernel


def kernels_called(act):
    """Names of torch's AdamW kernels that ``act`` runs."""
    called = set()

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Listen():
        act()
    return called


def step_of(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_an_argument_the_fused_kernel_is_used(dtype):
    optimizer = MetaAdamW(tiny(dtype).parameters())
    assert "_fused_adamw_" in kernels_called(lambda: step_of(optimizer))


def test_in_float64_the_kernel_is_that_of_adamw_called_alike():
    """So that the trajectories agree to the last digit, whatever rounding a gradient consists of."""
    for cls in (MetaAdamW, torch.optim.AdamW):
        optimizer = cls(tiny().parameters())
        assert "_fused_adamw_" not in kernels_called(lambda optimizer=optimizer: step_of(optimizer))


@pytest.mark.parametrize("kernel", [{"fused": False}, {"foreach": True}, {"foreach": False}], ids=str)
def test_whoever_asks_for_another_kernel_gets_it(kernel):
    optimizer = MetaAdamW(tiny().parameters(), **kernel)
    assert "_fused_adamw_" not in kernels_called(lambda: step_of(optimizer))


def test_a_group_may_ask_for_another_kernel_than_the_rest(batches):
    def groups(model):
        return [{"params": list(model.layers.parameters()), "foreach": True}, {"params": list(model.head.parameters())}]

    assert gap_to_adamw(batches, groups, lr=0.02) <= 1e-12


# ---------------------------------------------------------------- Φ's random start


def in_threads(*jobs):
    errors = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_the_seed_decides_phi_whatever_other_threads_draw():
    expected = MetaAdamW([nn.Parameter(torch.ones(2))], seed=3).modulator.state_dict()
    made, done = [], threading.Event()

    def make():
        made.extend(MetaAdamW([nn.Parameter(torch.ones(2))], seed=3) for _ in range(30))

    def draw():
        while not done.is_set():
            torch.rand(7)

    drawing = [threading.Thread(target=draw) for _ in range(2)]
    for thread in drawing:
        thread.start()
    try:
        in_threads(*[make] * 4)
    finally:
        done.set()
        for thread in drawing:
            thread.join()
    assert len(made) == 120
    for optimizer in made:
        assert_same(dict(optimizer.modulator.state_dict()), dict(expected))


def test_optimizers_of_other_seeds_made_at_the_same_time_do_not_meet():
    expected = {seed: MetaAdamW([nn.Parameter(torch.ones(2))], seed=seed).modulator.state_dict() for seed in range(4)}
    made = {seed: [] for seed in range(4)}

    def make(seed):
        made[seed].extend(MetaAdamW([nn.Parameter(torch.ones(2))], seed=seed) for _ in range(15))

    in_threads(*[lambda seed=seed: make(seed) for seed in range(4)])
    for seed, optimizers in made.items():
        assert len(optimizers) == 15
        for optimizer in optimizers:
            assert_same(dict(optimizer.modulator.state_dict()), dict(expected[seed]))


def test_numbers_that_another_thread_draws_are_those_of_its_seed():
    """The process's generator is never set to another state, not even for a moment."""
    torch.manual_seed(0)
    expected = torch.cat([torch.rand(3) for _ in range(2000)])
    drawn = []

    def draw():
        drawn.extend(torch.rand(3) for _ in range(2000))

    def make():
        for _ in range(20):
            MetaAdamW([nn.Parameter(torch.ones(2))], seed=3)

    torch.manual_seed(0)
    in_threads(draw, make, make)
    assert torch.equal(torch.cat(drawn), expected)


@pytest.mark.parametrize("version", [{}, {"feature_version": "enhanced", "attn_heads": 7, "use_feature_gating": True}])
def test_the_global_generators_are_untouched(version):
    before = torch.get_rng_state()
    MetaAdamW(tiny().named_parameters(), seed=3, **version)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_gives_the_phi_that_it_always_gave():
    """That of torch's own generator, so that earlier runs can be repeated."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        phi = Modulator(6, 1, layers=8, heads=6, hidden_dim=16, alpha_range=1.0, beta_range=1.0, group_embed_dim=0)
    made = MetaAdamW([nn.Parameter(torch.ones(2))], seed=3).modulator
    assert_same(dict(made.state_dict()), dict(phi.state_dict()))
