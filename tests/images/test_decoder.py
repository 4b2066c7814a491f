"""A decoder that crashes, aborts, hangs or is killed costs one image and seconds, never the run."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines.images import decoder, prepare
from pipelines.images.decoder import DecoderProcess
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status
from tests.builders import decoder_faults
from tests.builders.mutations import mutations

SPEC = ImageSpec(height=24, width=32)
LIMITS = DecodeLimits(timeout_s=1.0)


def payload(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((80, 60), number + 1).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PAYLOADS = [payload(number) for number in range(40)]


def provoke(monkeypatch: pytest.MonkeyPatch, faults: Mapping[bytes, str]) -> None:
    """Have decoders that start from now on break over these payloads."""
    monkeypatch.syspath_prepend(decoder_faults.FOLDER)
    for name, value in decoder_faults.variable(faults).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def isolated() -> Iterator[DecoderProcess]:
    with DecoderProcess(SPEC, LIMITS) as process:
        yield process


def worker_pid(process: DecoderProcess) -> int:
    """The worker, once it was forked."""
    for _ in range(500):
        if workers := psutil.Process(process._supervisor.pid).children():
            return workers[0].pid
        time.sleep(0.01)
    raise AssertionError("no worker was forked")


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_a_batch_comes_out_as_it_would_in_process(isolated: DecoderProcess) -> None:
    batch = [*PAYLOADS[:3], b"", b"<html>", PAYLOADS[3][:200], memoryview(PAYLOADS[4])]
    prepared, pixels_nhwc = isolated.prepare_batch(batch)
    assert pixels_nhwc.shape == (7, 24, 32, 3)
    for given, outcome, pixels_hwc in zip(batch, prepared, pixels_nhwc, strict=True):
        expected = prepare.prepare(bytes(given), SPEC)
        assert (outcome.status, outcome.error) == (expected.status, expected.error)
        assert (outcome.width_px, outcome.height_px, outcome.format) == (
            expected.width_px,
            expected.height_px,
            expected.format,
        )
        zeros = np.zeros((24, 32, 3), np.uint8)
        assert np.array_equal(pixels_hwc, zeros if expected.pixels_hwc is None else expected.pixels_hwc)


@pytest.mark.parametrize("size", [0, 1, 39, 40])
def test_batches_of_any_size_follow_one_another(isolated: DecoderProcess, size: int) -> None:
    for _ in range(2):
        prepared, pixels_nhwc = isolated.prepare_batch(PAYLOADS[:size])
        assert [image.status for image in prepared] == [Status.OK] * size
        assert len(pixels_nhwc) == size


def test_results_of_a_larger_batch_do_not_show_in_a_smaller_one(isolated: DecoderProcess) -> None:
    isolated.prepare_batch(PAYLOADS)
    _, pixels_nhwc = isolated.prepare_batch([b"no image", PAYLOADS[7]])
    assert not pixels_nhwc[0].any()
    assert np.array_equal(pixels_nhwc[1], prepare.prepare(PAYLOADS[7], SPEC).pixels_hwc)


def test_a_batch_larger_than_the_shared_memory_goes_through_in_pieces(
    isolated: DecoderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "PAYLOAD_BYTES_AT_ONCE", 3 * len(PAYLOADS[0]))
    prepared, pixels_nhwc = isolated.prepare_batch(PAYLOADS)
    assert {image.status for image in prepared} == {Status.OK}
    for given, pixels_hwc in zip(PAYLOADS, pixels_nhwc, strict=True):
        assert np.array_equal(pixels_hwc, prepare.prepare(given, SPEC).pixels_hwc)


def test_pieces_of_a_batch_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PAYLOAD_BYTES_AT_ONCE", 10)
    assert list(decoder.split_by_bytes([4, 6, 1, 30, 0, 10])) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert list(decoder.split_by_bytes([])) == []


def test_several_culprits_in_one_batch_are_found_and_the_rest_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    culprits = {0: "segv", 7: "abort", 8: "segv", 20: "hang", 39: "abort"}
    provoke(monkeypatch, {PAYLOADS[index]: kind for index, kind in culprits.items()})
    with DecoderProcess(SPEC, LIMITS) as process:
        started = time.monotonic()
        prepared, pixels_nhwc = process.prepare_batch(PAYLOADS)
        assert time.monotonic() - started < LIMITS.timeout_s + 3
        again, _ = process.prepare_batch(PAYLOADS[1:7])
    expected = {"hang": Status.DECODE_TIMEOUT}
    for index, (outcome, pixels_hwc) in enumerate(zip(prepared, pixels_nhwc, strict=True)):
        if index in culprits:
            assert outcome.status is expected.get(culprits[index], Status.DECODER_CRASHED)
            assert not pixels_hwc.any()
        else:
            assert np.array_equal(pixels_hwc, prepare.prepare(PAYLOADS[index], SPEC).pixels_hwc)
    assert prepared[0].error == "the decoder died of SIGSEGV, twice"
    assert prepared[7].error == "the decoder died of SIGABRT, twice"
    assert prepared[20].error == "not decoded after 1 s (timeout_s)"
    assert {image.status for image in again} == {Status.OK}


def test_a_batch_of_culprits_only_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    provoke(monkeypatch, dict.fromkeys(PAYLOADS, "segv"))
    with DecoderProcess(SPEC, LIMITS) as process:
        prepared, _ = process.prepare_batch(PAYLOADS)
    assert {image.status for image in prepared} == {Status.DECODER_CRASHED}


def test_a_worker_killed_from_outside_is_replaced_and_nobody_is_blamed(isolated: DecoderProcess) -> None:
    isolated.prepare_batch(PAYLOADS[:1])
    os.kill(worker_pid(isolated), signal.SIGKILL)
    prepared, _ = isolated.prepare_batch(PAYLOADS)
    assert {image.status for image in prepared} == {Status.OK}


@pytest.mark.parametrize("victim", ["worker", "supervisor"])
def test_a_kill_amid_a_batch_loses_nothing(isolated: DecoderProcess, victim: str) -> None:
    isolated.prepare_batch(PAYLOADS[:1])
    pid = worker_pid(isolated) if victim == "worker" else isolated._supervisor.pid
    kill = threading.Timer(0.05, os.kill, (pid, signal.SIGKILL))
    kill.start()
    prepared, pixels_nhwc = isolated.prepare_batch(PAYLOADS * 20)
    kill.join()
    assert gone(pid)
    assert {image.status for image in prepared} == {Status.OK}
    assert all(row.any() for row in pixels_nhwc)
    assert {image.status for image in isolated.prepare_batch(PAYLOADS)[0]} == {Status.OK}


class Interrupted(Exception):
    pass


def test_an_interrupted_batch_does_not_answer_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    provoke(monkeypatch, {PAYLOADS[0]: "hang"})

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    with DecoderProcess(SPEC, DecodeLimits(timeout_s=30)) as process:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(Interrupted):
            process.prepare_batch(PAYLOADS[:3])
        prepared, pixels_nhwc = process.prepare_batch(PAYLOADS[5:7])
    signal.signal(signal.SIGUSR1, before)
    assert [image.status for image in prepared] == [Status.OK, Status.OK]
    assert np.array_equal(pixels_nhwc[0], prepare.prepare(PAYLOADS[5], SPEC).pixels_hwc)


def test_an_image_beyond_the_memory_limit_fails_alone() -> None:
    buffer = io.BytesIO()
    Image.new("P", (8_000, 6_000)).save(buffer, "PNG", compress_level=1, transparency=0)
    with DecoderProcess(SPEC, DecodeLimits(max_memory_bytes=500_000_000)) as process:
        prepared, _ = process.prepare_batch([PAYLOADS[0], buffer.getvalue(), PAYLOADS[1]])
    assert [image.status for image in prepared] == [Status.OK, Status.DECODE_FAILED, Status.OK]
    assert "MemoryError" in str(prepared[1].error)


def test_closing_ends_the_processes() -> None:
    process = DecoderProcess(SPEC)
    process.prepare_batch(PAYLOADS[:2])
    pids = worker_pid(process), process._supervisor.pid
    process.close()
    assert all(gone(pid) for pid in pids)


def test_the_processes_end_with_the_one_that_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is killed while an image hangs the worker: then after `timeout_s`."""
    provoke(monkeypatch, {b"x": "hang"})
    code = (
        "import sys, threading; from pipelines.images.decoder import *\n"
        "from tests.images.test_decoder import worker_pid\n"
        "d = DecoderProcess(ImageSpec(), DecodeLimits(timeout_s=2))\n"
        "threading.Thread(target=d.prepare_batch, args=([b'x'],)).start()\n"
        "print(worker_pid(d), d._supervisor.pid, flush=True)"
    )
    command = [sys.executable, "-c", code]
    environment = decoder.child_environment()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as caller:
        assert caller.stdout is not None
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        caller.kill()
    assert all(gone(pid) for pid in pids)


