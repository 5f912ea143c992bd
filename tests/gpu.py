"""What tests of kernels run on: a GPU where torch has one, triton's interpreter where not.

The interpreter must be chosen before a kernel is imported, so these tests have processes of their
own: `run` starts a test file as a program, which does its part on `DEVICE`.
"""

import functools
import os
import subprocess
import sys

import numpy as np


@functools.cache
def device() -> str:
    """Torch's name of what kernels run on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(path: str, timeout_s: float = 280) -> str:
    """Run a test file as a program, and return what it prints; fail where it fails."""
    environ = dict(os.environ)
    if device() == "cpu":
        environ["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", path],
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def reachable(array: np.ndarray) -> np.ndarray:
    """Copy an array to memory whose addresses the device can use, keeping its strides' order."""
    if device() == "cpu":
        return array
    import torch

    order = np.argsort([-stride for stride in array.strides], kind="stable")
    dense = np.ascontiguousarray(array.transpose(order))
    pinned = torch.empty(max(1, dense.nbytes), dtype=torch.uint8, pin_memory=True).numpy()
    copied = pinned[: dense.nbytes].view(dense.dtype).reshape(dense.shape)
    copied[...] = dense
    return copied.transpose(np.argsort(order))


def settle() -> None:
    """Wait for all that was launched."""
    if device() != "cpu":
        import torch

        torch.cuda.synchronize()
