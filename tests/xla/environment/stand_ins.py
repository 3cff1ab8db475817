"""Tiny libraries in place of NVIDIA's, so that torch's CUDA wheel loads on a machine that has none of them.

For every NVIDIA library that torch's own are linked to and that is not installed, gcc makes a shared object
of that name which defines just the symbols torch leaves undefined; a call of any returns -1. They lie where
torch looks first (nvidia/<part>/lib beside it); torch's files stay as they are. For tests on the CPU only.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

# By the name torch is linked to: the folder under nvidia/, and which symbols without a version are its own.
LIBRARIES: dict[str, tuple[str, str]] = {
    "libcublas.so.12": ("cublas", ""),
    "libcublasLt.so.12": ("cublas", ""),
    "libcudart.so.12": ("cuda_runtime", ""),
    "libcudnn.so.9": ("cudnn", ""),
    "libcufft.so.11": ("cufft", ""),
    "libcufile.so.0": ("cufile", r"cuFile\w+"),
    "libcupti.so.12": ("cuda_cupti", ""),
    "libcurand.so.10": ("curand", r"curand\w+"),
    "libcusolver.so.11": ("cusolver", ""),
    "libcusparse.so.12": ("cusparse", ""),
    "libcusparseLt.so.0": ("cusparselt", r"cusparseLt\w+"),
    "libnccl.so.2": ("nccl", r"p?nccl[A-Z]\w+"),
    "libnvshmem_host.so.3": ("nvshmem", r"nvshmem\w+"),
}
# Symbol versions that are not called as their library is.
VERSIONS = {"NVSHMEM": "libnvshmem_host.so.3"}

Wanted = dict[str, dict[str, set[str]]]
"""Symbols by library and version ("" for none)."""


def wanted_symbols(folder: Path) -> Wanted:
    """What the shared objects in `folder` expect of NVIDIA's libraries."""
    found: Wanted = defaultdict(lambda: defaultdict(set))
    for library in sorted(folder.glob("*.so")):
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
        ).stdout
        for line in listed.splitlines():
            symbol, _, version = line.split()[-1].partition("@")
            version = version.lstrip("@")
            owner = VERSIONS.get(version, version)
            if owner in LIBRARIES:
                found[owner][version].add(symbol)
            elif not version:
                for name, (_, own) in LIBRARIES.items():
                    if own and re.fullmatch(own, symbol):
                        found[name][""].add(symbol)
    return found


def build(target: Path, symbols: dict[str, set[str]]) -> None:
    """A shared object at `target` that defines these symbols."""
    target.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(set().union(*symbols.values()))
    versions = [f"{v} {{ global: {'; '.join(sorted(one))}; }};" for v, one in symbols.items() if v]
    with tempfile.TemporaryDirectory() as folder:
        code, script = Path(folder, "stand_in.c"), Path(folder, "versions.map")
        code.write_text("".join(f"long {name}(void) {{ return -1; }}\n" for name in names) or "int _none;\n")
        script.write_text("\n".join(versions))
        options = [f"-Wl,-soname,{target.name}", *([f"-Wl,--version-script={script}"] if versions else [])]
        command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", *options, "-o", str(target), str(code)]
        subprocess.run(command, check=True)


def main() -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    wanted = wanted_symbols(packages / "torch" / "lib")
    made = []
    for name, (folder, _) in LIBRARIES.items():
        target = packages / "nvidia" / folder / "lib" / name
        if not target.exists():
            build(target, wanted.get(name, {}))
            made.append(name)
    print(f"stand-ins made: {', '.join(made) or 'none were missing'}")


if __name__ == "__main__":
    main()
