import glob

from setuptools import Extension, setup

# Without a C compiler torch's own kernels take its place.
kernels = Extension(
    'mmdet_ema.core.native._kernels',
    sorted(glob.glob('mmdet_ema/core/native/*.c')),
    extra_compile_args=[
        '-std=gnu11',
        '-O3',
        '-fno-math-errno',
        '-ffp-contract=off',
    ],
    optional=True,
)

setup(ext_modules=[kernels])
