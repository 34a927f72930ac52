"""Recipes from files, and the nets that were made by two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mohs
from mohs import models
from mohs.attacks import FGSM, PGD, REGISTRY
from mohs.data import load
from mohs.defenses.training import SGD, Adam, Constant, Cosine, Mixture, Natural, Recipe, Saddle, Steps
from mohs.defenses.training.files import read_recipe
from mohs.errors import UsageError

WHOLE = """
name = "mine"
data = "idx:somewhere"
net = "small_cnn"
threat = "linf:0.1"
epochs = 3
batch = 64
warmup = 1
holdout = 100
seed = 5
net_options = {size = 28}
objective = {name = "saddle", attack = "pgd", steps = 7, step_size = 0.03}
optimiser = {name = "sgd", lr = 0.05, nesterov = true}
schedule = {name = "steps", at = [0.5, 0.9], by = 0.2}
"""


def toml(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return read_recipe(path, REGISTRY)


def changed(line: str) -> str:
    """The whole recipe with one line replaced (or added, or with an empty value taken out)."""
    key, _, value = line.partition(" = ")
    kept = [x for x in WHOLE.strip().splitlines() if not x.startswith(f"{key} =")]
    return "\n".join(kept + ([line] if value else []))


def test_a_toml_recipe_equals_the_python_one(tmp_path: Path) -> None:
    assert toml(tmp_path, WHOLE) == Recipe(
        "mine", "idx:somewhere", "small_cnn", Saddle(PGD(steps=7, step_size=0.03)), 3, "linf:0.1", 64,
        SGD(lr=0.05, nesterov=True), Steps((0.5, 0.9), 0.2), warmup=1, holdout=100, seed=5, net_options={"size": 28},
    )  # fmt: skip


def test_defaults_and_short_forms(tmp_path: Path) -> None:
    recipe = toml(tmp_path, changed('objective = "natural"').replace('"sgd", lr = 0.05, nesterov = true', '"Adam"'))
    assert recipe.objective == Natural()
    assert recipe.optimiser == Adam()
    assert toml(tmp_path, changed("schedule")).schedule == Constant()
    assert toml(tmp_path, changed('schedule = "cosine"')).schedule == Cosine()
    fgsm = toml(tmp_path, changed('objective = {name = "mixture", attack = "FGSM", alpha = 0.25}'))
    assert fgsm.objective == Mixture(FGSM(), alpha=0.25)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nett = 3", "unknown nett; Recipe takes name, data"),
        ("net", "Recipe also needs net"),
        ("objective", r"no \[objective\]"),
        ('objective = "tardes"', "allowed are natural, mixture, saddle, trades"),
        ('objective = {name = "saddle"}', "attack was None; allowed are FGSM"),
        ('objective = {name = "saddle", attack = "os.system"}', "allowed are FGSM"),
        ('objective = {name = "saddle", attack = "pgd", step = 3}', "unknown step; PGD takes steps"),
        ('objective = {name = "saddle", attack = "pgd", steps = 0}', "steps must be a whole number"),
        ('objective = {name = "saddle", attack = "pgd", steps = "7"}', "steps was '7'; allowed: int"),
        ('objective = {name = "saddle", attack = "pgd", objective = "x"}', "write the recipe in Python"),
        ('objective = {name = "mixture", attack = "fgsm", alpha = 2}', "alpha"),
        ('optimiser = {name = "lion"}', "allowed are sgd, adam"),
        ('optimiser = {name = "adam", lr = true}', "lr was True; allowed: float"),
        ("optimiser = 3", "allowed are sgd, adam"),
        ("schedule = {at = [0.5]}", "name was None"),
        ("epochs = 1.5", "epochs was 1.5; allowed: int"),
        ("warmup = 7", "warmup"),
        ('threat = "linf"', "Cannot read the threat"),
        ("threat", "finite radius"),
        ("epochs = ]", "not a TOML file"),
    ],
)
def test_bad_toml_recipes_are_refused_in_words(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        toml(tmp_path, changed(line))


def test_python_recipes_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "my_own.toml").write_text(WHOLE)
    assert read_recipe("my-own", REGISTRY).name == "mine"
    (folder / "broken.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        read_recipe("broken", REGISTRY)
    (folder / "empty.py").write_text("RECIPE = 3")
    with pytest.raises(UsageError, match="defines no RECIPE"):
        read_recipe(folder / "empty.py", REGISTRY)
    with pytest.raises(UsageError, match=r"no recipe 'none'.*my_own"):
        read_recipe("none", REGISTRY)
    with pytest.raises(UsageError, match="relative paths start at"):
        read_recipe("none.toml", REGISTRY)
    with pytest.raises(UsageError, match="no recipe"):
        read_recipe("../recipes/my_own", REGISTRY)


RECIPES = {"fashion-natural": Natural, "fashion-pgd": Saddle}


@pytest.mark.parametrize("name", RECIPES)
def test_bundled_nets_are_what_their_recipes_say(name: str) -> None:
    recipe = read_recipe(name, REGISTRY)
    assert recipe.name == name
    assert isinstance(recipe.objective, RECIPES[name])
    info = models.bundled_info(name)
    assert info["arch"] == recipe.net
    assert info["numbers"]["examples"] == 10_000
    header = (Path(__file__).parents[1] / "recipes" / f"{name.replace('-', '_')}.py").read_text().partition('"""\n')[0]
    for figure in ("clean", "fgsm", "pgd_40x1", "pgd_40x5"):
        assert f"{100 * info['numbers'][figure]:.2f}%" in header, figure


def test_the_two_bundled_nets_differ_as_the_demonstration_needs() -> None:
    folder = Path(models.__file__).parent / "bundled"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 3e6
    x, y = load("bundled:fashion-mnist")
    survived = {}
    for name in RECIPES:
        net = models.load(f"bundled:{name}")
        numbers = models.bundled_info(name)["numbers"]
        with torch.inference_mode():
            right = net(x).argmax(1) == y
        # 1,000 of the 10,000 images the figure is of: four standard deviations
        assert abs(float(right.float().mean()) - numbers["clean"]) < 4 * (0.25 / 1000) ** 0.5
        few = right.nonzero().flatten()[:128]
        out = mohs.attack(PGD(steps=20), net, x[few], y[few], "linf:0.1")
        survived[name] = float((~out.success).float().mean()) * float(right.float().mean())
    assert survived["fashion-natural"] < 0.1
    assert survived["fashion-pgd"] > 0.6
