"""Which files make the package; its metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ stands at the top of the repository, has no __init__.py, and is installed as tiger_fast.kernels:
    # kernels/README.md says why. The mapping serves wheels, and keeps an editable install from putting the whole
    # repository, and with it `kernels`, on sys.path; the link tiger_fast/kernels serves every run from a checkout.
    packages=[*find_packages(include=["tiger_fast", "tiger_fast.*"]), "tiger_fast.kernels"],
    package_dir={"tiger_fast.kernels": "kernels"},
    include_package_data=False,
    package_data={"tiger_fast": ["py.typed", "experts/weights/*.safetensors", "models/weights/*.safetensors"]},
)
