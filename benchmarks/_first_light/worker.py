"""Runs one part of first light in this process; benchmarks/first_light.py starts it, with a limit of its own."""

import argparse
import importlib
import importlib.util
import sys
import types


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="of _first_light, with a function run(report, toy, argument)")
    parser.add_argument("argument", help="what of the module's work: a backend, a preset, or nothing")
    parser.add_argument("--part", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    if importlib.util.find_spec("jaxtyping") is None:
        sys.modules["jaxtyping"] = _annotations()

    from _first_light.report import Report  # here: first light's own time starts before JAX is imported

    report = Report(arguments.out, arguments.part, arguments.seconds)
    importlib.import_module(f"_first_light.{arguments.module}").run(report, arguments.toy, arguments.argument)


def _annotations() -> types.ModuleType:
    """What stands in for jaxtyping on a machine without it: the library takes nothing but its annotations."""
    import jax

    class Shaped:
        def __class_getitem__(cls, _):
            return jax.Array

    module = types.ModuleType("jaxtyping")
    module.Array, module.Bool, module.Float, module.Int = jax.Array, Shaped, Shaped, Shaped
    return module


if __name__ == "__main__":
    main()
