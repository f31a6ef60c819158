"""What several files of tests share: small checkpoints and programs, made once a session and only read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import zoo

import graphopt
from graphopt import Program


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the Hugging Face folder of a model of the zoo. Copy it before changing it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoints") / name
            zoo.make(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def captured(checkpoint: Callable[[str], Path]) -> Callable[[str], Program]:
    """Return the program of a model of the zoo; passes leave it as it is."""
    made: dict[str, Program] = {}

    def program(name: str) -> Program:
        if name not in made:
            made[name] = graphopt.capture(checkpoint(name))
        return made[name]

    return program


@pytest.fixture(scope="session")
def saved(
    captured: Callable[[str], Program], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the folder of a saved program of a model of the zoo. Copy it before changing it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = captured(name).save(tmp_path_factory.mktemp("programs") / name)
        return made[name]

    return folder


@pytest.fixture
def whole(saved: Callable[[str], Path]) -> Path:
    """Return the folder of a saved program, to be read only."""
    return saved("llama")
