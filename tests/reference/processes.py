"""Settings of processes that tests start."""

import os


def xla_flags(devices: int) -> str:
    """Return the XLA flags of the tests for a process with another number of CPU devices.

    Args:
      devices: Number of devices.
    """
    ours = "--xla_force_host_platform_device_count="
    others = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(ours)]
    return " ".join([*others, f"{ours}{devices}"])
