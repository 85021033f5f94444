"""Memory that --activations=auto chooses for the hidden states of all windows."""

import jax
import jax.numpy as jnp
import pytest

from launch.flags.common import offload_for
from models.sharding import make_mesh


@pytest.mark.parametrize(
    ("mesh", "channels", "chosen"),
    [
        ("data=2,model=2", 512, "device"),
        ("data=2,model=2", 513, "host"),  # every device of `model` has all channels
        ("data=2,model=1", 512, "host"),
        ("data=4,model=1", 512, "device"),
    ],
)
def test_a_device_holds_its_windows_and_channels(mesh: str, channels: int, chosen: str) -> None:
    x = jax.ShapeDtypeStruct((4, 1024, channels), jnp.float32)
    # A quarter of a device is for hidden states: here for a quarter of all, and a little more.
    available = {"device": 4 * 1024 * 515 * 4, "host": 1 << 40}
    assert offload_for("auto", x, make_mesh(mesh), available) == chosen
