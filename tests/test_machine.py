"""A run says what it ran on."""

import os

from pipelines import machine


def test_versions_are_of_the_libraries_that_are_installed():
    found = machine.package_versions()
    assert {"iab-vision", "torch", "numpy"} <= found.keys() <= set(machine.LIBRARIES)
    assert len(found.keys() & {"onnxruntime", "onnxruntime-gpu"}) == 1


def test_revision_is_that_of_the_code_and_not_of_the_working_directory(tmp_path, monkeypatch):
    expected = machine.git_revision()
    monkeypatch.chdir(tmp_path)
    assert machine.git_revision() == expected


def test_cores_are_those_that_this_process_may_use():
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
