"""Say in one sentence which packages gpu_check.sh lacks here, and how another machine fetches them.

    python scripts/missing_packages.py [MODULE ...]     MODULE: needed besides the usual ones

Uses the standard library only. Exits with 2 if something is missing.
"""

import importlib
import platform
import sys
import warnings

MODULES = [
    "numpy", "yaml", "pydantic", "typer", "rich", "matplotlib.pyplot", "tensorboard.summary.writer",
    "pytest", "hypothesis", "megatron.core.models.gpt",
]  # fmt: skip
PACKAGES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "dateutil": "python-dateutil",
    "google": "protobuf",
    "megatron": "megatron-core",
    "yaml": "pyyaml",
}
"""Packages that have another name than their module."""


def missing(modules: list[str]) -> list[str]:
    """Packages without which these modules cannot be imported."""
    found = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            top = error.name.split(".")[0]
            found[PACKAGES.get(top, top)] = True
    return list(found)


def download(packages: list[str]) -> str:
    """The command that fetches packages, and what they need, for this machine's Python."""
    version, machine = ".".join(platform.python_version_tuple()[:2]), platform.machine()
    pip = (
        f"pip download -c constraints.txt --dest WHEELS --python-version {version} "
        f"--only-binary=:all: --platform manylinux_2_28_{machine} --platform manylinux2014_{machine}"
    )
    commands = []
    if "megatron-core" in packages:
        commands.append(f"{pip} --no-deps megatron-core")  # else torch would come along
    if others := [package for package in packages if package != "megatron-core"]:
        commands.append(f"{pip} {' '.join(others)}")
    return " && ".join(commands)


def main() -> None:
    warnings.simplefilter("ignore")  # megatron-core's, about what nobody needs
    if missing(["torch"]):
        sys.exit("gpu_check: torch cannot be imported here; name a Python that has it: PYTHON=...")
    packages = missing([*MODULES, *sys.argv[1:]])
    if packages:
        print(
            f"gpu_check: missing here: {', '.join(packages)}; fetch them where there is a package "
            f"index with `{download(packages)}` and pass the folder WHEELS to this script",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
