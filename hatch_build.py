"""Build hook: a wheel holds ember.py as a package, so that it can carry a py.typed (PEP 561)."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelHook(BuildHookInterface[Any]):
    """Standard wheels only: an editable install imports the checkout's own ember.py."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Install ember.py as ember/__init__.py, beside py.typed."""
        if self.target_name == "wheel" and version == "standard":
            build_data["force_include"]["ember.py"] = "ember/__init__.py"
            build_data["force_include"]["py.typed"] = "ember/py.typed"
