"""
Eight devices, for all tests of JAX in this process; it reads this when it makes its first array.
"""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Machine code is what takes most of the time of a compilation.
        "--xla_backend_optimization_level=0",
    ]
).strip()
# As many threads as may wait for each other in a collective. XLA makes one for each core, and a
# product that is divided over threads is finished by none once all of them wait.
os.environ.setdefault("NPROC", "32")
