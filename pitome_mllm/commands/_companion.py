"""Import the packages that live in the folders eval/ and demo/, whether or not they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..errors import missing_package

CHECKOUT = Path(__file__).resolve().parents[2]


def companion(name: str, module: str = "") -> ModuleType:
    """The package ``pitome_mllm_<name>``, or one of its modules.

    Installed it is an ordinary package; in a checkout where nothing is installed, the folder ``<name>/`` beside
    ``pitome_mllm`` is loaded under that name.
    """
    package = f"pitome_mllm_{name}"
    try:
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            _load_folder(package, CHECKOUT / name)
        return importlib.import_module(f"{package}.{module}" if module else package)
    except ModuleNotFoundError as error:
        need = f"{package}{'.' + module if module else ''} needs {error.name!r}, which is not installed"
        raise missing_package(need, name) from error


def _load_folder(package: str, folder: Path) -> None:
    """Register the checkout's folder as a top-level package."""
    init = folder / "__init__.py"
    if not init.is_file():
        raise ModuleNotFoundError(f"no module named {package!r}, and no folder {folder}", name=package)
    spec = importlib.util.spec_from_file_location(package, init, submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    spec.loader.exec_module(module)
