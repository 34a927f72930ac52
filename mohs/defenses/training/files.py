"""Recipes from files: TOML is data and safe to read from anybody; Python is a program and is run."""

from __future__ import annotations

import dataclasses
import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mohs.defenses.training.awp import AWP
from mohs.defenses.training.cascade import Cascade
from mohs.defenses.training.deep_contractive import DeepContractive
from mohs.defenses.training.distillation import Distillation
from mohs.defenses.training.ensemble import Ensemble
from mohs.defenses.training.fast import Fast
from mohs.defenses.training.finetune import FineTune
from mohs.defenses.training.free import Free
from mohs.defenses.training.gaussian_augmentation import GaussianAugmentation
from mohs.defenses.training.gradalign import GradAlign
from mohs.defenses.training.mart import MART
from mohs.defenses.training.mixture import Mixture
from mohs.defenses.training.natural import Natural
from mohs.defenses.training.nfgsm import NFGSM
from mohs.defenses.training.on_embeddings import OnEmbeddings
from mohs.defenses.training.recipe import Recipe
from mohs.defenses.training.saddle import Saddle
from mohs.defenses.training.schedules import SGD, Adam, Constant, Cosine, Steps
from mohs.defenses.training.trades import TRADES
from mohs.defenses.training.unified_embedding import UnifiedEmbedding
from mohs.defenses.training.vat import VAT
from mohs.errors import MohsError, UsageError

OBJECTIVES: dict[str, type] = {
    "natural": Natural, "mixture": Mixture, "saddle": Saddle, "trades": TRADES, "mart": MART, "fast": Fast, "nfgsm": NFGSM,
    "free": Free, "gradalign": GradAlign, "awp": AWP, "distillation": Distillation, "finetune": FineTune, "ensemble": Ensemble,
    "cascade": Cascade, "unified_embedding": UnifiedEmbedding, "vat": VAT, "deep_contractive": DeepContractive,
    "gaussian_augmentation": GaussianAugmentation, "on_embeddings": OnEmbeddings,
}  # fmt: skip
OPTIMISERS: dict[str, type] = {"sgd": SGD, "adam": Adam}
SCHEDULES: dict[str, type] = {"constant": Constant, "steps": Steps, "cosine": Cosine}


def read_recipe(source: str | Path, attacks: Mapping[str, type]) -> Recipe:
    """A recipe from ``FILE.toml``, ``FILE.py``, or the name of one in ``recipes`` here or beside the package.

    Args:
        source: path or name.
        attacks: the attacks a TOML recipe may name.

    Raises:
        UsageError: No such recipe, or not one.
    """
    path = _find(source)
    if path.suffix == ".toml":
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path}: not a TOML file that can be read ({error}).") from error
        return recipe_from_table(table, attacks, str(path))
    try:
        found = runpy.run_path(str(path), run_name="recipe")
    except MohsError:
        raise
    except Exception as error:
        raise UsageError(f"{path}: the recipe failed when it was run ({type(error).__name__}: {error}).") from error
    recipe = found.get("RECIPE")
    if not isinstance(recipe, Recipe):
        raise UsageError(f"{path}: defines no RECIPE = Recipe(...); a Python recipe must.")
    return recipe


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.suffix in (".toml", ".py"):
        if not path.is_file():
            raise UsageError(f"no recipe {path}; relative paths start at {Path.cwd()}.")
        return path
    folders = [Path.cwd() / "recipes", Path(__file__).resolve().parents[3] / "recipes"]
    if path.name == str(source):
        stem = path.name.replace("-", "_")
        for folder in folders:
            for suffix in (".toml", ".py"):
                if (folder / f"{stem}{suffix}").is_file():
                    return folder / f"{stem}{suffix}"
    have = sorted({p.stem for f in folders if f.is_dir() for p in f.iterdir() if p.suffix in (".toml", ".py")})
    raise UsageError(
        f"no recipe {str(source)!r}; allowed are FILE.toml, FILE.py, or one of: {', '.join(have) or 'none here'}."
    )


