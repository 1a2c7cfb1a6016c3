"""Transforms: a function of arrays over a batch, and over the devices.

    from ember_accel import compose, pmap, sharded, vmap

    scores = vmap(score, in_axes=(None, 0))(router, embeddings)
    scores = pmap(score, in_axes=(None, 0))(router, embeddings)      # on all devices
    fit = sharded(step, jax.make_mesh((8,), ("rows",)), (P(), P("rows")))

JAX is imported at the first call of what they return, not before: modules may have them at the top.
"""

# What JAX holds has no type: pyright would have each of these values declared as Any.
# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownParameterType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ember import SetupError

Function = Callable[..., Any]


def compose(*transforms: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A transform: `compose(a, b)(fn)` is `a(b(fn))`, and `compose()(fn)` is `fn`.

    >>> compose(sorted, set)("abba")
    ['a', 'b']
    """
    return lambda fn: functools.reduce(lambda made, each: each(made), reversed(transforms), fn)


def _late(fn: Function, build: Callable[[Any], Function]) -> Function:
    """A function that is built with JAX at its first call."""

    @functools.cache
    def built() -> Function:
        try:
            import jax
        except ImportError as error:
            raise SetupError(f"{fn!r:.60} needs JAX: pip install 'ember-llm[accel]'") from error
        return build(jax)

    @functools.wraps(fn)
    def call(*args: Any, **given: Any) -> Any:
        return built()(*args, **given)

    return call


def vmap(fn: Function, **options: Any) -> Function:
    """The function over the leading axis of its arguments: `jax.vmap`, imported when called.

    Options are those of `jax.vmap`: `in_axes=(None, 0)` gives each row the same first argument.
    For a state they may be one that holds axes, `Router(0, None)`, which has the same statics.
    """
    return _late(fn, lambda jax: jax.vmap(fn, **options))


def _spread(jax: Any, prefix: Any, tree: Any) -> list[Any]:
    """What a prefix of a tree says of each of the tree's leaves."""
    found: list[Any] = []
    jax.tree.map(
        lambda one, part: found.extend([one] * len(jax.tree.leaves(part))),
        prefix, tree, is_leaf=lambda one: one is None,
    )  # fmt: skip
    return found


def _placed(jax: Any, mesh: Any, leaf: Any, spec: Any) -> tuple[Any, Any, Any]:
    """A leaf on the mesh, padded to sizes that divide evenly; its own sizes; and its sharding."""
    shape = np.shape(leaf)
    axes = [*(spec or ()), *(None for _ in shape)][: len(shape)]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # checks them
    names = [[axis] if isinstance(axis, str) else axis or () for axis in axes]
    counts = [math.prod(map(mesh.shape.get, each)) for each in names]
    widths = [(0, -size % count) for size, count in zip(shape, counts, strict=True)]
    if any(map(any, widths)):
        leaf = (jax.numpy if isinstance(leaf, jax.Array) else np).pad(leaf, widths, "edge")
    return jax.device_put(leaf, sharding), shape, sharding


def sharded(fn: Function, mesh: Any, spec: Any) -> Function:
    """The function, compiled for a mesh: its arguments lie on the mesh as `spec` says.

    fn: any function of arrays, also one that reduces over the batch: what it computes is what it
    computes on one device. mesh: a `jax.sharding.Mesh`, of Auto or Explicit axes; inside and in
    the results they are Auto. spec: a `PartitionSpec`, or None for what each device has whole;
    for all arguments, or a tuple of one for each argument or a part of it. A leaf with fewer axes
    than its spec, such as a scalar, is split by those that it has.

    Sizes need not divide evenly: a leaf is padded to be placed and cut to its size in the compiled
    program, before `fn` sees it, and XLA masks what each device has. So there is no mask to pass;
    each size is compiled once, and results whose sizes do not divide are whole on each device.
    """

    def build(jax: Any) -> Function:
        auto = (jax.sharding.AxisType.Auto,) * mesh.devices.ndim
        ours = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=auto)

        @functools.partial(jax.jit, static_argnums=(0, 1, 2))
        def run(form: Any, shapes: Any, shardings: Any, leaves: Any) -> Any:
            cut = [leaf[tuple(map(slice, one))] for leaf, one in zip(leaves, shapes, strict=True)]
            laid = jax.lax.with_sharding_constraint(cut, [*shardings])
            return fn(*jax.tree.unflatten(form, laid))

        def call(*args: Any) -> Any:
            leaves, form = jax.tree.flatten(args)
            pairs = zip(leaves, _spread(jax, spec, args), strict=True)
            leaves, *how = zip(*(_placed(jax, ours, *pair) for pair in pairs), strict=True)
            alone = jax.sharding.get_abstract_mesh().empty  # no `jax.set_mesh` of the caller
            with contextlib.nullcontext() if alone else jax.set_mesh(ours):
                return run(form, *how, leaves)

        return call

    return _late(fn, build)


def pmap(fn: Function, *, in_axes: Any = 0, devices: Any = (), axis_name: Any = None) -> Function:
    """The function over the leading axis of its arguments, which the devices share.

    fn: a function of one row; results are those of `vmap`. in_axes: 0, or None for what is the
    same for all rows, for all arguments or as a tuple. devices: all. Any number of rows: where
    they do not divide evenly the last is repeated, and what comes of it is cut off. Each device
    runs the same program on its rows, by `jax.shard_map`. With `axis_name`, fn may use collectives
    over all rows, as `jax.lax.pmean(x, axis_name)`; XLA then decides what runs where.
    """

    def build(jax: Any) -> Function:
        mesh = jax.sharding.Mesh(np.array(list(devices) or jax.devices()), ("rows",))
        rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
        if any(jax.tree.leaves(in_axes)):
            raise ValueError(f"pmap: in_axes={in_axes!r}, where each is to be 0 or None")
        spec = jax.tree.map(lambda _: rows, in_axes)
        each = jax.vmap(fn, in_axes=in_axes, axis_name=axis_name)
        settings = {"mesh": mesh, "out_specs": rows, "check_vma": False}  # fn may scan
        if axis_name:
            return sharded(each, mesh, spec)

        def spmd(*args: Any) -> Any:
            size = jax.tree.leaves(jax.eval_shape(each, *args))[0].shape[0]  # or vmap's error
            even = np.minimum(np.arange(size + -size % mesh.size), size - 1)
            leaves, form = jax.tree.flatten(args)
            specs = _spread(jax, spec, args)
            full = [leaf[even] if one else leaf for leaf, one in zip(leaves, specs, strict=True)]
            shard = functools.partial(jax.shard_map, in_specs=tuple(one or whole for one in specs))
            run = shard(lambda *parts: each(*jax.tree.unflatten(form, parts)), **settings)
            return jax.tree.map(lambda one: one[:size], run(*full))

        return sharded(spmd, mesh, spec)

    return _late(fn, build)
