"""The compiled extension; everything else about the package is in pyproject.toml."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildInParallel(build_ext):
    """Compiles the files of the extension on all CPUs: setuptools itself goes from one to the next."""

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources, **options):
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as several:
                return list(chain(*several.map(lambda source: compile_in_turn([source], **options), sources)))

        self.compiler.compile = compile_at_once
        super().build_extensions()


setup(cffi_modules=["csrc/build.py:ffibuilder"], cmdclass={"build_ext": BuildInParallel})
