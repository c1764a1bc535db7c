"""Types of the public API, as part of `make lint`: every name of docs/api.md has a complete type, and typical uses of
it are what a type checker takes them for. Needs basedpyright, which brings its own Node.

    python -P tests/check_types.py

-P: tests/pallas_kernels beside this file is not the package.
"""

import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("oasis_jax", "pallas_kernels")
# What is incomplete elsewhere.
EXTERNAL = {"oasis_jax.placement.make_mesh": "jax.Device has no type in jax's own files"}


def public_names() -> set[str]:
    """The full names of what docs/api.md documents, where it is defined: of classes and functions their own module."""
    found = set()
    blocks = re.findall(r"\.\. automodule:: (\S+)\n   :members:([^\n]*)", (ROOT / "docs" / "api.md").read_text())
    for module_name, members in blocks:
        module = importlib.import_module(module_name)
        for name in [x.strip() for x in members.split(",")] if members.strip() else module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found.add(f"{thing.__module__}.{thing.__qualname__}")
            elif not inspect.ismodule(thing):
                found.add(f"{module_name}.{name}")
    return found


def basedpyright(*arguments: str) -> dict:
    """What it says as JSON, with the packages of this interpreter."""
    programs = pathlib.Path(sys.executable).parent
    paths = dict(PATH=os.pathsep.join([str(programs), os.environ["PATH"]]), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "basedpyright", *arguments, "--outputjson"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | paths)
    try:
        return json.loads(said.stdout)
    except ValueError:
        raise SystemExit(f"{' '.join(command)}: {said.stdout or said.stderr}") from None


def incomplete(names: set[str]) -> list[str]:
    """The public names, and attributes and methods of theirs, whose types are not known in full, with the reason."""
    found, seen = [], set()
    for package in PACKAGES:
        for symbol in basedpyright("--verifytypes", package, "--ignoreexternal")["typeCompleteness"]["symbols"]:
            name = symbol["name"]
            owners = {x for x in names if name == x or name.startswith(f"{x}.")}
            seen |= owners
            if owners - EXTERNAL.keys() and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]):
                reasons = [" ".join(x["message"].split()) for x in symbol["diagnostics"]]
                found.append(f"{name}: {'; '.join(x for x in reasons if 'docstring' not in x) or 'by its parts'}")
    return found + [f"{name}: not found, or not public" for name in sorted(names - seen)]


def main() -> None:
    names = public_names()
    wrong = incomplete(names)
    for item in (uses := basedpyright())["generalDiagnostics"]:
        wrong.append(f"{item['file']}:{item['range']['start']['line'] + 1}: {' '.join(item['message'].split())}")
    if not uses["summary"]["filesAnalyzed"]:
        wrong.append("tests/typed_uses.py: not read")
    print("\n".join([*wrong, f"types: {len(names)} public names, {len(wrong)} mistakes"]))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
