"""The public libraries' minimum-norm attacks behind one signature: ``(model, x, y, steps, seed) -> x_adv``.

As in ``peers``: untargeted, box [0, 1], one batch, called as each library's documentation shows, defaults but for the
number of steps; settings that are none of the attack's business (ADV-LIB's DDN rounds to 8 bits unless told otherwise)
are off. ``steps`` is the number of iterations of the whole attack; what passes they cost is counted outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .peers import art_classifier, art_deepfool_l2, load, run_art, run_foolbox, seeded

MinimumAttack = Callable[[nn.Module, Tensor, Tensor, int, int], Tensor]
LEAST = 10  # with fewer some divide by zero, in a tenth of their steps
SEARCHES = 5  # of attacks that search for a constant in an outer loop; 9 or 20 by default, far beyond an equal budget
WIDEST = {"linf": 1.0, "l2": 10.0, "l1": 100.0}  # upper end of the bisection over radii


def _adv_lib(name: str, steps_name: str, share: float = 1.0, **settings: Any) -> MinimumAttack:
    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
        load("adv-lib")
        import adv_lib.attacks as attacks
        from adv_lib.attacks import auto_pgd

        attack = getattr(attacks, name, None) or getattr(auto_pgd, name)
        with seeded(seed):
            return attack(model, x, y, **{steps_name: max(LEAST, round(steps * share))}, **settings).detach()

    return run


def _foolbox(name: str, share: float = 1.0, **settings: Any) -> MinimumAttack:
    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
        attack = getattr(load("foolbox").attacks, name)(steps=max(1, round(steps * share)), **settings)
        return run_foolbox(attack, model, x, y, None, seed)

    return run


def _art(name: str, share: float = 1.0, **settings: Any) -> MinimumAttack:
    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
        attack = getattr(load("art"), name)(
            art_classifier(model, x),
            max_iter=max(1, round(steps * share)),
            batch_size=len(x),
            verbose=False,
            **settings,
        )
        return run_art(attack, x, y, seed)

    return run


def _torchattacks(name: str, make: Callable[[int, Tensor], dict[str, Any]]) -> MinimumAttack:
    def run(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
        with seeded(seed):
            return getattr(load("torchattacks"), name)(model, **make(steps, x))(x, y).detach()

    return run


def _pairs(steps: int, x: Tensor) -> dict[str, Any]:
    """A saliency map moves two features a step, each to its bound, and stops at a share of all features."""
    return {"theta": 1.0, "gamma": min(2 * steps / x[0].numel(), 1.0)}


def _art_jsma(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
    # Its labels are the classes to reach; without them it draws them at random.
    attack = load("art").SaliencyMapMethod(
        art_classifier(model, x), **_pairs(steps, x), batch_size=len(x), verbose=False
    )
    return run_art(attack, x, None, seed)


def _art_deepfool(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
    return art_deepfool_l2(model, x, y, 0.0, steps, 0.0, seed)


def _advertorch_lbfgs(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Tensor:
    # It keeps a point only where the class it is given is the answer, whatever `targeted` says, so it gets the runner-up;
    # and one image at a time, for a batch is one problem to it, with one line search.
    attacks = load("advertorch")
    with torch.no_grad():
        logits = model(x)
    goal = logits.scatter(1, y.unsqueeze(1), -math.inf).argmax(1)
    attack = attacks.LBFGSAttack(
        model,
        logits.shape[1],
        binary_search_steps=SEARCHES,
        max_iterations=max(1, round(steps / SEARCHES)),
        targeted=True,
    )
    found = [attack.perturb(x[i : i + 1], goal[i : i + 1]) for i in range(len(x))]
    return torch.cat(found).detach() if found else x


def _fmn(norm: float) -> MinimumAttack:
    return _adv_lib("fmn", "steps", norm=norm)


def _pdpgd(norm: float) -> MinimumAttack:
    return _adv_lib("pdpgd", "num_steps", norm=norm)


def _apgd_search(norm: float, form: str, *, targeted: bool) -> MinimumAttack:
    share = 1 / SEARCHES / (9 if targeted else 1)
    return _adv_lib(
        "minimal_apgd", "n_iter", share, norm=norm, max_eps=WIDEST[form], binary_search_steps=SEARCHES,
        targeted_version=targeted,
    )  # fmt: skip


def _fab(norm: float) -> MinimumAttack:
    return _adv_lib("fab", "n_iter", norm=norm)


def _trust(norm: float) -> MinimumAttack:
    return _adv_lib("tr", "iter", p=norm)


MINIMUM: dict[str, dict[str, dict[str, MinimumAttack]]] = {
    "linf": {
        "adv-lib": {
            "FMN": _fmn(math.inf), "PDPGD": _pdpgd(math.inf), "TR": _trust(math.inf), "FAB": _fab(math.inf),
            "APGD search": _apgd_search(math.inf, "linf", targeted=False),
            "APGD-T search": _apgd_search(math.inf, "linf", targeted=True),
            "DeepFool": _adv_lib("df", "steps", norm=math.inf), "CW": _adv_lib("carlini_wagner_linf", "max_iterations", 0.1),
        },
        "foolbox": {
            "FMN": _foolbox("LInfFMNAttack"), "BB": _foolbox("LinfinityBrendelBethgeAttack"),
            "DeepFool": _foolbox("LinfDeepFoolAttack", candidates=None),
        },
        "art": {"CW": _art("CarliniLInfMethod", 0.1)},
    },
    "l2": {
        "adv-lib": {
            "DDN": _adv_lib("ddn", "steps", levels=None), "FMN": _fmn(2), "PDGD": _adv_lib("pdgd", "num_steps"),
            "PDPGD": _pdpgd(2), "ALMA": _adv_lib("alma", "num_steps", distance="l2"), "SDF": _adv_lib("sdf", "steps"),
            "FAB": _fab(2), "TR": _trust(2), "APGD search": _apgd_search(2, "l2", targeted=False),
            "APGD-T search": _apgd_search(2, "l2", targeted=True), "DeepFool": _adv_lib("df", "steps", norm=2),
            "CW": _adv_lib("carlini_wagner_l2", "max_iterations", 1 / SEARCHES, binary_search_steps=SEARCHES),
        },
        "foolbox": {
            "DDN": _foolbox("DDNAttack"), "FMN": _foolbox("L2FMNAttack"), "BB": _foolbox("L2BrendelBethgeAttack"),
            "CW": _foolbox("L2CarliniWagnerAttack", 1 / SEARCHES, binary_search_steps=SEARCHES),
            "DeepFool": _foolbox("L2DeepFoolAttack", candidates=None),
        },
        "art": {"CW": _art("CarliniL2Method", 1 / SEARCHES, binary_search_steps=SEARCHES), "DeepFool": _art_deepfool},
        "advertorch": {"L-BFGS": _advertorch_lbfgs},
    },
    "l1": {
        "adv-lib": {
            "FMN": _fmn(1), "PDPGD": _pdpgd(1), "ALMA": _adv_lib("alma", "num_steps", distance="l1"), "FAB": _fab(1),
            "APGD search": _apgd_search(1, "l1", targeted=False), "APGD-T search": _apgd_search(1, "l1", targeted=True),
        },
        "foolbox": {
            "FMN": _foolbox("L1FMNAttack"), "BB": _foolbox("L1BrendelBethgeAttack"),
            "EAD": _foolbox("EADAttack", 1 / SEARCHES, binary_search_steps=SEARCHES, decision_rule="L1"),
        },
        "art": {"EAD": _art("ElasticNet", 1 / SEARCHES, binary_search_steps=SEARCHES, decision_rule="L1")},
    },
    "l0": {
        "adv-lib": {
            "sigma-zero": _adv_lib("sigma_zero", "num_steps"), "FMN": _fmn(0), "PDPGD": _pdpgd(0),
        },
        "foolbox": {"FMN": _foolbox("L0FMNAttack"), "BB": _foolbox("L0BrendelBethgeAttack")},
        "torchattacks": {
            "JSMA": _torchattacks("JSMA", _pairs), "SparseFool": _torchattacks("SparseFool", lambda steps, x: {"steps": steps}),
        },
        "art": {"JSMA": _art_jsma},
    },
}  # fmt: skip
"""By norm, library and attack."""
