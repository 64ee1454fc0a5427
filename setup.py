"""Only what pyproject.toml cannot say: cffi's keyword for the C kernels. All else is there."""

from setuptools import setup

setup(cffi_modules=["kernels_c/build.py:ffibuilder"])
