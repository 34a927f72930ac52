"""What the public libraries get wrong, each shown on the installed version beside what Mohs does in the same place.

A library that is not installed is left out; a case that the installed version has mended shows so by its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import peer_cases as show
from . import peers
from .measure import table
from .subjects import Options

HEAD = ["library", "where", "fact", "peer", "Mohs"]


@dataclass(frozen=True)
class Case:
    """A fact, and a function for each side that shows it; ``ours`` is None where Mohs has nothing of the kind."""

    owner: str
    where: str
    fact: str
    peer: Callable[[], str]
    ours: Callable[[], str] | None


def run(options: Options) -> Iterator[str]:
    """One line per case."""
    yield "## Where public libraries are wrong"
    yield (
        f"On the first {show.ROWS} images that bundled:fashion-natural classifies correctly, box [0, 1], "
        "unless said otherwise. Sizes not found count as infinite; '-': Mohs has no such attack."
    )
    rows = []
    for case in CASES:
        if case.owner in peers.LIBRARIES and (
            case.owner not in options.libraries or peers.missing(case.owner) is not None
        ):
            continue
        rows.append([case.owner, case.where, case.fact, _said(case.peer), _said(case.ours) if case.ours else "-"])
    options.keep("peer_bugs", [dict(zip(HEAD, row, strict=True)) for row in rows])
    yield table(HEAD, rows)


def _said(show: Callable[[], str]) -> str:
    """What a side shows; an error is something shown too."""
    try:
        return show()
    except Exception as error:  # peers fail in any way, and that may be the very fact
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


CASES: tuple[Case, ...] = (
    Case(
        "foolbox",
        "L2FMNAttack.project",
        "the projection does nothing",
        show.foolbox_fmn_projection,
        lambda: show.our_projection([2.0, 0.0], 0.5),
    ),
    Case("foolbox", "L2FMNAttack", "hence far larger changes than need be", show.foolbox_fmn, show.ours_fmn),
    Case(
        "foolbox",
        "HopSkipJumpAttack",
        "norms are taken over the whole batch: an image's result depends on its mates",
        show.foolbox_hop_skip_jump,
        show.ours_alone_and_together,
    ),
    Case(
        "foolbox",
        "all gradient attacks",
        "gradients are left in the parameters",
        show.foolbox_gradients,
        show.ours_touched,
    ),
    Case("torchattacks", "CW.f", "wrong where logits are negative", show.torchattacks_cw_shift, show.ours_shift),
    Case(
        "torchattacks",
        "CW.inverse_tanh_space",
        "pixels at 0 or 1 can never move",
        show.torchattacks_cw_edges,
        show.ours_edges,
    ),
    Case(
        "torchattacks",
        "CW",
        "the batch's sum decides when all stop",
        show.torchattacks_cw_mates,
        show.ours_alone_and_together,
    ),
    Case(
        "torchattacks",
        "Square.random_int",
        "the last row and column never get a square",
        show.torchattacks_square,
        None,
    ),
    Case(
        "torchattacks",
        "APGD, FAB, Square",
        "the caller's global generator is reseeded",
        show.torchattacks_seed,
        show.ours_seed,
    ),
    Case("torchattacks", "CW", "gradients are left in the parameters", show.torchattacks_gradients, show.ours_touched),
    Case(
        "torchattacks",
        "Attack",
        "a part frozen in eval mode is put into train mode",
        show.torchattacks_modes,
        show.ours_modes,
    ),
    Case("art", "DeepFool", "steps are multiplied by the width of the box", show.art_deepfool_units, show.ours_units),
    Case("art", "PyTorchClassifier", "a net in train mode is left in eval mode", show.art_modes, show.ours_modes),
    Case("art", "PyTorchClassifier", "gradients are left in the parameters", show.art_gradients, show.ours_touched),
    Case(
        "adv-lib",
        "fmn",
        "the projection pushes inner points outwards",
        show.adv_lib_projection,
        lambda: show.our_projection([0.3, 0.4], 2.0),
    ),
    Case("adv-lib", "sigma_zero", "targeted mode climbs the wrong way", show.adv_lib_sigma_zero, show.ours_targeted_l0),
    Case(
        "adv-lib",
        "pgd_linf",
        "the point that the last step reaches is never looked at",
        show.adv_lib_last_step,
        show.ours_last_step,
    ),
    Case(
        "adv-lib",
        "minimal_apgd",
        "targeted mode counts any answer but the target as success",
        show.adv_lib_minimal_apgd,
        show.ours_targeted_linf,
    ),
    Case("adv-lib", "run_attack", "needs a GPU to count passes", show.adv_lib_run_attack, show.ours_counts),
    Case(
        "AutoAttack",
        "checks.check_dynamic",
        "switches off debuggers and coverage",
        show.autoattack_trace,
        show.ours_trace,
    ),
)
"""In the order they are printed."""
