"""Leaf names: the '/'-joined path of every leaf of a pytree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from lsg_jax.errors import CheckpointError


def _key_name(key: Any) -> str:
    """The path component of one jax tree key: a dict key, a field name or a position."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown tree key {key!r}")


def check_name(name: str) -> None:
    """Refuses leaf names that are ambiguous on disk, where '.' joins the components.

    Raises:
        CheckpointError: an empty component, or one with a '.' or a '/'.
    """
    if not name or any(not part or "." in part for part in name.split("/")):
        raise CheckpointError(f"leaf name {name!r}: every part must be non-empty and without '.'")


def stored_name(name: str) -> str:
    """The name on disk of a leaf of a training state.

    What is trained is called `trained` in the program and `gates` in the steps of a run, in the state itself and within the
    optimiser's. The names on disk are a format: versions since 0.1 read each other's runs.
    """
    return "/".join("gates" if part == "trained" else part for part in name.split("/"))


def loaded_name(name: str) -> str:
    """The inverse of `stored_name`."""
    return "/".join("trained" if part == "gates" else part for part in name.split("/"))


def flatten(tree: Any) -> dict[str, Any]:
    """Leaf name -> leaf, in tree order. Nodes without leaves (an optax `EmptyState`) are dropped.

    Raises:
        CheckpointError: two leaves with one name, or a name that cannot be stored.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_key_name(key) for key in path]
        name = "/".join(parts)
        check_name(name)
        if any("/" in part for part in parts) or name in leaves:
            raise CheckpointError(f"leaf name {name!r} is ambiguous: a key contains '/' or two leaves share it")
        leaves[name] = leaf
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaf name -> leaf as a nested dict; the inverse of `flatten` for nested dicts.

    Raises:
        CheckpointError: one name is a prefix of another.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"leaf {name}: {parent} is a leaf as well")
        if last in node:
            raise CheckpointError(f"leaf {name} is also a branch")
        node[last] = leaf
    return tree


def differences(stored: Mapping[str, tuple[Any, str]], wanted: Mapping[str, tuple[Any, str]], limit: int = 8) -> str:
    """The differences between two maps of leaf name -> (shape, dtype name), as one line; empty if there are none."""
    found = [f"{name} is missing" for name in wanted if name not in stored]
    found += [f"{name} is not expected" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        (shape, dtype), (want_shape, want_dtype) = stored[name], wanted[name]
        if tuple(shape) != tuple(want_shape):
            found.append(f"{name} has shape {tuple(shape)}, expected {tuple(want_shape)}")
        if dtype != want_dtype:
            found.append(f"{name} has dtype {dtype}, expected {want_dtype}")
    found.sort()
    more = f"; and {len(found) - limit} more" if len(found) > limit else ""
    return "; ".join(found[:limit]) + more
