"""Several hosts: each runs this program, has its own devices and its own part of every batch. Here they are processes.

python -m examples.multi_host               # two processes with two CPU devices each; minutes on two cores

On a real cluster every host runs ``main_of_one`` with what ``jax.distributed.initialize()`` finds out by itself.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fantastic4 as f4
from fantastic4 import network, transforms

DEVICES = 2  # of each process
BATCH = 32  # of each process
MAXIMUM = 1.5


def main_of_one(steps: int) -> float:
    """What every host runs: data parallel, with the kernels' output channels sharded over all devices of all hosts."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    tx = optax.chain(
        transforms.add_spectral_penalty(0.01),
        optax.adam(3e-3),
        transforms.project_spectral_norm(MAXIMUM, every=10),  # sound bounds communicate: not at every step
    )

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        he = jax.nn.initializers.he_normal()
        return {"conv": {"kernel": he(keys[0], (3, 3, 8, 32))}, "head": {"kernel": he(keys[1], (32, 16))}}

    # Each device makes its own part of the params, and the state of the bounds is laid out as they are.
    placed = jax.tree.map(
        lambda p: NamedSharding(mesh, P(*(None,) * (p.ndim - 1), "all")), jax.eval_shape(init, jax.random.key(0))
    )
    params = jax.jit(init, out_shardings=placed)(jax.random.key(0))
    opt_state = jax.jit(tx.init)(params)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        logits = jax.nn.relu(x).mean((1, 2)) @ params["head"]["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> Any:
        gradients = jax.grad(loss_fn)(params, x, y)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return jax.lax.with_sharding_constraint(optax.apply_updates(params, updates), placed), opt_state

    rng = np.random.default_rng(jax.process_index())  # every host reads its own data
    for _ in range(steps):
        x = rng.standard_normal((BATCH, 8, 8, 8)).astype(np.float32)
        y = rng.integers(0, 16, BATCH).astype(np.int32)
        x, y = (jax.make_array_from_process_local_data(NamedSharding(mesh, P("all")), part) for part in (x, y))
        params, opt_state = step(params, opt_state, x, y)

    # A sound bound of every layer: computed together, so every host must call it; every host gets the numbers.
    layers = network.find(params)
    everywhere = NamedSharding(mesh, P())
    bounds = jax.jit(lambda p: network.bounds(p, layers), out_shardings=everywhere)(params)
    # norm_interval works on the host: bring the kernel there first. Its mesh is of this host's own devices.
    kernel = multihost_utils.process_allgather(params["conv"]["kernel"], tiled=True)
    mine = jax.sharding.Mesh(np.array(jax.local_devices()), ("mine",))
    interval = f4.norm_interval(kernel, rtol=1e-2, mesh=mine)
    upper = float(bounds["conv/kernel"])
    print(
        f"host {jax.process_index()} of {jax.process_count()}: {jax.device_count()} devices, conv bound {upper:.5f}, "
        f"norm in [{interval.lower:.5f}, {interval.upper:.5f}]",
        flush=True,
    )
    assert interval.lower <= upper <= MAXIMUM
    return upper


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="train steps (default %(default)s)")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        jax.config.update("jax_num_cpu_devices", DEVICES)
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
        main_of_one(options.steps)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "examples.multi_host", *sys.argv[1:], "--coordinator", address, "--process"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    hosts = [subprocess.Popen([*command, str(i)], env=environment) for i in range(options.processes)]
    codes = [host.wait() for host in hosts]
    if any(codes):
        sys.exit("a host failed")


if __name__ == "__main__":
    main()
