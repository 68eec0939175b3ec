"""Which folder is which package; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

KERNELS = "muxrt.kernels"  # its source is the top-level folder kernels/

setup(
    packages=[
        *find_packages(include=["muxrt", "muxrt.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    package_data={"muxrt": ["py.typed"], "muxrt.server": ["dashboard/**"]},
)
