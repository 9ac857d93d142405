"""Packages and their data; everything else about the distribution is in pyproject.toml.

``patches/`` of the checkout is the package ``megatron_moetion_patches``. Automatic discovery only
finds packages whose directory bears their name, so the mapping is spelled out here.
"""

from setuptools import find_packages, setup

PATCHES = "megatron_moetion_patches"

setup(
    packages=[
        *find_packages(include=["megatron_moetion", "megatron_moetion.*"]),
        PATCHES,
        *(f"{PATCHES}.{name}" for name in find_packages("patches")),
    ],
    package_dir={PATCHES: "patches"},
    package_data={PATCHES: ["moetion.sh", "README.md", "startup/*.py"]},
    include_package_data=False,
)
