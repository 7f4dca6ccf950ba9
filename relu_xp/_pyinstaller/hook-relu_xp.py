"""What PyInstaller does not see in the imports of a program that uses relu_xp."""

from PyInstaller.utils.hooks import collect_data_files

# The source of CuPy's kernels, which are compiled where there is a GPU.
datas = collect_data_files("relu_xp", includes=["kernels/*.h", "kernels/*.cuh"])

# array_api_compat imports these by computed names.
hiddenimports = [
    f"array_api_compat.{library}.{part}"
    for library in ("numpy", "cupy", "torch", "dask.array")
    for part in ("fft", "linalg")
]
