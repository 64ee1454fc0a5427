"""Only what pyproject.toml cannot say: cffi's keyword for the C kernels, and that they keep to the limited API, so that
one wheel serves every Python from 3.11 on. All else is there."""

from setuptools import setup

setup(cffi_modules=["kernels_c/build.py:ffibuilder"], options={"bdist_wheel": {"py_limited_api": "cp311"}})
