"""The public libraries' attacks behind one signature, each set to do exactly what is asked.

Every function here is ``(model, x, y, eps, steps, step_size, seed) -> x_adv``: untargeted, box [0, 1],
float32, one batch, the model as given (put it in eval mode first). A minimum-norm attack ignores ``eps`` and
``step_size``; an attack without randomness ignores ``seed``. Each peer is called the way its own
documentation shows, so what its call does beyond the attack (a final success test, copies to numpy) is part
of what is measured. The answer is what the peer returns, whether it worked or not: score it outside.

    for library, attack in PEERS["pgd-linf"].items():
        reason = missing(library)
        ...

What no setting can make equal is said at each function. No peer drops a row from its PGD once it is
misclassified, and a peer may leave gradients in the model's parameters: clear them between two peers.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import shim

PeerAttack = Callable[[nn.Module, Tensor, Tensor, float, int, float, int], Tensor]

OVERSHOOT = 0.02  # of DeepFool: the paper's value, and the default of all peers but ART (1e-6)

_MODULES = {
    "foolbox": "foolbox",
    "torchattacks": "torchattacks",
    "art": "art.attacks.evasion",
    "adv-lib": "adv_lib.attacks",
    "advertorch": "advertorch.attacks",
}
_DISTRIBUTIONS = {
    "foolbox": "foolbox",
    "torchattacks": "torchattacks",
    "art": "adversarial-robustness-toolbox",
    "adv-lib": "adv-lib",
    "advertorch": "advertorch",
}


@cache
def missing(library: str) -> str | None:
    """Say why a peer cannot be used here, or None where it can.

    >>> missing("no-such-library")
    "unknown peer 'no-such-library': known are foolbox, torchattacks, art, adv-lib, advertorch"
    """
    if library not in _MODULES:
        return f"unknown peer {library!r}: known are {', '.join(_MODULES)}"
    try:
        load(library)
    except Exception as error:  # a peer can fail to import in any way; the benchmark goes on without it
        first_line = (str(error).splitlines() or [""])[0]
        return f"{library} cannot be imported: {type(error).__name__}: {first_line}"
    return None


LIBRARIES = tuple(_MODULES)


def version(library: str) -> str:
    """Name the installed version of a peer, as its package declares it."""
    from importlib.metadata import version as installed

    return installed(_DISTRIBUTIONS[library])


def load(library: str) -> Any:
    shim.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the peers' own imports
        return importlib.import_module(_MODULES[library])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch and numpy, the peers' only sources of randomness, and put both back afterwards."""
    before = np.random.get_state()  # noqa: NPY002 (ART draws from numpy's global state)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


# foolbox. Its call tests every row once more at the end: one forward beyond the steps. It computes gradients
# with loss.backward(), so the parameters' gradients are computed, and accumulated into, at every step.


def run_foolbox(attack: Any, model: nn.Module, x: Tensor, y: Tensor, eps: float | None, seed: int) -> Tensor:
    foolbox = load("foolbox")
    target = foolbox.PyTorchModel(model, bounds=(0.0, 1.0), device=x.device)
    with seeded(seed):
        _, inside, _ = attack(target, x, y, epsilons=eps)
    return inside.detach()


def foolbox_pgd_linf(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    attack = load("foolbox").attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=True)
    return run_foolbox(attack, model, x, y, eps, seed)


def foolbox_pgd_l2(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    attack = load("foolbox").attacks.L2PGD(abs_stepsize=step_size, steps=steps, random_start=True)
    return run_foolbox(attack, model, x, y, eps, seed)


def foolbox_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int) -> Tensor:
    return run_foolbox(load("foolbox").attacks.FGSM(random_start=False), model, x, y, eps, seed)


def foolbox_bim(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int) -> Tensor:
    attacks = load("foolbox").attacks
    attack = attacks.LinfBasicIterativeAttack(abs_stepsize=step_size, steps=steps, random_start=False)
    return run_foolbox(attack, model, x, y, eps, seed)


