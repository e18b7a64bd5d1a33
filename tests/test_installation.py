"""README.md's table of versions says what the constraints hold; its lowest Python takes them."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from paths import ROOT

CONSTRAINTS = sorted(path.name for path in ROOT.glob("constraints*.txt"))


def lines_of(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.partition("#")[0].strip() for line in lines]


def pins(name):
    """{package: version} of a file of constraints."""
    return dict(line.lower().split("==") for line in lines_of(name) if line)


def requirements(name):
    return [Requirement(line) for line in lines_of(name) if line and not line.startswith("-")]


def table():
    """{first cell: (supported, tested)} of README.md's table of versions."""
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = card.partition("| | supported | tested |")[2].partition("\n\n")[0]
    return dict(
        (name, (supported, tested))
        for name, supported, tested in re.findall(r"\| (.+?) \| (.+?) \| (.+?) \|", rows)
    )


def lowest_python():
    return re.match(r"(3\.\d+)\+", table()["Python"][0])[1]


def test_the_lowest_python_is_one_and_the_same_everywhere():
    lowest = lowest_python()
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == f"py{lowest.replace('.', '')}"
    assert f"--python-version {lowest} " in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_lowest_python_takes_every_version_that_is_pinned(name):
    """Of the packages that are installed here in that version; `.ci/run` asks pip for all."""
    for package, version in pins(name).items():
        try:
            installed = distribution(package)
        except PackageNotFoundError:
            continue
        if installed.version.partition("+")[0] == version:
            python = installed.metadata["Requires-Python"]
            assert SpecifierSet(python or "").contains(lowest_python()), f"{package} {version}"


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_pinned_versions_are_supported(name):
    pinned = pins(name)
    for requirement in requirements("requirements.txt"):
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("requirements.txt", "constraints.txt"),
        ("requirements-dev.txt", "constraints.txt"),
        ("requirements-eval.txt", "constraints-eval.txt"),
        ("requirements-demo.txt", "constraints-demo.txt"),
    ],
)
def test_every_requirement_has_a_tested_version(wanted, name):
    assert {one.name for one in requirements(wanted)} <= pins(name).keys()


def test_the_tables_versions_are_those_of_the_constraints():
    newest, oldest, gpu, evaluation = (
        pins(f"constraints{name}.txt") for name in ("", "-oldest", "-gpu", "-eval")
    )

    def short(version):
        return version.rpartition(".")[0]

    rows = table()
    on_gpu = f"{newest['torch']} on a CPU; {short(gpu['torch'])} on an H100"
    assert rows["torch with torchvision"][1] == on_gpu
    assert rows["transformers"][1] == f"{oldest['transformers']}, {newest['transformers']}"
    assert gpu["transformers"] in rows["transformers"][1]
    assert rows["PyAV"][1] == f"{short(evaluation['av'])}, {short(newest['av'])}"
    (triton,) = (tested for name, (_, tested) in rows.items() if name.startswith("Triton"))
    assert triton == f"{short(gpu['triton'])} on an H100"
    bounds = {one.name: str(one.specifier) for one in requirements("requirements.txt")}
    for row, package in (("torch with torchvision", "torch"), ("PyAV", "av")):
        assert rows[row][0] == f"{bounds[package].removeprefix('>=')}+"
