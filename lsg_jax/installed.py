"""Checks that an installed package is one that this version works with."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from lsg_jax.errors import LsgError


def check_installed(package: str) -> None:
    """Raises LsgError unless the installed version of a package lies in the range that lsg_jax states for it.

    An older transformers may fail far from the cause, or read a model's configuration otherwise.
    """
    from packaging.requirements import Requirement

    try:
        stated = [Requirement(text) for text in requires("lsg_jax") or ()]
    except PackageNotFoundError:  # run from a source folder: no range is stated
        return
    needed = next(requirement for requirement in stated if requirement.name == package and requirement.marker is None)
    try:
        found = version(package)
    except PackageNotFoundError:
        raise LsgError(f"{package} is not installed; run: pip install '{needed}'") from None
    if not needed.specifier.contains(found, prereleases=True):
        raise LsgError(f"{package} {found} is installed, but lsg_jax needs {needed.specifier}; run: pip install '{needed}'")


def transformers() -> Any:
    """The package transformers, checked, and imported without its warning that PyTorch is missing: nothing here needs it."""
    check_installed("transformers")
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
