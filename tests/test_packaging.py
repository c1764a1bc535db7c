"""What an installation declares: dependencies, pins, licence. A missing requirement would only show on
somebody else's machine.
"""

import ast
import configparser
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
HOUSE = {"oasis_jax", "pallas_kernels"}
TRACKERS = ("tensorboard", "wandb")  # the extras of oasis_jax/training/trackers.py
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "xdist": "pytest-xdist", "markdown_it": "markdown-it-py"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def installed_version(name: str) -> str | None:
    """None: only `make docs` installs it, and has not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(lines: str) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines.split("\n") if line.strip()]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def imports_of(paths: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Distribution of every third-party module that the files import, anywhere in them, and a file that does."""
    found = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - HOUSE:
                tests = ROOT / "tests"
                if top.startswith("_") or (
                    path.is_relative_to(tests)
                    and any(near.exists() for near in (path.with_name(f"{top}.py"), tests / top, tests / f"{top}.py"))
                ):
                    continue  # a neighbour of a script or of a test
                found[canonicalize_name(DISTRIBUTIONS.get(top, top))] = path.relative_to(ROOT)
    return found


def software() -> list[pathlib.Path]:
    folders = [ROOT / "oasis_jax", ROOT / "pallas_kernels", ROOT / "configs", ROOT / "benchmarks"]
    return [path for folder in folders for path in folder.rglob("*.py")] + [
        p for p in (ROOT / "train.py", ROOT / "eval.py") if p.exists()
    ]


def test_every_import_is_declared(setup):
    declared = requirements(setup["options"]["install_requires"])
    extras = setup["options.extras_require"]
    optional = requirements("\n".join(extras[name] for name in (*TRACKERS, "lm-eval", "gcs")))
    peers = {"transformer-engine", "huggingface-hub"}  # used where they are installed
    known = declared.keys() | optional.keys() | peers
    benchmarks = [path for path in software() if path.is_relative_to(ROOT / "benchmarks")]
    others = [path for path in software() if path not in benchmarks]
    for paths, allowed in ((others, known), (benchmarks, known | requirements(extras["parity"]).keys())):
        assert not {name: str(path) for name, path in imports_of(paths).items() if name not in allowed}


def test_extras_are_imported_only_inside_functions(setup):
    optional = requirements("\n".join(setup["options.extras_require"][name] for name in (*TRACKERS, "gcs")))
    for path in software():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body = [ast.Pass()]
        top = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        top += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        assert not {canonicalize_name(name.partition(".")[0]) for name in top} & optional.keys(), path


def test_every_import_of_the_tests_is_declared(setup):
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"], extras["test"], extras["parity"], extras["lm-eval"], extras["wandb"]]
    declared = requirements("\n".join(lines))
    brought_by_pytest = {"packaging"}
    used = imports_of((ROOT / "tests").rglob("*.py"))
    missing = {name: str(path) for name, path in used.items() if name not in declared.keys() | brought_by_pytest}
    assert not missing


def test_extras_are_asked_for_by_names_that_pip_finds(setup):
    """Older pips do not find an extra whose name has an underscore, and go on with a warning."""
    extras = set(setup["options.extras_require"])
    assert not [name for name in extras if name != canonicalize_name(name)]
    texts = [ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "oasis_jax").rglob("*.py")]
    asked = {
        name.strip()
        for path in texts
        for names in re.findall(r"(?:oasis_jax|\"\.)\[([a-z0-9_, -]+)\]", path.read_text())
        for name in names.split(",")
    }
    assert {"test", "docs", "lm-eval", "gcs", "cuda13"} <= asked <= extras


def test_nothing_is_declared_that_is_not_used(setup):
    used = imports_of(software())
    assert not requirements(setup["options"]["install_requires"]).keys() - used.keys()
    for name in TRACKERS:
        assert not requirements(setup["options.extras_require"][name]).keys() - used.keys()


def test_every_requirement_is_pinned_for_this_python(setup):
    """The whole closure of what `make test`, `make lint` and `make docs` install, and nothing that asks for more than
    the pin.
    """
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                assert canonicalize_name(requirement.name) not in pins, line
                pins[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"], *(extras[name] for name in ("test", "lint", "docs", *TRACKERS))]
    open_ = list(requirements("\n".join(lines)).values())
    seen = set()
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against the pin {pins[name]}"
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        if installed_version(name) != pins[name]:
            continue  # another version's requirements say nothing about the pinned one's
        for child in map(Requirement, importlib.metadata.requires(name) or []):
            if child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                open_.append(child)


def test_pyproject_leaves_metadata_to_setup_cfg():
    """With a [project] table setup.cfg's dependencies would be dropped without a word."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "project" not in pyproject
    assert pyproject["build-system"]["build-backend"] == "setuptools.build_meta"


def test_licence_and_python_versions(setup):
    metadata, options = setup["metadata"], setup["options"]
    assert metadata["license_expression"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in licence
        and "Version 2.0, January 2004" in licence
        and "END OF TERMS AND CONDITIONS" in licence
    )
    assert options["python_requires"] == ">=3.11,<3.14"


def test_kernels_stand_alone():
    """pallas_kernels is usable without the model: it imports neither oasis_jax nor Flax."""
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        text = path.read_text()
        modules = [a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names]
        modules += [n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module]
        assert not {m.partition(".")[0] for m in modules} & {"oasis_jax", "flax"}, path


def test_an_installation_imports_from_anywhere(setup, tmp_path):
    code = "from importlib.metadata import version; print(version('oasis_jax')); import pallas_kernels, oasis_jax"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )
    if "PackageNotFoundError" in done.stderr:
        pytest.skip("oasis_jax is not installed in this environment")
    assert (done.returncode, done.stdout.strip()) == (0, setup["metadata"]["version"]), done.stderr


def test_packages_are_found_with_all_their_folders(setup):
    """A folder without __init__.py would be left out of a wheel while tests from the clone still pass."""
    assert setup["options"]["packages"] == "find:"
    for package in HOUSE:
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path
