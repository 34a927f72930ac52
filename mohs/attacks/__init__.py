"""Attacks: one file per method, one line here per attack; contract tests, listings and docs follow from this list."""

from mohs.attacks._base import Attack, State
from mohs.attacks._ranking import by_distance, by_logit
from mohs.attacks.alma import ALMA
from mohs.attacks.apgd import APGD
from mohs.attacks.bim import BIM
from mohs.attacks.boundary import Boundary
from mohs.attacks.carlini_wagner import CarliniWagner
from mohs.attacks.ddn import DDN
from mohs.attacks.deepfool import DeepFool
from mohs.attacks.ead import EAD
from mohs.attacks.fab import FAB
from mohs.attacks.fgsm import FGSM
from mohs.attacks.fmn import FMN
from mohs.attacks.hop_skip_jump import HopSkipJump
from mohs.attacks.hot_flip import HotFlip
from mohs.attacks.jsma import JSMA
from mohs.attacks.latent import Latent
from mohs.attacks.lavan import LaVAN
from mohs.attacks.lbfgs import LBFGS
from mohs.attacks.logit_matching import LogitMatching
from mohs.attacks.mifgsm import MIFGSM
from mohs.attacks.nifgsm import NIFGSM
from mohs.attacks.odi import ODI
from mohs.attacks.orthogonal_pgd import OrthogonalPGD
from mohs.attacks.patch_search import PatchSearch
from mohs.attacks.pdgd import PDGD
from mohs.attacks.pdpgd import PDPGD
from mohs.attacks.pgd import PGD
from mohs.attacks.run import Job, Outcome, Stop, attack
from mohs.attacks.sigma_zero import SigmaZero
from mohs.attacks.sparsefool import SparseFool
from mohs.attacks.spgd import SPGD
from mohs.attacks.square import Square
from mohs.attacks.superdeepfool import SuperDeepFool
from mohs.attacks.trust_region import TrustRegion
from mohs.attacks.weighted_pgd import WeightedPGD

REGISTRY: dict[str, type] = {
    a.__name__: a
    for a in (
        FGSM,
        BIM,
        PGD,
        APGD,
        MIFGSM,
        NIFGSM,
        ODI,
        OrthogonalPGD,
        WeightedPGD,
        LogitMatching,
        DeepFool,
        FAB,
        DDN,
        FMN,
        PDGD,
        PDPGD,
        SuperDeepFool,
        ALMA,
        TrustRegion,
        CarliniWagner,
        LBFGS,
        EAD,
        SigmaZero,
        JSMA,
        SparseFool,
        SPGD,
        LaVAN,
        PatchSearch,
        HotFlip,
        Square,
        HopSkipJump,
        Boundary,
    )
}
"""Every attack by name that needs no more than settings."""

WITH_PARTS: dict[str, type] = {"Latent": Latent}
"""Attacks that are made with a module, which no plan and no command line can name."""

__all__ = [
    *REGISTRY, *WITH_PARTS, "REGISTRY", "WITH_PARTS", "Attack", "Job", "Outcome", "State", "Stop", "attack", "by_distance", "by_logit",
]  # fmt: skip