def foolbox_deepfool_l2(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    # candidates=None asks for every class, as the paper does; the default looks at ten. One forward per class
    # and step, and all rows are computed until the last one has crossed. Leaves the label it is given, but
    # forms the differences from the class the model predicts: meant for rows that are classified correctly.
    attack = load("foolbox").attacks.L2DeepFoolAttack(steps=steps, candidates=None, overshoot=OVERSHOOT)
    return run_foolbox(attack, model, x, y, None, seed)


def foolbox_deepfool_linf(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    attack = load("foolbox").attacks.LinfDeepFoolAttack(steps=steps, candidates=None, overshoot=OVERSHOOT)
    return run_foolbox(attack, model, x, y, None, seed)


# torchattacks. Returns the last iterate without looking at it. Switches a model in train mode to eval, and
# back as a whole (a part that was frozen in eval comes back in train mode).


def _torchattacks(attack: Any, x: Tensor, y: Tensor, seed: int) -> Tensor:
    with seeded(seed):
        return attack(x, y).detach()


def torchattacks_pgd_linf(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    attack = load("torchattacks").PGD(model, eps=eps, alpha=step_size, steps=steps, random_start=True)
    return _torchattacks(attack, x, y, seed)


def torchattacks_pgd_l2(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    # Its random start draws the radius, not the volume, uniformly: nearer to the input than the other peers'.
    attack = load("torchattacks").PGDL2(model, eps=eps, alpha=step_size, steps=steps, random_start=True)
    return _torchattacks(attack, x, y, seed)


def torchattacks_fgsm(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    return _torchattacks(load("torchattacks").FGSM(model, eps=eps), x, y, seed)


def torchattacks_bim(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    attack = load("torchattacks").BIM(model, eps=eps, alpha=step_size, steps=steps)
    return _torchattacks(attack, x, y, seed)


def torchattacks_deepfool_l2(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    # Row by row, one forward and a backward per class at each step: far slower than the others, so give it fewer
    # rows. A row whose step is cut off by the box can converge to the decision boundary without ever crossing it
    # (logits tied within 1e-6), which is its failure, not the adapter's. The point that the last step reaches is
    # returned without having been looked at. The parameters' gradients accumulate.
    attack = load("torchattacks").DeepFool(model, steps=steps, overshoot=OVERSHOOT)
    return _torchattacks(attack, x, y, seed)


# ART. Works on numpy arrays; its PGD goes through a data loader. Clears the parameters' gradients before each
# backward and leaves the last ones behind, and leaves the model in eval mode. Its PGD and BIM test success at
# the end: two more forwards. The adapter spends one more forward, of one row, to learn the number of classes.


def art_classifier(model: nn.Module, x: Tensor) -> Any:
    load("art")
    estimators = importlib.import_module("art.estimators.classification")
    with torch.no_grad():
        classes = int(model(x[:1]).shape[1])
    return estimators.PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )


def run_art(attack: Any, x: Tensor, y: Tensor | None, seed: int) -> Tensor:
    with seeded(seed):
        found = attack.generate(x.detach().cpu().numpy(), None if y is None else y.cpu().numpy())
    return torch.from_numpy(found).to(x)


def _art_pgd(
    model: nn.Module, x: Tensor, y: Tensor, norm: float, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    attack = load("art").ProjectedGradientDescent(
        art_classifier(model, x),
        norm=norm,
        eps=eps,
        eps_step=step_size,
        max_iter=steps,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return run_art(attack, x, y, seed)


def art_pgd_linf(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int) -> Tensor:
    return _art_pgd(model, x, y, float("inf"), eps, steps, step_size, seed)


def art_pgd_l2(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int) -> Tensor:
    return _art_pgd(model, x, y, 2, eps, steps, step_size, seed)


def art_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int) -> Tensor:
    attack = load("art").FastGradientMethod(art_classifier(model, x), eps=eps, batch_size=len(x))
    return run_art(attack, x, y, seed)


def art_bim(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int) -> Tensor:
    attack = load("art").BasicIterativeMethod(
        art_classifier(model, x),
        eps=eps,
        eps_step=step_size,
        max_iter=steps,
        batch_size=len(x),
        verbose=False,
    )
    return run_art(attack, x, y, seed)


def art_deepfool_l2(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    # Leaves the class the model predicts, whatever y says: meant for rows that are classified correctly. The
    # overshoot is applied once, at the end, and nothing is looked at afterwards. Its inner forward passes run
    # in batches of 128 whatever batch_size says, and all rows are computed until the last one has crossed.
    classifier = art_classifier(model, x)
    attack = load("art").DeepFool(
        classifier,
        max_iter=steps,
        epsilon=OVERSHOOT,
        nb_grads=classifier.nb_classes,
        batch_size=len(x),
        verbose=False,
    )
    return run_art(attack, x, y, seed)


# adv-lib. Plain functions, input gradients only, box [0, 1] fixed. It has no FGSM, no BIM and no PGD in L2.


def adv_lib_pgd_linf(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    # Looks at a point before it steps, so the point that the last step reaches is never looked at: of the
    # iterates asked for, the start counts and the last does not. Returns the last adversarial point, or the
    # clean input.
    with seeded(seed):
        return load("adv-lib").pgd_linf(model, x, y, eps, steps=steps, random_init=True, absolute_step_size=step_size)


def adv_lib_bim(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int) -> Tensor:
    # BIM is its PGD from the input itself.
    with seeded(seed):
        return load("adv-lib").pgd_linf(model, x, y, eps, steps=steps, random_init=False, absolute_step_size=step_size)


def adv_lib_deepfool_l2(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    # Drops rows that have crossed. Looks before it steps, so `steps` looks give at most steps - 1 useful
    # steps; the overshoot compounds from step to step. Returns the clean input where it fails.
    return load("adv-lib").df(model, x, y, steps=steps, overshoot=OVERSHOOT, norm=2)


def adv_lib_deepfool_linf(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float, seed: int
) -> Tensor:
    return load("adv-lib").df(model, x, y, steps=steps, overshoot=OVERSHOOT, norm=float("inf"))


PEERS: dict[str, dict[str, PeerAttack]] = {
    "fgsm": {"foolbox": foolbox_fgsm, "torchattacks": torchattacks_fgsm, "art": art_fgsm},
    "bim": {
        "foolbox": foolbox_bim,
        "torchattacks": torchattacks_bim,
        "art": art_bim,
        "adv-lib": adv_lib_bim,
    },
    "pgd-linf": {
        "foolbox": foolbox_pgd_linf,
        "torchattacks": torchattacks_pgd_linf,
        "art": art_pgd_linf,
        "adv-lib": adv_lib_pgd_linf,
    },
    "pgd-l2": {"foolbox": foolbox_pgd_l2, "torchattacks": torchattacks_pgd_l2, "art": art_pgd_l2},
    "deepfool-l2": {
        "foolbox": foolbox_deepfool_l2,
        "torchattacks": torchattacks_deepfool_l2,
        "art": art_deepfool_l2,
        "adv-lib": adv_lib_deepfool_l2,
    },
    "deepfool-linf": {"foolbox": foolbox_deepfool_linf, "adv-lib": adv_lib_deepfool_linf},
}
