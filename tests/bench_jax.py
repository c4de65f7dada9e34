"""One meta-iteration of the LSTM optimizer in JAX, for `make bench`: the truncated stop-gradient unroll as a lax.scan."""

import json
import os
import sys
import time

THREADS, STEPS, WINDOW = (int(v) for v in sys.argv[1:])
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false" if THREADS == 1 else ""
try:
    import jax
    import jax.numpy as jnp
except ImportError:
    sys.exit(3)

if THREADS == 1 and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def cell(w, b, x, h, c):
    i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ w.T + b, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def log_sign(g, p=10.0):
    size, small = jnp.abs(g), jnp.exp(-p)
    first = jnp.where(size >= small, jnp.log(jnp.maximum(size, 1e-30)) / p, -1.0)
    return jnp.stack([first, jnp.where(size >= small, jnp.sign(g), g * jnp.exp(p))], -1)


def loss_of(theta, w, y):
    return ((jnp.einsum("tij,tj->ti", w, theta) - y) ** 2).sum(-1)


def window(phi, theta, cells, w, y):
    """The mean loss after each of WINDOW steps, and where they lead."""

    def step(carry, _):
        theta, (h1, c1, h2, c2) = carry
        g = jax.lax.stop_gradient(jax.grad(lambda t: loss_of(t, w, y).sum())(theta))
        h1, c1 = cell(phi["w1"], phi["b1"], log_sign(g), h1, c1)
        h2, c2 = cell(phi["w2"], phi["b2"], h1, h2, c2)
        theta = theta + 0.1 * (h2 @ phi["w"].T + phi["b"])[..., 0]
        return (theta, (h1, c1, h2, c2)), loss_of(theta, w, y).mean()

    carry, losses = jax.lax.scan(step, (theta, cells), None, length=WINDOW)
    return losses.mean(), carry


@jax.jit
def iteration(phi, theta, w, y):
    cells = tuple(jnp.zeros((*theta.shape, phi["w"].shape[1])) for _ in range(4))
    found = []
    for _ in range(STEPS // WINDOW):
        grads, (theta, cells) = jax.grad(window, has_aux=True)(phi, theta, cells, w, y)
        found.append(grads)
    return found


def main() -> None:
    """Read the problem, print the first window's gradient and the seconds of several calls."""
    given = json.load(sys.stdin)
    phi = {k: jnp.array(v) for k, v in given["phi"].items()}
    arguments = (phi, *(jnp.array(given[k]) for k in ("theta", "w", "y")))
    first = jax.block_until_ready(iteration(*arguments))[0]
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(iteration(*arguments))
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"gradient": {k: v.tolist() for k, v in first.items()}, "seconds": seconds}))


if __name__ == "__main__":
    main()