def test_a_supervisor_that_cannot_start_is_no_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(decoder.DecoderUnavailable, match="code 1"):
        DecoderProcess(SPEC)


def test_the_child_imports_little() -> None:
    code = (
        "import sys, pipelines.images.decoder_worker as w; w.prepare.register_plugins(); print(*sys.modules)"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pyarrow", "ray", "torch", "fsspec", "pydantic"} & set(modules)


@pytest.mark.parametrize("count", [300])
def test_damaged_files_get_a_status_each_and_kill_nothing(tricky: Path, count: int) -> None:
    whole = [path.read_bytes() for path in sorted(tricky.iterdir()) if path.suffix != ".csv"]
    damaged = list(mutations(whole, count))
    with DecoderProcess(SPEC, DecodeLimits(timeout_s=10)) as process:
        supervisor = process._supervisor.pid
        statuses: Counter[Status] = Counter()
        for start in range(0, count, 64):
            prepared, _ = process.prepare_batch(damaged[start : start + 64])
            statuses.update(image.status for image in prepared)
        assert process._supervisor.pid == supervisor
    assert statuses.total() == count
    assert statuses[Status.DECODER_CRASHED] + statuses[Status.DECODE_TIMEOUT] <= count // 100
    assert statuses[Status.OK] > count // 4
