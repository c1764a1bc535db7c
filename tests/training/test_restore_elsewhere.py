"""A checkpoint restored onto another mesh, another number of devices and another number of processes: bit for
bit, and no example twice or lost.
"""

import json
import pathlib
import socket
import subprocess
import sys

import pytest
from programs import on_devices

HERE = pathlib.Path(__file__).parent
# Processes, devices of each, mesh.
SAVED = (2, 4, dict(fsdp=4, tensor=2))
ELSEWHERE = [
    (1, 8, dict(data=2, fsdp=2, tensor=2)),
    (1, 1, dict()),
    (4, 1, dict(fsdp=2, tensor=2)),
]


def run(folder: str | pathlib.Path, action: str, processes: int, devices: int, mesh: dict) -> list[dict]:
    """What restore_elsewhere.py prints in each of its processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = on_devices(devices)
    command = [
        sys.executable,
        "-W",
        "error",
        HERE / "restore_elsewhere.py",
        folder,
        action,
        json.dumps(mesh),
        coordinator,
        str(processes),
    ]
    options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen([*command, str(index)], **options) for index in range(processes)]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(errors for _, errors in said)
    return [json.loads(text.splitlines()[-1]) for text, _ in said]


def whole_batch(reports: list[dict]) -> list:
    """The examples of one global batch, from the parts that processes read: part p has p, p + P, ..."""
    parts = {report["part"]: report["rows"] for report in reports}
    assert sorted(parts) == list(range(reports[0]["parts"]))
    return [row for rows in zip(*(parts[part] for part in sorted(parts))) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "gs"])
def test_a_checkpoint_goes_anywhere(tmp_path, where, request):
    folder = tmp_path if where == "here" else f"{request.getfixturevalue('gs')}/elsewhere"
    next_batch = whole_batch(run(folder, "save", *SAVED))
    assert len(next_batch) == 16
    assert len({str(row) for row in next_batch}) == 16
    for devices in ELSEWHERE:
        reports = run(folder, "restore", *devices)
        assert all(report["compared"] > 40 for report in reports)
        assert whole_batch(reports) == next_batch
