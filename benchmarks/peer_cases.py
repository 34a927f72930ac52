"""Both sides of each case of ``peer_bugs``: functions that do something and say what came of it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs.attacks import FGSM, PGD, REGISTRY, DeepFool
from mohs.errors import MohsError

from . import peers
from .subjects import SEED

ROWS = 32

# ---- the common ground --------------------------------------------------------------------------------------


@cache
def _net() -> nn.Module:
    return mohs.models.load("bundled:fashion-natural")


@cache
def _images() -> tuple[Tensor, Tensor]:
    x, y = mohs.data.load("bundled:fashion-mnist", n=4 * ROWS)
    with torch.no_grad():
        right = _net()(x).argmax(1) == y
    return x[right][:ROWS].clone(), y[right][:ROWS].clone()


class _Moved(nn.Module):
    """The net with a number added to every logit, or on inputs in another unit: the same classifier."""

    def __init__(self, net: nn.Module, add: float = 0.0, unit: float = 1.0) -> None:
        super().__init__()
        self.net, self.add, self.unit = net, add, unit
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / self.unit) + self.add


def _fooled(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) != y).double().mean())


def _median(net: nn.Module, x0: Tensor, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        wrong = net(x).argmax(1) != y
    size = (x - x0).flatten(1).norm(dim=1).masked_fill(~wrong, math.inf)
    return float(size.sort().values[(len(size) - 1) // 2])


def _smallest(*names: str) -> Any:
    """The first of these attacks that the registry has."""
    return next(REGISTRY[name]() for name in (*names, "DeepFool") if name in REGISTRY)


def ours_fmn() -> str:
    attack, (x, y) = _smallest("FMN", "DDN"), _images()
    out = mohs.attack(attack, _net(), x, y, "l2:inf", seed=SEED)
    return f"{type(attack).__name__}: median {float(out.size.sort().values[(ROWS - 1) // 2]):.4f}"


def _foolbox(attack: Any, net: nn.Module, x: Tensor, y: Tensor, eps: float | None = None) -> Tensor:
    return peers.run_foolbox(attack, net, x, y, eps, SEED)


def _torchattacks(name: str, net: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    with peers.seeded(SEED):
        return getattr(peers.load("torchattacks"), name)(net, **settings)(x, y).detach()


def _adv_lib() -> Any:
    return peers.load("adv-lib")


# ---- foolbox ------------------------------------------------------------------------------------------------


def foolbox_fmn_projection() -> str:
    import eagerpy as ep

    attack = peers.load("foolbox").attacks.L2FMNAttack()
    far = ep.astensor(torch.tensor([[2.0, 0.0]]))
    inside = attack.project(far, far * 0, ep.astensor(torch.tensor([0.5])))
    return f"a vector of length 2 projected to radius 0.5 has length {float(inside.raw.norm()):.2f}"


def our_projection(point: list[float], eps: float) -> str:
    x = torch.tensor([point])
    out = mohs.L2(eps).project(x, torch.zeros_like(x), torch.tensor([eps]), (-math.inf, math.inf))
    return f"length {float(out.norm()):.2f}"


def foolbox_fmn() -> str:
    (x, y), attacks = _images(), peers.load("foolbox").attacks
    fmn, ddn = (_foolbox(a(steps=100), _net(), x, y) for a in (attacks.L2FMNAttack, attacks.DDNAttack))
    return f"median {_median(_net(), x, fmn, y):.4f}; its own DDN {_median(_net(), x, ddn, y):.4f}"


def foolbox_hop_skip_jump() -> str:
    import eagerpy as ep

    attack = peers.load("foolbox").attacks.HopSkipJumpAttack()
    lengths = []
    for rows in (1, 16):
        centre = torch.full((rows, 1, 28, 28), 0.5)
        seen: list[Tensor] = []

        def look(points: Any, seen: list[Tensor] = seen, centre: Tensor = centre) -> Any:
            seen.append((points.raw - centre).flatten(1).norm(dim=1))
            return points.flatten(1)[:, 0] > 0

        with peers.seeded(SEED):
            attack.approximate_gradients(look, ep.astensor(centre), 4, ep.astensor(torch.full((rows,), 0.1)))
        lengths.append(float(torch.stack(seen).mean()))
    return f"probes at distance 0.1 lie at {lengths[0]:.3f} for 1 image, at {lengths[1]:.3f} for 16"


def ours_alone_and_together() -> str:
    x, y = _images()
    together = mohs.attack(DeepFool(), _net(), x, y, "l2:inf", batch=ROWS)
    alone = [mohs.attack(DeepFool(), _net(), x[i : i + 1], y[i : i + 1], "l2:inf", batch=ROWS) for i in range(4)]
    same = all(torch.equal(out.x[0], together.x[i]) for i, out in enumerate(alone))
    return f"DeepFool, alone and together: {'the same bits' if same else 'DIFFERENT'}"


def foolbox_gradients() -> str:
    return _touched(lambda net, x, y: _foolbox(peers.load("foolbox").attacks.LinfPGD(steps=3), net, x, y, 0.1))


# ---- side effects, on any side ------------------------------------------------------------------------------


def _touched(attack: Callable[[nn.Module, Tensor, Tensor], object]) -> str:
    net, (x, y) = _net(), _images()
    net.zero_grad(set_to_none=True)
    attack(net, x, y)
    touched = sum(p.grad is not None for p in net.parameters())
    net.zero_grad(set_to_none=True)
    return f"{touched} of {len(list(net.parameters()))} parameters hold gradients afterwards"


def ours_touched() -> str:
    return _touched(lambda net, x, y: mohs.attack(PGD(steps=3), net, x, y, "linf:0.1"))


def _seed_after(attack: Callable[[], object]) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(123)
        attack()
        return f"seeded with 123 before, {torch.initial_seed()} after"


def _frozen_part() -> tuple[nn.Sequential, Tensor, Tensor]:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10)).train()
    net[1].eval()
    return net, *_images()


def _modes_after(attack: Callable[[nn.Module, Tensor, Tensor], object]) -> str:
    net, x, y = _frozen_part()
    try:
        attack(net, x, y)
        said = ""
    except MohsError as error:
        said = f"refused ({str(error).split('.')[0]}); "
    return f"{said}net in {_mode(net)} mode, its frozen part in {_mode(net[1])} mode"


def _mode(module: nn.Module) -> str:
    return "train" if module.training else "eval"


# ---- torchattacks -------------------------------------------------------------------------------------------


def torchattacks_cw_shift() -> str:
    x, y = _images()
    rates = []
    for add in (0.0, -100.0):
        net = _Moved(_net(), add)
        rates.append(_fooled(net, _torchattacks("CW", net, x, y, c=10, steps=50, lr=0.05), y))
    return f"success {rates[0]:.2f}, with -100 added to every logit {rates[1]:.2f}"


def ours_shift() -> str:
    attack, (x, y) = _smallest("CW", "DDN"), _images()
    rates = [
        float(mohs.attack(attack, _Moved(_net(), add), x, y, "l2:inf").success.double().mean()) for add in (0.0, -100.0)
    ]
    return f"{type(attack).__name__}: success {rates[0]:.2f} and {rates[1]:.2f}"


def _moved_share(x: Tensor, x0: Tensor) -> str:
    edge = (x0 == 0) | (x0 == 1)
    return (
        f"of the {float(edge.double().mean()):.0%} pixels at 0 or 1, {float((x != x0)[edge].double().mean()):.0%} moved"
    )


def torchattacks_cw_edges() -> str:
    x, y = _images()
    return _moved_share(_torchattacks("CW", _net(), x, y, c=10, steps=50, lr=0.05), x)


def ours_edges() -> str:
    attack, (x, y) = _smallest("CW", "DDN"), _images()
    return f"{type(attack).__name__}: " + _moved_share(mohs.attack(attack, _net(), x, y, "l2:inf").x, x)


def torchattacks_cw_mates() -> str:
    x, y = _images()
    settings = {"c": 1, "steps": 100, "lr": 0.1}
    together = _torchattacks("CW", _net(), x, y, **settings)
    alone = torch.cat(
        [_torchattacks("CW", _net(), a, b, **settings) for a, b in zip(x.split(1), y.split(1), strict=True)]
    )
    differ = ((together - alone).abs().flatten(1).amax(1) > 1e-3).sum()
    return f"{int(differ)} of {ROWS} results differ by more than 0.001 when each image is attacked alone"


def torchattacks_square() -> str:
    attack = peers.load("torchattacks").Square(_net())
    drawn = attack.random_int(0, 5, [800])
    return f"800 draws of an offset in 0 to 5: largest {int(drawn.max())}"


def torchattacks_seed() -> str:
    x, y = _images()
    return _seed_after(lambda: peers.load("torchattacks").APGD(_net(), eps=0.1, steps=2)(x, y))


def torchattacks_gradients() -> str:
    return _touched(lambda net, x, y: _torchattacks("CW", net, x, y, steps=2))


def torchattacks_modes() -> str:
    return _modes_after(lambda net, x, y: _torchattacks("FGSM", net, x, y))


# ---- ART ----------------------------------------------------------------------------------------------------


def _art_deepfool(unit: float) -> float:
    x, y = _images()
    net = _Moved(_net(), unit=unit)
    art = peers.load("art")
    from art.estimators.classification import PyTorchClassifier

    estimator = PyTorchClassifier(
        net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, unit), device_type="cpu"
    )
    attack = art.DeepFool(estimator, epsilon=0.02, nb_grads=10, batch_size=ROWS, verbose=False)
    found = peers.run_art(attack, x * unit, y, SEED)
    return _median(net, x * unit, found, y) / unit


def art_deepfool_units() -> str:
    return f"median in units of the box: {_art_deepfool(1.0):.4f} on [0, 1], {_art_deepfool(255.0):.4f} on [0, 255]"


def ours_units() -> str:
    sizes = []
    for unit in (1.0, 255.0):
        x, y = _images()
        out = mohs.attack(DeepFool(), _Moved(_net(), unit=unit), x * unit, y, f"l2:inf in [0, {unit}]")
        sizes.append(float(out.size.sort().values[(ROWS - 1) // 2]) / unit)
    return f"DeepFool: {sizes[0]:.4f} and {sizes[1]:.4f}"


def _art_step(net: nn.Module, x: Tensor, y: Tensor) -> None:
    peers.run_art(peers.load("art").FastGradientMethod(peers.art_classifier(net, x), eps=0.1), x, y, SEED)


def art_modes() -> str:
    return _modes_after(_art_step)


def art_gradients() -> str:
    return _touched(_art_step)


# ---- adv-lib ------------------------------------------------------------------------------------------------


def adv_lib_projection() -> str:
    _adv_lib()
    from adv_lib.attacks.fast_minimum_norm import l2_projection_

    change = torch.tensor([[0.3, 0.4]])
    l2_projection_(change, torch.tensor([2.0]))
    return f"a vector of length 0.5 projected to radius 2 has length {float(change.norm()):.2f}"


def _targets() -> Tensor:
    return (_images()[1] + 1) % 10


def adv_lib_sigma_zero() -> str:
    x, _ = _images()
    with peers.seeded(SEED):
        found = _adv_lib().sigma_zero(_net(), x, _targets(), num_steps=200, targeted=True)
    with torch.no_grad():
        return f"targeted success {float((_net()(found).argmax(1) == _targets()).double().mean()):.2f}"


def ours_targeted_l0() -> str:
    if "SigmaZero" not in REGISTRY:
        return "-"
    x, y = _images()
    out = mohs.attack(REGISTRY["SigmaZero"](), _net(), x, y, "l0-features:inf", targets=_targets())
    return f"SigmaZero: {float(out.success.double().mean()):.2f}"


def adv_lib_last_step() -> str:
    x, y = _images()
    found = _adv_lib().pgd_linf(_net(), x, y, 0.1, steps=1, random_init=False, absolute_step_size=0.1)
    unmoved = int((found == x).flatten(1).all(1).sum())
    return f"one step from the input: success {_fooled(_net(), found, y):.2f}, {unmoved} images returned unchanged"


def ours_last_step() -> str:
    x, y = _images()
    rates = [
        float(mohs.attack(a, _net(), x, y, "linf:0.1").success.double().mean())
        for a in (PGD(steps=1, step_size=0.1, random_start=False), FGSM())
    ]
    return f"PGD of one step {rates[0]:.2f}, FGSM {rates[1]:.2f}"


def adv_lib_run_attack() -> str:
    x, y = _images()
    _adv_lib()
    from adv_lib.utils.attack_utils import run_attack

    run_attack(model=_net(), inputs=x[:4], labels=y[:4], attack=_adv_lib().ddn)
    return "works on a CPU"


def ours_counts() -> str:
    x, y = _images()
    out = mohs.attack(DeepFool(), _net(), x[:4], y[:4], "l2:inf")
    return f"counts on a CPU: {int(out.forwards.sum())} forwards, {int(out.backwards.sum())} backwards"


def adv_lib_minimal_apgd() -> str:
    x, _ = _images()
    _adv_lib()
    from adv_lib.attacks.auto_pgd import minimal_apgd

    with peers.seeded(SEED):
        found = minimal_apgd(
            _net(), x, _targets(), norm=math.inf, max_eps=1.0, targeted=True, binary_search_steps=8, n_iter=20
        )
    with torch.no_grad():
        return f"targeted success {float((_net()(found).argmax(1) == _targets()).double().mean()):.2f}"


def ours_targeted_linf() -> str:
    x, y = _images()
    out = mohs.attack(DeepFool(), _net(), x, y, Threat.parse("linf:inf"), targets=_targets())
    return f"DeepFool: {float(out.success.double().mean()):.2f}"


# ---- AutoAttack ---------------------------------------------------------------------------------------------


def autoattack_trace() -> str:
    checkout = os.environ.get("MOHS_AUTOATTACK")
    if not checkout:
        return "MOHS_AUTOATTACK names no checkout"
    if checkout not in sys.path:
        sys.path.append(checkout)
    from autoattack import checks

    return _trace_after(lambda: checks.check_dynamic(_net(), _images()[0], logger=None))


def _trace_after(call: Callable[[], object]) -> str:
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        call()
        kept = sys.gettrace() is not None
    finally:
        sys.settrace(before)
    return f"a debugger's trace function is {'kept' if kept else 'gone'} afterwards"


def ours_trace() -> str:
    x, y = _images()
    return _trace_after(lambda: mohs.check(_net(), (x, y), "linf:0.1"))


def ours_seed() -> str:
    x, y = _images()
    return _seed_after(lambda: mohs.attack(PGD(steps=2), _net(), x, y, "linf:0.1"))


def ours_modes() -> str:
    return _modes_after(lambda net, x, y: mohs.attack(FGSM(), net, x, y, "linf:0.1"))
