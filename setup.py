"""Which files make the package; its metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ stands at the top of the repository, has no __init__.py, and is installed as tiger_fast.kernels; its
    # README says why. Running from a checkout relies on the link tiger_fast/kernels; with package_dir a wheel does not,
    # so it is right too when built from a checkout that cannot hold links.
    packages=[*find_packages(include=["tiger_fast", "tiger_fast.*"]), "tiger_fast.kernels"],
    package_dir={"tiger_fast.kernels": "kernels"},
    include_package_data=False,
    package_data={"tiger_fast": ["py.typed", "experts/weights/*.safetensors", "models/weights/*.safetensors"]},
)
