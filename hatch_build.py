"""An editable install gets the start-up hook too; the package and `tasks/` are read from the checkout."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableStartup(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        build_data["force_include_editable"] = {
            f"startup/{name}": name for name in ("lminf_eval_autoload.pth", "lminf_eval_autoload.py")
        }