def recipe_from_table(table: Mapping[str, Any], attacks: Mapping[str, type], where: str) -> Recipe:
    """A recipe from the content of a TOML file.

        name = "mine"
        data = "idx:data/fashion-mnist"
        net = "small_cnn"
        threat = "linf:0.1"
        epochs = 10

        [objective]
        name = "saddle"
        attack = "PGD"      # further keys with an attack are the attack's own, such as steps
        steps = 7

    An objective around another one holds it as a table of its own:

        [objective]
        name = "awp"
        gamma = 0.005
        objective = {name = "trades", beta = 6.0}

    Fixed nets, of an objective or to start from, are bundled ones or weights that ``mohs train`` wrote; hidden code is never run:

        start = "bundled:fashion-natural"

        [objective]
        name = "ensemble"
        sources = ["bundled:fashion-natural", "runs/other/weights.safetensors"]
        objective = {name = "mixture", attack = "FGSM"}

        [optimiser]
        name = "adam"
        lr = 0.001

    Raises:
        UsageError: A field is missing, unknown or of the wrong kind; the message lists the allowed ones.
    """
    fields = dict(table)
    if "objective" not in fields:
        raise UsageError(f"{where}: no [objective] table; its name is one of {', '.join(OBJECTIVES)}.")
    fields["objective"] = _objective(fields["objective"], attacks, f"{where}, [objective]")
    for key, kinds in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES)):
        if key in fields:
            kind, settings = _named(fields[key], kinds, f"{where}, [{key}]")
            fields[key] = _make(kind, settings, f"{where}, [{key}]")
    return _make(Recipe, fields, where)


def _objective(table: Any, attacks: Mapping[str, type], where: str) -> Any:
    kind, settings = _named(table, OBJECTIVES, where)
    own = {f.name for f in dataclasses.fields(kind)}
    if "objective" in settings and "objective" in own:
        settings["objective"] = _objective(settings["objective"], attacks, f"{where}, objective")
    if "attack" not in own:
        return _make(kind, settings, where)
    by_name = {name.lower(): attack for name, attack in attacks.items()}
    name = settings.pop("attack", None)
    if not isinstance(name, str) or name.lower() not in by_name:
        raise UsageError(f"{where}: attack was {name!r}; allowed are {', '.join(attacks)}.")
    its = {k: settings.pop(k) for k in list(settings) if k not in own}
    return _make(kind, {**settings, "attack": _make(by_name[name.lower()], its, f"{where}, attack {name}")}, where)


def _named(table: Any, kinds: Mapping[str, type], where: str) -> tuple[type, dict[str, Any]]:
    """The class a table names, and its other keys."""
    settings = dict(table) if isinstance(table, Mapping) else {"name": table}
    name = settings.pop("name", None)
    if not isinstance(name, str) or name.lower() not in kinds:
        raise UsageError(f"{where}: name was {name!r}; allowed are {', '.join(kinds)}.")
    return kinds[name.lower()], settings


def _make(kind: type, settings: Mapping[str, Any], where: str) -> Any:
    """An instance, with unknown, missing and wrongly typed settings named."""
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    unknown = [key for key in settings if key not in fields]
    if unknown:
        raise UsageError(
            f"{where}: unknown {', '.join(unknown)}; {kind.__name__} takes {', '.join(fields) or 'nothing'}."
        )
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in settings
    ]
    if required:
        raise UsageError(f"{where}: {kind.__name__} also needs {', '.join(required)}.")
    for name, value in settings.items():
        _check_kind(fields[name], value, f"{where}: {name}")
    try:
        return kind(**settings)
    except MohsError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {kind.__name__} does not take {dict(settings)!r} ({error}).") from error


_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "tuple": (list, tuple), "Mapping": (dict,),
}  # fmt: skip


def _check_kind(field: dataclasses.Field[Any], value: Any, where: str) -> None:
    """Numbers, texts, lists and tables where they belong; fields of other kinds cannot be given in a file."""
    if dataclasses.is_dataclass(value):
        return  # built by this module
    names = [part.split("[")[0].strip() for part in str(field.type).split("|")]
    allowed = [kind for name in names for kind in _PLAIN.get(name, ())]
    if not allowed:
        raise UsageError(f"{where} cannot be set in a TOML recipe; write the recipe in Python.")
    if not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed):
        raise UsageError(f"{where} was {value!r}; allowed: {field.type}.")
